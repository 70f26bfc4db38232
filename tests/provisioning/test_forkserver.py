"""The fork server: kernels that are forked are the guardian's, start with nothing of others, and outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dspex_kernels.provisioning import fork_servers
from dspex_kernels.provisioning import guardian as guardian_process
from dspex_kernels.provisioning.fork_servers import NoFork, Origin
from tests import leaks
from tests.provisioning.families import Identity, wait_until_gone
from tests.waiting import halt, wait_for

ROOT = Path(__file__).parents[2]
MODULE = "tests.provisioning.forkable"


@pytest.fixture
def forks(guardian, tmp_path):
    return Forks(guardian, tmp_path)


class Forks:
    """Kernels of the forkable module, below a guardian."""

    def __init__(self, guardian, tmp_path, **variables) -> None:
        self.guardian = guardian
        self.tmp_path = tmp_path
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        self.argv = [sys.executable, "-m", MODULE, "-f", "{file}"]
        self.origin = Origin.of(self.argv, self.env)
        self.server = guardian.fork_servers.of(self.origin)
        self.number = 0

    def take(self, standby=0):
        return self.server.take(standby).result(60)

    def assign(self, kernel, code, env=None, cwd=None, paths=(), memory_limit=0, **streams):
        self.number += 1
        file = self.tmp_path / f"code-{self.number}.py"
        file.write_text(code)
        assignment = {
            "argv": [*self.argv[:-1], str(file)],
            "env": self.env if env is None else env,
            "cwd": str(cwd or self.tmp_path),
            "imports_from_cwd": True,
            "memory_limit": memory_limit,
        }
        given = [streams.get(name, subprocess.DEVNULL) for name in ("stdin", "stdout", "stderr")]
        return kernel.assign(assignment, given, paths)

    def run(self, code, **options):
        return self.assign(self.take(), code, **options).result(60)

    def output(self, code, **options):
        with (self.tmp_path / "output").open("w+") as file:
            process = self.run(f"{code}\nbound()", stdout=file, stderr=file, **options)
            assert process.ended.result(60) == 0, (self.tmp_path / "output").read_text()
        return (self.tmp_path / "output").read_text()


WAIT = "bound()\nimport signal; signal.pause()"


def test_a_forked_kernel_is_the_guardians_child_and_leads_its_session(forks):
    told = forks.output("import os; print(os.getppid(), os.getsid(0) == os.getpgid(0) == os.getpid())")
    assert told.split() == [str(forks.guardian.pid), "True"]


def identity(process):
    return Identity.of(process.pid)


def threads_of(pid):
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", 0),
        ("raise SystemExit", 0),
        ("raise SystemExit(7)", 7),
        ("raise SystemExit('so')", 1),
        ("import os; os._exit(5)", 5),
        ("1 / 0", 70),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    ],
)
def test_how_a_forked_kernel_ends_is_reported(forks, code, expected):
    assert forks.run(f"bound()\n{code}").ended.result(60) == expected


def test_what_ends_before_it_serves_is_a_kernel_that_has_ended(forks):
    assert forks.run("raise SystemExit(3)").ended.result(60) == 3


def test_at_its_end_exit_functions_run_threads_are_waited_for_and_output_is_written(forks):
    code = """
import atexit, threading
atexit.register(print, "exit function")
threading.Thread(target=lambda: (threading.main_thread().join(), print("thread"))).start()
print("main")
"""
    assert forks.output(code).split("\n")[:3] == ["main", "thread", "exit function"]


def test_a_forked_kernel_has_its_own_environment_directory_arguments_and_streams(forks, tmp_path):
    (tmp_path / "beside.py").write_text("WORD = 'imported'")
    (tmp_path / "input").write_text("read")
    code = """
