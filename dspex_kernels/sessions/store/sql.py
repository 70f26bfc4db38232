"""The session store over SQL: SQLite by default, PostgreSQL by its URL.

All SQL runs on one thread of the store's own (``turns``), so that the event loop never waits for a disk; how a
database is spoken to is ``database``'s, what its rows hold is ``rows``' and ``holders``'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from dspex_kernels import errors
from dspex_kernels.protocol.records import Change
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions.model import BackendName, SessionRecord
from dspex_kernels.sessions.store import (
    MAX_SECRET_BYTES,
    BriefPage,
    ServiceRecord,
    SessionBrief,
    SessionPage,
    SessionStore,
    holders,
    rows,
)
from dspex_kernels.sessions.store.database import Database
from dspex_kernels.sessions.store.pages import check_limit, make_cursor, parse_cursor
from dspex_kernels.sessions.store.schema import PROGRAMS, SECRETS, SERVICES, SESSIONS
from dspex_kernels.sessions.store.sql_library import SQLLibrary
from dspex_kernels.sessions.store.turns import Turns


class SQLStore(SQLLibrary, SessionStore):
    """Keeps sessions and the program library in an SQL database.

    Args:
        url: As SQLAlchemy reads it. ``sqlite:////path/file`` (made 0600, its directory 0700), ``sqlite://`` (in
            memory, gone at ``close``), ``postgresql+psycopg://…``.
        service_id: The service that it is opened for; None for a tool's, which may change every session.
    """

    def __init__(self, url: str, service_id: str | None = None) -> None:
        self._database = Database(url)
        self._service_id = service_id
        super().__init__(Turns(self._database))

    async def open(self) -> None:
        await self._turns.open()

    async def close(self) -> None:
        await self._turns.close()

    async def create(self, record: SessionRecord) -> None:
        row = rows.session_row(record, self._service_id)
        programs = rows.program_rows(record)

        def insert(connection: sa.Connection) -> None:
            try:
                connection.execute(SESSIONS.insert(), row)
            except IntegrityError:
                raise errors.SessionExists(
                    f"session {record.session_id!r} exists: choose another id, or get_session()",
                    details={"session_id": record.session_id},
                ) from None  # it would carry the row
            if programs:
                connection.execute(PROGRAMS.insert(), programs)

        await self._turns.write(insert)

    async def get(self, session_id: str) -> SessionRecord:
        return await self._turns.read(lambda connection: rows.read_session(connection, session_id))

    async def list(self, owner: str | None = None, *, limit: int = 100, after: str | None = None) -> SessionPage:
        query = _page_query(owner, limit, after)

        def select(connection: sa.Connection) -> SessionPage:
            shown, cursor = _page(connection, query, limit)
            return SessionPage(tuple(rows.records(connection, shown)), cursor)

        return await self._turns.read(select)

    async def list_brief(
        self, owner: str | None = None, *, limit: int = 100, after: str | None = None
    ) -> BriefPage:
        query = _page_query(owner, limit, after)

        def select(connection: sa.Connection) -> BriefPage:
            shown, cursor = _page(connection, query, limit)
            programs = rows.program_ids(connection, (row.session_id for row in shown))
            found = map(rows.record_without_programs, shown)
            return BriefPage(tuple(SessionBrief(r, tuple(programs[r.session_id])) for r in found), cursor)

        return await self._turns.read(select)

    async def count(self, owner: str | None = None) -> int:
        query = sa.select(sa.func.count()).select_from(SESSIONS)
        if owner is not None:
            query = query.where(SESSIONS.c.owner == owner)
        return await self._turns.read(lambda connection: int(connection.execute(query).scalar_one()))

    async def delete(self, session_id: str) -> bool:
        def delete(connection: sa.Connection) -> bool:
            if not rows.exists(connection, session_id):
                return False
            self._check(connection, session_id)
            connection.execute(SESSIONS.delete().where(SESSIONS.c.session_id == session_id))
            return True

        return await self._turns.write(delete)

    async def save_changes(
        self, session_id: str, changes: Sequence[Change], journal_offset: int | None = None
    ) -> None:
        changes = list(changes)  # the caller may go on with its own

        def save(connection: sa.Connection) -> None:
            self._check(connection, session_id)
            rows.apply(connection, session_id, changes)
            if journal_offset is not None:
                rows.update_session(connection, session_id, journal_offset=journal_offset)

        await self._turns.write(save)

    async def touch(self, session_id: str, last_activity: datetime) -> None:
        moment = rows.to_text(last_activity)
        later = sa.case((SESSIONS.c.last_activity < moment, moment), else_=SESSIONS.c.last_activity)
        await self._update(session_id, last_activity=later)

    async def set_generation(self, session_id: str, generation: int) -> None:
        await self._update(session_id, generation=generation)

    async def set_status(self, session_id: str, status: SessionStatus) -> None:
        await self._update(session_id, status=str(status))

    async def set_backend(self, session_id: str, backend: BackendName, directory: str | None) -> None:
        await self._update(session_id, backend=backend, directory=directory, journal_offset=None)

    async def register(self, service: ServiceRecord) -> None:
        await self._turns.write(lambda connection: holders.add(connection, service))

    async def renew(self, service_id: str, expires_at: datetime) -> bool:
        statement = SERVICES.update().where(SERVICES.c.service_id == service_id)
        statement = statement.values(expires_at=rows.to_text(expires_at))
        return await self._turns.write(lambda connection: connection.execute(statement).rowcount > 0)

    async def unregister(self, service_id: str) -> None:
        await self._turns.write(lambda connection: holders.remove(connection, service_id))

    async def bury(self, service_id: str, *, seen: datetime | None = None) -> bool:
        expires_at = rows.to_text(seen) if seen is not None else None
        return await self._turns.write(lambda connection: holders.remove(connection, service_id, expires_at))

    async def services(self) -> Sequence[ServiceRecord]:
        return await self._turns.read(holders.read_all)

    async def claim(self, session_id: str, service_id: str) -> SessionRecord:
        def claim(connection: sa.Connection) -> SessionRecord:
            holders.take(connection, session_id, service_id)
            return rows.read_session(connection, session_id)

        return await self._turns.write(claim)

    async def set_secret(self, session_id: str, token: bytes | None) -> None:
        _check_secret(token)

        def keep(connection: sa.Connection) -> None:
            self._check(connection, session_id)
            connection.execute(SECRETS.delete().where(SECRETS.c.session_id == session_id))
            if token is not None:
                connection.execute(SECRETS.insert(), {"session_id": session_id, "token": token})

        await self._turns.write(keep)

    async def get_secret(self, session_id: str) -> bytes | None:
        query = (
            sa.select(SECRETS.c.token)
            .select_from(SESSIONS.outerjoin(SECRETS, SECRETS.c.session_id == SESSIONS.c.session_id))
            .where(SESSIONS.c.session_id == session_id)
        )

        def select(connection: sa.Connection) -> bytes | None:
            row = connection.execute(query).first()
            if row is None:
                raise rows.session_not_found(session_id)
            return None if row.token is None else bytes(row.token)

        return await self._turns.read(select)

    async def replace_secret(self, session_id: str, old: bytes, new: bytes) -> bool:
        _check_secret(new)
        same = (SECRETS.c.session_id == session_id) & (SECRETS.c.token == old)

        def replace(connection: sa.Connection) -> bool:
            if connection.execute(sa.select(SECRETS.c.session_id).where(same)).first() is None:
                return False
            self._check(connection, session_id)
            connection.execute(SECRETS.update().where(same).values(token=new))
            return True

        return await self._turns.write(replace)

    async def secrets(self, *, limit: int = 100, after: str | None = None) -> Sequence[tuple[str, bytes]]:
        check_limit(limit)
        query = sa.select(SECRETS).order_by(SECRETS.c.session_id).limit(limit)
        if after is not None:
            query = query.where(SECRETS.c.session_id > after)

        def select(connection: sa.Connection) -> Sequence[tuple[str, bytes]]:
            return [(row.session_id, bytes(row.token)) for row in connection.execute(query)]

        return await self._turns.read(select)

    async def size(self) -> int | None:
        return await self._turns.read(self._database.size)

    async def backup(self, path: Path) -> None:
        if self._database.is_in_memory:
            await self._turns.run(lambda: self._database.back_up(path))
        else:  # not on the store's thread: others read and write while a large database is copied
            self._turns.check_open()
            await asyncio.to_thread(self._database.back_up, path)

    async def _update(self, session_id: str, **values: Any) -> None:
        # Not ``&``: what that makes are cycles, which only the garbage collector ends; this is asked all the time.
        mine = sa.and_(SESSIONS.c.session_id == session_id, holders.is_held_by(self._service_id))
        statement = SESSIONS.update().where(mine).values(values)

        def update(connection: sa.Connection) -> None:
            if connection.execute(statement).rowcount == 0:
                self._check(connection, session_id)

        await self._turns.write(update)

    def _check(self, connection: sa.Connection, session_id: str) -> None:
        holders.check(connection, session_id, self._service_id)


def _page_query(owner: str | None, limit: int, after: str | None) -> sa.Select[Any]:
    check_limit(limit)
    query = sa.select(SESSIONS).order_by(SESSIONS.c.created_at, SESSIONS.c.session_id).limit(limit + 1)
    if owner is not None:
        query = query.where(SESSIONS.c.owner == owner)
    if after is not None:
        query = query.where(sa.tuple_(SESSIONS.c.created_at, SESSIONS.c.session_id) > parse_cursor(after))
    return query


def _page(connection: sa.Connection, query: sa.Select[Any], limit: int) -> tuple[Sequence[Any], str | None]:
    """The rows of a page, and where the next one begins: the query asks for one row more than is shown."""
    found = connection.execute(query).all()
    shown = found[:limit]
    more = len(found) > limit
    return shown, make_cursor(shown[-1].created_at, shown[-1].session_id) if more else None


def _check_secret(token: bytes | None) -> None:
    if token is not None and len(token) > MAX_SECRET_BYTES:
        raise errors.TooLarge(
            f"the encrypted secret has {len(token):,} bytes: at most {MAX_SECRET_BYTES:,}",
            details={"limit": MAX_SECRET_BYTES},
        )
