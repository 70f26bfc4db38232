"""The session store over SQL: SQLite by default, another database by its URL.

All SQL runs on one thread of the store's own, so that the event loop never waits for a disk. A program version is
a row; records and settings are JSON text, which no query looks into.

SQLite runs in WAL mode with ``synchronous=FULL``: the default of WAL, NORMAL, would lose the last transactions in
a power failure, and these were acknowledged. Writers begin with ``BEGIN IMMEDIATE``: a transaction that read
first and then wanted to write would fail at once when another process wrote in between, whatever the timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from dspex_kernels import errors
from dspex_kernels.protocol import limits
from dspex_kernels.protocol.messages import first_problem
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
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions.model import BackendName, SessionRecord
from dspex_kernels.sessions.store import MAX_PAGE, SessionPage, SessionStore

BUSY_TIMEOUT: Final = 10.0
"""Seconds that SQLite waits for another process's write to end."""
CALL_TIMEOUT: Final = 30.0
"""Seconds that a caller waits for the store, its turn included."""
MAX_WAITING: Final = 10_000
"""Calls that may wait for the store's thread; more are refused."""

T = TypeVar("T")

METADATA = sa.MetaData()

SCHEMA = sa.Table(
    "dspex_schema",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),  # always 1: the table has one row
    sa.Column("version", sa.Integer, nullable=False),
)
SESSIONS = sa.Table(
    "dspex_sessions",
    METADATA,
    sa.Column("session_id", sa.Text, primary_key=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("backend", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
    # UTC as text of one width: it sorts as time does, and every database keeps it to the microsecond.
    sa.Column("created_at", sa.Text, nullable=False),
    sa.Column("last_activity", sa.Text, nullable=False),
    sa.Column("directory", sa.Text),
    sa.Column("journal_offset", sa.BigInteger),
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column("spent", sa.Text, nullable=False),
)
PROGRAMS = sa.Table(
    "dspex_programs",
    METADATA,
    sa.Column("session_id", sa.Text, primary_key=True),
    sa.Column("program_id", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("record", sa.Text, nullable=False),
)


def _create_tables(connection: sa.Connection) -> None:
    """Version 1."""
    for statement in (
        "CREATE TABLE dspex_sessions (session_id TEXT PRIMARY KEY, owner TEXT NOT NULL, backend TEXT NOT NULL, "
        "status TEXT NOT NULL, generation INTEGER NOT NULL, created_at TEXT NOT NULL, "
        "last_activity TEXT NOT NULL, directory TEXT, journal_offset BIGINT, settings TEXT NOT NULL, "
        "spent TEXT NOT NULL)",
        "CREATE INDEX dspex_sessions_by_age ON dspex_sessions (created_at, session_id)",
        "CREATE INDEX dspex_sessions_by_owner ON dspex_sessions (owner, created_at, session_id)",
        "CREATE TABLE dspex_programs (session_id TEXT NOT NULL REFERENCES dspex_sessions ON DELETE CASCADE, "
        "program_id TEXT NOT NULL, version INTEGER NOT NULL, record TEXT NOT NULL, "
        "PRIMARY KEY (session_id, program_id, version))",
    ):
        connection.exec_driver_sql(statement)


MIGRATIONS: tuple[Callable[[sa.Connection], None], ...] = (_create_tables,)
"""The n-th brings a database from version n - 1 to n. A new database runs them all, so a migration is written
without the tables above, which are those of the last version, and is never changed again."""


class SQLStore(SessionStore):
    """Keeps sessions in an SQL database.

    Args:
        url: As SQLAlchemy reads it. ``sqlite:////path/file`` (made 0600, its directory 0700), ``sqlite://`` (in
            memory, gone at ``close``), ``postgresql+psycopg://…``.
    """

    def __init__(self, url: str) -> None:
        self._url = _parse_url(url)
        self._engine: sa.Engine | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._waiting = 0  # read and changed on the event loop only

    async def open(self) -> None:
        if self._thread is not None:
            raise errors.StoreError(f"the store {self._url!r} is open already")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dspex-store")
        try:
            await self._run(self._connect)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        last = thread.submit(self._disconnect)
        thread.shutdown(wait=False)
        await self._result(last)

    async def create(self, record: SessionRecord) -> None:
        contents = record.contents
        row = {
            "session_id": record.session_id,
            "owner": record.owner,
            "backend": record.backend,
            "status": str(record.status),
            "generation": record.generation,
            "created_at": _to_text(record.created_at),
            "last_activity": _to_text(record.last_activity),
            "directory": record.directory,
            "journal_offset": record.journal_offset,
            "settings": _to_json(contents.settings),
            "spent": _to_json(contents.spent),
        }
        programs = [
            _program_row(record.session_id, program)
            for versions in contents.programs.values()
            for program in versions[-limits.MAX_VERSIONS_KEPT :]
        ]

        def insert(connection: sa.Connection) -> None:
            if _exists(connection, record.session_id):
                raise _session_exists(record.session_id)
            connection.execute(SESSIONS.insert().values(row))
            if programs:
                connection.execute(PROGRAMS.insert(), programs)

        try:
            await self._write(insert)
        except errors.StoreError as failure:
            # Another process was quicker, where the database lets two look before one writes.
            if isinstance(failure.__cause__, IntegrityError):
                raise _session_exists(record.session_id) from failure
            raise

    async def get(self, session_id: str) -> SessionRecord:
        def select(connection: sa.Connection) -> SessionRecord:
            rows = connection.execute(sa.select(SESSIONS).where(SESSIONS.c.session_id == session_id)).all()
            if not rows:
                raise _session_not_found(session_id)
            return _records(connection, rows)[0]

        return await self._read(select)

    async def list(self, owner: str | None = None, *, limit: int = 100, after: str | None = None) -> SessionPage:
        if not 1 <= limit <= MAX_PAGE:
            raise errors.InvalidArguments(f"limit {limit} is out of range: give 1 to {MAX_PAGE}")
        query = sa.select(SESSIONS).order_by(SESSIONS.c.created_at, SESSIONS.c.session_id).limit(limit + 1)
        if owner is not None:
            query = query.where(SESSIONS.c.owner == owner)
        if after is not None:
            query = query.where(sa.tuple_(SESSIONS.c.created_at, SESSIONS.c.session_id) > _parse_cursor(after))

        def select(connection: sa.Connection) -> SessionPage:
            rows = connection.execute(query).all()
            shown = rows[:limit]
            more = len(rows) > limit
            cursor = f"{shown[-1].created_at}~{shown[-1].session_id}" if more else None
            return SessionPage(tuple(_records(connection, shown)), cursor)

        return await self._read(select)

    async def count(self, owner: str | None = None) -> int:
        query = sa.select(sa.func.count()).select_from(SESSIONS)
        if owner is not None:
            query = query.where(SESSIONS.c.owner == owner)
        return await self._read(lambda connection: int(connection.execute(query).scalar_one()))

    async def delete(self, session_id: str) -> bool:
        statement = SESSIONS.delete().where(SESSIONS.c.session_id == session_id)
        return await self._write(lambda connection: connection.execute(statement).rowcount > 0)

    async def save_changes(
        self, session_id: str, changes: Sequence[Change], journal_offset: int | None = None
    ) -> None:
        changes = list(changes)  # the caller may go on with its own

        def save(connection: sa.Connection) -> None:
            if not _exists(connection, session_id):
                raise _session_not_found(session_id)
            for change in changes:
                _apply(connection, session_id, change)
            for program_id in {c.record.program_id for c in changes if isinstance(c, ProgramPut)}:
                _drop_old_versions(connection, session_id, program_id)
            if journal_offset is not None:
                _update_session(connection, session_id, journal_offset=journal_offset)

        await self._write(save)

    async def touch(self, session_id: str, last_activity: datetime) -> None:
        moment = _to_text(last_activity)
        later = sa.case((SESSIONS.c.last_activity < moment, moment), else_=SESSIONS.c.last_activity)
        await self._update(session_id, last_activity=later)

    async def set_generation(self, session_id: str, generation: int) -> None:
        await self._update(session_id, generation=generation)

    async def set_status(self, session_id: str, status: SessionStatus) -> None:
        await self._update(session_id, status=str(status))

    async def set_backend(self, session_id: str, backend: BackendName, directory: str | None) -> None:
        await self._update(session_id, backend=backend, directory=directory, journal_offset=None)

    async def _update(self, session_id: str, **values: Any) -> None:
        def update(connection: sa.Connection) -> None:
            if not _update_session(connection, session_id, **values):
                raise _session_not_found(session_id)

        await self._write(update)

    async def _read(self, work: Callable[[sa.Connection], T]) -> T:
        return await self._run(lambda: self._transact(work, writes=False))

    async def _write(self, work: Callable[[sa.Connection], T]) -> T:
        return await self._run(lambda: self._transact(work, writes=True))

    async def _run(self, work: Callable[[], T]) -> T:
        """Do work on the store's thread, in the order asked."""
        if self._thread is None:
            raise errors.StoreError(
                f"the store {self._url!r} is not open: call open() first, and not after close()"
            )
        if self._waiting >= MAX_WAITING:
            raise errors.StoreError(
                f"the store {self._url!r} has {self._waiting:,} calls waiting, its limit: ask again later",
                retry_after=1.0,
            )
        self._waiting += 1
        try:
            return await self._result(self._thread.submit(work))
        finally:
            self._waiting -= 1

    async def _result(self, future: Future[T]) -> T:
        try:
            # Cancelled or late, a call that has begun still ends as a whole; one that has not is dropped.
            return await asyncio.wait_for(asyncio.wrap_future(future), CALL_TIMEOUT)
        except TimeoutError:
            raise errors.StoreError(
                f"the store {self._url!r} did not answer within {CALL_TIMEOUT:g} s; the change may still be "
                "made: look before asking again"
            ) from None  # the cause says nothing more

    def _connect(self) -> None:
        with self._told():
            self._engine = _make_engine(self._url)
        self._transact(lambda connection: _migrate(connection, self._url), writes=True)

    def _disconnect(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            with self._told():
                engine.dispose()

    def _transact(self, work: Callable[[sa.Connection], T], *, writes: bool) -> T:
        assert self._engine is not None  # _run refuses what comes before open
        with (
            self._told(),
            self._engine.connect() as connection,
            connection.execution_options(dspex_writes=writes).begin(),
        ):
            return work(connection)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turns what the database or the disk refuses into a StoreError of one line."""
        try:
            yield
        except (SQLAlchemyError, OSError) as failure:
            # SQLAlchemy's own text spans lines and tells the statement; the driver's is to the point.
            reason = str(getattr(failure, "orig", None) or failure).strip().partition("\n")[0]
            raise errors.StoreError(f"the store {self._url!r} failed: {reason}") from failure
        except (OverflowError, UnicodeEncodeError) as failure:  # of the driver: the value fits no column
            raise errors.InvalidArguments(
                f"the store cannot hold this value: {type(failure).__name__}: {str(failure)[:200]}"
            ) from None  # the cause would carry the value
        except ValidationError as failure:
            raise errors.StoreError(
                f"the store {self._url!r} holds a record that this version cannot read: {first_problem(failure)}"
            ) from failure


def _parse_url(url: str) -> sa.URL:
    try:
        return sa.make_url(url)
    except ArgumentError:
        # The cause would repeat the text, a password perhaps among it.
        raise errors.StoreError(
            "the store's URL cannot be read: give one like sqlite:////path/sessions.sqlite"
        ) from None


def _make_engine(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() != "sqlite":
        try:
            return sa.create_engine(url, pool_pre_ping=True, hide_parameters=True)
        except ModuleNotFoundError as failure:
            raise errors.DependencyMissing(
                f"the store {url!r} needs the package {failure.name!r}: install it"
            ) from failure
    database = url.database or ":memory:"
    if database != ":memory:" and not database.startswith("file:"):
        _make_file(Path(database))
    engine = sa.create_engine(
        url,
        poolclass=StaticPool,  # one connection for the one thread, and in memory the database itself
        connect_args={"timeout": BUSY_TIMEOUT},
        hide_parameters=True,
    )
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _make_file(path: Path) -> None:
    """Prompts and programs are their owner's: SQLite would make the file as readable as the umask says.

    The file gets its name only when it is closed again: closing any descriptor of a database drops the locks
    that this process holds on it (https://www.sqlite.org/howtocorrupt.html, section 2.2), another store's too.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        os.close(descriptor)
        try:
            with contextlib.suppress(FileExistsError):  # another store was quicker, as well
                os.link(temporary, path)
        finally:
            Path(temporary).unlink()
    path.chmod(0o600)


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins no transaction by itself: _begin_sqlite does
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("dspex_writes", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(connection: sa.Connection, url: sa.URL) -> None:
    known = len(MIGRATIONS)
    SCHEMA.create(connection, checkfirst=True)
    version = connection.execute(sa.select(SCHEMA.c.version)).scalar_one_or_none()
    if version is None:
        connection.execute(SCHEMA.insert().values(id=1, version=0))
    if (version or 0) > known:
        raise errors.StoreError(
            f"the store {url!r} has schema version {version}, this dspex-kernels knows {known}: use the newer "
            "dspex-kernels that wrote it, or another SessionService.store_url",
            details={"theirs": version, "ours": known},
        )
    for migration in MIGRATIONS[version or 0 :]:
        migration(connection)
    connection.execute(SCHEMA.update().values(version=known))


def _exists(connection: sa.Connection, session_id: str) -> bool:
    # The lock keeps two writers of one session apart where several may write at once (PostgreSQL).
    query = sa.select(SESSIONS.c.session_id).where(SESSIONS.c.session_id == session_id).with_for_update()
    return connection.execute(query).first() is not None


def _update_session(connection: sa.Connection, session_id: str, **values: Any) -> bool:
    statement = SESSIONS.update().where(SESSIONS.c.session_id == session_id).values(values)
    return connection.execute(statement).rowcount > 0


def _apply(connection: sa.Connection, session_id: str, change: Change) -> None:
    """What ``SessionContents.apply`` does, in rows."""
    of_session = PROGRAMS.delete().where(PROGRAMS.c.session_id == session_id)
    match change:
        case ProgramPut(record=record):
            same = (PROGRAMS.c.program_id == record.program_id) & (PROGRAMS.c.version == record.version)
            connection.execute(of_session.where(same))
            connection.execute(PROGRAMS.insert().values(_program_row(session_id, record)))
        case ProgramDeleted(program_id=program_id):
            connection.execute(of_session.where(PROGRAMS.c.program_id == program_id))
        case SettingsChanged(settings=settings):
            _update_session(connection, session_id, settings=_to_json(settings))
        case SessionReset():
            connection.execute(of_session)
            _update_session(connection, session_id, settings=_to_json(SessionSettings()))
        case Spent():
            _update_session(connection, session_id, spent=_to_json(change))


def _drop_old_versions(connection: sa.Connection, session_id: str, program_id: str) -> None:
    of_program = (PROGRAMS.c.session_id == session_id) & (PROGRAMS.c.program_id == program_id)
    newest_dropped = connection.execute(
        sa.select(PROGRAMS.c.version)
        .where(of_program)
        .order_by(PROGRAMS.c.version.desc())
        .offset(limits.MAX_VERSIONS_KEPT)
        .limit(1)
    ).scalar_one_or_none()
    if newest_dropped is not None:
        connection.execute(PROGRAMS.delete().where(of_program & (PROGRAMS.c.version <= newest_dropped)))


def _records(connection: sa.Connection, rows: Sequence[Any]) -> list[SessionRecord]:
    """The rows as records, their programs with them."""
    contents = {
        row.session_id: SessionContents(
            settings=SessionSettings.model_validate_json(row.settings), spent=Spent.model_validate_json(row.spent)
        )
        for row in rows
    }
    query = (
        sa.select(PROGRAMS.c.session_id, PROGRAMS.c.program_id, PROGRAMS.c.record)
        .where(PROGRAMS.c.session_id.in_(contents))
        .order_by(PROGRAMS.c.session_id, PROGRAMS.c.program_id, PROGRAMS.c.version)
    )
    for session_id, program_id, record in connection.execute(query):
        programs = contents[session_id].programs
        programs.setdefault(program_id, []).append(ProgramRecord.model_validate_json(record))
    return [
        SessionRecord(
            session_id=row.session_id,
            owner=row.owner,
            backend=row.backend,
            status=row.status,
            generation=row.generation,
            created_at=datetime.fromisoformat(row.created_at),
            last_activity=datetime.fromisoformat(row.last_activity),
            directory=row.directory,
            journal_offset=row.journal_offset,
            contents=contents[row.session_id],
        )
        for row in rows
    ]


def _program_row(session_id: str, record: ProgramRecord) -> dict[str, Any]:
    return {
        "session_id": session_id,
        "program_id": record.program_id,
        "version": record.version,
        "record": _to_json(record),
    }


def _to_json(model: BaseModel) -> str:
    try:
        return model.model_dump_json()
    except PydanticSerializationError as failure:
        raise errors.InvalidRecord(f"a {type(model).__name__} cannot be written as JSON: {failure}") from failure


def _to_text(moment: datetime) -> str:
    if moment.tzinfo is None:
        raise errors.InvalidArguments(f"the time {moment} has no time zone: give UTC")
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def _parse_cursor(cursor: str) -> tuple[str, str]:
    created_at, found, session_id = cursor.partition("~")
    if not found:
        raise errors.InvalidArguments(f"{cursor[:128]!r} is no cursor of a page: give a page's next_cursor")
    return created_at, session_id


def _session_exists(session_id: str) -> errors.SessionExists:
    return errors.SessionExists(
        f"session {session_id!r} exists: choose another id, or get_session()", details={"session_id": session_id}
    )


def _session_not_found(session_id: str) -> errors.SessionNotFound:
    return errors.SessionNotFound(
        f"no session {session_id!r}: it was never created, or was destroyed", details={"session_id": session_id}
    )