import beside, os, subprocess, sys
print(sorted(os.environ), ascii(os.environ["A"]), os.getcwd(), os.path.basename(sys.argv[0]), sys.argv[1])
print(beside.WORD, sys.stdin.read(), subprocess.check_output("printf %s $A", shell=True))
"""
    env = {"A": "ä\udcff", "PATH": os.environ["PATH"], leaks.RUN_VARIABLE: os.environ[leaks.RUN_VARIABLE]}
    with (tmp_path / "input").open() as file:
        told = forks.output(code, env=env, stdin=file)
    names = ["A", "DSPEX_SERVICE", "JPY_PARENT_PID", leaks.RUN_VARIABLE, "PATH"]
    assert told.splitlines() == [
        rf"{names} '\xe4\udcff' {tmp_path} __main__.py -f",
        r"imported read b'\xc3\xa4\xff'",
    ]


def test_a_directory_that_cannot_be_entered_is_the_oserror_that_popen_raises(forks):
    with pytest.raises(FileNotFoundError) as caught:
        forks.run(WAIT, cwd="/no/such/directory")
    assert caught.value.filename == "/no/such/directory"


def test_a_forked_kernel_inherits_no_descriptor_and_no_signal_disposition(forks):
    code = """
import os, signal
print([fd for fd in range(3, 64) if os.path.exists(f"/proc/self/fd/{fd}")])
print([s.name for s in signal.Signals if signal.getsignal(s) == signal.SIG_IGN])
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""
    told = forks.output(f"bound()\n{code}").splitlines()
    assert told == ["[]", "['SIGPIPE', 'SIGXFSZ']", "True set()"]


