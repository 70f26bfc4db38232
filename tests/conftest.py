"""What every test stands on: a home of its own for the run, the watch over leaks, the LM server."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import leaks
from tests.waiting import wait_for

RUN_ID = uuid.uuid4().hex
# Short, for an ipc socket's path ends at 107 bytes; made now, for libraries read their variables when imported.
DIRECTORIES = leaks.RunDirectories(Path(tempfile.mkdtemp(prefix="dspex-test-")))

_UNWANTED = (
    # A base URL or a proxy in the environment would send the tests' requests elsewhere, or through litellm.
    *("OPENAI_API_BASE", "OPENAI_BASE_URL", "OPENAI_API_KEY"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"),
    # A kernel started by a test must not watch the process that watches us.
    *("JPY_PARENT_PID", "JPY_SESSION_NAME", "JUPYTER_PATH", "JUPYTER_PLATFORM_DIRS"),
)


_FAILED = pytest.StashKey[bool]()


def _set_environment() -> None:
    for name in _UNWANTED:
        os.environ.pop(name, None)
    for name in [name for name in os.environ if name.startswith("DSPEX_") and name != "DSPEX_STRESS"]:
        del os.environ[name]
    DIRECTORIES.make()
    os.environ.update(DIRECTORIES.environment())
    os.environ.update(
        {
            leaks.RUN_VARIABLE: RUN_ID,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else the first call fetches prices from the network
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "PYTHONUNBUFFERED": "1",
        }
    )
    tempfile.tempdir = None  # it was cached before TMPDIR was set


_set_environment()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Called before the workers are counted: stress tests measure, so nothing else runs beside them."""
    if config.option.markexpr == "stress":
        config.option.numprocesses, config.option.dist = 0, "no"


# These read the environment when they are imported.
from tests.lm_server import LMServer  # noqa: E402  # see above


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the test that leaves a process, thread, open file, socket or temporary file.

    Fixtures of a wider scope are set up before it, so what they start is theirs to end.
    """
    before = leaks.Snapshot.take(RUN_ID, DIRECTORIES)
    yield
    left = leaks.leaks_since(before, in_process=not request.node.stash.get(_FAILED, False))
    if left:
        leaks.end_processes(before)
        pytest.fail("the test left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report


@pytest.fixture(autouse=True, scope="session")
def _process_wide() -> Iterator[None]:
    """Opens what libraries open once per process, so that no test is blamed for it."""
    import zmq
    import zmq.utils.garbage as garbage
    from jupyter_core.utils import ensure_event_loop

    loop = ensure_event_loop()  # blocking Jupyter clients run on it
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    # The first large message starts pyzmq's thread that frees them.
    with context.socket(zmq.PAIR) as sender, context.socket(zmq.PAIR) as receiver:
        sender.bind("inproc://first-large-message")
        receiver.connect("inproc://first-large-message")
        sender.send(bytes(2 * zmq.COPY_THRESHOLD), copy=False)
        receiver.recv()
    yield
    garbage.gc.stop()
    context.destroy(linger=0)
    if not loop.is_closed():
        loop.close()


@pytest.fixture(autouse=True, scope="session")
def _shared_guardian(_process_wide: None) -> Iterator[None]:
    """The guardian of kernels that no service owns, which stays for the next of them, until the run's end."""
    from dspex_kernels.provisioning.guardian_client import unsupported
    from dspex_kernels.provisioning.provisioner import shared_guardians

    if unsupported() is not None:
        yield
        return
    guardians = shared_guardians()
    guardian = guardians.join()
    guardian.ready.result(30)
    wait_for(lambda: guardian.pid is not None, deadline=30, what="the guardian")
    yield
    guardians.linger = 0
    ended = guardians.leave(guardian)
    assert ended is not None
    ended.result(30)


@pytest.fixture(autouse=True)
def _remembers_no_answer() -> Iterator[None]:
    """Gives each test an empty ``dspy.cache``: a question asked before would reach no server."""
    before = _dspy_cache()
    yield
    after = _dspy_cache()
    for cache in (before, after):
        if cache is not None:
            cache.reset_memory_cache()
            if cache.enable_disk_cache:
                cache.disk_cache.clear()
    if after is not before:
        if before is None:
            del vars(sys.modules["dspy"])["cache"]  # DSPy builds one when it is next read
        else:
            vars(sys.modules["dspy"])["cache"] = before


def _dspy_cache() -> Any:
    return vars(sys.modules["dspy"]).get("cache") if "dspy" in sys.modules else None


@pytest.fixture
def make_lm_server() -> Iterator[Callable[[], LMServer]]:
    """Makes as many LM servers as a test wants, and closes them."""
    servers: list[LMServer] = []

    def make() -> LMServer:
        servers.append(LMServer())
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def lm_server(make_lm_server: Callable[[], LMServer]) -> LMServer:
    """One LM server."""
    return make_lm_server()


class _WholeRun:
    """The last look, when the fixtures of every scope are gone: whatever is left fails the run."""

    def __init__(self) -> None:
        self._left: list[str] = []

    def pytest_sessionstart(self) -> None:
        self._before = leaks.Snapshot.take(RUN_ID, DIRECTORIES)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._left = leaks.leaks_since(self._before, in_process=not session.testsfailed)
        leaks.end_processes(self._before)
        if self._left and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._left:
            terminalreporter.section("left behind by the whole run", red=True, bold=True)
            for line in self._left:
                terminalreporter.line(line)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_WholeRun(), "dspex-whole-run")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    shutil.rmtree(DIRECTORIES.root, ignore_errors=True)
