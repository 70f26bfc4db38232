"""What of a living session reaches the store: the changes that its kernel journals, and when it was last used."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from logging import Logger, LoggerAdapter
from pathlib import Path
from typing import Any

from dspex_kernels import errors
from dspex_kernels.protocol import journal
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions.live import LiveSession
from dspex_kernels.sessions.store import SessionStore
from dspex_kernels.sessions.tasks import Tasks

TOUCH_INTERVAL = 10.0
"""Seconds between two writes of a session's ``last_activity``: reads need not cost a write each."""


class Keeper:
    """Takes journals and activity into the store.

    Args:
        store: Open.
        tasks: Where writes run that nobody waits for.
        log: Is told what could not be kept: the journal itself is durable, and the next fold takes it up.
    """

    def __init__(self, store: SessionStore, tasks: Tasks, log: Logger | LoggerAdapter[Any]) -> None:
        self._store = store
        self._tasks = tasks
        self._log = log

    async def fold(self, live: LiveSession) -> None:
        """Take the new part of a session's journal into the store. A failure is logged and not raised."""
        path = live.directory / journal.FILE_NAME
        async with live.folding:
            if live.status is SessionStatus.DESTROYED:
                return
            try:
                data = await asyncio.to_thread(_read_if_there, path)
                new = journal.unread(data, live.record.journal_offset)
                if new.changes:
                    await self._store.save_changes(live.session_id, new.changes, new.offset)
                    for change in new.changes:
                        live.apply(change)
                    live.note(journal_offset=new.offset)
            except (errors.DSPexError, OSError):
                self._log.exception("session %s: its journal could not be taken into the store", live.session_id)

    def touch(self, live: LiveSession) -> None:
        """Note that a session is used now; the store is told now and then, and by ``save_activity``."""
        now = asyncio.get_running_loop().time()
        live.last_activity = datetime.now(UTC)
        if now - live.touched >= TOUCH_INTERVAL:
            live.touched = now
            self._tasks.spawn(self.save_activity(live))

    async def save_activity(self, live: LiveSession) -> None:
        """Tell the store when a session was last used. A failure is logged and not raised."""
        if live.status is SessionStatus.DESTROYED:
            return
        try:
            await self._store.touch(live.session_id, live.last_activity)
        except errors.DSPexError as failure:
            self._log.warning("session %s: its last activity could not be kept: %s", live.session_id, failure)


def _read_if_there(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:  # the kernel has changed nothing yet
        return b""