def test_a_forked_kernel_is_shown_as_what_it_is(forks):
    kernel = forks.run(WAIT)
    shown = Path(f"/proc/{kernel.pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    assert shown == [*map(os.fsencode, forks.argv[:-1]), str(forks.tmp_path / "code-1.py").encode()]


def test_random_numbers_and_ids_are_each_kernels_own(forks):
    code = """
import random, uuid, tempfile, secrets
print(random.random(), uuid.uuid4(), uuid.uuid1(), next(tempfile._get_candidate_names()), secrets.token_hex())
"""
    told = [forks.output(code).split() for _ in range(3)]
    assert [len(set(column)) for column in zip(*told, strict=True)] == [3] * len(told[0])


def test_numpys_generator_is_each_kernels_own_where_numpy_is_there(guardian, tmp_path):
    (tmp_path / "packages" / "numpy").mkdir(parents=True)
    (tmp_path / "packages" / "numpy" / "__init__.py").touch()
    # A stand-in: numpy is no dependency of ours. Its legacy generator has this one function that counts here.
    (tmp_path / "packages" / "numpy" / "random.py").write_text("SEEDED = []\ndef seed(): SEEDED.append(1)\n")
    forks = Forks(guardian, tmp_path, LC_PRELOAD="numpy.random")
    forks.env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{tmp_path / 'packages'}"
    forks.server = guardian.fork_servers.of(Origin.of(forks.argv, forks.env))
    assert forks.output("import numpy.random; print(numpy.random.SEEDED)").strip() == "[1]"


def test_what_a_kernel_imports_in_its_life_is_there_before_it_is_forked(forks):
    forks.run("bound()").ended.result(60)  # the first one does not wait for the rehearsal
    assert forks.output("import sys; print('colorsys' in sys.modules)").strip() == "True"


def test_a_rehearsal_that_fails_costs_nobody_a_kernel(guardian, tmp_path):
    forks = Forks(guardian, tmp_path, LC_REHEARSAL="1 / 0")
    assert [forks.output("print('there')").strip() for _ in range(2)] == ["there", "there"]


def test_a_forked_kernel_leaves_no_descriptor_in_the_guardian_and_none_here(forks):
    forks.run("bound()").ended.result(60)

    def descriptors():
        return [
            len(list(Path(f"/proc/{pid}/fd").iterdir()))
            for pid in (forks.guardian.pid, forks.server.pid, os.getpid())
        ]

    def no_more():
        return all(now <= was for now, was in zip(descriptors(), before, strict=True))

    before = descriptors()
    kernels = [forks.run(WAIT) for _ in range(5)]
    wait_for(no_more, what="no more descriptors")
    for kernel in kernels:
        kernel.send_signal(signal.SIGKILL)
        assert kernel.ended.result(60) == -signal.SIGKILL
    wait_for(no_more, what="no more descriptors")
    assert guardian_process.children(forks.server.pid) == []


def test_kernels_outlive_their_fork_server_and_the_next_one_has_a_new_one(forks):
    kernel, waiting = forks.run(WAIT), forks.take()
    killed = Identity.of(forks.server.pid)
    killed.kill()
    wait_until_gone(killed)
    wait_for(lambda: forks.server.pid is None, what="the loss noticed")
    assert kernel.poll() is None
    assert forks.assign(waiting, WAIT).result(60) is waiting  # forked before, used after
    later = forks.run(WAIT)
    assert forks.server.pid not in (None, killed.pid)
    assert identity(later).is_alive
    assert identity(kernel).is_alive
    for process in (kernel, waiting, later):
        assert guardian_process.stat(process.pid)[1] == forks.guardian.pid
        process.send_signal(signal.SIGTERM)
        assert process.ended.result(60) == -signal.SIGTERM


def test_who_waits_for_a_fork_server_that_dies_meanwhile_has_a_kernel_of_the_next(forks):
    forks.run("bound()").ended.result(60)
    server = Identity.of(forks.server.pid)
    halt(server.pid)
    taken = [forks.server.take(0) for _ in range(3)]
    server.kill()
    kernels = [one.result(60) for one in taken]
    assert len({kernel.pid for kernel in kernels}) == 3
    assert forks.server.pid != server.pid
    assert [forks.assign(kernel, "bound()").result(60).ended.result(60) for kernel in kernels] == [0, 0, 0]


def test_many_are_forked_while_others_die_and_none_is_taken_for_an_orphan(forks):
    forks.run("bound()").ended.result(60)
    doomed = [forks.server.take(0) for _ in range(20)]
    wanted = []
    for taken in doomed:
        kernel = taken.result(60)
        kernel.send_signal(signal.SIGKILL)
        wanted.append(forks.server.take(0))
    kernels = [taken.result(60) for taken in wanted]
    assert {taken.result(60).ended.result(60) for taken in doomed} == {-signal.SIGKILL}
    for kernel in kernels:
        forks.assign(kernel, "bound()").result(60)
    assert {kernel.ended.result(60) for kernel in kernels} == {0}


def test_orphans_of_a_forked_kernel_are_killed(forks, tmp_path):
    code = """
import os, signal
bound()
child = os.fork()
if not child:
    os.setsid()
    signal.pause()
open("child.part", "w").write(str(child))
os.rename("child.part", "child")
signal.pause()
"""
    kernel = forks.run(code)
    wait_for((tmp_path / "child").exists, what="the child")
    child = Identity.of(int((tmp_path / "child").read_text()))
    kernel.send_signal(signal.SIGKILL)
    wait_until_gone(child)


def test_when_the_guardian_is_killed_forked_kernels_and_the_fork_server_end(forks):
    kernel, waiting = forks.run(WAIT), forks.take()
    processes = [identity(kernel), identity(waiting), Identity.of(forks.server.pid)]
    os.kill(forks.guardian.pid, signal.SIGKILL)
    assert kernel.ended.result(60) == -signal.SIGKILL
    wait_until_gone(*processes)
    assert forks.output("print(1)").strip() == "1"  # a new guardian, and a new fork server


def test_paths_of_a_forked_kernel_are_removed_when_the_service_ends(forks, tmp_path):
    (tmp_path / "connection").touch()
    forks.run(WAIT, paths=[str(tmp_path / "connection")])
    forks.guardian.stop().result(60)
    assert not (tmp_path / "connection").exists()


def test_no_kernel_stands_by_before_one_was_used_and_then_they_are_handed_out(forks):
    assert forks.server.standby == []
    first = forks.take(2)
    assert forks.server.standby == []  # whoever waits comes first
    forks.assign(first, "bound()").result(60)
    forks.server.refill()
    wait_for(lambda: len(forks.server.standby) == 2, what="two that stand by")
    standing = forks.server.standby
    assert forks.take(2).pid == standing[0]
    forks.server.refill()
    wait_for(lambda: len(forks.server.standby) == 2, what="another")


def test_a_kernel_that_nobody_waits_for_is_parked_in_a_directory_of_its_own_and_one_that_is_wanted_is_not(
    guardian, tmp_path
):
    forks = Forks(guardian, tmp_path, LC_PARKED=str(tmp_path / "parked"))
    first = forks.output("print(parked, warmed)")
    assert first.split() == ["0", "False"]  # it does not wait for the rehearsal
    assert forks.output("print(parked, warmed)").split() == ["0", "True"]
    forks.assign(forks.take(1), "bound()").result(60)
    forks.server.refill()
    parked = tmp_path / "parked"
    directory = Path(wait_for(lambda: parked.exists() and parked.read_text(), what="the parked one"))
    assert directory.parent == Path(guardian.directory)
    serving = f"import os; print(parked, os.path.exists({str(directory)!r})); serving()"
    assert forks.output(serving).split() == ["2", "True"]
    assert not directory.exists()


def test_what_a_kernel_has_set_aside_goes_with_it_when_it_is_killed(guardian, tmp_path):
    parked = tmp_path / "parked"
    forks = Forks(guardian, tmp_path, LC_PARKED=str(parked))
    forks.run("bound()").ended.result(60)
    kernel = forks.take(0)
    directory = Path(wait_for(lambda: parked.exists() and parked.read_text(), what="the parked one"))
    (directory / "socket").touch()
    kernel.send_signal(signal.SIGKILL).result(60)
    wait_for(lambda: not directory.exists(), what="the directory to be removed")


def test_a_rehearsal_that_fails_costs_no_kernel_and_no_fork_server(guardian, tmp_path):
    forks = Forks(guardian, tmp_path, LC_WARM="raise OSError('no room')")
    forks.run("bound()")
    pid = forks.server.pid
    assert forks.output("print(warmed)").strip() == "False"
    assert forks.server.pid == pid


def test_a_kernel_that_dies_while_it_stands_by_is_replaced_and_not_handed_out(forks):
    forks.assign(forks.take(1), "bound()").result(60)
    forks.server.refill()
    (dead,) = wait_for(lambda: forks.server.standby, what="one that stands by")
    os.kill(dead, signal.SIGKILL)
    (other,) = wait_for(lambda: [pid for pid in forks.server.standby if pid != dead], what="another")
    assert forks.take(0).pid == other


@pytest.mark.parametrize("change", ["fewer", "retired"])
def test_a_kernel_that_is_forked_ahead_and_not_wanted_any_more_does_not_stand_by(forks, change):
    forks.assign(forks.take(1), "bound()").result(60)
    forks.server._refill_now()
    assert forks.server._is_refilling
    if change == "fewer":
        forks.server._wanted = 0
    else:
        forks.server.retire()
        forks.server._wanted = 1  # somebody else has wanted one since
    wait_for(lambda: not forks.server._is_refilling, deadline=30, what="the fork")
    assert forks.server.standby == []


def test_kernels_that_keep_dying_while_they_stand_by_are_not_replaced_for_ever(forks):
    forks.assign(forks.take(1), "bound()").result(60)
    forks.server.refill()
    dead = []
    while len(dead) < 3:
        (pid,) = wait_for(
            lambda: [pid for pid in forks.server.standby if pid not in dead], what="one that stands by"
        )
        os.kill(pid, signal.SIGKILL)
        dead.append(pid)
    wait_for(lambda: not forks.server.standby, what="no more")
    forks.server._refill_now()
    assert not forks.server._is_refilling
    assert forks.run("bound()").ended.result(60) == 0


def test_a_fork_server_whose_sources_change_is_started_anew_with_all_that_stands_by(guardian, tmp_path):
    (tmp_path / "config").write_text("old")
    forks = Forks(guardian, tmp_path, LC_SOURCE=str(tmp_path / "config"))
    forks.assign(forks.take(1), "bound()").result(60)
    forks.server.refill()
    (outdated,) = wait_for(lambda: forks.server.standby, what="one that stands by")
    served = Identity.of(forks.server.pid)
    kept = forks.run(WAIT)
    (tmp_path / "config").write_text("newer")
    assert forks.take(0).pid != outdated
    wait_until_gone(served)
    assert identity(kept).is_alive


def test_of_many_fork_servers_the_least_used_is_ended_and_its_kernels_live_on(guardian, tmp_path):
    first = Forks(guardian, tmp_path)
    kernel = first.run(WAIT)
    retired = Identity.of(first.server.pid)
    for number in range(fork_servers.MAX_SERVERS):
        Forks(guardian, tmp_path, LC_NUMBER=str(number))
    wait_until_gone(retired)
    assert identity(kernel).is_alive
    assert len(guardian.fork_servers.all()) == fork_servers.MAX_SERVERS


def test_what_cannot_be_built_is_refused_for_good_with_its_reason_logged_once(guardian, tmp_path, caplog):
    forks = Forks(guardian, tmp_path, LC_REFUSE="no model map")
    for _ in range(2):
        with pytest.raises(NoFork, match="RuntimeError: no model map"):
            forks.take()
    assert caplog.text.count("are started plainly") == 1


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()", "2 threads"),
        ("import socket; kept = socket.socket()", "open descriptors: socket"),
        ("import asyncio; kept = asyncio.new_event_loop()", "open descriptors"),
    ],
)
def test_a_fork_that_would_not_be_safe_is_refused(guardian, tmp_path, code, why):
    forks = Forks(guardian, tmp_path, LC_RUN=code)
    with pytest.raises(NoFork, match=why):
        forks.take()


