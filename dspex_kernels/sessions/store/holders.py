"""Which service holds which session: what the store's methods do about it inside a transaction."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from dspex_kernels import errors
from dspex_kernels.sessions.store import ServiceRecord
from dspex_kernels.sessions.store.rows import session_not_found, to_text, update_session
from dspex_kernels.sessions.store.schema import SERVICES, SESSIONS

_HOLDER = sa.select(SESSIONS.c.holder).where(SESSIONS.c.session_id == sa.bindparam("session_id"))


def add(connection: sa.Connection, service: ServiceRecord) -> None:
    connection.execute(SERVICES.delete().where(SERVICES.c.service_id == service.service_id))
    row = {
        "service_id": service.service_id,
        "host": service.host,
        "pid": service.pid,
        "started_at": to_text(service.started_at),
        "expires_at": to_text(service.expires_at),
    }
    connection.execute(SERVICES.insert(), row)


def remove(connection: sa.Connection, service_id: str, seen: str | None = None) -> bool:
    """Forget a service, and that it holds sessions: a row without a holder is nobody's, the former one's neither.

    Args:
        connection: In a transaction.
        service_id: Which.
        seen: Only if this is when it expires; None in any case.

    Returns:
        Whether it was registered, so.
    """
    row = SERVICES.c.service_id == service_id
    as_seen = row if seen is None else row & (SERVICES.c.expires_at == seen)
    found = connection.execute(SERVICES.delete().where(as_seen)).rowcount > 0
    if found or seen is None:
        connection.execute(SESSIONS.update().where(SESSIONS.c.holder == service_id).values(holder=None))
    return found


def read_all(connection: sa.Connection) -> list[ServiceRecord]:
    rows = connection.execute(sa.select(SERVICES).order_by(SERVICES.c.started_at, SERVICES.c.service_id))
    return [_service(row) for row in rows]


def take(connection: sa.Connection, session_id: str, service_id: str) -> None:
    """Let a service hold a session; ``SessionStore.claim`` tells when it may."""
    holder = _holder(connection, session_id)
    if _find(connection, service_id) is None:
        raise errors.StoreError(
            f"service {service_id!r} is not registered, so it cannot use session {session_id!r}: another service "
            "took it for dead; register it again",
            details={"session_id": session_id, "service_id": service_id},
        )
    if holder == service_id:
        return
    other = _find(connection, holder) if holder is not None else None
    if other is not None:
        raise errors.SessionNotReady(
            f"session {session_id!r} is used by another service, {_described(other)}: use the session there, or "
            "end that service",
            details=_details(session_id, other.service_id, other),
        )
    update_session(connection, session_id, holder=service_id)


def is_held_by(service_id: str | None) -> sa.ColumnElement[bool]:
    """Whether a row of SESSIONS may be changed by this service; None is no service, which may change all."""
    return sa.true() if service_id is None else SESSIONS.c.holder == service_id


def check(connection: sa.Connection, session_id: str, service_id: str | None) -> None:
    """Refuse to change what ``is_held_by`` says is not this service's.

    A session that nobody holds is refused too: a service that held it and was taken for dead cannot know whether a
    successor has had it, changed it and left since.

    Raises:
        SessionNotFound: There is none of that id.
        SessionNotReady: This service does not hold it, or not any more.
    """
    holder = _holder(connection, session_id)
    if service_id is None or holder == service_id:
        return
    other = _find(connection, holder) if holder is not None else None
    if holder is None:
        message = f"session {session_id!r} is not this service's, or was taken from it: claim it first"
    else:
        whose = _described(other) if other is not None else repr(holder)
        message = f"another service has taken session {session_id!r} over: {whose}; use the session there"
    raise errors.SessionNotReady(message, details=_details(session_id, holder, other))


def _holder(connection: sa.Connection, session_id: str) -> str | None:
    row = connection.execute(_HOLDER, {"session_id": session_id}).first()
    if row is None:
        raise session_not_found(session_id)
    return row.holder  # type: ignore[no-any-return]  # the columns of a row are untyped


def _find(connection: sa.Connection, service_id: str) -> ServiceRecord | None:
    row = connection.execute(sa.select(SERVICES).where(SERVICES.c.service_id == service_id)).first()
    return None if row is None else _service(row)


def _service(row: Any) -> ServiceRecord:
    return ServiceRecord(
        service_id=row.service_id,
        host=row.host,
        pid=row.pid,
        started_at=datetime.fromisoformat(row.started_at),
        expires_at=datetime.fromisoformat(row.expires_at),
    )


def _described(service: ServiceRecord) -> str:
    return f"{service.service_id!r} (host {service.host}, process {service.pid})"


def _details(session_id: str, holder: str | None, service: ServiceRecord | None) -> dict[str, Any]:
    return {
        "session_id": session_id,
        "holder": holder,
        "host": service.host if service else None,
        "pid": service.pid if service else None,
    }
