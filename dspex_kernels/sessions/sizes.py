"""How large the service and its store are, told at once: what takes a while is asked now and then."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from dspex_kernels import errors, logs
from dspex_kernels.sessions.store import SessionStore
from dspex_kernels.sessions.tasks import Tasks

MAX_AGE = 10.0
"""Seconds after which the store is asked again."""
PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

_log = logs.get_logger(__name__)


def memory_bytes(pid: int | str = "self") -> int:
    """Resident memory of a process of this machine; 0 where that cannot be known."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_SIZE
    except (OSError, ValueError, IndexError):
        return 0


class StoreSize:
    """The store's size as it was a moment ago.

    Args:
        store: Open, whenever it is read.
        tasks: Where the store is asked.
    """

    def __init__(self, store: SessionStore, tasks: Tasks) -> None:
        self._store = store
        self._tasks = tasks
        self._bytes: int | None = None
        self._asked_at = -MAX_AGE
        self._asking: asyncio.Task[None] | None = None

    def read(self) -> int | None:
        """Bytes; None while that is not known. Has the store asked again if this is old."""
        now = asyncio.get_running_loop().time()
        if self._asking is None and now - self._asked_at >= MAX_AGE:
            self._asked_at = now
            self._asking = self._tasks.spawn(self._ask())
        return self._bytes

    async def _ask(self) -> None:
        try:
            self._bytes = await self._store.size()
        except errors.DSPexError as failure:
            _log.warning("the store does not tell its size: %s", failure)
        finally:
            self._asking = None
