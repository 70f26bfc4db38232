"""A kernel's log stays bounded, whatever the kernel writes and its owner puts in its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dspex_kernels.sessions import kernel_log
from tests.waiting import wait_for


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs that are soon too large."""
    monkeypatch.setattr(kernel_log, "MAX_BYTES", 100)
    monkeypatch.setattr(kernel_log, "KEPT_BYTES", 10)


def test_the_tail_of_a_log_of_any_size_is_read_alone(tmp_path):
    log = tmp_path / "kernel.log"
    with log.open("wb") as file:
        file.truncate(1 << 43)  # a hole of 8 TiB: reading it whole is a MemoryError
        file.seek(0, os.SEEK_END)
        file.write(b"\n" * 5000 + b"the last word\n")
    assert kernel_log.read_tail(log) == "the last word"


def test_a_log_that_has_grown_too_large_is_cut_and_its_kernel_writes_on_at_the_new_end(small, tmp_path):
    path = tmp_path / "kernel.log"
    code = "import sys\nfor line in sys.stdin: print(line * 50 if line == 'long\\n' else line, end='', flush=True)"
    argv = [sys.executable, "-I", "-S", "-c", code]
    with kernel_log.open_log(path) as log:
        kernel = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=log, text=True)
    with kernel:
        kernel.stdin.write("long\n")
        kernel.stdin.flush()
        wait_for(lambda: path.stat().st_size == 250, what="a log that is too large")
        kernel_log.cut_logs([path])
        assert path.stat().st_size == 0
        kernel.stdin.write("after\n")
    assert path.read_bytes() == b"after\n"
    before = path.with_name("kernel.log.1")
    assert before.read_bytes() == b"long\nlong\n"
    assert before.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("before", [None, b"of the kernel before"])
def test_a_log_that_is_moved_keeps_the_one_before_and_gives_it_back(tmp_path, before):
    log, path = tmp_path / "spare.log", tmp_path / "session" / "kernel.log"
    path.parent.mkdir()
    if before is not None:
        path.write_bytes(before)
    with kernel_log.open_log(log) as file:
        kernel_log.move_log(log, path)
        file.write(b"it writes on")
    assert not log.exists()
    assert path.read_bytes() == b"it writes on"
    beside = path.with_name("kernel.log.1")
    assert (beside.read_bytes() if beside.exists() else None) == before
    kernel_log.unmove_log(path)
    assert (path.read_bytes() if path.exists() else None) == before
    assert not beside.exists()


def test_a_log_of_moderate_size_is_left_alone(small, tmp_path):
    path = tmp_path / "kernel.log"
    path.write_bytes(b"x" * 100)
    kernel_log.cut_logs([tmp_path / "none", path])
    assert path.stat().st_size == 100
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kernel.log"]


@pytest.mark.parametrize("what", ["link", "pipe"])
def test_what_an_owner_put_in_the_logs_place_is_neither_followed_nor_waited_for(small, tmp_path, caplog, what):
    path, other = tmp_path / "kernel.log", tmp_path / "other"
    other.write_bytes(b"x" * 1000)
    if what == "link":
        path.symlink_to(other)
        kernel_log.cut_logs([path])
        assert f"{path} cannot be cut" in caplog.text
    else:
        os.mkfifo(path)
        kernel_log.cut_logs([path])
    assert kernel_log.read_tail(path) == ""
    assert other.stat().st_size == 1000


def test_a_link_in_the_place_of_the_log_before_is_replaced(small, tmp_path):
    path, other = tmp_path / "kernel.log", tmp_path / "other"
    other.write_bytes(b"untouched")
    path.write_bytes(b"x" * 1000)
    Path(f"{path}.1").symlink_to(other)
    kernel_log.cut_logs([path])
    assert other.read_bytes() == b"untouched"
    assert Path(f"{path}.1").read_bytes() == b"x" * 10
