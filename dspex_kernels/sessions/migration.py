"""A session moves from one backend to the other, with everything it holds; or it stays, and is told why."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from logging import Logger, LoggerAdapter
from pathlib import Path
from typing import Any

from dspex_kernels import errors
from dspex_kernels.protocol import journal
from dspex_kernels.protocol.records import Change, SessionContents, Spent
from dspex_kernels.sessions.keeper import Keeper
from dspex_kernels.sessions.live import LiveSession
from dspex_kernels.sessions.model import BackendName
from dspex_kernels.sessions.places import Places, Waiter
from dspex_kernels.sessions.store import SessionStore

DEDICATED: BackendName = "dedicated"
"""The backend whose sessions have a directory."""


class Migration:
    """Moves sessions between backends.

    While a session moves, its calls wait: those that run are let end first, in the old place; those that come are
    answered in the new one. What it holds travels through the store, so a crash at any moment leaves it whole, in
    one backend or the other.

    Args:
        store: Open.
        places: Where sessions live.
        keeper: Makes durable what the old place changed.
        sessions_dir: Where sessions of dedicated kernels have their directories.
        log: Is told what was left behind.
    """

    def __init__(
        self,
        store: SessionStore,
        places: Places,
        keeper: Keeper,
        sessions_dir: Path,
        log: Logger | LoggerAdapter[Any],
    ) -> None:
        self._store = store
        self._places = places
        self._keeper = keeper
        self._sessions_dir = sessions_dir
        self._log = log

    async def move(self, live: LiveSession, target: BackendName, timeout: float) -> None:
        """Move a session; in its own backend already, nothing happens.

        Args:
            live: Which.
            target: The backend's name.
            timeout: Seconds for everything; calls that run longer keep the session where it is.

        Raises:
            NotPortable: It holds what only its notebook's kernel has; nothing was changed.
            CommandTimeout: Its calls did not end in time; nothing was changed.
            StoreError: The store did not take what it holds; it is in its old backend.
            KernelStartFailed: The new place did not open; it is in its old backend again.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        await self._places.ensure(live, Waiter("migrate_session", deadline))
        if live.record.backend == target:
            return
        await self._places.move(live, lambda: self._leave(live, target), deadline)
        try:
            await self._places.ensure(live, Waiter("migrate_session", deadline))
        except errors.KernelError:
            former: BackendName = "pooled" if target == DEDICATED else DEDICATED
            self._log.warning("session %s: backend %s cannot take it; it goes back", live.session_id, target)
            await self._settle_in(live, former)
            raise

    async def _leave(self, live: LiveSession, target: BackendName) -> None:
        """Change a session's backend, when nothing runs in it and before its place is closed."""
        await self._settle(live, lives=True)
        record = await self._store.get(live.session_id)
        _require_portable(live.session_id, record.contents)
        await self._places.backend_of(live).close(live.session_id)
        await self._settle(live, lives=False)
        await self._keeper.drain(live)
        await self._settle_in(live, target)

    async def _settle(self, live: LiveSession, *, lives: bool) -> None:
        """Have the store hold everything, for the directory will be removed with the journal in it.

        Args:
            live: Which session.
            lives: Whether its kernel does: that goes on writing what was spent, though nothing runs.

        Raises:
            StoreError: The store did not take it.
        """
        if live.record.directory is None:
            await self._keeper.settle(live, live.record.generation)
            return
        await self._keeper.fold(live)
        unread = await asyncio.to_thread(_read_unread, live)
        if live.unfolded or any(not (lives and isinstance(change, Spent)) for change in unread):
            raise errors.StoreError(
                f"session {live.session_id!r} stays where it is: the store did not take all of its journal; see "
                "the log, and try again",
                details={"session_id": live.session_id},
            )

    async def _settle_in(self, live: LiveSession, target: BackendName) -> None:
        old = live.record.directory
        new = self._sessions_dir / live.session_id if target == DEDICATED else None
        if new is not None:
            await asyncio.to_thread(_make_empty, new)
        await self._store.set_backend(live.session_id, target, str(new) if new is not None else None)
        live.note(backend=target, directory=str(new) if new is not None else None, journal_offset=None)
        live.unfolded, live.folded_to = [], None
        if old is not None:
            # From here on the store holds it all; what a crash leaves of the directory is removed by _make_empty.
            await asyncio.to_thread(shutil.rmtree, old, ignore_errors=True)


def _read_unread(live: LiveSession) -> Sequence[Change]:
    """What a session's journal tells that was not read yet."""
    path = live.directory / journal.FILE_NAME
    return journal.unread(path.read_bytes(), live.record.journal_offset).changes if path.exists() else ()


def _require_portable(session_id: str, contents: SessionContents) -> None:
    because = {
        program_id: version.not_portable_because or ["it was made in its notebook"]
        for program_id, versions in contents.programs.items()
        for version in versions
        if not version.portable
    }
    if because:
        told = "; ".join(f"program {program_id!r}: {', '.join(why)}" for program_id, why in because.items())
        raise errors.NotPortable(
            f"session {session_id!r} cannot move: {told[:2000]}; delete what its notebook alone has, or leave it",
            details={"session_id": session_id, "because": because},
        )


def _make_empty(directory: Path) -> None:
    """Make a session's directory; one that an interrupted move left is not its own any more."""
    shutil.rmtree(directory, ignore_errors=True)
    try:
        directory.mkdir(mode=0o700, parents=True)
    except OSError as failure:
        raise errors.StoreError(
            f"{directory} cannot be made: {failure.strerror}; make room, or make it writable"
        ) from failure
