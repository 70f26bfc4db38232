"""The journal of a dedicated kernel's session: each change is on disk before its reply leaves.

One file in the session's own directory, ``journal.jsonl`` (``protocol.journal`` tells its form), written by one
kernel at a time. ``append`` returns when the change would outlive a power failure. What the session has spent is
written at once too, so that it outlives the kernel, but does not wait for the disk: it is a running total, and
the next change takes it along.

The file grows with every change, so it is compacted now and then: the session as it stands is written to a new
file that takes the old one's name in one step. Whoever reads meanwhile holds one whole file or the other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
import weakref
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

from dspex_kernels import errors, logs
from dspex_kernels.protocol import journal as lines
from dspex_kernels.protocol.records import Change, SessionContents, Spent

COMPACT_BYTES: Final = 4 * 1024 * 1024
"""A journal smaller than this is left alone: it is read in milliseconds."""
COMPACT_RATIO: Final = 4
"""Compact when the file is this often the size of its last snapshot: each byte is then rewritten 1/3 times."""
LOCK_TIMEOUT: Final = 2.0
"""Seconds to wait for the session's previous kernel to be gone; it may be dying while its heir starts."""

_MARGIN: Final = 256 * 1024
"""More than the longest line about what was spent: 100 models, and their totals."""

_LOCK_NAME = "journal.lock"  # apart from the journal, whose inode changes with each compaction
_TEMPORARY_NAME = "journal.jsonl.new"

logger = logs.get_logger(__name__)


