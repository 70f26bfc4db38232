"""The guardian: what it launches, reports and reaps, and what it ends when its service is gone."""

from __future__ import annotations

import errno
import gc
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from dspex_kernels import errors
from dspex_kernels.provisioning import guardian as guardian_process
from dspex_kernels.provisioning.guardians import Guardians
from tests import leaks
from tests.provisioning.families import (
    PYTHON,
    launch_family,
    service_process,
    wait_until_gone,
)
from tests.waiting import wait_for


def run(guardian, code, *arguments, **options):
    """The process of a Python program without site packages."""
    return guardian.launch([*PYTHON, code, *arguments], env=os.environ, **options).result(30)


def output(guardian, code, tmp_path, **options):
    """What a Python program prints."""
    options = {"env": os.environ, **options}
    with (tmp_path / "output").open("w+") as file:
        process = guardian.launch([*PYTHON, code], stdout=file, stderr=subprocess.STDOUT, **options).result(30)
        assert process.ended.result(30) == 0, (tmp_path / "output").read_text()
    return (tmp_path / "output").read_text()


def descriptors(pid):
    return sorted(path.name for path in Path(f"/proc/{pid}/fd").iterdir())


def state(pid):
    found = guardian_process.stat(pid)
    return found[0] if found is not None else None


@pytest.mark.parametrize(("code", "expected"), [("", 0), ("import os; os._exit(7)", 7)])
def test_the_exit_code_is_reported(guardian, code, expected):
    process = run(guardian, code)
    assert process.ended.result(30) == expected
    assert process.poll() == expected


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_death_by_signal_is_reported_as_popen_does(guardian, signum):
    process = run(guardian, "import signal; signal.pause()")
    assert process.poll() is None
    assert process.send_signal(signum).result(30)
    assert process.ended.result(30) == -signum
    assert not process.send_signal(signum).result(30)


def test_a_signal_reaches_the_whole_group(guardian, tmp_path):
    code = "import os, signal, sys\nif os.fork():\n os.wait(); os._exit(5)\nopen(sys.argv[1], 'w'); signal.pause()"
    process = run(guardian, code, str(tmp_path / "forked"))
    wait_for((tmp_path / "forked").exists)
    assert process.send_signal(signal.SIGTERM).result(30)
    assert process.ended.result(30) == -signal.SIGTERM  # and the child too: the test leaves no process


@pytest.mark.parametrize(
    ("argv", "options", "expected"),
    [
        (["no-such-program-dspex"], {}, FileNotFoundError),
        (["/etc/passwd"], {}, PermissionError),
        (["true"], {"cwd": "/no/such/directory"}, FileNotFoundError),
    ],
)
def test_what_cannot_be_run_is_the_oserror_that_popen_raises(guardian, argv, options, expected):
    with pytest.raises(expected) as caught:
        guardian.launch(argv, env=os.environ, paths=["/no/such/file"], **options).result(30)
    assert caught.value.filename == options.get("cwd", argv[0])
    wait_for(lambda: [path.name for path in guardian.directory.iterdir()] == ["lock"], what="no record")


def test_an_argument_that_no_program_can_have_is_refused_and_the_guardian_lives_on(guardian):
    with pytest.raises(OSError, match="Invalid argument") as caught:
        guardian.launch(["true", "a\0b"], env=os.environ).result(30)
    assert caught.value.errno == errno.EINVAL
    assert run(guardian, "").ended.result(30) == 0


def test_a_launch_has_its_own_environment_directory_and_streams(guardian, tmp_path):
    code = "import os; os.write(1, os.getcwdb() + b' ' + os.environb[b'A'] + os.read(0, 1)); os.write(2, b' error')"
    env = {"A": "ä\udcff", leaks.RUN_VARIABLE: os.environ[leaks.RUN_VARIABLE]}
    with (tmp_path / "output").open("wb") as file:
        options = {"env": env, "cwd": "/usr", "stdout": file, "stderr": subprocess.STDOUT}
        process = guardian.launch([*PYTHON, code], **options).result(30)
        assert process.ended.result(30) == 0
    assert (tmp_path / "output").read_bytes() == b"/usr " + "ä".encode() + b"\xff error"


