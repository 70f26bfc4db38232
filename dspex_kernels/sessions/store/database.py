"""The database under the store: how it is opened, asked in transactions, measured and copied.

SQLite runs in WAL mode with ``synchronous=FULL``: the default of WAL, NORMAL, would lose the last transactions in
a power failure, and these were acknowledged. Writers begin with ``BEGIN IMMEDIATE``: a transaction that read
first and then wanted to write would fail at once when another process wrote in between, whatever the timeout.

PostgreSQL gets the same order of things, one writer at a time, from an advisory lock: a transaction carries many
sessions' writes, and two such would deadlock on rows they take in different orders. A writer that is stopped, or
whose machine is gone, must not keep the others from writing: the server ends its transaction.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.exc import ArgumentError, DataError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from dspex_kernels import errors
from dspex_kernels.protocol.messages import first_problem
from dspex_kernels.sessions.store.schema import METADATA, migrate

BUSY_TIMEOUT: Final = 10.0
"""Seconds that a write waits for another process's write to end."""
WRITERS_LOCK: Final = 0x64737065
"""PostgreSQL's advisory lock of whoever writes; any number that no other program of the database uses."""
IDLE_TIMEOUT: Final = 10.0
"""Seconds that a PostgreSQL transaction may be open without a word from us: from then on others may write."""
LIBPQ_OPTIONS: Final = {
    "connect_timeout": 10,  # seconds
    "keepalives_idle": 10,  # seconds
    "keepalives_interval": 5,  # seconds
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # milliseconds
}
"""A server that is cut off is noticed in half a minute. By themselves, TCP and libpq take up to two hours."""
WRITE_AHEAD: Final = "PRAGMA journal_mode=WAL"
_OF_THE_DATABASE: Final = (SQLAlchemyError, sqlite3.Error, OSError)


class Database:
    """A database by its URL. All but ``back_up`` is called on one thread.

    Args:
        url: As SQLAlchemy reads it.

    Raises:
        StoreError: The URL cannot be read, or is of another database than SQLite and PostgreSQL.
    """

    def __init__(self, url: str) -> None:
        self.url = _parse_url(url)
        self._is_sqlite = self.url.get_backend_name() == "sqlite"
        self._engine: sa.Engine | None = None

    @property
    def is_in_memory(self) -> bool:
        """Whether it is SQLite's, gone when it is closed."""
        if not self._is_sqlite:
            return False
        return ":memory:" in (self.url.database or ":memory:") or self.url.query.get("mode") == "memory"

    def open(self) -> None:
        """Reach it, and give it the tables of this version."""
        with self.told():
            self._engine = _make_engine(self.url)
            with self.transaction(writes=True) as connection:
                migrate(connection, self.url)

    def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            with self.told():
                engine.dispose()

    @contextlib.contextmanager
    def transaction(self, *, writes: bool) -> Iterator[sa.Connection]:
        """One transaction: committed at the end, or rolled back as a whole. What fails is not translated."""
        assert self._engine is not None  # the store's thread runs nothing before open
        options: dict[str, Any] = {"dspex_writes": writes}
        if not self._is_sqlite:
            # All statements of a read see one moment. Those of a write see what the writers before it committed:
            # one moment, whatever the server's default, would be that before it waited for their lock.
            options["isolation_level"] = "READ COMMITTED" if writes else "REPEATABLE READ"
        with self._engine.connect() as connection, connection.execution_options(**options).begin():
            yield connection

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Turns what the database or the disk refuses into an error of ours, of one line."""
        try:
            yield
        except (*_OF_THE_DATABASE, OverflowError, UnicodeEncodeError, ValidationError) as failure:
            # A cause that could carry the value that was refused is left out.
            hidden = isinstance(failure, OverflowError | UnicodeEncodeError | DataError)
            raise self.translated(failure) from (None if hidden else failure)

    def translated(self, failure: Exception) -> Exception:
        """The error of ours, new for each who is told it; what is ours or nobody's stays as it is."""
        if isinstance(failure, OverflowError | UnicodeEncodeError | DataError):  # the value fits no column
            reason = _reason(failure) if isinstance(failure, DataError) else str(failure)
            return errors.InvalidArguments(
                f"the store cannot hold this value: {type(failure).__name__}: {reason[:200]}"
            )
        if isinstance(failure, ValidationError):
            problem = first_problem(failure)
            return errors.StoreError(
                f"the store {self.url!r} holds a record that this version cannot read: {problem}"
            )
        if isinstance(failure, _OF_THE_DATABASE):
            return errors.StoreError(f"the store {self.url!r} failed: {_reason(failure)}")
        return failure

    def size(self, connection: sa.Connection) -> int:
        """Bytes: SQLite's pages, PostgreSQL's tables with their indexes."""
        if self._is_sqlite:
            pages, page_size = (
                connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in ("page_count", "page_size")
            )
            return int(pages * page_size)
        sizes = (sa.func.pg_total_relation_size(sa.func.to_regclass(name)) for name in METADATA.tables)
        return sum(connection.execute(sa.select(*sizes)).one())

    def back_up(self, path: Path) -> None:
        """Copy a SQLite database into a new file, beside those who use it; ``path`` appears when it is whole.

        Raises:
            StoreError: ``SessionStore.backup`` tells when.
        """
        if not self._is_sqlite:
            raise errors.StoreError(
                f"the store {self.url!r} is backed up by PostgreSQL's own tool: {self._dump_command(path)}"
            )
        with self.told():
            # A connection of its own: others read and write meanwhile. In memory, there is only the one.
            engine = self._engine if self.is_in_memory else _make_engine(self.url)
            assert engine is not None  # the store's thread runs nothing before open
            try:
                with contextlib.closing(engine.raw_connection()) as connection:
                    _vacuum_into(connection, path)
            except FileExistsError:
                raise errors.StoreError(f"{path} exists: give the backup another name") from None  # it says all
            finally:
                if engine is not self._engine:
                    engine.dispose()

    def _dump_command(self, path: Path) -> str:
        # Without the password: pg_dump reads PGPASSWORD or ~/.pgpass.
        source = self.url.set(drivername="postgresql", password=None).render_as_string()
        return f"pg_dump --format=custom --table='dspex_*' --file={shlex.quote(str(path))} {shlex.quote(source)}"


