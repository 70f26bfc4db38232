"""The store: where the service keeps sessions and program records, so that they outlive it and every kernel.

``SessionStore`` is the contract, ``library.ProgramLibrary`` the part of it that is about published programs;
``sql.SQLStore`` keeps it over any database that SQLAlchemy speaks to. Every implementation passes
``tests/contract/test_store.py``.

Several services may share one store. Each registers, claims a session before it opens it, and renews its
registration; who is dead is theirs to find out (``expires_at``, the process). The store only decides whose a
session is, and refuses the writes of a service that lost it: one that slept through its own death cannot undo what
its successor did.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Self

from jupyter_core.paths import jupyter_data_dir

from dspex_kernels.protocol.records import Change
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions.model import BackendName, SessionRecord
from dspex_kernels.sessions.store.library import ProgramLibrary

MAX_PAGE: Final = 1000
"""Sessions, secrets or names on one page."""
MAX_SECRET_BYTES: Final = 64 * 1024
"""A session's encrypted secret."""


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


@dataclass(frozen=True, slots=True)
class SessionBrief:
    """A session without its program records: what a service that starts needs of each.

    Attributes:
        record: Its contents hold the settings and what was spent, and no programs.
        programs: The programs' ids, in the order of their making.
    """

    record: SessionRecord
    programs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BriefPage:
    """Some sessions of many, in brief.

    Attributes:
        sessions: Oldest first.
        next_cursor: Where the next page begins; None when this is the last.
    """

    sessions: tuple[SessionBrief, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class ServiceRecord:
    """A service that uses the store.

    Attributes:
        service_id: Never used before.
        host: The machine it runs on.
        pid: Its process there.
        started_at: A time with time zone; it comes back in UTC, as does the next.
        expires_at: Not renewed by then, it may be taken for dead.
    """

    service_id: str
    host: str
    pid: int
    started_at: datetime
    expires_at: datetime


class SessionStore(ProgramLibrary):
    """Keeps sessions, and the program library with them.

    Promises of every method: what it changed is durable when it returns, and is there as a whole or not at all
    when it does not; it never blocks the event loop; a failure of the database is a ``StoreError`` of one line,
    and so is a call before ``open`` or after ``close``. Several stores, in several processes, may share one
    database: each sees what the others finished.

    A store that was opened for a service changes a session (its contents, fields and secret; deleting it too) only
    while that service holds it, by ``create`` or ``claim``. Otherwise it raises SessionNotReady and changes
    nothing, also where nobody holds the session: another service may have had it meanwhile. A store for no service
    (a tool's) changes all.
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
        """Keep a new session, its contents with it; the store's service holds it.

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
    async def list_brief(
        self, owner: str | None = None, *, limit: int = 100, after: str | None = None
    ) -> BriefPage:
        """What ``list`` tells, without reading the program records: for a service that knows all its sessions.

        Args:
            owner: As for ``list``.
            limit: As for ``list``.
            after: A page's ``next_cursor``, of either kind of page; None begins.

        Raises:
            InvalidArguments: As for ``list``.
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

    @abstractmethod
    async def register(self, service: ServiceRecord) -> None:
        """Make a service known, so that it may claim sessions; a record of the same id is replaced.

        Raises:
            InvalidArguments: A time has no time zone.
        """

    @abstractmethod
    async def renew(self, service_id: str, expires_at: datetime) -> bool:
        """Move a service's expiry.

        Returns:
            Whether it is still registered. False: it was declared dead, its sessions may be another's by now.

        Raises:
            InvalidArguments: The time has no time zone.
        """

    @abstractmethod
    async def unregister(self, service_id: str) -> None:
        """Forget a service that ends, and that it holds sessions; one that is not registered is no error."""

    @abstractmethod
    async def bury(self, service_id: str, *, seen: datetime | None = None) -> bool:
        """Forget a service that was found dead, and that it holds sessions: each may be claimed.

        Should it be alive after all, ``renew`` tells it so, and it can change no session before it claims it anew.

        Args:
            service_id: Which; one that is not registered is no error.
            seen: The ``expires_at`` by which it was found dead: where it has renewed or registered since, nothing
                is done. None asks for nothing of the kind, for one that is known to be gone.

        Returns:
            Whether it is forgotten. False: it lives, or is forgotten already.

        Raises:
            InvalidArguments: ``seen`` has no time zone.
        """

    @abstractmethod
    async def services(self) -> Sequence[ServiceRecord]:
        """The registered services, oldest first; some may be dead."""

    @abstractmethod
    async def claim(self, session_id: str, service_id: str) -> SessionRecord:
        """Let a service hold a session that no registered service holds.

        Args:
            session_id: Which.
            service_id: Who takes it; holding it already is fine.

        Returns:
            The session as it is from now on, until this service changes it.

        Raises:
            SessionNotFound: There is none of that id.
            SessionNotReady: Another service holds it (details: ``holder``, ``host``, ``pid``).
            StoreError: The service that claims is not registered: it was declared dead, and nobody would see that
                it holds the session.
        """

    @abstractmethod
    async def set_secret(self, session_id: str, token: bytes | None) -> None:
        """Keep a session's secret, encrypted (``sessions.secrets``); it is in no record and on no page.

        Args:
            session_id: Whose.
            token: At most ``MAX_SECRET_BYTES``; None forgets it.

        Raises:
            SessionNotFound: There is none of that id.
            TooLarge: The token is.
        """

    @abstractmethod
    async def get_secret(self, session_id: str) -> bytes | None:
        """What ``set_secret`` kept; None for nothing.

        Raises:
            SessionNotFound: There is none of that id.
        """

    @abstractmethod
    async def replace_secret(self, session_id: str, old: bytes, new: bytes) -> bool:
        """Keep ``new`` if the secret still is ``old``: for a key's rotation, while sessions go on.

        Returns:
            Whether it was; a session that is gone is no error.

        Raises:
            TooLarge: ``new`` is.
        """

    @abstractmethod
    async def secrets(self, *, limit: int = 100, after: str | None = None) -> Sequence[tuple[str, bytes]]:
        """Sessions that have a secret, each with it, by session id.

        Args:
            limit: At most so many, 1 to ``MAX_PAGE``; fewer are the last ones.
            after: Begin after this session id; None begins with the first.

        Raises:
            InvalidArguments: ``limit`` is out of range.
        """

    @abstractmethod
    async def size(self) -> int | None:
        """The store's size in bytes, for health figures; None where it cannot be told."""

    @abstractmethod
    async def backup(self, path: Path) -> None:
        """Copy the whole store into a new file, mode 0600, while others go on using it.

        The copy is what was there at one moment; it opens as a store of its own.

        Raises:
            StoreError: ``path`` exists or cannot be written, or the database has a tool of its own for it: the
                message gives its command.
        """