def test_a_kernel_knows_its_parent_and_its_service(guardian, tmp_path):
    code = "import os; print(os.getppid() == int(os.environ['JPY_PARENT_PID']), os.environ['DSPEX_SERVICE'])"
    assert output(guardian, code, tmp_path).split() == ["True", str(guardian.directory)]


def test_a_large_environment_arrives_whole(guardian, tmp_path):
    env = {**os.environ, **{f"LARGE_{n}": "x" * 100_000 for n in range(10)}}
    code = "import os; print(sum(len(v) for k, v in os.environ.items() if k.startswith('LARGE_')))"
    assert int(output(guardian, code, tmp_path, env=env)) == 1_000_000


def test_the_environment_is_in_no_command_line_no_file_and_not_in_the_guardian(guardian, tmp_path):
    secret = "sk-not-to-be-seen"
    env = {**os.environ, "A_KEY": secret}
    process = guardian.launch([*PYTHON, "import signal; signal.pause()"], env=env).result(30)
    seen = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (guardian.pid, process.pid)]
    seen += [Path(f"/proc/{guardian.pid}/environ").read_bytes()]
    seen += [path.read_bytes() for path in guardian.directory.iterdir()]
    assert secret.encode() in Path(f"/proc/{process.pid}/environ").read_bytes()
    assert not [text for text in seen if secret.encode() in text]


def test_a_kernel_inherits_no_descriptor_but_its_streams(guardian, tmp_path):
    with socket.socket() as inheritable:
        inheritable.set_inheritable(True)
        code = "import os, sys; print(*(fd for fd in range(64) if os.path.exists(f'/proc/self/fd/{fd}')))"
        assert output(guardian, code, tmp_path).split() == ["0", "1", "2"]


def test_a_kernel_inherits_no_signal_disposition_and_leads_its_session(guardian, tmp_path):
    code = """
import os, signal
print([s.name for s in signal.Signals if signal.getsignal(s) == signal.SIG_IGN])
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.pthread_sigmask(signal.SIG_BLOCK, ()))
print(os.getsid(0) == os.getpgid(0) == os.getpid())
"""
    # Python itself ignores these two.
    expected = ["['SIGPIPE', 'SIGXFSZ']", "True set()", "True"]
    assert output(guardian, code, tmp_path).splitlines() == expected


def test_signals_for_the_service_do_not_end_the_guardian(guardian):
    process = run(guardian, "import signal; signal.pause()")
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(guardian.pid, signum)
    assert run(guardian, "").ended.result(30) == 0
    assert process.poll() is None
    assert os.getsid(guardian.pid) != os.getsid(0)


def test_fifty_kernels_leave_no_zombie_no_descriptor_and_no_record(guardian):
    run(guardian, "").ended.result(30)
    gc.collect()  # what earlier tests left to it may hold descriptors
    before = (descriptors(guardian.pid), descriptors(os.getpid()))
    processes = [run(guardian, "") for _ in range(50)]
    assert {process.ended.result(30) for process in processes} == {0}
    # The report goes out before its launch is tidied up: an answer that comes after it is the end of that.
    assert not processes[-1].send_signal(signal.SIGTERM).result(30)
    assert (descriptors(guardian.pid), descriptors(os.getpid())) == before
    assert guardian_process.children(guardian.pid) == []
    assert [path.name for path in guardian.directory.iterdir()] == ["lock"]