def _reason(failure: Exception) -> str:
    # SQLAlchemy's own text spans lines and tells the statement; the driver's is to the point.
    return str(getattr(failure, "orig", None) or failure).strip().partition("\n")[0]


def _parse_url(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except ArgumentError:
        # The cause would repeat the text, a password perhaps among it.
        raise errors.StoreError(
            "the store's URL cannot be read: give one like sqlite:////path/sessions.sqlite"
        ) from None
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise errors.StoreError(
            f"a store cannot be kept in {parsed.get_backend_name()}: give the URL of SQLite "
            "(sqlite:////path/sessions.sqlite) or PostgreSQL (postgresql+psycopg://user@host/database)"
        )
    return parsed


def _make_engine(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() != "sqlite":
        return _make_postgresql_engine(url)
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


def _make_postgresql_engine(url: sa.URL) -> sa.Engine:
    uses_libpq = url.get_driver_name() in ("psycopg", "psycopg2")
    options = {name: value for name, value in LIBPQ_OPTIONS.items() if uses_libpq and name not in url.query}
    try:
        engine = sa.create_engine(url, connect_args=options, pool_pre_ping=True, hide_parameters=True)
    except ModuleNotFoundError as failure:
        remedy = "pip install 'dspex-kernels[postgres]'" if failure.name == "psycopg" else "install it"
        raise errors.DependencyMissing(
            f"the store {url!r} needs the package {failure.name!r}: {remedy}"
        ) from failure
    sa.event.listen(engine, "begin", _begin_postgresql)
    return engine


def _make_file(path: Path) -> None:
    """Prompts and programs are their owner's: SQLite would make the file as readable as the umask says.

    The file gets its name only when it is closed again: closing any descriptor of a database drops the locks
    that this process holds on it (https://www.sqlite.org/howtocorrupt.html, section 2.2), another store's too.

    It is in write-ahead mode before others can open it: of several that change the mode of one database at once,
    SQLite refuses all but one without waiting.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        os.close(descriptor)
        try:
            with contextlib.closing(sqlite3.connect(temporary)) as connection:
                connection.execute(WRITE_AHEAD)
            with contextlib.suppress(FileExistsError):  # another store was quicker, as well
                os.link(temporary, path)
        finally:
            Path(temporary).unlink()
    path.chmod(0o600)


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins no transaction by itself: _begin_sqlite does
    cursor = connection.cursor()
    for pragma in (WRITE_AHEAD, "PRAGMA synchronous=FULL", "PRAGMA foreign_keys=ON"):
        cursor.execute(pragma)
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("dspex_writes", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _begin_postgresql(connection: sa.Connection) -> None:
    if connection.get_execution_options().get("dspex_writes", True):
        # One round trip: the timeouts, of this transaction alone, are set before the lock is asked for.
        timeouts = {"lock_timeout": BUSY_TIMEOUT, "idle_in_transaction_session_timeout": IDLE_TIMEOUT}
        settings = (f"set_config('{name}', '{int(value * 1000)}', true)" for name, value in timeouts.items())
        connection.exec_driver_sql(f"SELECT {', '.join(settings)}, pg_advisory_xact_lock({WRITERS_LOCK})")


def _vacuum_into(connection: Any, path: Path) -> None:
    """SQLite's own copy: of one moment, without free pages, and without a write-ahead log of its own."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600, and empty
    try:
        cursor = connection.cursor()
        cursor.execute("VACUUM INTO ?", (temporary,))
        cursor.close()
        os.fsync(descriptor)  # SQLite leaves that to us
        os.link(temporary, path)  # unlike a rename, it replaces nothing
    finally:
        os.close(descriptor)
        Path(temporary).unlink()
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # so that the name survives a power failure too
    finally:
        os.close(directory)
