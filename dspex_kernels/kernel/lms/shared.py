"""What all kernels of a service know of a provider's endpoint: its quota and its circuit, each a small record.

A record is a file that is changed under a lock. The lock is the operating system's and is held for microseconds, so
a record outlives every kernel, a kernel that is killed leaves no lock behind, and there is no server to ask. A
record has a fixed size, a version and a checksum: one that is torn or foreign counts as empty. Without a directory
the records live in the process's memory.

Nothing here may hold a request up for long: where a record cannot be had (a stopped process holds its lock, the
disk refuses) the caller is told, and goes on without.

The quota is a window and not a bucket: a bucket of N that refills with N a minute lets 2 N through in its first
minute, and providers count minutes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import struct
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from dspex_kernels import config, logs
from dspex_kernels.config import ProviderLimits

log = logs.get_logger(__name__)

LOCK_PATIENCE = 0.2
"""Longest wait for a record's lock, in seconds: only a process that was stopped just then holds it so long."""
MAX_IN_MEMORY = 4096
"""Records kept in memory where there is no directory; the one that was longest untouched goes first."""
SWEEP_EVERY = 256
"""After so many new files, those that are long untouched are removed."""
MAX_AGE = 2 * 3600.0
"""Seconds after which a record that nobody changed says nothing any more."""

WINDOW = 60
"""Seconds in which a quota holds."""
SLOTS = WINDOW + 1
"""A window that begins within one second and ends within another touches so many."""
MAX_RETRY_AFTER = 30.0
"""Longest wait that a provider's ``retry-after`` is honoured with, in seconds."""
MAX_FAILURES = 32
"""Failures that a circuit remembers: no more are asked for (``ProviderLimits.breaker_failures``)."""

_SALT_NAME = "salt"
_SALT_SIZE = 32
_MAGIC = b"DSPX"
# Magic, version, kind, bytes of the payload, checksum of the payload.
_HEADER = struct.Struct("<4sHHII")
_VERSION = 1


class State(Protocol):
    """What a record holds: immutable, and packed always into ``SIZE`` bytes. Made of nothing, it is empty."""

    KIND: ClassVar[int]
    SIZE: ClassVar[int]

    def pack(self) -> bytes: ...

    @classmethod
    def unpack(cls, data: bytes) -> Self: ...


@dataclass(frozen=True, slots=True)
class Quota:
    """What went to an endpoint with one key, by the second: a record's state.

    Attributes:
        newest: The last second that is counted, on the monotonic clock.
        requests: One number for each of the ``SLOTS`` seconds up to it, the oldest first.
        tokens: The same.
        held_until: The provider asked for no request before; on the monotonic clock.
    """

    KIND: ClassVar[int] = 1
    _LAYOUT: ClassVar[struct.Struct] = struct.Struct(f"<qd{SLOTS}Q{SLOTS}Q")
    SIZE: ClassVar[int] = _LAYOUT.size

    newest: int = 0
    requests: tuple[int, ...] = (0,) * SLOTS
    tokens: tuple[int, ...] = (0,) * SLOTS
    held_until: float = 0.0

    def pack(self) -> bytes:
        return self._LAYOUT.pack(self.newest, self.held_until, *self.requests, *self.tokens)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        newest, held_until, *counts = cls._LAYOUT.unpack(data)
        return cls(newest, tuple(counts[:SLOTS]), tuple(counts[SLOTS:]), held_until)

    def at(self, now: float) -> Quota:
        """The same, seen from now: seconds that have left the window are forgotten."""
        passed = int(now) - self.newest
        if passed == 0:
            return self
        if not 0 < passed < SLOTS:  # long ago, or by the clock of another boot
            return Quota(newest=int(now), held_until=self.held_until if passed >= 0 else 0.0)
        return Quota(
            int(now),
            (*self.requests[passed:], *(0,) * passed),
            (*self.tokens[passed:], *(0,) * passed),
            self.held_until,
        )

    def counted(self, second: int, *, requests: int = 0, tokens: int = 0) -> Quota:
        """With so much more (or less) in a second; the same where it has left the window."""
        index = second - self.newest + SLOTS - 1
        if not 0 <= index < SLOTS:
            return self
        return replace(
            self,
            requests=_added(self.requests, index, requests),
            tokens=_added(self.tokens, index, tokens),
        )

    def held(self, until: float) -> Quota:
        """With no request before that time."""
        return replace(self, held_until=max(until, self.held_until))

    def wait(self, now: float, limits: Mapping[str, int], requests: int, tokens: int) -> tuple[float, str]:
        """Seconds until so much more fits at the earliest, and which limit says so; 0 when it fits now."""
        held = self.held_until - now
        waits = [(held if 0 < held <= MAX_RETRY_AFTER else 0.0, "retry-after")]
        for what, counts, more in zip(config.QUOTAS, (self.requests, self.tokens), (requests, tokens), strict=True):
            if what in limits:
                waits.append((_wait(counts, limits[what], more, self.newest, now), what))
        return max(waits, key=lambda wait: wait[0])