def test_kernels_are_launched_from_many_threads_at_once(guardian):
    processes = []

    def launch():
        processes.extend(run(guardian, f"import os; os._exit({n})") for n in range(5))

    threads = [threading.Thread(target=launch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(process.ended.result(30) for process in processes) == sorted([*range(5)] * 4)


def test_orphans_of_a_kernel_that_crashed_are_killed_and_other_kernels_live_on(guardian, tmp_path):
    crashed, lost = launch_family(guardian, tmp_path / "crashed")
    other, kept = launch_family(guardian, tmp_path / "other")
    os.kill(crashed.pid, signal.SIGSEGV)
    assert crashed.ended.result(30) == -signal.SIGSEGV
    wait_until_gone(*lost)
    assert [process.is_alive for process in kept] == [True, True, True]
    assert other.poll() is None


def test_a_detached_grandchild_stays_below_its_kernel_while_that_lives(guardian, tmp_path):
    process, (_, child, grandchild) = launch_family(guardian, tmp_path / "family")
    assert sorted(guardian_process.children(process.pid)) == sorted([child.pid, grandchild.pid])


def test_freezing_stops_a_process_and_all_below_it_and_nothing_else():
    # Of this test's own children, as the guardian does with its.
    code = "import os, signal\nif not os.fork():\n os.setsid()\nsignal.pause()"
    with subprocess.Popen([*PYTHON, code]) as frozen, subprocess.Popen(["sleep", "600"]) as other:
        (child,) = wait_for(lambda: guardian_process.children(frozen.pid), what="the child")
        guardian_process.freeze(frozen.pid)
        wait_for(lambda: [state(pid) for pid in (frozen.pid, child)] == ["T", "T"], what="stopped processes")
        assert state(other.pid) != "T"
        for pid in (child, frozen.pid, other.pid):
            os.kill(pid, signal.SIGKILL)


def test_stop_outruns_what_forks_all_the_time(guardian, tmp_path):
    code = """
import os, sys, time
while True:
    if not os.fork():
        os.setsid()
        if os.fork():
            os._exit(0)
        open(sys.argv[1], "w").close()
        time.sleep(600)
    os.wait()
    time.sleep(0.002)
"""
    process = run(guardian, code, str(tmp_path / "forked"))
    wait_for((tmp_path / "forked").exists)
    guardian.stop().result(30)  # what is left is found by the watch over leaks
    assert process.ended.result(30) == -signal.SIGKILL


def test_stop_ends_everything_removes_the_paths_and_frees_the_lock(tmp_path):
    guardian = Guardians().open("stopped", tmp_path / "services")
    process, family = launch_family(guardian, tmp_path / "family")
    paths = [tmp_path / name for name in ("connection.json", "link", "kept", "later")]
    for path in paths:
        path.touch()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "ipc"))
    listener.close()
    first = guardian.launch(["true"], env=os.environ, paths=[str(tmp_path / "ipc"), str(paths[0])]).result(30)
    forgotten = guardian.launch(["true"], env=os.environ, paths=[str(paths[2])]).result(30)
    process.remember([str(paths[1])])
    first.remember([str(paths[3])])
    forgotten.forget()
    guardian.stop().result(30)
    assert process.ended.result(30) == -signal.SIGKILL
    assert not [member for member in family if member.is_alive]
    assert [path.exists() for path in (*paths, tmp_path / "ipc")] == [False, False, True, False, False]
    assert list((tmp_path / "services").iterdir()) == []


def test_a_stopped_guardian_launches_no_more(tmp_path):
    guardian = Guardians().open("stopped", tmp_path / "services")
    process = run(guardian, "import signal; signal.pause()")
    guardian.stop().result(30)
    with pytest.raises(errors.ServiceClosed, match="'stopped'"):
        guardian.launch(["true"], env=os.environ)
    assert not process.send_signal(signal.SIGTERM).result(30)
    process.forget()
    guardian.stop().result(30)