def test_a_module_without_a_template_is_refused(guardian):
    argv = [sys.executable, "-m", "json.tool", "-f", "x"]
    server = guardian.fork_servers.of(Origin.of(argv, dict(os.environ)))
    with pytest.raises(NoFork, match=r"json\.tool"):
        server.take(0).result(60)


def test_an_interpreter_that_is_not_there_is_refused(guardian):
    server = guardian.fork_servers.of(Origin.of(["/no/python", "-m", MODULE, "-f", "x"], dict(os.environ)))
    with pytest.raises(NoFork, match="No such file"):
        server.take(0).result(60)


@pytest.mark.parametrize(
    "argv",
    [
        ["python", "kernel.py", "-f", "x"],
        ["python", "-m", "module"],
        ["python", "-m", "module", "-f", "x", "--debug"],
        ["python", "-c", "pass", "-m", "module", "-f", "x"],
        ["python", "-X", "dev", "-m", "module", "-f", "x"],
        ["-m", "module", "-f", "x"],
        [],
    ],
)
def test_another_command_has_no_origin(argv):
    with pytest.raises(NoFork, match="PYTHON"):
        Origin.of(argv, {})


def test_an_origin_is_the_interpreter_the_module_and_what_is_read_on_import_without_secrets():
    argv = ["python", "-Xfrozen_modules=off", "-m", "module", "-f", "/a"]
    env = {"PYTHONPATH": "/b", "HF_HOME": "/c", "HF_TOKEN": "secret", "LITELLM_API_KEY": "secret", "OTHER": "d"}
    origin = Origin.of(argv, env)
    assert origin == Origin(("python", "-Xfrozen_modules=off"), "module", (("HF_HOME", "/c"), ("PYTHONPATH", "/b")))
    assert origin == Origin.of([*argv[:-1], "/other"], {**env, "OTHER": "e", "HF_TOKEN": "another"})
    assert origin != Origin.of(argv, {**env, "HF_HOME": "/d"})


