"""Sessions, programs and secrets as rows: what the store's methods do inside a transaction.

A program version is a row; records and settings are JSON text, which no query looks into.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel
from pydantic_core import PydanticSerializationError

from dspex_kernels import errors
from dspex_kernels.protocol import limits
from dspex_kernels.protocol.records import (
    Change,
    ProgramDeleted,
    ProgramPut,
    ProgramRecord,
    SessionContents,
    SessionReset,
    SessionSettings,
    SettingsChanged,
    Spent,
)
from dspex_kernels.sessions.model import SessionRecord
from dspex_kernels.sessions.store.schema import PROGRAMS, SESSIONS

# Built once: each change runs these, and to build a statement takes longer than SQLite takes to run it.
_UPDATE_SESSION = SESSIONS.update().where(SESSIONS.c.session_id == sa.bindparam("of_session"))
# A program stands where its versions stand, or else behind all others of its session.
_PUT_PROGRAM = sa.text(
    "INSERT INTO dspex_programs (session_id, program_id, version, record, position) "
    "VALUES (:session_id, :program_id, :version, :record, COALESCE("
    "(SELECT MIN(position) FROM dspex_programs WHERE session_id = :session_id AND program_id = :program_id), "
    "(SELECT MAX(position) + 1 FROM dspex_programs WHERE session_id = :session_id), 1)) "
    "ON CONFLICT (session_id, program_id, version) DO UPDATE SET record = excluded.record"
)
_DROP_OLD_VERSIONS = sa.text(
    "DELETE FROM dspex_programs WHERE session_id = :session_id AND program_id = :program_id AND version <= "
    "(SELECT version FROM dspex_programs WHERE session_id = :session_id AND program_id = :program_id "
    "ORDER BY version DESC LIMIT 1 OFFSET :kept)"
)


def session_row(record: SessionRecord, holder: str | None) -> dict[str, Any]:
    contents = record.contents
    return {
        "session_id": record.session_id,
        "owner": record.owner,
        "backend": record.backend,
        "status": str(record.status),
        "generation": record.generation,
        "created_at": to_text(record.created_at),
        "last_activity": to_text(record.last_activity),
        "directory": record.directory,
        "journal_offset": record.journal_offset,
        "settings": to_json(contents.settings),
        "spent": to_json(contents.spent),
        "holder": holder,
    }


def program_rows(record: SessionRecord) -> list[dict[str, Any]]:
    """Those of all programs that a session holds, the versions that are kept."""
    return [
        {**_program_row(record.session_id, program), "position": position}
        for position, versions in enumerate(record.contents.programs.values(), start=1)
        for program in versions[-limits.MAX_VERSIONS_KEPT :]
    ]


def exists(connection: sa.Connection, session_id: str) -> bool:
    query = sa.select(SESSIONS.c.session_id).where(SESSIONS.c.session_id == session_id)
    return connection.execute(query).first() is not None


def read_session(connection: sa.Connection, session_id: str) -> SessionRecord:
    """A session with its contents.

    Raises:
        SessionNotFound: There is none of that id.
    """
    rows = connection.execute(sa.select(SESSIONS).where(SESSIONS.c.session_id == session_id)).all()
    if not rows:
        raise session_not_found(session_id)
    return records(connection, rows)[0]


def update_session(connection: sa.Connection, session_id: str, **values: Any) -> None:
    connection.execute(_UPDATE_SESSION, {"of_session": session_id, **values})


def apply(connection: sa.Connection, session_id: str, changes: Iterable[Change]) -> None:
    """What ``SessionContents.apply`` does, in rows."""
    put: set[str] = set()
    for change in changes:
        _apply(connection, session_id, change)
        if isinstance(change, ProgramPut):
            put.add(change.record.program_id)
    for program_id in put:
        which = {"session_id": session_id, "program_id": program_id, "kept": limits.MAX_VERSIONS_KEPT}
        connection.execute(_DROP_OLD_VERSIONS, which)


def _apply(connection: sa.Connection, session_id: str, change: Change) -> None:
    match change:
        case ProgramPut(record=record):
            connection.execute(_PUT_PROGRAM, _program_row(session_id, record))
        case ProgramDeleted(program_id=program_id):
            # Not ``&``: what that makes are cycles, which only the garbage collector ends.
            of_program = sa.and_(PROGRAMS.c.session_id == session_id, PROGRAMS.c.program_id == program_id)
            connection.execute(PROGRAMS.delete().where(of_program))
        case SettingsChanged(settings=settings):
            update_session(connection, session_id, settings=to_json(settings))
        case SessionReset():
            connection.execute(PROGRAMS.delete().where(PROGRAMS.c.session_id == session_id))
            update_session(connection, session_id, settings=to_json(SessionSettings()))
        case Spent():
            update_session(connection, session_id, spent=to_json(change))


def records(connection: sa.Connection, rows: Sequence[Any]) -> list[SessionRecord]:
    """The rows as records, their programs with them."""
    found = [record_without_programs(row) for row in rows]
    contents = {record.session_id: record.contents for record in found}
    query = (
        sa.select(PROGRAMS.c.session_id, PROGRAMS.c.program_id, PROGRAMS.c.record)
        .where(PROGRAMS.c.session_id.in_(contents))
        .order_by(PROGRAMS.c.session_id, PROGRAMS.c.position, PROGRAMS.c.program_id, PROGRAMS.c.version)
    )
    for session_id, program_id, record in connection.execute(query):
        programs = contents[session_id].programs
        programs.setdefault(program_id, []).append(ProgramRecord.model_validate_json(record))
    return found


def record_without_programs(row: Any) -> SessionRecord:
    return SessionRecord(
        session_id=row.session_id,
        owner=row.owner,
        backend=row.backend,
        status=row.status,
        generation=row.generation,
        created_at=datetime.fromisoformat(row.created_at),
        last_activity=datetime.fromisoformat(row.last_activity),
        directory=row.directory,
        journal_offset=row.journal_offset,
        contents=SessionContents(
            settings=SessionSettings.model_validate_json(row.settings), spent=Spent.model_validate_json(row.spent)
        ),
    )


def program_ids(connection: sa.Connection, session_ids: Iterable[str]) -> dict[str, list[str]]:
    """By session, in the order of the programs' making; read off an index, no record is touched."""
    found: dict[str, list[str]] = {session_id: [] for session_id in session_ids}
    query = (
        sa.select(PROGRAMS.c.session_id, PROGRAMS.c.position, PROGRAMS.c.program_id)
        .where(PROGRAMS.c.session_id.in_(found))
        .distinct()
        .order_by(PROGRAMS.c.session_id, PROGRAMS.c.position, PROGRAMS.c.program_id)
    )
    for session_id, _, program_id in connection.execute(query):
        found[session_id].append(program_id)
    return found


def _program_row(session_id: str, record: ProgramRecord) -> dict[str, Any]:
    return {
        "session_id": session_id,
        "program_id": record.program_id,
        "version": record.version,
        "record": to_json(record),
    }


def to_json(model: BaseModel) -> str:
    """A model as a row keeps it.

    Raises:
        InvalidRecord: It holds something that JSON cannot.
    """
    try:
        return model.model_dump_json()
    except PydanticSerializationError as failure:
        raise errors.InvalidRecord(f"a {type(model).__name__} cannot be written as JSON: {failure}") from failure


def to_text(moment: datetime) -> str:
    """A time as a row keeps it.

    Raises:
        InvalidArguments: It has no time zone.
    """
    if moment.tzinfo is None:
        raise errors.InvalidArguments(f"the time {moment} has no time zone: give UTC")
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def session_not_found(session_id: str) -> errors.SessionNotFound:
    return errors.SessionNotFound(
        f"no session {session_id!r}: it was never created, or was destroyed", details={"session_id": session_id}
    )
