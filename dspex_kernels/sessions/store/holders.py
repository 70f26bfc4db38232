"""Which service holds which session: what the store's methods do about it inside a transaction."""

from __future__ import annotations

from collections.abc import Collection
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


def remove(connection: sa.Connection, service_id: str) -> None:
    """Forget a service, and that it holds sessions."""
    connection.execute(SESSIONS.update().where(SESSIONS.c.holder == service_id).values(holder=None))
    connection.execute(SERVICES.delete().where(SERVICES.c.service_id == service_id))


def read_all(connection: sa.Connection) -> list[ServiceRecord]:
    rows = connection.execute(sa.select(SERVICES).order_by(SERVICES.c.started_at, SERVICES.c.service_id))
    return [_service(row) for row in rows]


def take(connection: sa.Connection, session_id: str, service_id: str, dead: Collection[str]) -> None:
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
    other = _find(connection, holder) if holder is not None and holder not in dead else None
    if other is not None:
        raise errors.SessionNotReady(
            f"session {session_id!r} is used by another service, {_described(other)}: use the session there, or "
            "end that service",
            details=_details(session_id, other.service_id, other),
        )
    update_session(connection, session_id, holder=service_id)


def is_free_for(service_id: str | None) -> sa.ColumnElement[bool]:
    """Whether a row of SESSIONS may be changed by this service; None is no service, which may change all."""
    if service_id is None:
        return sa.true()
    return SESSIONS.c.holder.is_(None) | (SESSIONS.c.holder == service_id)


def check(connection: sa.Connection, session_id: str, service_id: str | None) -> None:
    """Refuse to change what ``is_free_for`` says is not free.

    Raises:
        SessionNotFound: There is none of that id.
        SessionNotReady: Another service has it now.
    """
    holder = _holder(connection, session_id)
    if service_id is None or holder is None or holder == service_id:
        return
    other = _find(connection, holder)
    raise errors.SessionNotReady(
        f"another service has taken session {session_id!r} over: {_described(other) if other else repr(holder)}; "
        "use the session there",
        details=_details(session_id, holder, other),
    )


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


def _details(session_id: str, holder: str, service: ServiceRecord | None) -> dict[str, Any]:
    return {
        "session_id": session_id,
        "holder": holder,
        "host": service.host if service else None,
        "pid": service.pid if service else None,
    }