class Journal:
    """The one writer of a session's journal. Thread-safe; every method blocks on the disk.

    Made by ``Journal.open``. After a failed write that could not be taken back the journal refuses to go on, for
    what is on disk is not known any more.
    """

    def __init__(self, directory: Path, lock: int) -> None:
        self._directory = directory
        self._lock = lock
        self._file = -1
        self._guard = threading.Lock()  # guards everything below, and the file's end
        self._contents = SessionContents()
        self._sequence = 0
        self._start = 0
        self._header_length = 0
        self._size = 0
        self._compact_at = COMPACT_BYTES
        self._broken = ""
        self._is_new = False
        """Whether its directory's entry for it may not be on disk yet."""
        _open_journals.add(self)

    @classmethod
    def open(
        cls, directory: str | os.PathLike[str], *, lock_timeout: float = LOCK_TIMEOUT
    ) -> tuple[Self, SessionContents]:
        """The journal of the session in ``directory``, and what the session holds.

        Args:
            directory: The session's own directory; made (0700) when it is not there.
            lock_timeout: Seconds to wait for another kernel to let go of it.

        Returns:
            The journal and the contents; the contents are the caller's own and do not follow the journal.

        Raises:
            StoreError: Another kernel holds the session, the journal is damaged, or the disk refuses.
        """
        path = Path(directory)
        with _told(path, "open"):
            if not path.is_dir():
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                _sync_directory(path.parent)  # else a power failure could take the whole directory
            lock = _take_lock(path, lock_timeout)
        journal = cls(path, lock)
        try:
            with _told(path, "read"):
                journal._load()
        except BaseException:
            journal.close()
            raise
        return journal, _copy(journal._contents)

    @property
    def path(self) -> Path:
        """The journal's file."""
        return self._directory / lines.FILE_NAME

    @property
    def offset(self) -> int:
        """The offset behind the last entry, as ``protocol.journal`` counts (bytes over the journal's life)."""
        with self._guard:
            return self._start + self._size - self._header_length

    def append(self, change: Change) -> None:
        """Write one change down; it is durable when this returns (``Spent``: it outlives this process).

        Raises:
            StoreError: It could not be written and the journal is as before; or the journal is closed or
                broken, and the message tells why.
            InvalidRecord: The change holds something that JSON cannot.
        """
        with self._guard:
            self._append(change)

    def append_at_once(self, spent: Spent) -> bool:
        """Write what was spent without waiting for the disk; called on a loop, which others wait for.

        Returns:
            False where that cannot be: another write waits for the disk just now, or a compaction is due. Nothing
            was written then.

        Raises:
            StoreError: As ``append``.
        """
        if not self._guard.acquire(blocking=False):
            return False
        try:
            if self._size >= self._compact_at - _MARGIN:
                return False
            self._append(spent)
            return True
        finally:
            self._guard.release()

    def _append(self, change: Change) -> None:
        self._check_usable()
        line = lines.encode(self._sequence + 1, datetime.now(UTC), change)
        self._write(line, durable=not isinstance(change, Spent))
        self._sequence += 1
        self._contents.apply(change)
        if self._size >= self._compact_at:
            self._compact_if_possible()

    def settle(self) -> None:
        """Bring a new journal's name to the disk: the first change would wait for that too.

        Raises:
            StoreError: The disk refuses.
        """
        with self._guard:
            if self._is_new and self._file >= 0:
                self._sync_name()

    def flush(self) -> None:
        """Make what was spent durable too.

        Raises:
            StoreError: The disk refuses.
        """
        with self._guard:
            self._check_usable()
            self._sync()

    def compact(self) -> None:
        """Replace the file by a snapshot of the session; nothing changes for whoever reads it.

        Raises:
            StoreError: The disk refuses; the journal is as before.
        """
        with self._guard:
            self._check_usable()
            self._compact()

    def close(self) -> None:
        """Let go of the session; what is appended from now on is refused. Closing twice is fine."""
        with self._guard:
            try:
                if self._file >= 0 and not self._broken:
                    self._sync()
            except errors.StoreError:
                logger.exception("journal %s: the last statistics may be lost", self.path)
            finally:
                self._close_files()
                _open_journals.discard(self)

    def _close_files(self) -> None:
        file, self._file = self._file, -1
        lock, self._lock = self._lock, -1
        for descriptor in (file, lock):  # the lock last: it is free only when nothing is written any more
            if descriptor >= 0:
                os.close(descriptor)

    def _check_usable(self) -> None:
        if self._file < 0:
            raise errors.StoreError(f"the journal {self.path} is closed: its kernel is ending")
        if self._broken:
            raise errors.StoreError(f"the journal {self.path} is broken ({self._broken}): restart the kernel")

    def _load(self) -> None:
        """Take over what is on disk; a torn tail is cut off, a missing file made."""
        (self._directory / _TEMPORARY_NAME).unlink(missing_ok=True)  # of a compaction that a crash ended
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            data = b""
        if b"\n" not in data:  # not even a header: nothing was kept before the power failed
            self._begin()
            return
        header, self._header_length = lines.decode_header(data)
        entries, self._size = lines.decode(data)
        self._contents = lines.fold(entries)
        self._sequence = entries[-1].sequence if entries else 0
        self._start = header.start
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        os.fchmod(self._file, 0o600)
        if self._size < len(data):
            logger.warning("journal %s: cut off %d bytes of a torn line", self.path, len(data) - self._size)
            os.ftruncate(self._file, self._size)
        os.fsync(self._file)  # what was read may be in memory only; from here on it counts as kept
        self._is_new = True  # who made it may have died before its name was on disk
        if self._size >= self._compact_at:
            self._compact_if_possible()

    def _begin(self) -> None:
        """Make the file. There is nothing to lose yet: it is on disk with the first change that is."""
        self._start = time.time_ns()
        header = lines.encode_header(self._start)
        with _told(self._directory, "make"):
            self._file = _write_new(self.path, header)
        self._size = self._header_length = len(header)
        self._is_new = True

    def _write(self, line: bytes, *, durable: bool) -> None:
        try:
            _write_all(self._file, line)
        except OSError as failure:
            self._take_back()
            raise errors.StoreError(
                f"cannot write to the journal {self.path}: {failure.strerror}; the change was not made"
            ) from failure
        if durable:
            try:
                self._sync()
            except errors.StoreError:
                self._take_back()
                raise
        self._size += len(line)

    def _take_back(self) -> None:
        """Cut off what a failed write left, so that the next line does not follow half a one."""
        try:
            os.ftruncate(self._file, self._size)
        except OSError as failure:
            self._broken = f"a failed write could not be taken back: {failure.strerror}"

    def _sync(self) -> None:
        if self._is_new:
            self._sync_name()
        try:
            os.fsync(self._file)
        except OSError as failure:
            # A second fsync may report success for blocks that the first has dropped, so there is none.
            self._broken = f"the disk failed: {failure.strerror}"
            raise errors.StoreError(
                f"the disk did not take the journal {self.path}: {failure.strerror}; restart the kernel"
            ) from failure

    def _compact_if_possible(self) -> None:
        try:
            self._compact()
        except errors.StoreError:
            # What was appended is durable already; the file may grow for a while.
            self._compact_at = 2 * self._size
            logger.exception("journal %s: compaction failed at %d bytes", self.path, self._size)

    def _compact(self) -> None:
        start = self._start + self._size - self._header_length
        header = lines.encode_header(start)
        now = datetime.now(UTC)
        changes = lines.snapshot(self._contents) if self._sequence else []
        body = [lines.encode(self._sequence + n, now, change) for n, change in enumerate(changes, start=1)]
        temporary = self._directory / _TEMPORARY_NAME
        with _told(self._directory, "compact"):
            file = _write_new(temporary, b"".join([header, *body]))
            try:
                os.fsync(file)
                temporary.replace(self.path)
            except OSError:
                os.close(file)
                temporary.unlink(missing_ok=True)
                raise
        old, self._file = self._file, file
        if old >= 0:
            os.close(old)
        self._start, self._header_length = start, len(header)
        self._size = len(header) + sum(map(len, body))
        self._sequence += len(changes)
        self._compact_at = max(COMPACT_BYTES, COMPACT_RATIO * self._size)
        self._sync_name()

    def _sync_name(self) -> None:
        # Until then a power failure could bring the old file back, without what is appended to the new one.
        try:
            _sync_directory(self._directory)
        except OSError as failure:
            self._broken = f"the disk failed: {failure.strerror}"
            raise errors.StoreError(
                f"the disk did not take the directory of the journal {self.path}: {failure.strerror}; "
                "restart the kernel"
            ) from failure
        self._is_new = False