def _added(counts: tuple[int, ...], index: int, more: int) -> tuple[int, ...]:
    return (*counts[:index], max(0, counts[index] + more), *counts[index + 1 :]) if more else counts


def _wait(counts: tuple[int, ...], limit: int, more: int, newest: int, now: float) -> float:
    # What exceeds the limit by itself takes whole windows before the rest is waited for.
    windows, rest = divmod(max(more, 1) - 1, limit)
    excess = sum(counts) + rest + 1 - limit
    left = 0.0
    for age, count in zip(range(SLOTS - 1, -1, -1), counts, strict=True):
        if excess <= 0:
            break
        excess -= count
        left = newest - age + SLOTS - now
    return windows * WINDOW + left


@dataclass(frozen=True, slots=True)
class Circuit:
    """How an endpoint fared of late: a record's state.

    Attributes:
        failures: When it failed, in a row, on the monotonic clock; no answer came in between.
        open_until: Nothing is sent before; 0 is closed.
        probe: The number of the request that tries whether the endpoint is back; 0 is none.
        probe_until: That request is not waited for any longer.
        reason: The last failure's code.
    """

    KIND: ClassVar[int] = 2
    _LAYOUT: ClassVar[struct.Struct] = struct.Struct(f"<ddQH{MAX_FAILURES}d24s")
    SIZE: ClassVar[int] = _LAYOUT.size

    failures: tuple[float, ...] = ()
    open_until: float = 0.0
    probe: int = 0
    probe_until: float = 0.0
    reason: str = ""

    def pack(self) -> bytes:
        times = (*self.failures, *(0.0,) * (MAX_FAILURES - len(self.failures)))
        return self._LAYOUT.pack(
            self.open_until, self.probe_until, self.probe, len(self.failures), *times, self.reason.encode()[:24]
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        open_until, probe_until, probe, count, *rest = cls._LAYOUT.unpack(data)
        reason = rest.pop().rstrip(b"\0").decode("ascii", "replace")
        return cls(tuple(rest[:count]), open_until, probe, probe_until, reason)

    def at(self, now: float, limits: ProviderLimits) -> Circuit:
        """The same, seen from now: what the clock of another boot wrote is forgotten."""
        return self if self.open_until <= now + limits.breaker_reset else Circuit()

    def refusal(self, now: float) -> float | None:
        """Seconds until a request may be sent again; None when it may be now."""
        if now < self.open_until:
            return self.open_until - now
        return self.probe_until - now if self.probe and now < self.probe_until else None

    def probed(self, probe: int, until: float) -> Circuit:
        """With that request on its way as the probe."""
        return replace(self, probe=probe, probe_until=until)

    def failed(self, now: float, probe: int, reason: str, limits: ProviderLimits) -> Circuit:
        """After a failure of a request that was the probe of that number (0: none)."""
        if self.open_until and not self._is_probe(probe):
            return self  # sent before it opened: that failure says nothing new
        # A probe fails a row that is older than the window.
        row = [at for at in self.failures if self.open_until or 0 <= now - at < limits.breaker_window]
        failures = (*row, now)[-MAX_FAILURES:]
        opens = bool(self.open_until) or len(failures) >= limits.breaker_failures
        return Circuit(failures, now + limits.breaker_reset if opens else 0.0, reason=reason)

    def answered(self, probe: int) -> Circuit:
        """After an answer, whatever it said."""
        if self.open_until and not self._is_probe(probe):
            return self
        return Circuit() if self.failures else self

    def given_up(self, probe: int) -> Circuit:
        """After a request whose end says nothing of the endpoint: the next one may be the probe."""
        return replace(self, probe=0, probe_until=0.0) if self._is_probe(probe) else self

    def _is_probe(self, probe: int) -> bool:
        return probe != 0 and probe == self.probe


S = TypeVar("S", bound=State)
R = TypeVar("R")


class Record(Generic[S]):
    """One record; made by ``Records.record``."""

    def __init__(self, records: Records, kind: Callable[[], S], name: str) -> None:
        self._records = records
        self._kind = kind
        self.name = name

    def change(self, decide: Callable[[S, float], tuple[S, R]]) -> R | None:
        """Decide on the record's state, and change it, as one step among all processes. Thread-safe.

        Args:
            decide: Takes the state and the time, gives the new state and a result. Quick, for it runs under the
                lock; the time is read there, so that it never runs backwards from one change to the next.

        Returns:
            The result; None when the record cannot be had, and nothing was decided.
        """
        return self._records.change(self.name, self._kind, decide)


class Records:
    """The records of one directory.

    Args:
        directory: Shared by the kernels of a service; made (0700) when it is not there. None keeps the records in
            this process's memory.
        clock: ``time.monotonic``, which all processes of one boot share.

    Raises:
        OSError: The directory cannot be used.
    """

    def __init__(self, directory: Path | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._clock = clock
        self._lock = threading.Lock()
        self._in_memory: OrderedDict[str, Any] = OrderedDict()
        self._stuck: set[str] = set()
        self._failed = False
        self._made = 0
        if directory is None:
            self._salt = secrets.token_bytes(_SALT_SIZE)
            return
        # Not its parents: those that a service took away with it must not come back.
        directory.mkdir(mode=0o700, exist_ok=True)
        self._salt = _shared_salt(directory)

    def record(self, kind: type[S], *parts: str) -> Record[S]:
        """The record of that kind for ``parts``, which its file's name does not tell."""
        digest = hashlib.blake2b(json.dumps(parts).encode(), key=self._salt, digest_size=16).hexdigest()
        return Record(self, kind, f"{kind.__name__.lower()}-{digest}")

    def change(self, name: str, kind: Callable[[], S], decide: Callable[[S, float], tuple[S, R]]) -> R | None:
        """See ``Record.change``."""
        if self._directory is None:
            return self._change_in_memory(name, kind, decide)
        try:
            with self._locked(self._directory / name) as file:
                if file is None:
                    return None
                before = _read(file, kind, name)
                after, result = decide(before, self._clock())
                if after is not before:
                    _write(file, after)
            self._failed = False
            return result
        except OSError as failure:
            if not self._failed:
                log.warning("provider limits do not hold: %s: %s", self._directory, failure.strerror or failure)
            self._failed = True
            return None

    def _change_in_memory(self, name: str, kind: Callable[[], S], decide: Callable[[S, float], tuple[S, R]]) -> R:
        with self._lock:
            before = self._in_memory.get(name)
            after, result = decide(kind() if before is None else before, self._clock())
            self._in_memory[name] = after
            self._in_memory.move_to_end(name)
            if len(self._in_memory) > MAX_IN_MEMORY:
                self._in_memory.popitem(last=False)
            return result

    @contextmanager
    def _locked(self, path: Path) -> Iterator[int | None]:
        """The record's file, locked; None when its lock cannot be had in time."""
        while True:
            # Opened each time: descriptors kept open would grow with the keys, and threads would share a lock.
            file = self._open(path)
            try:
                if not self._takes_lock(file, path.name):
                    yield None
                    return
                if os.fstat(file).st_nlink:
                    yield file
                    return
                # It was swept between open and lock: what is written now would be lost.
            finally:
                # Not left to close: a child that another thread forked just now has the file open as well.
                fcntl.flock(file, fcntl.LOCK_UN)
                os.close(file)

    def _open(self, path: Path) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(path, flags)
        except FileNotFoundError:
            file = os.open(path, flags | os.O_CREAT, 0o600)
        self._made += 1
        if self._made % SWEEP_EVERY == 0:
            self._sweep(path.parent)
        return file

    def _takes_lock(self, file: int, name: str) -> bool:
        # Who waited for it in vain once only looks, until it is free again: each look would hold the loop up.
        until = time.monotonic() + (0.0 if name in self._stuck else LOCK_PATIENCE)
        pause = 0.0001
        while not _locks(file):
            if time.monotonic() >= until:
                if name not in self._stuck:
                    log.warning("a stopped process holds %s: provider limits do not hold until it goes on", name)
                    self._stuck.add(name)
                return False
            time.sleep(pause)  # flock cannot wait with a deadline
            pause = min(2 * pause, 0.001)
        self._stuck.discard(name)
        return True

    def _sweep(self, directory: Path) -> None:
        """Remove what nobody changed for long: keys come and go."""
        oldest = time.time() - MAX_AGE
        for path in directory.iterdir():
            with suppress(FileNotFoundError):  # another kernel may sweep as well
                if path.name != _SALT_NAME and path.stat().st_mtime < oldest:
                    _remove(path, oldest)


def _remove(path: Path, oldest: float) -> None:
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        # Under the lock, where whoever opened it meanwhile looks whether it is still there.
        if _locks(file) and os.fstat(file).st_mtime < oldest:
            path.unlink()
    finally:
        os.close(file)


def _locks(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(file: int, kind: Any, name: str) -> Any:
    size = _HEADER.size + kind.SIZE
    data = os.pread(file, size + 1, 0)
    if not data:
        return kind()
    payload = data[_HEADER.size :]
    if len(data) != size or data[: _HEADER.size] != _header(kind, payload):
        log.warning("%s is torn or foreign: it counts as empty", name)
        return kind()
    return kind.unpack(payload)


def _write(file: int, state: State) -> None:
    payload = state.pack()
    # One write of less than a page: whoever is killed here has written all of it or nothing.
    os.pwrite(file, _header(state, payload) + payload, 0)
    os.ftruncate(file, _HEADER.size + state.SIZE)


def _header(kind: Any, payload: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, _VERSION, kind.KIND, kind.SIZE, zlib.crc32(payload))


def _shared_salt(directory: Path) -> bytes:
    """The directory's salt: whoever comes first makes it, whole, under its name."""
    path = directory / _SALT_NAME
    with suppress(FileNotFoundError):
        salt = path.read_bytes()
        if len(salt) == _SALT_SIZE:
            return salt
        log.warning("%s is no salt: it is made anew", path)
        path.unlink(missing_ok=True)
    draft = directory / f".{_SALT_NAME}-{secrets.token_hex(8)}"
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(file, secrets.token_bytes(_SALT_SIZE))
        with suppress(FileExistsError):  # another kernel was quicker: its salt counts
            os.link(draft, path)
    finally:
        os.close(file)
        draft.unlink()
    return path.read_bytes()
