"""A kernel that was built before a fork is, in the child, a kernel like any other, and nobody else's."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.connect import write_connection_file

from tests.kernel.forks import Forks
from tests.waiting import wait_for

OWN = ("PATH", "LANG", "HOME", "TMPDIR")
"""Variables that a kernel of these tests has from the tests."""


class Forked:
    """A kernel that was forked from the template, and a client of it."""

    def __init__(self, forks: Forks, directory: Path, env: dict[str, str], *, transport: str = "ipc") -> None:
        self._forks = forks
        self._directory = directory
        self.connection_file = directory / "k.json"
        self.env = {name: os.environ[name] for name in OWN if name in os.environ}
        self.env |= {"IPYTHONDIR": str(directory / "ipython"), "JUPYTER_DATA_DIR": str(directory), **env}
        self.pid = forks.ask("fork", lean=env.get("DSPEX_LEAN") == "1")["pid"]
        told = {"transport": transport, "key": secrets.token_hex(16).encode()}
        if transport == "ipc":
            told["ip"] = str(directory / "k")
        write_connection_file(str(self.connection_file), **told)
        if transport == "ipc":  # those that it picked itself are a tcp kernel's
            ports = {f"{name}_port": n for n, name in enumerate(("shell", "iopub", "stdin", "hb", "control"), 1)}
            self.connection_file.write_text(json.dumps(json.loads(self.connection_file.read_text()) | ports))

    def assign(self) -> str:
        """Make it this test's; what it said when it was ready, or "" if it ended before."""
        said = self._forks.ask(
            "assign",
            pid=self.pid,
            connection_file=str(self.connection_file),
            env=self.env,
            cwd=str(self._directory),
            output=str(self._directory / "output"),
        )
        return str(said["said"])

    def connect(self) -> BlockingKernelClient:
        client = self.client = BlockingKernelClient()
        client.load_connection_file(str(self.connection_file))
        client.start_channels(hb=False)
        client.wait_for_ready(timeout=60)
        return client

    def start(self) -> Forked:
        assert self.assign() == "ready", (self._directory / "output").read_text()
        self.connect()
        return self

    def ask(self, msg_type: str, content: dict[str, Any], *, control: bool = False) -> dict[str, Any]:
        """The content of the reply to a message."""
        message = self.client.session.msg(msg_type, content)
        channel = self.client.control_channel if control else self.client.shell_channel
        channel.send(message)
        while True:
            reply = channel.get_msg(timeout=30)
            if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
                return dict(reply["content"])

    def result(self, command: str, args: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = self.ask("dspex_request", {"command": command, "args": args or {}})
        assert answer["status"] == "ok", answer
        return dict(answer["result"])

    def value(self, expression: str) -> Any:
        """What a Python expression is in the kernel, as far as JSON can tell."""
        asked = {"code": "import json", "user_expressions": {"it": f"json.dumps({expression})"}}
        shown = self.ask("execute_request", {**asked, "silent": True, "allow_stdin": False})
        told = shown["user_expressions"]["it"]
        assert told["status"] == "ok", told
        return json.loads(eval(told["data"]["text/plain"]))

    def end(self) -> int:
        """Kill it if it lives; its exit code."""
        if hasattr(self, "client"):
            self.client.stop_channels()
            self.client.context.destroy(linger=0)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return int(self._forks.ask("wait", pid=self.pid)["exit"])


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    env = {"FORK_SERVERS_OWN": "secret", "OPENAI_API_KEY": "sk-of-the-fork-server", "JPY_SESSION_NAME": "another's"}
    with Forks(env) as forks:
        yield forks


@pytest.fixture
def fork(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Forked]]:
    made: list[Forked] = []

    def fork(env: dict[str, str] | None = None, **options: Any) -> Forked:
        made.append(Forked(forks, tmp_path_factory.mktemp("k"), env or {}, **options))
        return made[-1]

    yield fork
    for kernel in made:
        kernel.end()


LEAN = {"DSPEX_LEAN": "1"}
PROGRAM = {"program_id": "qa", "signature": "question -> answer"}


def test_the_template_has_one_thread_and_holds_nothing_open(forks: Forks) -> None:
    assert (forks.built["threads"], forks.built["os_threads"]) == (["MainThread"], 1)
    assert forks.built["files"] == []
    assert not forks.built["cache"]
    assert not forks.built["zmq_context"]


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
@pytest.mark.parametrize("env", [LEAN, {}], ids=["lean", "full"])
def test_a_fork_answers_commands_and_cells_over_any_transport(
    fork: Callable[..., Forked], env: dict[str, str], transport: str
) -> None:
    kernel = fork(env, transport=transport).start()
    kernel.result("configure", {"lm": {"model": "offline/echo"}})
    kernel.result("create_program", PROGRAM)
    assert kernel.result("execute_program", {"program_id": "qa", "inputs": {"question": "why?"}})["outputs"]
    assert kernel.value("6 * 7") == 42
    assert kernel.value("get_ipython().__class__.__name__") == "ZMQInteractiveShell"


