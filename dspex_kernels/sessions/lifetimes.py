"""How sessions begin and end: in the registry, the store and their directory, so that a crash in between is mended.

What another service has under the same id is never touched: neither by a session that fails to begin, nor by one
that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from logging import Logger, LoggerAdapter
from typing import Any

from dspex_kernels import errors
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions.happenings import Listeners, SessionCreated, SessionDestroyed
from dspex_kernels.sessions.keeper import Keeper
from dspex_kernels.sessions.live import LiveSession
from dspex_kernels.sessions.places import Places
from dspex_kernels.sessions.registry import Registry
from dspex_kernels.sessions.store import MAX_PAGE, SessionStore
from dspex_kernels.sessions.tasks import Tasks
from dspex_kernels.sessions.tenure import Tenure


class Lifetimes:
    """Begins and ends the sessions of a service.

    Args:
        registry: Which sessions there are.
        store: Open, once ``load`` is called.
        places: Where they live.
        keeper: Is told of those that end.
        tenure: Says which sessions are this service's.
        listeners: Are told of sessions that come and go.
        tasks: Where ends run.
        log: Is told what a backend could not close.
    """

    def __init__(
        self,
        registry: Registry,
        store: SessionStore,
        places: Places,
        keeper: Keeper,
        tenure: Tenure,
        listeners: Listeners,
        tasks: Tasks,
        log: Logger | LoggerAdapter[Any],
    ) -> None:
        self._registry = registry
        self._store = store
        self._places = places
        self._keeper = keeper
        self._tenure = tenure
        self._listeners = listeners
        self._tasks = tasks
        self._log = log

    async def load(self) -> None:
        """Know the sessions of an earlier service; what it was destroying is gone now."""
        cursor: str | None = None
        while True:
            page = await self._store.list_brief(limit=MAX_PAGE, after=cursor)
            for brief in page.sessions:
                live = LiveSession.of(brief.record, reason="the service was started anew")
                live.programs = dict.fromkeys(brief.programs)
                if brief.record.status is SessionStatus.DESTROYED:
                    await self._finish_ending(live)
                else:
                    self._registry.add(live)
            cursor = page.next_cursor
            if cursor is None:
                return

    async def adopt(self, session_id: str) -> None:
        """Know a session that another service made; where there is none, nothing happens."""
        try:
            record = await self._store.get(session_id)
        except errors.SessionNotFound:
            return
        if record.status is not SessionStatus.DESTROYED and self._registry.find(session_id) is None:
            self._registry.add(LiveSession.of(record, reason="another service made it"))

    async def begin(self, live: LiveSession) -> None:
        """Write a new session down; its place may be opened meanwhile. Runs as ``live.creating``, to its end.

        Raises:
            SessionExists: Another service or store has something of that id; it stays as it is.
        """
        has_directory = False
        try:
            await asyncio.to_thread(_make_directory, live)
            has_directory = live.fresh = True
            live.note(generation=1)
            live.housed.set()
            await self._store.create(live.record)
            live.held = True
            live.touched = asyncio.get_running_loop().time()
            self._listeners.tell(SessionCreated(**live.about()))
        except BaseException:
            live.become(SessionStatus.DESTROYED)
            self._registry.leave(live)
            await self._places.cancel_opening(live)  # it may be under way in the directory
            if has_directory:
                await asyncio.to_thread(_remove_directory, live)
            self._registry.free(live)
            raise
        finally:
            live.creating = None  # ten thousand ended tasks would be kept

    async def end(self, live: LiveSession) -> None:
        """End a session for good, though the caller leave; who asks while it ends waits for the same end.

        Raises:
            SessionNotReady: Another service uses it; nothing was done.
            StoreError: The store or the disk refuses: the session stays, or the next ``load`` finishes its end.
        """
        if live.ending is None:
            live.ending = self._tasks.spawn(self._end(live))
        await asyncio.shield(live.ending)

    async def _end(self, live: LiveSession) -> None:
        """End a session. Runs as ``live.ending``, which stays, unless it fails before anything was done."""
        if live.creating is not None:
            await asyncio.wait({live.creating})
        if live.status is SessionStatus.DESTROYED:
            return
        try:
            await self._write_end(live)
        except BaseException:
            live.ending = None
            raise
        if self._registry.find(live.session_id) is live:
            await self._take_away(live)

    async def _write_end(self, live: LiveSession) -> None:
        with contextlib.suppress(errors.SessionNotFound):  # another service destroyed it: less to do
            if not live.held:
                await self._tenure.claim(live.session_id)
            # From here on a service that comes back after a crash goes on with it.
            await self._store.set_status(live.session_id, SessionStatus.DESTROYED)

    async def _take_away(self, live: LiveSession) -> None:
        """Close and remove what a session has, and free its id."""
        live.become(SessionStatus.DESTROYED)
        self._registry.leave(live)
        live.lm_with_key = None
        self._keeper.forget(live)
        try:
            await self._places.cancel_opening(live)
            if live.closing is not None:
                if live.quiet is not None:
                    live.quiet.set()  # a move waits no longer for calls that end now
                await asyncio.wait({live.closing})
            try:
                await self._places.backend_of(live).close(live.session_id)
            except Exception:  # noqa: BLE001  # a backend may fail in any way; the session goes all the same
                self._log.exception("session %s: its place could not be closed", live.session_id)
            async with live.folding:  # a fold that has begun would write to a session that is gone
                await self._remove(live)
            self._listeners.tell(SessionDestroyed(**live.about()))
        finally:
            self._registry.free(live)

    async def _finish_ending(self, live: LiveSession) -> None:
        """Remove what an earlier service was destroying, unless another one is at it."""
        try:
            await self._tenure.claim(live.session_id)
        except (errors.SessionNotReady, errors.SessionNotFound):
            return
        await self._remove(live)

    async def _remove(self, live: LiveSession) -> None:
        """Remove what outlived a session's kernel: the directory, then the record that names it."""
        await asyncio.to_thread(_remove_directory, live)
        await self._store.delete(live.session_id)


def _make_directory(live: LiveSession) -> None:
    """Make a session's own directory (0700); one that is there is another session's.

    Raises:
        SessionExists: There is one.
        StoreError: The disk refuses.
    """
    if live.record.directory is None:
        return
    try:
        live.directory.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        raise errors.SessionExists(
            f"{live.directory} holds a session {live.session_id!r} already, of another service or store: choose "
            "another id, or another SessionService.data_dir",
            details={"session_id": live.session_id},
        ) from None  # the cause tells nothing more
    except OSError as failure:
        raise errors.StoreError(
            f"session {live.session_id!r}: {live.directory} cannot be made: {failure.strerror}; make room, or make "
            "it writable"
        ) from failure


def _remove_directory(live: LiveSession) -> None:
    if live.record.directory is not None:
        shutil.rmtree(live.directory, ignore_errors=True)