@pytest.mark.parametrize(
    ("flags", "env", "expected"),
    [
        ((), {}, True),
        (("-P",), {}, False),
        (("-sI",), {}, False),
        (("-Xdev",), {}, True),
        ((), {"PYTHONSAFEPATH": "1"}, False),
    ],
)
def test_modules_are_found_in_the_kernels_directory_as_python_would(flags, env, expected):
    assert Origin.of(["python", *flags, "-m", "module", "-f", "x"], env).imports_from_cwd is expected


def test_a_forked_kernel_is_bounded_in_memory(forks):
    code = """
try:
    bytearray(1 << 30)
except MemoryError:
    print("bounded")
"""
    with (forks.tmp_path / "told").open("w+") as file:
        process = forks.assign(forks.take(), f"bound(){code}", memory_limit=256 << 20, stdout=file).result(60)
        assert process.ended.result(60) == 0
    assert (forks.tmp_path / "told").read_text() == "bounded\n"


def test_the_fork_server_has_one_thread_and_nothing_of_the_kernels_environment(guardian, tmp_path):
    forks = Forks(guardian, tmp_path, A_SECRET_KEY="sk-not-to-be-seen")
    forks.run("bound()").ended.result(60)
    assert threads_of(forks.server.pid) == 1
    seen = (
        Path(f"/proc/{forks.server.pid}/environ").read_bytes()
        + Path(f"/proc/{forks.server.pid}/cmdline").read_bytes()
    )
    assert b"sk-not-to-be-seen" not in seen
