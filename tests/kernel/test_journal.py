"""The kernel's journal on a real disk: durable, exclusive, compacted, and whole after a SIGKILL."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspex_kernels import errors
from dspex_kernels.kernel import journal as kernel_journal
from dspex_kernels.kernel.journal import Journal
from dspex_kernels.protocol import journal as lines
from dspex_kernels.protocol.records import (
    Budget,
    Change,
    ProgramDeleted,
    ProgramPut,
    ProgramRecord,
    ProgramSpec,
    SessionContents,
    SessionSettings,
    SettingsChanged,
    Spent,
)
from tests.waiting import wait_for


def _put(program_id: str = "qa_bot", version: int = 1, size: int = 0) -> ProgramPut:
    record = ProgramRecord(program_id=program_id, version=version, spec=ProgramSpec(), state={"pad": "x" * size})
    return ProgramPut(record=record)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "session"


@pytest.fixture
def opened(directory: Path) -> Iterator[Journal]:
    journal, _ = Journal.open(directory)
    yield journal
    journal.close()


def _reopened(directory: Path) -> SessionContents:
    journal, contents = Journal.open(directory, lock_timeout=0)
    journal.close()
    return contents


def _kept(directory: Path) -> SessionContents:
    """What a reader beside the kernel finds."""
    return lines.fold(lines.decode((directory / lines.FILE_NAME).read_bytes())[0])


def test_a_new_session_is_empty(directory: Path) -> None:
    journal, contents = Journal.open(directory)
    journal.close()

    assert contents == SessionContents()


def test_what_was_appended_is_there_on_reopening(directory: Path) -> None:
    changes: list[Change] = [
        _put(),
        _put("other"),
        _put(version=2),
        SettingsChanged(settings=SessionSettings(budget=Budget(tokens=5))),
        Spent(lm_calls=2, tokens=9),
        ProgramDeleted(program_id="other"),
    ]
    expected = SessionContents()
    journal, contents = Journal.open(directory)
    for change in changes:
        journal.append(change)
        expected.apply(change)
    journal.close()

    assert contents == SessionContents()
    assert _reopened(directory) == expected


def test_a_reader_beside_the_kernel_sees_each_change_when_it_is_acknowledged(
    opened: Journal, directory: Path
) -> None:
    offset = None
    for version in (1, 2, 3):
        opened.append(_put(version=version))
        new = lines.unread((directory / lines.FILE_NAME).read_bytes(), offset)
        assert new.changes == [_put(version=version)]
        assert new.offset == opened.offset
        offset = new.offset


def test_file_and_directory_are_their_owners_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        journal, _ = Journal.open(tmp_path / "session")
    finally:
        os.umask(old)
    journal.append(_put())
    journal.compact()
    journal.close()

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "session").iterdir()}
    assert modes == {"journal.jsonl": 0o600, "journal.lock": 0o600}
    assert stat.S_IMODE((tmp_path / "session").stat().st_mode) == 0o700


def test_two_kernels_never_write_one_session(opened: Journal, directory: Path) -> None:
    with pytest.raises(errors.StoreError, match=f"held by another kernel .pid {os.getpid()}.*shut the other down"):
        Journal.open(directory, lock_timeout=0)


def test_a_session_whose_kernel_is_ending_is_waited_for(opened: Journal, directory: Path) -> None:
    opened.append(_put())
    held = threading.Event()
    found: list[SessionContents] = []

    def heir() -> None:
        held.set()
        journal, contents = Journal.open(directory, lock_timeout=10)
        journal.close()
        found.append(contents)

    thread = threading.Thread(target=heir)
    thread.start()
    held.wait(10)
    opened.close()
    thread.join(10)

    assert list(found[0].programs) == ["qa_bot"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # forking is the very thing asked about
def test_a_forked_child_of_the_notebooks_code_neither_holds_the_session_nor_writes_it(directory: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    journal, _ = Journal.open(directory)

    def child() -> None:
        try:
            journal.append(_put("from_the_child"))
        except errors.StoreError as refused:
            theirs.send(refused.message)
        theirs.recv()

    process = fork.Process(target=child)
    process.start()
    try:
        assert ours.poll(10)
        assert "is closed" in ours.recv()
        journal.append(_put())
        journal.close()
        assert list(_reopened(directory).programs) == ["qa_bot"]
    finally:
        process.kill()
        process.join(10)
        process.close()
        ours.close()
        theirs.close()


def test_appending_to_a_closed_journal_is_refused(directory: Path) -> None:
    journal, _ = Journal.open(directory)
    journal.close()
    journal.close()

    with pytest.raises(errors.StoreError, match="is closed"):
        journal.append(_put())


def test_a_tail_torn_at_any_byte_is_cut_off_and_written_over(directory: Path) -> None:
    journal, _ = Journal.open(directory)
    journal.append(_put(version=1))
    path = journal.path
    sound = path.stat().st_size
    journal.append(_put(version=2))
    journal.close()
    data = path.read_bytes()

    for length in range(sound, len(data)):
        path.write_bytes(data[:length])
        journal, contents = Journal.open(directory, lock_timeout=0)
        assert [r.version for r in contents.programs["qa_bot"]] == [1], f"cut to {length} bytes"
        assert path.stat().st_size == sound
        journal.append(_put(version=3))
        journal.close()
        assert [r.version for r in _kept(directory).programs["qa_bot"]] == [1, 3]


def test_a_damaged_journal_is_not_opened_and_the_session_is_let_go(directory: Path) -> None:
    journal, _ = Journal.open(directory)
    for version in (1, 2, 3):
        journal.append(_put(version=version))
    path = journal.path
    journal.close()
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"version":2', b'"version":9'))

    with pytest.raises(errors.StoreError, match="is damaged"):
        Journal.open(directory, lock_timeout=0)
    path.write_bytes(data)

    assert [r.version for r in _reopened(directory).programs["qa_bot"]] == [1, 2, 3]


def test_compaction_keeps_the_session_and_frees_the_space(opened: Journal, directory: Path) -> None:
    for _ in range(200):
        opened.append(_put(size=100))
    opened.append(_put("last"))
    before, end = _kept(directory), opened.offset
    behind = end - 1000
    size = opened.path.stat().st_size

    opened.compact()

    assert _kept(directory) == before
    assert opened.path.stat().st_size < size / 20
    whole = lines.unread(opened.path.read_bytes(), behind)
    assert whole.changes == lines.snapshot(before)
    assert whole.offset == opened.offset > end
    opened.append(_put("after"))
    assert lines.unread(opened.path.read_bytes(), whole.offset).changes == [_put("after")]
    assert list(_kept(directory).programs) == ["qa_bot", "last", "after"]


def test_a_journal_that_passes_its_bound_is_compacted_by_itself(opened: Journal) -> None:
    size = kernel_journal.COMPACT_BYTES // 10
    for n in range(25):
        opened.append(Spent(tokens=n))
        opened.append(_put(size=size))

    assert opened.path.stat().st_size < kernel_journal.COMPACT_BYTES
    assert _kept(opened.path.parent).spent.tokens == 24


def test_a_live_session_over_the_bound_is_not_rewritten_with_every_change(opened: Journal) -> None:
    part = kernel_journal.COMPACT_BYTES // 3
    for n in range(4):
        opened.append(_put(f"large_{n}", size=part))
    inode = opened.path.stat().st_ino

    for version in range(1, 6):
        opened.append(_put(version=version, size=part // 2))

    assert opened.path.stat().st_ino == inode


def test_a_compaction_that_a_crash_ended_leaves_the_journal_as_it_was(directory: Path) -> None:
    journal, _ = Journal.open(directory)
    journal.append(_put())
    journal.close()
    (directory / "journal.jsonl.new").write_bytes(b"half a snapsh")

    assert list(_reopened(directory).programs) == ["qa_bot"]
    assert not (directory / "journal.jsonl.new").exists()


def test_a_journal_made_anew_is_beyond_every_offset_of_the_one_before(directory: Path) -> None:
    journal, _ = Journal.open(directory)
    for _ in range(50):
        journal.append(_put(size=1000))
    offset = journal.offset
    journal.close()
    journal.path.unlink()

    journal, _ = Journal.open(directory)
    journal.append(_put("new"))
    journal.close()

    assert lines.unread(journal.path.read_bytes(), offset).changes == [_put("new")]


def test_a_full_disk_refuses_the_change_and_the_journal_goes_on(
    opened: Journal, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened.append(_put())
    real = os.write
    monkeypatch.setattr(os, "write", _DiskThatFillsUp())
    with pytest.raises(errors.StoreError, match=r"No space left.*the change was not made"):
        opened.append(_put("lost", size=10_000))
    monkeypatch.setattr(os, "write", real)

    opened.append(_put("kept"))

    assert list(_kept(directory).programs) == ["qa_bot", "kept"]


class _DiskThatFillsUp:
    """Takes half of what is written, and then nothing."""

    def __init__(self) -> None:
        self._write, self._is_full = os.write, False

    def __call__(self, file: int, data: memoryview) -> int:
        if self._is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._is_full = True
        return self._write(file, data[: len(data) // 2])


def test_a_compaction_that_fails_does_not_fail_the_change(
    opened: Journal, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kernel_journal, "_write_new", refuse)
    with caplog.at_level(logging.ERROR):
        for version in range(1, 4):
            opened.append(_put(version=version, size=kernel_journal.COMPACT_BYTES // 2))

    assert [r.version for r in _kept(directory).programs["qa_bot"]] == [1, 2, 3]
    assert [record.message.split(": ")[1][:17] for record in caplog.records] == ["compaction failed"]


def test_after_a_failed_fsync_nothing_is_acknowledged_any_more(
    opened: Journal, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened.append(_put())

    def refuse(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", refuse)
        with pytest.raises(errors.StoreError, match="restart the kernel"):
            opened.append(_put("lost"))
    with pytest.raises(errors.StoreError, match=r"is broken .*restart the kernel"):
        opened.append(_put("refused"))
    opened.close()

    assert list(_reopened(directory).programs) == ["qa_bot"]


def test_changes_wait_for_the_disk_and_statistics_do_not(opened: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(file), real(file))[1])

    opened.append(Spent(tokens=1))
    assert len(synced) == 0
    opened.append(_put())
    assert len(synced) == 2  # with a new journal's first change, its directory too: else it may have no name
    opened.append(_put(version=2))
    assert len(synced) == 3
    opened.append(Spent(tokens=2))
    opened.flush()
    assert len(synced) == 4


@pytest.mark.parametrize("left", [b"", b'{"format": "dspex-jou', bytes(64)])
def test_a_journal_of_which_not_even_the_header_reached_the_disk_begins_anew(directory: Path, left: bytes) -> None:
    directory.mkdir(parents=True)
    (directory / lines.FILE_NAME).write_bytes(left)
    journal, contents = Journal.open(directory)
    assert contents == SessionContents()
    journal.append(_put())
    journal.close()
    assert list(_reopened(directory).programs) == ["qa_bot"]


def test_threads_may_append_at_once(opened: Journal, directory: Path) -> None:
    threads = [
        threading.Thread(target=lambda n=n: [opened.append(_put(f"p{n}", v)) for v in range(1, 11)])
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    programs = _kept(directory).programs
    assert {name: len(versions) for name, versions in programs.items()} == {f"p{n}": 10 for n in range(8)}


_WRITER = """
import sys
from dspex_kernels.kernel import journal
from dspex_kernels.protocol.records import ProgramPut, ProgramRecord, ProgramSpec, Spent

