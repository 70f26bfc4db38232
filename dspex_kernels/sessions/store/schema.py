"""The store's tables, and how a database of an older version gets them."""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from dspex_kernels import errors

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
    sa.Column("holder", sa.Text),  # a service's id; it may have been removed without freeing the session
)
PROGRAMS = sa.Table(
    "dspex_programs",
    METADATA,
    sa.Column("session_id", sa.Text, primary_key=True),
    sa.Column("program_id", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("record", sa.Text, nullable=False),
    sa.Column("position", sa.BigInteger, nullable=False),  # of the program among its session's, in each version
)
SECRETS = sa.Table(
    "dspex_secrets",
    METADATA,
    sa.Column("session_id", sa.Text, primary_key=True),
    sa.Column("token", sa.LargeBinary, nullable=False),
)
SERVICES = sa.Table(
    "dspex_services",
    METADATA,
    sa.Column("service_id", sa.Text, primary_key=True),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("started_at", sa.Text, nullable=False),
    sa.Column("expires_at", sa.Text, nullable=False),
)
LIBRARY = sa.Table(
    "dspex_library",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("latest", sa.Integer, nullable=False),  # it outlives its versions: no number is given twice
)
VERSIONS = sa.Table(
    "dspex_library_versions",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("record", sa.Text, nullable=False),
    sa.Column("made_by", sa.Text, nullable=False),
    sa.Column("made_at", sa.Text, nullable=False),
)
TARGETS = sa.Table(
    "dspex_library_targets",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("alias", sa.Text, primary_key=True),
    sa.Column("move", sa.Integer, primary_key=True),  # ascending: the last one is where the alias points
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("former", sa.Integer),  # the move that a roll-back repeats; null where there is none
    sa.Column("made_by", sa.Text, nullable=False),
    sa.Column("made_at", sa.Text, nullable=False),
)
SERIAL = sa.Table(
    "dspex_library_serial",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),  # always 1: the table has one row
    sa.Column("serial", sa.BigInteger, nullable=False),
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


def _many_services(connection: sa.Connection) -> None:
    """Version 2: holders, secrets, the program library, the order of programs."""
    is_sqlite = connection.dialect.name == "sqlite"
    blob = "BLOB" if is_sqlite else "BYTEA"
    for statement in (
        "CREATE TABLE dspex_services (service_id TEXT PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, "
        "started_at TEXT NOT NULL, expires_at TEXT NOT NULL)",
        "ALTER TABLE dspex_sessions ADD COLUMN holder TEXT",
        "CREATE INDEX dspex_sessions_by_holder ON dspex_sessions (holder)",
        "CREATE TABLE dspex_secrets (session_id TEXT PRIMARY KEY REFERENCES dspex_sessions ON DELETE CASCADE, "
        f"token {blob} NOT NULL)",
        "CREATE TABLE dspex_library (name TEXT PRIMARY KEY, latest INTEGER NOT NULL)",
        "CREATE TABLE dspex_library_versions (name TEXT NOT NULL REFERENCES dspex_library, "
        "version INTEGER NOT NULL, record TEXT NOT NULL, made_by TEXT NOT NULL, made_at TEXT NOT NULL, "
        "PRIMARY KEY (name, version))",
        "CREATE TABLE dspex_library_targets (name TEXT NOT NULL REFERENCES dspex_library, alias TEXT NOT NULL, "
        "move INTEGER NOT NULL, version INTEGER NOT NULL, former INTEGER, made_by TEXT NOT NULL, "
        "made_at TEXT NOT NULL, PRIMARY KEY (name, alias, move))",
        "CREATE TABLE dspex_library_serial (id INTEGER PRIMARY KEY, serial BIGINT NOT NULL)",
        "INSERT INTO dspex_library_serial (id, serial) VALUES (1, 0)",
        "ALTER TABLE dspex_programs ADD COLUMN position BIGINT NOT NULL DEFAULT 0",
        "CREATE INDEX dspex_programs_by_position ON dspex_programs (session_id, position, program_id)",
    ):
        connection.exec_driver_sql(statement)
    if is_sqlite:  # PostgreSQL does not remember the order of rows: there, they stay in that of their ids
        connection.exec_driver_sql(
            "UPDATE dspex_programs SET position = (SELECT MIN(one.rowid) FROM dspex_programs AS one WHERE "
            "one.session_id = dspex_programs.session_id AND one.program_id = dspex_programs.program_id)"
        )


MIGRATIONS: tuple[Callable[[sa.Connection], None], ...] = (_create_tables, _many_services)
"""The n-th brings a database from version n - 1 to n. A new database runs them all, so a migration is written
without the tables above, which are those of the last version, and is never changed again."""


def migrate(connection: sa.Connection, url: sa.URL) -> None:
    """Bring a database, new or old, to this version.

    Raises:
        StoreError: It is of a newer one.
    """
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