@pytest.mark.parametrize("how", ["killed", "exits", "forked"])
def test_when_the_service_is_gone_all_is_gone_and_only_then_its_lock_is_free(tmp_path, how):
    with service_process(tmp_path, how=how) as service:
        assert [path.exists() for path in service.paths] == [True, True]
        if how == "exits":
            service.wait()  # with nobody calling stop()
        else:
            service.kill()
        service.wait_for_lock()
        assert not [member for member in service.family if member.is_alive]
        assert [path.exists() for path in (*service.paths, service.directory)] == [False, False, False]
        if service.holder is not None:
            assert service.holder.is_alive  # it holds copies of the service's socket and lock


def test_when_the_guardian_is_killed_its_kernels_end_and_the_service_is_told(guardian, tmp_path, caplog):
    process, family = launch_family(guardian, tmp_path / "family")
    waiting = run(guardian, "import signal; signal.pause()")
    killed = guardian.pid
    os.kill(killed, signal.SIGKILL)
    assert process.ended.result(30) == waiting.ended.result(30) == -signal.SIGKILL
    assert not [member for member in family if member.is_alive]  # the detached grandchild too
    assert f"its guardian {killed} ended with code -9" in caplog.text


def test_after_a_lost_guardian_kernels_have_a_new_one_that_knows_what_to_remove(guardian, tmp_path):
    (tmp_path / "connection.json").touch()
    lost = guardian.launch(
        [*PYTHON, "import signal; signal.pause()"], env=os.environ, paths=[str(tmp_path / "connection.json")]
    ).result(30)
    killed = guardian.pid
    os.kill(killed, signal.SIGKILL)
    lost.ended.result(30)
    later, family = launch_family(guardian, tmp_path / "family")
    assert guardian.pid != killed
    assert later.poll() is None
    guardian.stop().result(30)
    assert not [member for member in family if member.is_alive]
    assert not (tmp_path / "connection.json").exists()


def test_when_its_thread_breaks_nobody_waits_for_it_any_more(tmp_path, monkeypatch, caplog):
    guardian = Guardians().open("broken", tmp_path / "services")
    process, family = launch_family(guardian, tmp_path / "family")

    def fails(message):
        raise LookupError(f"no such {message}")

    monkeypatch.setattr(guardian, "_heed", fails)
    with pytest.raises(errors.KernelStartFailed, match="broke"):
        guardian.launch(["true"], env=os.environ).result(30)
    assert process.ended.result(30) == -signal.SIGKILL
    assert not [member for member in family if member.is_alive]
    with pytest.raises(errors.ServiceClosed):
        guardian.launch(["true"], env=os.environ)
    with pytest.raises(LookupError):
        guardian.stop().result(30)
    assert "service broken: the thread of its guardian broke" in caplog.text


def test_a_second_guardian_of_one_service_does_not_take_the_firsts_place(tmp_path):
    guardians = Guardians()
    first = guardians.open("twice", tmp_path / "services")
    first.ready.result(30)
    second = guardians.open("twice", tmp_path / "services")
    with pytest.raises(errors.StoreError, match="lives already"):
        second.ready.result(30)
    assert guardians.get("twice") is first
    first.stop().result(30)
    second.stop().result(30)


def test_a_launch_without_room_for_its_record_is_refused(guardian):
    run(guardian, "").ended.result(30)
    directory = guardian.directory
    directory.rename(directory.with_name("moved"))  # as when the disk refuses: no file can be made
    try:
        with pytest.raises(FileNotFoundError, match="part"):
            guardian.launch(["true"], env=os.environ).result(30)
    finally:
        directory.with_name("moved").rename(directory)
    assert run(guardian, "").ended.result(30) == 0


def test_a_pipe_is_refused_and_no_descriptor_is_lost(guardian):
    run(guardian, "").ended.result(30)  # it is there, with all that its thread opens
    before = descriptors(os.getpid())
    with pytest.raises(ValueError, match="files or descriptors"):
        guardian.launch(["true"], env=os.environ, stderr=subprocess.PIPE)
    assert set(descriptors(os.getpid())) <= set(before)