journal.COMPACT_BYTES = 20_000  # so that the kill meets compactions too
opened, contents = journal.Journal.open(sys.argv[1])
version = max([r.version for r in contents.programs.get("p", [])], default=0)
while True:
    version += 1
    record = ProgramRecord(program_id="p", version=version, spec=ProgramSpec(), state={"pad": "x" * (version % 97)})
    opened.append(ProgramPut(record=record))
    opened.append(Spent(lm_calls=version))
    print(version, flush=True)
"""


def test_whatever_was_acknowledged_before_a_sigkill_is_there_after_it(directory: Path) -> None:
    acknowledged = 0
    for kill_after in (1, 40, 90):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(directory)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        with writer, writer.stdout as printed:
            for _ in range(kill_after):
                acknowledged = int(printed.readline())
            writer.send_signal(signal.SIGKILL)
            acknowledged = max([acknowledged, *map(int, printed.read().split())])
        wait_for(lambda w=writer: w.poll() is not None, what="the writer's end")

        contents = _reopened(directory)

        versions = [record.version for record in contents.programs["p"]]
        assert versions[-1] in (acknowledged, acknowledged + 1)
        assert versions == list(range(versions[0], versions[-1] + 1))
        assert contents.spent.lm_calls in (acknowledged, acknowledged + 1)


_CRASHER = """
import os, pathlib, signal, sys
from dspex_kernels.kernel import journal
from dspex_kernels.protocol.records import ProgramPut, ProgramRecord, ProgramSpec