@pytest.mark.parametrize("env", [LEAN, {}], ids=["lean", "full"])
def test_a_kernel_is_ready_when_its_sockets_are_bound(fork: Callable[..., Forked], env: dict[str, str]) -> None:
    kernel = fork(env)
    assert kernel.assign() == "ready"
    assert len(list(kernel.connection_file.parent.glob("k-*"))) == 5


@pytest.mark.parametrize("env", [LEAN, {}], ids=["lean", "full"])
def test_a_shutdown_ends_it_with_exit_code_0(
    fork: Callable[..., Forked], forks: Forks, env: dict[str, str]
) -> None:
    kernel = fork(env).start()
    kernel.ask("shutdown_request", {"restart": False}, control=True)
    assert forks.ask("exited", pid=kernel.pid)["exit"] == 0


def test_a_kernel_that_cannot_start_says_why_and_exits(fork: Callable[..., Forked]) -> None:
    kernel = fork({"DSPEX_LEAN": "perhaps"})
    assert kernel.assign() == ""
    assert "DSPEX_LEAN='perhaps': give 0 or 1" in (kernel.connection_file.parent / "output").read_text()


def test_a_kernel_that_is_parked_has_the_environment_and_the_directory_that_it_is_given_later(
    fork: Callable[..., Forked],
) -> None:
    first, second = fork(LEAN | {"MINE": "first"}), fork({"MINE": "second"})
    for kernel, name in ((second, "second"), (first, "first")):
        kernel.start()
        assert kernel.value("__import__('os').environ['MINE']") == name
        assert kernel.value("[str(d) for d in _dh]") == [str(kernel.connection_file.parent)]
        assert kernel.value("'FORK_SERVERS_OWN' in __import__('os').environ") is False
        assert kernel.value("'__session__' in globals()") is False
        assert kernel.value("get_ipython().profile_dir.location").startswith(kernel.env["IPYTHONDIR"])


def test_what_a_kernel_did_while_it_stood_by_is_undone(fork: Callable[..., Forked]) -> None:
    kernel = fork(LEAN).start()
    assert kernel.value("len(__import__('logging').getLogger('tornado').handlers)") == 1
    assert kernel.value("[t.name for t in __import__('threading').enumerate()].count('IOPub')") == 1
    assert kernel.value("'session_rehearsal' in str(get_ipython().kernel.dispatcher._namespaces)") is False


def test_a_lean_kernel_that_stood_by_runs_the_threads_that_it_made_then_and_no_more(
    fork: Callable[..., Forked],
) -> None:
    kernel = fork(LEAN).start()
    names = kernel.value("sorted(t.name for t in __import__('threading').enumerate())")
    channels = ["Control", "IOPub", "MainThread", "Shell channel"]
    assert names == [*channels, "dspex-commands", "dspex-journal_0"]


@pytest.mark.parametrize("env", [LEAN, {}], ids=["lean", "full"])
def test_a_kernel_that_is_told_no_ports_picks_some_and_tells_them(
    fork: Callable[..., Forked], env: dict[str, str]
) -> None:
    kernel = fork(env, transport="tcp")
    ports = [f"{name}_port" for name in ("shell", "iopub", "stdin", "hb", "control")]
    told = json.loads(kernel.connection_file.read_text())
    kernel.connection_file.write_text(json.dumps({**told, **dict.fromkeys(ports, 0)}))
    kernel.start()
    written = json.loads(kernel.connection_file.read_text())
    assert len({written[port] for port in ports} - {0}) == len(ports)
    recorded = kernel.ask("connect_request", {})
    assert {port: recorded[port] for port in ports} == {port: written[port] for port in ports}


DRAWN = (
    "[get_ipython().kernel.ident, get_ipython().kernel.session.session, __import__('uuid').uuid4().hex, "
    "__import__('random').random(), __import__('dspex_kernels.kernel.lms.gate').kernel.lms.gate._salt.hex()]"
)
"""What a kernel draws by lot."""


def test_forks_draw_different_lots(fork: Callable[..., Forked]) -> None:
    one, other = (fork(env).start().value(DRAWN) for env in (LEAN, LEAN))
    assert all(mine != yours for mine, yours in zip(one, other, strict=True))


def test_a_fork_remembers_no_prompt_no_program_and_no_language_model(fork: Callable[..., Forked]) -> None:
    asked = fork(LEAN).start()
    asked.result("configure", {"lm": {"model": "offline/echo"}})
    asked.result("create_program", PROGRAM)
    asked.result("execute_program", {"program_id": "qa", "inputs": {"question": "why?"}})
    fresh = fork(LEAN).start()
    assert fresh.result("inspect_history", {"n": 50})["entries"] == []
    assert fresh.result("list_programs")["programs"] == []
    assert fresh.value("[len(dspy.clients.base_lm.GLOBAL_HISTORY), dspy.settings.lm is None]") == [0, True]
    assert fresh.value("len(dspy.cache.memory_cache)") == 0


