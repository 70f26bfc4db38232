"""How large the service and its store are, told at once: what takes a while is asked now and then."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from dspex_kernels import errors, logs
from dspex_kernels.sessions.tasks import Tasks

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

_log = logs.get_logger(__name__)


async def read_memory() -> int:
    """Resident memory of this process, read in a thread.

    A file is quick to read; but whoever reads lets other threads have the interpreter, and waits until it comes
    back: 5 ms each time that one of them computes.
    """
    return await asyncio.to_thread(memory_bytes)


def memory_bytes(pid: int | str = "self") -> int:
    """Resident memory of a process of this machine; 0 where that cannot be known."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_SIZE
    except (OSError, ValueError, IndexError):
        return 0


class Size:
    """A size as it was a moment ago: asking takes a while, and is done beside the loop.

    Args:
        ask: Tells the size.
        what: The size's name, for the log.
        tasks: Where it is asked.
        max_age: Seconds after which it is asked again.
        known: What it is now; None is unknown.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[int | None]],
        what: str,
        tasks: Tasks,
        *,
        max_age: float,
        known: int | None = None,
    ) -> None:
        self._ask = ask
        self._what = what
        self._tasks = tasks
        self._max_age = max_age
        self._bytes = known
        self._asked_at = -math.inf
        self._asking: asyncio.Task[None] | None = None

    def read(self) -> int | None:
        """Bytes; None while that is not known. Has it asked again if this is old."""
        now = asyncio.get_running_loop().time()
        if self._asking is None and now - self._asked_at >= self._max_age:
            self._asked_at = now
            self._asking = self._tasks.spawn(self._look())
        return self._bytes

    async def _look(self) -> None:
        try:
            self._bytes = await self._ask()
        except errors.DSPexError as failure:
            _log.warning("%s cannot be told: %s", self._what, failure)
        finally:
            self._asking = None
