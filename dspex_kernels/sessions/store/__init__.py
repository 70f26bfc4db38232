"""The store: where the service keeps sessions and program records, so that they outlive it and every kernel.

``SessionStore`` is the contract; ``sql.SQLStore`` keeps it over any database that SQLAlchemy speaks to. Every
implementation passes ``tests/contract/test_store.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Self

from jupyter_core.paths import jupyter_data_dir

from dspex_kernels.protocol.records import Change
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions.model import BackendName, SessionRecord

MAX_PAGE: Final = 1000
"""Sessions on one page of ``SessionStore.list``."""


def default_store_url() -> str:
    """A SQLite file in the Jupyter data directory: durable without any setting."""
    return f"sqlite:///{Path(jupyter_data_dir()) / 'dspex' / 'sessions.sqlite'}"


@dataclass(frozen=True, slots=True)
class SessionPage:
    """Some sessions of many.

    Attributes:
        records: Oldest first.
        next_cursor: Where the next page begins; None when this is the last.
    """

    records: tuple[SessionRecord, ...]
    next_cursor: str | None


class SessionStore(ABC):
    """Keeps sessions.

    Promises of every method: what it changed is durable when it returns, and is there as a whole or not at all
    when it does not; it never blocks the event loop; a failure of the database is a ``StoreError`` of one line,
    and so is a call before ``open`` or after ``close``. Several stores, in several processes, may share one
    database: each sees what the others finished.
    """

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @abstractmethod
    async def open(self) -> None:
        """Make ready; a new database gets its tables, an older one is brought up to this version.

        Raises:
            StoreError: It cannot be reached, is not ours, or was written by a newer version.
        """

    @abstractmethod
    async def close(self) -> None:
        """Let go of the database, after what was begun; closing twice is fine."""

    @abstractmethod
    async def create(self, record: SessionRecord) -> None:
        """Keep a new session, its contents with it.

        Raises:
            SessionExists: There is one of that id, whoever owns it.
        """

    @abstractmethod
    async def get(self, session_id: str) -> SessionRecord:
        """The session, its contents with it.

        Raises:
            SessionNotFound: There is none of that id.
        """

    @abstractmethod
    async def list(self, owner: str | None = None, *, limit: int = 100, after: str | None = None) -> SessionPage:
        """Sessions, oldest first; each that is there throughout is told exactly once over all pages.

        Args:
            owner: Only this owner's; None is everybody's.
            limit: At most so many on the page, 1 to ``MAX_PAGE``.
            after: A page's ``next_cursor``; None begins.

        Raises:
            InvalidArguments: ``limit`` is out of range, or ``after`` is no cursor of ours.
        """

    @abstractmethod
    async def count(self, owner: str | None = None) -> int:
        """How many sessions there are; of this owner, or (None) of all."""

    @abstractmethod
    async def delete(self, session_id: str) -> bool:
        """Forget a session and all it holds.

        Returns:
            Whether there was one: two that destroy the same session both succeed.
        """

    @abstractmethod
    async def save_changes(
        self, session_id: str, changes: Sequence[Change], journal_offset: int | None = None
    ) -> None:
        """Take changes in, in their order and all in one transaction.

        Of each program the newest ``limits.MAX_VERSIONS_KEPT`` versions are kept. Taking a change in again does
        no harm.

        Args:
            session_id: Whose.
            changes: None at all is allowed, to move only the offset.
            journal_offset: How far its journal is folded in with these (``protocol.journal.unread``); None for
                changes that did not come from a journal: the kept offset stays.

        Raises:
            SessionNotFound: There is none of that id.
            InvalidRecord: A change holds something that JSON cannot.
        """

    @abstractmethod
    async def touch(self, session_id: str, last_activity: datetime) -> None:
        """Move the last activity forward; an earlier time (with time zone) than the kept one changes nothing.

        Raises:
            SessionNotFound: There is none of that id.
        """

    @abstractmethod
    async def set_generation(self, session_id: str, generation: int) -> None:
        """Keep how often the session has been given a kernel.

        Raises:
            SessionNotFound: There is none of that id.
        """

    @abstractmethod
    async def set_status(self, session_id: str, status: SessionStatus) -> None:
        """Keep what the session is meant to be.

        Raises:
            SessionNotFound: There is none of that id.
        """

    @abstractmethod
    async def set_backend(self, session_id: str, backend: BackendName, directory: str | None) -> None:
        """Keep where the session lives now; the journal offset, of its former place, is dropped.

        Raises:
            SessionNotFound: There is none of that id.
        """