def test_a_lean_kernel_advertises_what_it_can_do(fork: Callable[..., Forked]) -> None:
    kernel = fork(LEAN).start()
    info = kernel.ask("kernel_info_request", {}, control=True)
    assert "dspex" in info["supported_features"]
    assert "debugger" not in info["supported_features"]
    asked = {"type": "request", "seq": 1, "command": "debugInfo", "arguments": {}}
    assert kernel.ask("debug_request", asked, control=True)["status"] == "error"


def test_a_full_kernel_advertises_what_a_plain_one_does(fork: Callable[..., Forked]) -> None:
    kernel = fork().start()
    info = kernel.ask("kernel_info_request", {}, control=True)
    assert set(info["supported_features"]) == {"debugger", "kernel subshells", "dspex"}
    asked = {"type": "request", "seq": 1, "command": "debugInfo", "arguments": {}}
    assert kernel.ask("debug_request", asked, control=True)["success"]


def test_a_kernel_that_takes_data_only_refuses_cells(fork: Callable[..., Forked]) -> None:
    kernel = fork(LEAN | {"DSPEX_ALLOW_CODE": "0"}).start()
    assert kernel.ask("execute_request", {"code": "1", "silent": False})["ename"] == "PolicyDenied"
    assert kernel.ask("kernel_info_request", {})["supported_features"] == ["dspex"]


def test_commands_and_control_are_answered_while_a_cell_of_a_lean_kernel_computes(
    fork: Callable[..., Forked], tmp_path: Path
) -> None:
    kernel = fork(LEAN).start()
    begun, go = tmp_path / "begun", tmp_path / "go"
    code = f"from pathlib import Path; Path({str(begun)!r}).touch()\nwhile not Path({str(go)!r}).exists(): pass"
    cell = kernel.client.execute(code)
    wait_for(begun.exists, deadline=30, what="the cell")
    assert kernel.result("list_programs")["count"] == 0
    assert kernel.ask("dspex_request", {"command": "ping"}, control=True)["status"] == "ok"
    go.touch()
    assert kernel.client.get_shell_msg(timeout=30)["parent_header"]["msg_id"] == cell


@pytest.mark.parametrize(("env", "configured"), [({}, True), (LEAN, False)], ids=["full", "lean"])
def test_only_a_full_kernel_follows_its_users_ipython_configuration(
    fork: Callable[..., Forked], env: dict[str, str], configured: bool
) -> None:
    kernel = fork(env)
    profile = Path(kernel.env["IPYTHONDIR"]) / "profile_default"
    (profile / "startup").mkdir(parents=True)
    (profile / "startup" / "first.py").write_text("started = True")
    (profile / "ipython_config.py").write_text(
        "c.InteractiveShellApp.exec_lines = ['configured = True']\nc.InteractiveShell.xmode = 'Plain'\n"
        "c.DSPexKernelApp.heartbeat_interval = 3.0"
    )
    kernel.start()
    assert kernel.value("['configured' in globals(), 'started' in globals()]") == [configured, configured]
    assert kernel.value("get_ipython().InteractiveTB.mode") == ("Plain" if configured else "Context")
    assert kernel.value("get_ipython().kernel.parent.heartbeat_interval") == (3.0 if configured else 10.0)
    assert (profile / "history.sqlite").exists() == configured


def switches(pid: int) -> int:
    """How often the threads of a process were given a processor."""
    lines = (
        line
        for task in Path(f"/proc/{pid}/task").iterdir()
        for line in (task / "status").read_text().splitlines()
        if "ctxt_switches" in line
    )
    return sum(int(line.split()[1]) for line in lines)


@pytest.mark.stress  # it does nothing but wait, for half a minute
def test_an_idle_lean_kernel_does_not_wake(fork: Callable[..., Forked]) -> None:
    kernel = fork(LEAN).start()
    kernel.result("create_program", PROGRAM)
    seen = (switches(kernel.pid), time.monotonic())

    def slept() -> bool:
        nonlocal seen
        if (now := switches(kernel.pid)) != seen[0]:
            seen = (now, time.monotonic())
        return time.monotonic() - seen[1] >= 12.0  # longer than any clock of ipykernel's

    wait_for(slept, deadline=60, what="12 s without a wakeup")


def test_a_rehearsal_ends_and_shows_what_a_kernel_imports(
    forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> None:
    learned = forks.ask("rehearse", cwd=str(tmp_path_factory.mktemp("r")), env=dict(os.environ))["learned"]
    assert "sqlite3" in learned
