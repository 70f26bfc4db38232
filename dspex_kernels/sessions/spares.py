"""Spare kernels: started, answering, and no session's yet, so that a session has one in the time of a call.

Nobody sees them until then: no session is theirs, and their connection files are where Jupyter's clients do not
look for them. None is started before the first session has a kernel; those that are taken are replaced when nobody
has asked for one for a moment, one at a time, as long as the machine has memory to spare. One whose environment,
directory or libraries are not those of a kernel that were started now is not handed out.

There are none where kernels are not forked, for each would have all its memory to itself, and none where they have
no guardian, for nobody would clear away after a crash.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging import Logger, LoggerAdapter
from pathlib import Path
from typing import Any

from dspex_kernels import config, errors, room
from dspex_kernels.sessions.calls import ReplyListener
from dspex_kernels.sessions.kernels import Kernel, Kernels
from dspex_kernels.sessions.tasks import Tasks

QUIET = 0.3
"""Seconds for which nobody has asked for a kernel before one is started ahead: it would take a processor from
theirs."""
START_TIMEOUT = 60.0
"""Seconds for a spare kernel to start."""
ADOPT_TIMEOUT = 5.0
"""Seconds for it to become somebody's, which takes some milliseconds: one that hangs must not cost its owner more.
It may have to wait for two that the kernel before it lets go of the journal."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a kernel becomes.

    Attributes:
        whose: For messages and logs.
        log_path: Where its log belongs.
        link: Where a link to its connection file is kept.
        died: As ``Kernels.start_kernel`` takes it.
        on_reply: As ``KernelConnection`` takes it.
        told: What ``adopt_session`` tells the kernel, but for its connection file's name.
    """

    whose: str
    log_path: Path
    link: Path
    died: Callable[[Kernel, str], None]
    on_reply: ReplyListener
    told: Mapping[str, Any]


class Spares:
    """The spare kernels of a backend.

    Args:
        kernels: Where they are started.
        backend: For which.
        count: How many there are to be; 0 is none.
        env: Variables that they get beside what kernels inherit.
        log: Is told of those that were of no use.
    """

    def __init__(
        self,
        kernels: Kernels,
        backend: str,
        count: int,
        env: Mapping[str, str],
        log: Logger | LoggerAdapter[Any],
    ) -> None:
        self._kernels = kernels
        self._backend = backend
        self._count = count
        self._env = {**env, config.ENV_SPARE: "1"}
        self._log = log
        self._tasks = Tasks(log)
        self._there: deque[Kernel] = deque()
        self._asked_at = 0.0
        self._closed = False
        self._filling: asyncio.Task[None] | None = None

    @property
    def kernels(self) -> list[Kernel]:
        """Those that are there."""
        return list(self._there)

    async def take(self, owner: Owner, *, timeout: float) -> Kernel | None:
        """A kernel that is its owner's now; None where there is none to be had.

        Args:
            owner: Whose.
            timeout: Seconds for it to answer.
        """
        self._asked_at = asyncio.get_running_loop().time()
        kernel = self._next()
        if kernel is None:
            return None
        try:
            await self._hand_over(kernel, owner, min(timeout, ADOPT_TIMEOUT))
        except (errors.DSPexError, OSError) as failure:
            self._log.info("%s: a spare kernel was of no use: %s", owner.whose, failure)
            await self._tasks.finish(self._kernels.take_back(kernel))
            return None
        except BaseException:
            await self._tasks.finish(self._kernels.take_back(kernel))  # before the session may have another
            raise
        if kernel.ending:  # it died just now
            await self._tasks.finish(self._kernels.take_back(kernel))
            return None
        kernel.died = owner.died
        return kernel

    async def _hand_over(self, kernel: Kernel, owner: Owner, timeout: float) -> None:
        """Make a kernel its owner's: it is told, and its files renamed, at the same time."""
        kernel.connection.on_reply = owner.on_reply
        told = {**owner.told, "connection_file": self._kernels.connection_file(kernel.kernel_id)}
        outcomes = await asyncio.gather(
            self._kernels.hand_over(kernel, owner.whose, owner.log_path, owner.link),
            kernel.connection.request("adopt_session", told, timeout=timeout),
            return_exceptions=True,
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    def replenish(self, like: Kernel) -> None:
        """Have spare kernels again, soon. Called when a session has got its kernel.

        Args:
            like: That one. Where it was not forked, a spare one would be as large as it is: there are none.
        """
        is_possible = self._kernels.spares_dir is not None and self._kernels.was_forked(like) and not self._closed
        if is_possible and self._filling is None and len(self._there) < self._count:
            self._filling = self._tasks.spawn(self._fill())

    async def stop(self) -> None:
        """End them, and start none any more."""
        self._closed = True
        if self._filling is not None:
            self._filling.cancel()
        there, self._there = list(self._there), deque()
        await asyncio.gather(*(self._kernels.take_back(kernel) for kernel in there))
        if running := self._tasks.running:
            await asyncio.wait(running)

    def _next(self) -> Kernel | None:
        while self._there:
            kernel = self._there.popleft()
            if kernel.ending:
                continue
            if self._kernels.is_current(kernel, self._env):
                return kernel
            self._tasks.spawn(self._kernels.take_back(kernel))
        return None

    async def _fill(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while len(self._there) < self._count and room.is_there():
                if (left := self._asked_at + QUIET - loop.time()) > 0:
                    await asyncio.sleep(left)
                    continue
                self._there.append(await self._start())
        except errors.KernelError as failure:
            self._log.info("no spare kernel: %s", failure)  # a session that needs its own is told why
        finally:
            self._filling = None

    async def _start(self) -> Kernel:
        assert self._kernels.spares_dir is not None
        return await self._kernels.start_kernel(
            whose="a spare kernel",
            backend=self._backend,
            env=self._env,
            log_path=self._kernels.spares_dir / f"spare-{uuid.uuid4().hex}.log",
            timeout=START_TIMEOUT,
            died=self._died,
            spare=True,
        )

    def _died(self, kernel: Kernel, _: str) -> None:
        if kernel in self._there:
            self._there.remove(kernel)
