"""The dedicated backend: one kernel a session, which journals in the session's own directory."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dspex_kernels import config, errors
from dspex_kernels.protocol import journal
from dspex_kernels.protocol.records import SessionContents
from dspex_kernels.sessions.backend import Place, PlaceGone, SessionBackend
from dspex_kernels.sessions.calls import Call
from dspex_kernels.sessions.kernels import SUSPICION_AFTER, Kernel, Kernels
from dspex_kernels.sessions.model import SessionRecord
from dspex_kernels.sessions.spares import Owner, Spares
from dspex_kernels.sessions.tasks import Tasks

LOG_NAME = "kernel.log"
"""A kernel's stdout and stderr, in its session's directory."""
LINK_NAME = "kernel.json"
"""In a session's directory, a link to its kernel's connection file, which tells what to remove after a crash."""


@dataclass(eq=False, slots=True)
class _Home:
    """A session's kernel."""

    session_id: str
    generation: int
    kernel: Kernel | None = None
    """None until it has answered."""


class DedicatedBackend(SessionBackend):
    """One kernel for each session.

    Args:
        kernels: Where they are started.
        allow_code: Whether its owner may run code in it; else it takes commands only.
        lean: Whether it does without what only a notebook needs.
        spares: Kernels that are started ahead once a session had one.
        **kwargs: For traitlets: ``parent``, ``config``, ``log``.
    """

    name = "dedicated"

    def __init__(
        self,
        kernels: Kernels,
        *,
        allow_code: bool = True,
        lean: bool = True,
        spares: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._kernels = kernels
        self._env = {
            config.ENV_BACKEND: self.name,
            config.ENV_ALLOW_CODE: str(int(allow_code)),
            config.ENV_LEAN: str(int(lean)),
        }
        self._spares = Spares(kernels, self.name, spares, self._env, self.log)
        self._tasks = Tasks(self.log)
        self._suspected: set[Kernel] = set()
        self._homes: dict[str, _Home] = {}

    async def start(self) -> None:
        """Nothing is started ahead."""

    async def stop(self) -> None:
        await self._spares.stop()
        closed = errors.ServiceClosed("the session service is closing")
        homes = [home for home in list(self._homes.values()) if home.kernel is not None]
        await asyncio.gather(*(self._end(home, closed) for home in homes))
        running = self._tasks.running
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    async def open(self, record: SessionRecord, *, timeout: float) -> Place:
        if record.directory is None:
            raise errors.KernelStartFailed(f"session {record.session_id!r} has no directory for its journal")
        directory = Path(record.directory)
        home = self._homes[record.session_id] = _Home(record.session_id, record.generation)
        try:
            if record.contents != SessionContents():
                await asyncio.to_thread(_restore_journal, directory, record)
            owner = self._owner(home, record)
            deadline = asyncio.get_running_loop().time() + timeout
            kernel = await self._spares.take(owner, timeout=timeout)
            left = max(round(deadline - asyncio.get_running_loop().time(), 3), 0.001)
            home.kernel = kernel or await self._start(owner, record, left)
        except BaseException:
            self._forget(home)
            raise
        self._spares.replenish(home.kernel)
        return _place(home)

    async def _start(self, owner: Owner, record: SessionRecord, timeout: float) -> Kernel:
        return await self._kernels.start_kernel(
            whose=owner.whose,
            backend=self.name,
            env={
                **self._env,
                config.ENV_SESSION_ID: record.session_id,
                config.ENV_SESSION_DIR: str(record.directory),
                config.ENV_GENERATION: str(record.generation),
            },
            log_path=owner.log_path,
            link=owner.link,
            timeout=timeout,
            died=owner.died,
            on_reply=owner.on_reply,
        )

    def _owner(self, home: _Home, record: SessionRecord) -> Owner:
        directory = Path(str(record.directory))
        return Owner(
            whose=f"session {record.session_id!r}",
            log_path=directory / LOG_NAME,
            link=directory / LINK_NAME,
            died=lambda _, how: self._died(home, how),
            on_reply=lambda content: self._take_reply(home, content),
            told={
                "session_id": record.session_id,
                "directory": str(record.directory),
                "generation": record.generation,
            },
        )

    async def call(self, session_id: str, call: Call) -> dict[str, Any]:
        home = self._homes.get(session_id)
        if home is None or home.kernel is None:
            raise PlaceGone(session_id)
        call.watch.asked(home.kernel.kernel_id)
        try:
            return await home.kernel.connection.request(
                call.command,
                call.args,
                session_id=session_id,
                timeout=call.timeout,
                request_id=call.request_id,
                stream=call.stream,
                on_event=call.on_event,
            )
        except (errors.CommandTimeout, errors.CommandCancelled, errors.CommandInterrupted, asyncio.CancelledError):
            self._suspect(home.kernel)
            raise

    async def close(self, session_id: str) -> None:
        home = self._homes.get(session_id)
        if home is not None and home.kernel is not None:
            await self._end(home, errors.CommandCancelled(f"session {session_id!r} was closed during the call"))

    def withdraw(self, session_id: str, request_id: str) -> bool:
        return False  # nothing waits here: a kernel of its own takes every call at once

    async def interrupt(self, session_id: str) -> None:
        home = self._homes.get(session_id)
        if home is not None and home.kernel is not None:
            await self._kernels.interrupt(home.kernel)

    def get_place(self, session_id: str) -> Place | None:
        home = self._homes.get(session_id)
        return _place(home) if home is not None and home.kernel is not None else None

    def _suspect(self, kernel: Kernel) -> None:
        """Have a kernel looked at in which a call was ended: its program may go on."""
        if kernel not in self._suspected and not kernel.ending:
            self._suspected.add(kernel)
            self._tasks.spawn(self._look_at(kernel))

    async def _look_at(self, kernel: Kernel) -> None:
        """Interrupt a kernel that goes on with what was ended; kill one that still does."""
        try:
            await asyncio.sleep(SUSPICION_AFTER)
            if not await self._kernels.why_sick(kernel):
                return
            await self._kernels.interrupt(kernel)
            await asyncio.sleep(SUSPICION_AFTER)
            why = await self._kernels.why_sick(kernel)
            if why and not kernel.ending:
                self.log.warning("%s: kernel %s is killed: %s", kernel.whose, kernel.kernel_id, why)
                await self._kernels.kill(kernel)
        finally:
            self._suspected.discard(kernel)

    async def _end(self, home: _Home, error: errors.DSPexError) -> None:
        assert home.kernel is not None
        self._forget(home)
        await self._kernels.end(home.kernel, error)

    def _take_reply(self, home: _Home, content: dict[str, Any]) -> None:
        """Called by the connection with every reply. Its owner's code could name another's session in it."""
        if self.replied is not None and content.get("session_id") == home.session_id:
            self.replied(content)

    def _died(self, home: _Home, how: str) -> None:
        place = _place(home)
        self._forget(home)
        if self.lost is not None:
            self.lost(home.session_id, place, f"its kernel {how}")

    def _forget(self, home: _Home) -> None:
        if self._homes.get(home.session_id) is home:
            del self._homes[home.session_id]


def _place(home: _Home) -> Place:
    kernel = home.kernel
    assert kernel is not None
    return Place(kernel.kernel_id, kernel.pid, home.generation, kernel.connection_file)


def _restore_journal(directory: Path, record: SessionRecord) -> None:
    """Write what the store holds where the session's journal is not: it moved here, or its directory was lost.

    Raises:
        StoreError: The disk refuses.
    """
    path = directory / journal.FILE_NAME
    if path.exists():
        return
    now = datetime.now(UTC)
    lines = [journal.encode_header(time.time_ns())]
    changes = journal.snapshot(record.contents)
    lines += [journal.encode(number, now, change) for number, change in enumerate(changes, start=1)]
    temporary = path.with_suffix(".restored")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(temporary, "wb", opener=_private) as file:  # Path.open takes no opener
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as failure:
        raise errors.StoreError(
            f"session {record.session_id!r}: its programs cannot be written to {path}: {failure.strerror}; make "
            "room, or make it writable"
        ) from failure


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
