"""The sweep: it ends what dead services left, and touches nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspex_kernels import errors
from dspex_kernels.provisioning import guardian as guardian_process
from dspex_kernels.provisioning import sweep
from dspex_kernels.provisioning.guardians import Guardians
from tests.provisioning.families import PYTHON, Identity, launch_family, service_process, wait_until_gone
from tests.waiting import wait_for


@pytest.fixture
def foreign() -> Iterator[subprocess.Popen[bytes]]:
    """A process that no service knows of."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def write_record(services: Path, service_id: str, **record: object) -> Path:
    """What a dead service left: a directory whose lock nobody holds, with one record."""
    directory = services / service_id
    directory.mkdir(parents=True)
    (directory / guardian_process.LOCK_NAME).touch()
    record = {"pid": 1, "start_time": 1, "boot_id": guardian_process.boot_id(), "paths": []} | record
    (directory / "1-1-1.json").write_text(json.dumps(record))
    return directory


def test_what_a_service_left_that_was_killed_with_its_guardian_is_ended_and_removed(tmp_path):
    with service_process(tmp_path) as service:
        kernel, child, grandchild = service.family
        service.kill_with_guardian()
        wait_until_gone(kernel)  # it dies with the guardian
        assert [child.is_alive, grandchild.is_alive] == [True, True]
        assert [path.exists() for path in service.paths] == [True, True]
        assert sweep.sweep(service.services) == [service.service_id]
        assert [child.is_alive, grandchild.is_alive] == [False, False]
        assert [path.exists() for path in (*service.paths, service.directory)] == [False, False, False]


def test_a_recorded_kernel_that_lives_is_ended_with_all_below_it(tmp_path):
    # Without the service's mark in their environment: only the record and the process tree tell of them.
    code = "import os, signal\nif not os.fork():\n os.setsid()\nsignal.pause()"
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", code]) as kernel:
        (child,) = wait_for(lambda: guardian_process.children(kernel.pid), what="the child")
        members = [Identity.of(kernel.pid), Identity.of(child)]
        write_record(tmp_path, "dead", pid=kernel.pid, start_time=members[0].start_time)
        assert sweep.sweep(tmp_path) == ["dead"]
        assert not [member for member in members if member.is_alive]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["start_time", "boot_id"])
def test_a_process_that_has_a_recorded_id_by_now_is_not_touched(tmp_path, foreign, wrong):
    identity = Identity.of(foreign.pid)
    record = {"pid": foreign.pid, "start_time": identity.start_time} | {
        wrong: "another" if wrong == "boot_id" else 1
    }
    directory = write_record(tmp_path, "dead", **record)
    assert sweep.sweep(tmp_path) == ["dead"]
    assert identity.is_alive
    assert guardian_process.stat(foreign.pid)[0] != "T"  # not stopped either
    assert not directory.exists()


def test_a_process_is_looked_at_again_when_it_is_held(foreign):
    identity = Identity.of(foreign.pid)
    held = sweep._Held()  # as if the id had come to another process between the search and the signal
    assert not held.stop({(foreign.pid, 1)})
    held.kill(0.0)
    held.close()
    assert identity.is_alive
    assert guardian_process.stat(foreign.pid)[0] != "T"


def test_a_living_service_and_its_guardian_are_not_touched(tmp_path):
    with service_process(tmp_path) as service:
        assert sweep.sweep(service.services) == []
        assert [member.is_alive for member in (*service.family, service.guardian)] == [True] * 4
        assert [path.exists() for path in (*service.paths, service.directory)] == [True] * 3


def test_kernels_of_a_living_service_do_not_suffer_from_a_dead_one(tmp_path):
    with service_process(tmp_path, "dead") as dead, service_process(tmp_path, "living") as living:
        dead.kill_with_guardian()
        assert sweep.sweep(dead.services) == ["dead"]
        assert not [member for member in dead.family if member.is_alive]
        assert [member.is_alive for member in (*living.family, living.guardian)] == [True] * 4


