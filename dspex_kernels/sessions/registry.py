"""Which sessions there are: ids, owners, limits. All is decided at once, without an await and without I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from dspex_kernels import errors
from dspex_kernels.protocol import names
from dspex_kernels.protocol.messages import first_problem
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions.live import LiveSession, Moved
from dspex_kernels.sessions.model import SessionRecord


class Registry:
    """The sessions of a service, by id. An id is taken until its session is destroyed to the end."""

    def __init__(self, moved: Moved) -> None:
        self._moved = moved
        self._sessions: dict[str, LiveSession] = {}
        self._leaving: set[str] = set()

    def __iter__(self) -> Iterator[LiveSession]:
        return iter(list(self._sessions.values()))

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, session_id: str) -> LiveSession:
        """The session of that id.

        Raises:
            SessionNotFound: There is none.
        """
        live = self._sessions.get(session_id)
        if live is None:
            raise not_found(session_id)
        return live

    def find(self, session_id: str) -> LiveSession | None:
        """The session of that id, or None."""
        return self._sessions.get(session_id)

    def owned_by(self, owner: str) -> list[LiveSession]:
        """The sessions of an owner."""
        return [live for live in self if live.record.owner == owner]

    def add(self, live: LiveSession) -> None:
        """Know a session; it counts from here on."""
        self._sessions[live.session_id] = live
        live.moved = self._moved
        live.moved(live.record.backend, None, live.status)

    def leave(self, live: LiveSession) -> None:
        """Know a session no more; its id stays taken until ``free``."""
        self._leaving.add(live.session_id)
        self._sessions.pop(live.session_id, None)

    def free(self, live: LiveSession) -> None:
        """Give an id free."""
        self._leaving.discard(live.session_id)

    def check_id(self, session_id: str) -> None:
        """Refuse an id that no session can have, or that one has.

        Raises:
            InvalidSession: It could not be a directory's name.
            SessionExists: There is one of that id.
        """
        if not names.is_session_id(session_id):
            raise errors.InvalidSession(
                f"{session_id[:128]!r} is no session id: use letters, digits and _ . - , at most 128, the first a "
                "letter or digit"
            )
        if session_id in self._sessions or session_id in self._leaving:
            raise errors.SessionExists(
                f"session {session_id!r} exists: get it with get_session, or choose another id",
                details={"session_id": session_id},
            )

    def check_limits(self, owner: str, max_sessions: int, per_owner: int | Callable[[str], int]) -> None:
        """Refuse one session more than there may be; 0 is no limit.

        Raises:
            SessionLimitReached: The message names the trait.
        """
        _check_limit(max_sessions, len(self._sessions), "SessionService.max_sessions", "")
        limit = per_owner(owner) if callable(per_owner) else per_owner
        count = len(self.owned_by(owner)) if limit else 0
        _check_limit(limit, count, "SessionService.max_sessions_per_owner", f" of owner {owner!r}")


def new_record(session_id: str, *, owner: str, backend: str, directory: Path | None) -> SessionRecord:
    """The record of a session that begins now.

    Raises:
        InvalidSession: No record can hold these.
    """
    now = datetime.now(UTC)
    try:
        return SessionRecord.model_validate(
            {
                "session_id": session_id,
                "owner": owner,
                "backend": backend,
                "status": SessionStatus.READY,  # what it is meant to be
                "created_at": now,
                "last_activity": now,
                "directory": str(directory) if directory is not None else None,
            }
        )
    except ValidationError as failure:
        raise errors.InvalidSession(f"no session can be made so: {first_problem(failure)}") from failure


def not_found(session_id: str) -> errors.SessionNotFound:
    """What is said of an id that no session has."""
    return errors.SessionNotFound(
        f"no session {session_id!r}: it was never created here, or has been destroyed",
        details={"session_id": session_id[:128]},
    )


def _check_limit(limit: int, count: int, trait: str, whose: str) -> None:
    if limit and count >= limit:
        raise errors.SessionLimitReached(
            f"there are {count} sessions{whose}, and {trait} is {limit}: destroy one, or raise it",
            details={"count": count, "limit": limit, "trait": trait},
        )
