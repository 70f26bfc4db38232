"""Work that goes on when whoever began it is cancelled, and that whoever stops can wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from logging import Logger, LoggerAdapter
from typing import Any


class Tasks:
    """Tasks with an owner: the event loop itself would let them be collected.

    Args:
        log: Is told of failures, for those that nobody awaits.
    """

    def __init__(self, log: Logger | LoggerAdapter[Any]) -> None:
        self._log = log
        self._running: set[asyncio.Task[Any]] = set()

    @property
    def running(self) -> set[asyncio.Task[Any]]:
        """Those that have not ended."""
        return set(self._running)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Begin; await the task only shielded, or not at all."""
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def finish(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of work that is done to its end even if its caller is cancelled."""
        return await asyncio.shield(self.spawn(work))

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._log.debug("a task failed", exc_info=task.exception())
