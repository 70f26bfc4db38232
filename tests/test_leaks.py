"""A test that leaves something behind fails, whatever it leaves; what ends a moment later is forgiven."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from tests import leaks
from tests.conftest import DIRECTORIES, RUN_ID

pytest_plugins = ["pytester"]

LEAKY = """
import os, socket, subprocess, sys, tempfile, threading
from pathlib import Path
import pytest
from tests import leaks

leaks.SETTLE_S = 0.2
done = threading.Event()
kept = []

def teardown_module():
    done.set()

def test_clean():
    with tempfile.NamedTemporaryFile():
        subprocess.run(["true"], check=True)

def test_late_thread():
    threading.Thread(target=done.wait, args=(0.1,)).start()

def test_progress_bar():
    import tqdm
    assert list(tqdm.tqdm(range(3))) == [0, 1, 2]

def test_child():
    kept.append(subprocess.Popen(["sleep", "61"]))

def test_unreaped_child():
    pid = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

def test_orphan():
    subprocess.run("setsid sleep 62 >/dev/null 2>&1 &", shell=True, check=True)

def test_orphan_without_environment():
    code = "import subprocess, sys; subprocess.Popen(['tail', '-f', '/dev/null', sys.argv[1]], env={})"
    name = os.environ["JUPYTER_RUNTIME_DIR"] + "/../kernel-1.json"
    Path(name).touch()
    subprocess.run([sys.executable, "-c", code, name], check=True, stderr=subprocess.DEVNULL)

def test_thread():
    threading.Thread(target=done.wait, name="forgotten").start()

def test_daemon():
    threading.Thread(target=done.wait, name="lurking", daemon=True).start()

def test_file(tmp_path):
    kept.append((tmp_path / "report").open("w"))

def test_listener():
    kept.append(socket.create_server(("127.0.0.1", 0)))

def test_connection_file():
    Path(os.environ["JUPYTER_RUNTIME_DIR"], "kernel-2.json").touch()

def test_unix_socket():
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.environ["JUPYTER_RUNTIME_DIR"] + "/kernel-2-ipc-1")

def test_temporary_file():
    tempfile.mkstemp(prefix="draft")[0]
"""

EXPECTED = {
    "child": "process * (sleeping): sleep 61",
    "unreaped_child": "process * (zombie): true",
    "orphan": "process * (sleeping): sleep 62",
    "orphan_without_environment": "process * (sleeping): tail -f /dev/null */kernel-1.json",
    "thread": "thread 'forgotten'",
    "daemon": "thread 'lurking' (daemon)",
    "file": "open file *: */report",
    "listener": "open file *: socket:* LISTEN *",
    "connection_file": "runtime file kernel-2.json",
    "unix_socket": "runtime file kernel-2-ipc-1",
    "temporary_file": "temporary file draft*",
}

LEAKY_MODULE = """
import subprocess
import pytest
from tests import leaks

leaks.SETTLE_S = 0.2

@pytest.fixture(scope="module")
def service():
    return subprocess.Popen("setsid sleep 63 >/dev/null 2>&1 &", shell=True).wait()

def test_service(service):
    assert service == 0
"""


@pytest.fixture
def watched(pytester, monkeypatch):
    """Runs a test file in a process of its own, under the same watch as this one."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)

    def run(source: str) -> pytest.RunResult:
        pytester.makepyfile(source)
        return pytester.runpytest_subprocess("-p", "tests.conftest", "-p", "no:cacheprovider", timeout=60)

    return run


def test_every_kind_of_leak_fails_its_test_and_is_named(watched):
    result = watched(LEAKY)
    output = result.stdout.str()
    result.assert_outcomes(passed=len(EXPECTED) + 3, errors=len(EXPECTED))
    for test, line in EXPECTED.items():
        assert f"ERROR at teardown of test_{test} " in output
        result.stdout.fnmatch_lines([f"*{line}"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_what_a_wider_fixture_leaves_fails_the_whole_run_and_is_ended(watched):
    result = watched(LEAKY_MODULE)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*left behind by the whole run*", "process * (sleeping): sleep 63"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    pid = int(next(line for line in result.outlines if line.endswith("sleep 63")).split()[1])
    # An orphan's init may be slow to reap it; it holds nothing any more.
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_failed_test_is_not_blamed_for_what_its_traceback_keeps_open(watched):
    result = watched(
        """
        import socket
        def test_fails():
            server = socket.create_server(("127.0.0.1", 0))
            assert False
        """
    )
    result.assert_outcomes(failed=1)
    assert "left behind" not in result.stdout.str()


def test_the_directory_of_a_run_is_gone_after_it(watched):
    result = watched(
        """
        import os
        def test_clean():
            print("ROOT", os.environ["JUPYTER_RUNTIME_DIR"])
            assert False  # so that the output is shown
        """
    )
    runtime = next(line for line in result.outlines if line.startswith("ROOT")).split()[1]
    assert runtime.endswith("/run")
    assert not Path(runtime).parent.exists()


def test_looking_costs_less_than_five_milliseconds():
    costs = []
    for _ in range(20):
        started = time.perf_counter()
        before = leaks.Snapshot.take(RUN_ID, DIRECTORIES)
        assert leaks.leaks_since(before) == []
        costs.append(time.perf_counter() - started)
    assert min(costs) < 0.005


def test_nothing_of_a_run_is_kept_in_the_users_home():
    for name, value in DIRECTORIES.environment().items():
        assert os.environ[name] == value
        assert Path(value).is_relative_to(DIRECTORIES.root)


def test_a_connection_files_ipc_socket_fits_into_a_socket_address():
    longest = DIRECTORIES.runtime / f"kernel-{RUN_ID}-{RUN_ID[:4]}-ipc-5"
    assert len(str(longest)) < 107