def test_the_process_that_sweeps_and_its_ancestors_are_spared(tmp_path):
    # A service that was started in a terminal of a dead one's kernel: it and its parent carry the mark themselves.
    directory = write_record(tmp_path, "dead")
    code = "import sys, pathlib; from dspex_kernels.provisioning import sweep"
    code += "; print(sweep.sweep(pathlib.Path(sys.argv[1])))"
    terminal = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    argv = [*PYTHON, terminal, sys.executable, "-c", code, str(tmp_path)]
    env = {**os.environ, sweep.ENV_SERVICE: sweep.mark_of(directory)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['dead']"
    assert not directory.exists()


def test_paths_of_a_service_that_died_with_the_machine_are_removed(tmp_path):
    (tmp_path / "connection.json").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    paths = [str(tmp_path / name) for name in ("connection.json", "link", "gone")]
    write_record(tmp_path / "services", "dead", boot_id="another", paths=paths)
    assert sweep.sweep(tmp_path / "services") == ["dead"]
    assert not (tmp_path / "connection.json").exists()
    assert not (tmp_path / "link").is_symlink()


def test_where_there_is_nothing_to_sweep_nothing_is_made(tmp_path):
    assert sweep.sweep(tmp_path / "services") == []
    assert not (tmp_path / "services").exists()


def test_a_record_that_was_being_written_is_removed(tmp_path):
    directory = write_record(tmp_path, "dead")
    (directory / "1-1-2.json.part").write_text('{"pid"')
    assert sweep.sweep(tmp_path) == ["dead"]
    assert not directory.exists()


def test_a_directory_is_claimed_by_one(tmp_path):
    first = sweep.claim(tmp_path / "service")
    assert first is not None
    assert sweep.claim(tmp_path / "service") is None
    os.close(first)
    second = sweep.claim(tmp_path / "service")
    assert second is not None
    os.close(second)
    assert (tmp_path / "service").stat().st_mode & 0o777 == 0o700


def test_a_claim_waits_for_a_sweep_that_just_looks(tmp_path):
    (tmp_path / "service").mkdir()
    looking = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'w'), 2); print(flush=True); sys.stdin.read()"
    argv = [sys.executable, "-I", "-S", "-c", looking, str(tmp_path / "service" / "lock")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        other.stdin.close()
        claimed = sweep.claim(tmp_path / "service", timeout=30)
    assert claimed is not None
    os.close(claimed)


def test_a_service_id_that_lives_is_refused(tmp_path):
    with service_process(tmp_path, "living") as service:
        second = Guardians().open("living", service.services)
        with pytest.raises(errors.StoreError, match="'living' lives"):
            second.ready.result(30)
        second.stop().result(30)
        with pytest.raises(errors.ServiceClosed):
            second.launch(["true"], env=os.environ)
        assert [member.is_alive for member in service.family] == [True] * 3


def test_a_service_with_a_guardian_of_its_own_sweeps_first(tmp_path):
    with service_process(tmp_path, "dead") as dead:
        dead.kill_with_guardian()
        guardian = Guardians().open("next", dead.services)
        guardian.ready.result(30)
        try:
            assert not [member for member in dead.family if member.is_alive]
            process, family = launch_family(guardian, tmp_path / "family")
            assert [member.is_alive for member in family] == [True] * 3
            assert process.poll() is None
        finally:
            guardian.stop().result(30)


def test_a_lock_that_was_given_stays_the_services_when_the_guardian_has_stopped(tmp_path):
    # A service still writes to its store when its kernels are gone: nobody may take it for dead before.
    with (tmp_path / "lease").open("w") as lease, (tmp_path / "lease").open() as other:
        fcntl.flock(lease, fcntl.LOCK_EX)
        guardian = Guardians().open("leased", tmp_path / "services", lease.fileno())
        guardian.ready.result(30)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        guardian.stop().result(30)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lease.close()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("damaged", [b"", b"\xff", b"[]", b"{}", b'{"pid": 1, "start_time": "soon"}'])
def test_a_damaged_record_stands_in_nobodys_way(tmp_path, capsys, damaged):
    directory = write_record(tmp_path, "dead")
    (directory / "1-1-2.json").write_bytes(damaged)
    assert sweep.sweep(tmp_path) == ["dead"]
    assert "1-1-2.json is damaged" in capsys.readouterr().err


def test_a_services_directory_that_cannot_be_read_is_told_and_nobody_waits_for_its_guardian(tmp_path):
    (tmp_path / "services").touch()
    guardian = Guardians().open("tested", tmp_path / "services")
    with pytest.raises(errors.StoreError, match="Not a directory"):
        guardian.ready.result(30)
    guardian.stop().result(30)


def test_a_directory_that_cannot_be_used_does_not_keep_the_others_from_being_swept(tmp_path, caplog):
    (tmp_path / "broken" / guardian_process.LOCK_NAME).mkdir(parents=True)
    write_record(tmp_path, "dead")
    assert sweep.sweep(tmp_path) == ["dead"]
    assert "service broken left cannot be ended" in caplog.text


def test_a_lock_whose_file_is_removed_before_it_is_taken_is_taken_anew(tmp_path, monkeypatch):
    path = tmp_path / "service" / guardian_process.LOCK_NAME
    flock = fcntl.flock

    def flock_after_a_removal(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_a_removal)
    claimed = sweep.claim(path.parent, timeout=30)
    assert claimed is not None
    assert os.fstat(claimed).st_ino == path.stat().st_ino
    assert sweep.claim(path.parent) is None
    os.close(claimed)