def _take_lock(directory: Path, timeout: float) -> int:
    """The descriptor that holds the session's lock; it ends with this process, however that ends."""
    lock = os.open(directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        is_ours = _locked_within(lock, timeout)
        owner = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
        if is_ours:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(lock)
        raise
    if not is_ours:
        os.close(lock)
        raise errors.StoreError(
            f"the session in {directory} is held by another kernel (pid {owner or 'unknown'}), still after "
            f"{timeout:g} s: two kernels cannot write one session; shut the other down first",
            details={"pid": owner},
        )
    return lock


def _locked_within(lock: int, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)  # flock cannot wait with a deadline
        else:
            return True


def _write_new(path: Path, data: bytes) -> int:
    """A new file with ``data`` in it, open for appending; nothing is left where that fails."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        _write_all(file, data)
    except BaseException:
        os.close(file)
        path.unlink(missing_ok=True)
        raise
    return file


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]  # a full disk may take a part


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(contents: SessionContents) -> SessionContents:
    """Contents that may be changed apart; the records themselves are immutable and shared."""
    programs = {program_id: list(versions) for program_id, versions in contents.programs.items()}
    return SessionContents(programs=programs, settings=contents.settings, spent=contents.spent)


class _told(contextlib.AbstractContextManager[None]):  # noqa: N801  # reads as a statement
    """Turns what the disk refuses into a StoreError that names the place."""

    def __init__(self, directory: Path, verb: str) -> None:
        self._directory, self._verb = directory, verb

    def __exit__(self, kind: object, failure: BaseException | None, traceback: object) -> None:
        if isinstance(failure, OSError):
            raise errors.StoreError(
                f"cannot {self._verb} the journal in {self._directory}: {failure.strerror or failure}"
            ) from failure


_open_journals: weakref.WeakSet[Journal] = weakref.WeakSet()


def _let_go_in_child() -> None:
    # A forked child of the notebook's code would keep the lock past its kernel's death, and could write.
    for journal in list(_open_journals):
        journal._guard = threading.Lock()  # a thread that did not come along may have held it
        journal._close_files()


os.register_at_fork(after_in_child=_let_go_in_child)
