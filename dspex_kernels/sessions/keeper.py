"""What of a living session reaches the store: what changed in it, what it spent, and when it was last used.

A dedicated kernel journals its changes before it replies: they are durable, and the service knows them before the
caller is answered; the store has them within a second, and whoever opens the session next reads the journal first.
A pooled kernel's replies carry the changes, which are in the store before the caller is answered. What was spent is
written within a second, in both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from logging import Logger, LoggerAdapter
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dspex_kernels import errors
from dspex_kernels.protocol import journal
from dspex_kernels.protocol.messages import first_problem
from dspex_kernels.protocol.records import Change, Spent
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions.live import Batch, LiveSession
from dspex_kernels.sessions.store import SessionStore
from dspex_kernels.sessions.tasks import Tasks

TOUCH_INTERVAL = 10.0
"""Seconds between two writes of a session's ``last_activity``: reads need not cost a write each."""
MAX_WRITING = 500
"""Sessions of which something is written at the same time: the store is to have room for changes."""
WRITE_INTERVAL = 0.5
"""Seconds between two writes of what nobody waits for: what sessions spent, what their journals hold already."""

_CHANGES: TypeAdapter[list[Change]] = TypeAdapter(list[Change])


class Keeper:
    """Takes changes, what was spent, and activity into the store.

    Args:
        store: Open, once anything is to be kept.
        tasks: Where writes run that nobody waits for.
        log: Is told what could not be kept.
    """

    refused: Callable[[LiveSession, str], None]
    """Called when a session's changes could not be kept, with one line why: its kernel now holds what the store
    does not. Set by the service; it must not raise."""

    def __init__(self, store: SessionStore, tasks: Tasks, log: Logger | LoggerAdapter[Any]) -> None:
        self._store = store
        self._tasks = tasks
        self._log = log
        self._spent: dict[str, LiveSession] = {}
        """Sessions whose totals the store does not know yet."""
        self._unfolded: dict[str, LiveSession] = {}
        """Sessions whose journals hold what the store does not."""
        self._writing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write what nobody waits for."""
        self._writing = asyncio.create_task(self._write())

    async def stop(self) -> None:
        """Write what is still to be written; nothing is taken after that."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait({self._writing})
        await self._write_once()

    def take(self, live: LiveSession, told: list[dict[str, Any]]) -> None:
        """Take in what a pooled kernel's reply says that changed; ``settle`` tells when it is durable."""
        if live.refused is not None and live.refused[0] == live.record.generation:
            return  # it stands on what was refused
        try:
            changes = _CHANGES.validate_python(told)
        except ValidationError as failure:
            unread = errors.StoreError(
                f"session {live.session_id!r}: its kernel told of a change that cannot be read: "
                f"{first_problem(failure)}"
            )
            self._refuse(live, unread)
            return
        for change in changes:
            # Totals only grow, and come over two channels: the older may be the later to arrive.
            if isinstance(change, Spent) and (live.spent is None or _calls(change) >= _calls(live.spent)):
                live.spent = change
                self._spent[live.session_id] = live
        kept: list[Change] = [change for change in changes if not isinstance(change, Spent)]
        if kept:
            self._queue(live, kept)

    async def settle(self, live: LiveSession, generation: int) -> None:
        """Return when everything that a session has changed so far is durable, and known here.

        Args:
            live: Which.
            generation: The session's when the change was asked for.

        Raises:
            StoreError: A pooled session's change could not be kept; it has not happened. (A journal is durable by
                itself: what cannot be folded now is logged, and folded later.)
        """
        if live.record.directory is not None:
            await self._tasks.finish(self._read_journal(live))
            if live.unfolded:
                self._unfolded[live.session_id] = live
            return
        if live.batches:
            await live.batches[-1].done.wait()
        if live.refused is not None and live.refused[0] == generation:
            raise errors.from_dict(live.refused[1].to_dict())  # each waiter has an exception of its own

    async def drain(self, live: LiveSession) -> None:
        """Wait until nothing of a session is on its way into the store any more; what was refused has been told."""
        while live.batches:
            await live.batches[-1].done.wait()
        await self._save_unfolded(live)
        await self.flush(live)

    async def flush(self, live: LiveSession) -> None:
        """Write what a session spent, now. A failure is logged and not raised."""
        if self._spent.pop(live.session_id, None) is not None:
            await self._save_spent(live)

    async def fold(self, live: LiveSession) -> None:
        """Take the new part of a session's journal into the store. A failure is logged and not raised."""
        await self._read_journal(live)
        await self._save_unfolded(live)

    async def _read_journal(self, live: LiveSession) -> None:
        async with live.reading:
            if live.status is SessionStatus.DESTROYED or live.record.directory is None:
                return
            directory = live.record.directory
            try:
                data = await asyncio.to_thread(_read_if_there, live.directory / journal.FILE_NAME)
                if live.record.directory != directory:
                    return  # it moved meanwhile, with all that was in there
                new = journal.unread(data, live.record.journal_offset)
            except (errors.DSPexError, OSError):
                self._log.exception("session %s: its journal could not be taken into the store", live.session_id)
                return
            if new.changes:
                for change in new.changes:
                    live.apply(change)
                live.note(journal_offset=new.offset)
                live.unfolded += new.changes

    async def _save_unfolded(self, live: LiveSession) -> None:
        """Tell the store what the journal told. What it does not take now is read again with the next."""
        async with live.folding:
            while live.unfolded and live.status is not SessionStatus.DESTROYED:
                unfolded, live.unfolded = live.unfolded, []
                offset = live.record.journal_offset
                try:
                    await self._store.save_changes(live.session_id, unfolded, offset)
                except BaseException as failure:
                    live.unfolded = []  # not kept: a store may be gone for long
                    live.note(journal_offset=live.folded_to)
                    if not isinstance(failure, Exception):
                        raise
                    self._log.exception(
                        "session %s: its journal could not be taken into the store", live.session_id
                    )
                else:
                    live.folded_to = offset

    def touch(self, live: LiveSession) -> None:
        """Note that a session is used now; the store is told now and then, and by ``save_activity``."""
        now = asyncio.get_running_loop().time()
        live.last_activity = datetime.now(UTC)
        if now - live.touched >= TOUCH_INTERVAL:
            live.touched = now
            self._tasks.spawn(self.save_activity(live))

    async def save_activity(self, live: LiveSession) -> None:
        """Tell the store when a session was last used. A failure is logged and not raised."""
        if live.status is SessionStatus.DESTROYED or not live.held:
            return
        try:
            await self._store.touch(live.session_id, live.last_activity)
        except errors.DSPexError as failure:
            self._log.warning("session %s: its last activity could not be kept: %s", live.session_id, failure)

    def forget(self, live: LiveSession) -> None:
        """Write nothing more of a session: it ends."""
        self._spent.pop(live.session_id, None)
        self._unfolded.pop(live.session_id, None)

    def _queue(self, live: LiveSession, changes: list[Change]) -> None:
        if live.batches and not live.batches[-1].writing:
            live.batches[-1].changes += changes
            return
        live.batches.append(Batch(changes))
        if len(live.batches) == 1:
            self._tasks.spawn(self._save(live))

    async def _save(self, live: LiveSession) -> None:
        """Write a session's batches one after another, until there are none."""
        while live.batches:
            batch = live.batches[0]
            batch.writing = True
            try:
                await self._store.save_changes(live.session_id, batch.changes)
            except errors.DSPexError as failure:
                self._refuse(live, failure)
                return
            for change in batch.changes:
                live.apply(change)
            live.batches.popleft()
            batch.done.set()

    def _refuse(self, live: LiveSession, failure: errors.DSPexError) -> None:
        """What could not be written has not happened, nor what came after it."""
        live.refused = (live.record.generation, failure)
        for batch in live.batches:
            batch.done.set()
        live.batches.clear()
        if live.status is not SessionStatus.DESTROYED:
            self._log.error("session %s: its changes could not be kept: %s", live.session_id, failure)
            self.refused(live, f"its changes could not be kept: {failure.message}")

    async def _write(self) -> None:
        while True:
            await asyncio.sleep(WRITE_INTERVAL)
            await self._write_once()

    async def _write_once(self) -> None:
        unfolded, self._unfolded = list(self._unfolded.values()), {}
        spent, self._spent = list(self._spent.values()), {}
        # Finished though ``stop`` comes in between: what was taken out is nowhere else.
        await self._tasks.finish(
            self._write_all(
                [*((self._save_unfolded, live) for live in unfolded), *((self._save_spent, live) for live in spent)]
            )
        )

    async def _write_all(self, waiting: list[tuple[Callable[[LiveSession], Awaitable[None]], LiveSession]]) -> None:
        for start in range(0, len(waiting), MAX_WRITING):
            part = waiting[start : start + MAX_WRITING]
            done = await asyncio.gather(*(save(live) for save, live in part), return_exceptions=True)
            for (_, live), failure in zip(part, done, strict=True):
                if failure is not None:  # of a store that breaks its word; the others' are written all the same
                    self._log.error("session %s: it could not be written", live.session_id, exc_info=failure)

    async def _save_spent(self, live: LiveSession) -> None:
        if live.spent is None or live.status is SessionStatus.DESTROYED:
            return
        try:
            await self._store.save_changes(live.session_id, [live.spent])
        except (errors.SessionNotFound, errors.SessionNotReady):
            return  # it has been destroyed meanwhile, or is another service's
        except errors.DSPexError as failure:
            self._log.warning("session %s: what it spent could not be kept: %s", live.session_id, failure)
            self._spent.setdefault(live.session_id, live)


def _calls(spent: Spent) -> tuple[int, int]:
    return spent.ok + spent.error + spent.aborted, spent.lm_calls


def _read_if_there(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:  # the kernel has changed nothing yet
        return b""