def put(version):
    record = ProgramRecord(program_id="p", version=version, spec=ProgramSpec())
    return ProgramPut(record=record)

def dies_before_step(last, owner, name, steps):
    real = getattr(owner, name)
    def step(*args, **more):
        steps.append(name)
        if len(steps) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **more)
    setattr(owner, name, step)

def crash(directory, last, acknowledge):
    steps = []
    for owner, name in ((os, "write"), (os, "fsync"), (os, "ftruncate"), (os, "open"), (pathlib.Path, "replace")):
        dies_before_step(last, owner, name, steps)
    opened, _ = journal.Journal.open(directory)
    for version in range(1, 7):
        opened.append(put(version))
        acknowledge(version)
        if version % 2 == 0:
            opened.compact()

last = 0
while True:
    last += 1
    directory = pathlib.Path(sys.argv[1]) / str(last)
    ours, theirs = os.pipe()
    writes = os.write
    child = os.fork()
    if child == 0:
        crash(directory, last, lambda version: writes(theirs, bytes([version])))
        os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        acknowledged = max(pipe.read(), default=0)
    _, status = os.waitpid(child, 0)
    reopened, contents = journal.Journal.open(directory, lock_timeout=0)
    versions = [record.version for record in contents.programs.get("p", [])]
    reopened.append(put(99))
    reopened.close()
    print(last, acknowledged, len(versions), versions == list(range(1, len(versions) + 1)), flush=True)
    if os.waitstatus_to_exitcode(status) == 0:
        break
