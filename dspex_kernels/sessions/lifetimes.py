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
from dspex_kernels.protocol import journal
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions.live import LiveSession
from dspex_kernels.sessions.places import Places
from dspex_kernels.sessions.registry import Registry
from dspex_kernels.sessions.store import MAX_PAGE, SessionStore


class Lifetimes:
    """Begins and ends the sessions of a service.

    Args:
        registry: Which sessions there are.
        store: Open, once ``load`` is called.
        places: Where they live.
        log: Is told what a backend could not close.
    """

    def __init__(
        self, registry: Registry, store: SessionStore, places: Places, log: Logger | LoggerAdapter[Any]
    ) -> None:
        self._registry = registry
        self._store = store
        self._places = places
        self._log = log

    async def load(self) -> None:
        """Know the sessions of an earlier service; what it was destroying is gone now."""
        cursor: str | None = None
        while True:
            page = await self._store.list(limit=MAX_PAGE, after=cursor)
            for record in page.records:
                live = LiveSession.of(record, reason="the service was started anew")
                if record.status is SessionStatus.DESTROYED:
                    await self._finish_ending(live)
                else:
                    self._registry.add(live)
            cursor = page.next_cursor
            if cursor is None:
                return

    async def begin(self, live: LiveSession) -> None:
        """Write a new session down. Runs as ``live.creating``, to its end.

        Raises:
            SessionExists: Another service or store has something of that id; it stays as it is.
        """
        try:
            await self._check_free(live)
            await self._store.create(live.record)
        except BaseException:
            live.become(SessionStatus.DESTROYED)
            live.discard()
            self._registry.leave(live)
            self._registry.free(live)
            raise

    async def end(self, live: LiveSession) -> None:
        """End a session for good; if that was done already, all is well.

        Raises:
            SessionNotReady: Another service uses it; nothing was done.
            StoreError: The store or the disk refuses: the session stays, or the next ``load`` finishes its end.
        """
        if live.creating is not None:
            await asyncio.wait({live.creating})
        if live.status is SessionStatus.DESTROYED:
            return
        live.claim()
        # From here on a service that comes back after a crash goes on with it.
        with contextlib.suppress(errors.SessionNotFound):  # another service destroyed it: less to do
            await self._store.set_status(live.session_id, SessionStatus.DESTROYED)
        if self._registry.find(live.session_id) is not live:  # another call was quicker
            return
        live.become(SessionStatus.DESTROYED)
        self._registry.leave(live)
        live.lm_with_key = None
        try:
            await self._places.cancel_opening(live)
            try:
                await self._places.backend_of(live).close(live.session_id)
            except Exception:  # noqa: BLE001  # a backend may fail in any way; the session goes all the same
                self._log.exception("session %s: its place could not be closed", live.session_id)
            async with live.folding:  # a fold that has begun would write to a session that is gone
                await self._remove(live)
        finally:
            live.release()
            self._registry.free(live)

    async def _check_free(self, live: LiveSession) -> None:
        try:
            live.claim()
        except errors.SessionNotReady as taken:
            raise errors.SessionExists(f"{taken.message}; or choose another id", details=taken.details) from taken
        if await asyncio.to_thread((live.directory / journal.FILE_NAME).exists):
            raise errors.SessionExists(
                f"{live.directory} holds a session {live.session_id!r} already, of another service or store: "
                "choose another id, or another SessionService.data_dir",
                details={"session_id": live.session_id},
            )

    async def _finish_ending(self, live: LiveSession) -> None:
        """Remove what an earlier service was destroying, unless another one is at it."""
        try:
            live.claim()
        except errors.SessionNotReady:
            return
        try:
            await self._remove(live)
        finally:
            live.release()

    async def _remove(self, live: LiveSession) -> None:
        """Remove what outlived a session's kernel: the directory, then the record that names it."""
        await asyncio.to_thread(shutil.rmtree, live.directory, ignore_errors=True)
        await self._store.delete(live.session_id)
