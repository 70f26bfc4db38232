"""A real PostgreSQL server for tests, started and ended by them; a database of its own for each test that asks.

A test module that wants it says ``pytest_plugins = ["tests.postgres"]``. The server's fixture is the session's, so
it is running before a test's first look at what is there (``tests.leaks``); its processes come and go with the
stores' connections, and start with an environment that does not mark them as the run's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.waiting import wait_for

INSTALL = "apt-get install -y postgresql, and pip install 'psycopg[binary]'"
_SETTINGS = {
    "listen_addresses": "",  # only its socket, in a directory of its own
    "fsync": "off",  # the tests kill those who use the server, never the machine
    "autovacuum": "off",  # its workers would start at any time
    "max_connections": "60",
    "shared_buffers": "16MB",
}


def missing() -> str | None:
    """Why there can be no server on this machine, and the remedy; None when there can."""
    if importlib.util.find_spec("psycopg") is None:
        return f"psycopg is not installed: {INSTALL}"
    if _binary("initdb") is None or _binary("postgres") is None:
        return f"no PostgreSQL server is installed: {INSTALL}"
    if os.geteuid() == 0 and "postgres" not in [user.pw_name for user in pwd.getpwall()]:
        return f"PostgreSQL refuses to run as root, and there is no user 'postgres': {INSTALL}"
    return None


def _binary(name: str) -> str | None:
    """Debian keeps them out of PATH, a directory for each version."""
    versions = sorted(Path("/usr/lib/postgresql").glob("[0-9]*"), key=lambda path: int(path.name), reverse=True)
    return shutil.which(name, path=os.pathsep.join([*(f"{path}/bin" for path in versions), os.environ["PATH"]]))


@dataclass
class PostgresServer:
    """A running server."""

    directory: Path
    """Its data and its socket."""
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """The URL of a new, empty database, which is dropped at the end: nobody may be connected by then."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        yield f"postgresql+psycopg://dspex@/{name}?host={self.directory}"
        self.execute(f"DROP DATABASE {name}")

    def execute(self, statement: str) -> None:
        """Run a statement of the server's own, outside of any transaction."""
        import psycopg

        with psycopg.connect(host=str(self.directory), user="dspex", dbname="postgres", autocommit=True) as it:
            it.execute(statement)  # type: ignore[arg-type]  # a literal of the tests


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The run's one server; without PostgreSQL on the machine, the test is skipped."""
    if reason := missing():
        pytest.skip(reason)
    # Not in the run's directory: the server's user cannot enter that, and a socket's path ends at 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="dspex-pg-", dir="/tmp"))
    process: subprocess.Popen[bytes] | None = None
    try:
        process = _start(directory)
        server = PostgresServer(directory)
        _wait_until_ready(server, process)
        yield server
    finally:
        if process is not None:
            process.terminate()  # no new connections; it ends with the last one
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:  # a test left a connection, and was told so
                process.kill()
                process.wait(timeout=10)
        shutil.rmtree(directory)


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A new database of the run's server."""
    with postgres_server.database() as url:
        yield url


def _start(directory: Path) -> subprocess.Popen[bytes]:
    user = _server_user()
    if user is not None:
        os.chown(directory, user.pw_uid, user.pw_gid)
    account = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    data = directory / "data"
    initdb = [
        _binary("initdb"),
        "--pgdata",
        data,
        "--username=dspex",
        "--auth=trust",
        "--encoding=UTF8",
        "--no-sync",
    ]
    done = subprocess.run(
        initdb, cwd=directory, env=environment, capture_output=True, text=True, timeout=60, **account
    )
    assert done.returncode == 0, done.stderr
    settings = [part for name, value in _SETTINGS.items() for part in ("-c", f"{name}={value}")]
    with (directory / "log").open("wb") as log:
        return subprocess.Popen(
            [_binary("postgres"), "-D", data, "-k", directory, *settings],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            **account,
        )


def _server_user() -> pwd.struct_passwd | None:
    """PostgreSQL refuses to be root's: then it is run as the user that its package makes."""
    return pwd.getpwnam("postgres") if os.geteuid() == 0 else None


def _wait_until_ready(server: PostgresServer, process: subprocess.Popen[bytes]) -> None:
    import psycopg

    def is_ready() -> bool:
        assert process.poll() is None, (server.directory / "log").read_text()
        try:
            server.execute("SELECT 1")
        except psycopg.OperationalError:  # it is still starting
            return False
        return True

    wait_for(is_ready, deadline=60, what="PostgreSQL to start")