"""


def test_a_kernel_that_dies_before_any_step_of_writing_or_compacting_loses_nothing_acknowledged(
    directory: Path,
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _CRASHER, str(directory)], capture_output=True, text=True, timeout=60, check=False
    )

    assert run.returncode == 0, run.stderr
    points = [line.split() for line in run.stdout.splitlines()]
    assert len(points) > 35  # six appends and three compactions, each of several steps
    for step, acknowledged, kept, is_in_order in points:
        assert is_in_order == "True", f"killed before step {step}"
        assert int(kept) - int(acknowledged) in (0, 1), f"killed before step {step}"
    assert points[-1][1] == "6"


def test_what_was_spent_is_written_at_once_unless_the_disk_is_waited_for(opened: Journal, directory: Path) -> None:
    assert opened.append_at_once(Spent(lm_calls=1))
    assert _kept(directory).spent.lm_calls == 1
    with opened._guard:  # as another thread's append does, until the disk has it
        assert not opened.append_at_once(Spent(lm_calls=2))
    opened._compact_at = 0
    assert not opened.append_at_once(Spent(lm_calls=2))
    assert _kept(directory).spent.lm_calls == 1
    opened.close()
    opened._compact_at = kernel_journal.COMPACT_BYTES
    with pytest.raises(errors.StoreError, match="is closed"):
        opened.append_at_once(Spent(lm_calls=2))
