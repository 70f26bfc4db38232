"""The sweep: ends what a service left that was killed together with its guardian, and nothing else.

A service's directory tells: its lock is free although the directory is there. Its records name the kernels by
process id, start time and boot id; what they started is found below them, and by a variable of the environment that
all descendants inherit. Each process is signalled through a pidfd that was opened before it was looked at, so that
a process id which another process has by now is never hit.

What is not found: a process that cleared its environment *and* whose kernel and guardian are both gone.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import time
from collections.abc import Collection, Iterable
from pathlib import Path

from dspex_kernels import errors, logs
from dspex_kernels.provisioning import guardian

ENV_SERVICE = "DSPEX_SERVICE"
"""In the environment of every kernel of a service, and so of all that it starts: whose it is (``mark_of``)."""
KILL_TIMEOUT = 5.0
"""Seconds for killed processes to be gone."""

_PAUSE = 0.02
_log = logs.get_logger(__name__)


def claim(directory: Path, *, timeout: float = 0.0) -> int | None:
    """Make a service's directory (0700) and take its lock.

    Args:
        directory: The service's.
        timeout: Seconds to wait for the lock: another service's sweep may just be looking whether it is free.

    Returns:
        An open descriptor that holds the lock; None when a living service has it.

    Raises:
        StoreError: The disk refuses.
    """
    path = directory / guardian.LOCK_NAME
    deadline = time.monotonic() + timeout
    try:
        while True:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue  # a sweep removed the directory just now
            if _lock(descriptor):
                return descriptor
            os.close(descriptor)
            if time.monotonic() >= deadline:
                return None
            time.sleep(_PAUSE)  # flock knows no timeout
    except OSError as failure:
        raise errors.StoreError(
            f"service directory {directory} cannot be used: {failure.strerror}; make room, or make it writable"
        ) from failure


def _lock(descriptor: int) -> bool:
    """Whether the lock is ours now. Not when its file was removed after we opened it: that keeps nobody out."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        os.close(descriptor)
        raise
    return os.fstat(descriptor).st_nlink > 0


def sweep(services: Path) -> list[str]:
    """End and remove what dead services left.

    Args:
        services: The directory that holds one directory for each service; it need not be there.

    Returns:
        The ids of the services of which nothing is left any more. What stands in the way of the others is logged,
        and the next sweep tries again.

    Raises:
        StoreError: The directory cannot be read.
    """
    swept = []
    for directory in _directories(services):
        try:
            if _sweep_service(directory):
                swept.append(directory.name)
        except (OSError, errors.StoreError):
            _log.warning("what service %s left cannot be ended", directory.name, exc_info=True)
    if swept:
        _log.info("ended what dead services left: %s", ", ".join(swept))
    return swept


def _directories(services: Path) -> list[Path]:
    try:
        return sorted(path for path in services.iterdir() if path.is_dir() and not path.is_symlink())
    except FileNotFoundError:
        return []
    except OSError as failure:
        raise errors.StoreError(
            f"the services' directory {services} cannot be read: {failure.strerror}; make it readable"
        ) from failure


def _sweep_service(directory: Path) -> bool:
    """Whether nothing is left of a service now that was dead before."""
    lock = claim(directory)
    if lock is None:
        return False
    try:
        left = end_recorded(directory)
        if left:
            _log.warning("service %s: processes %s do not end", directory.name, left)
            return False
        guardian.bury(str(directory))
        return True
    finally:
        os.close(lock)


def mark_of(directory: Path) -> str:
    """What the processes of the service carry whose directory that is; its id alone may be another's elsewhere."""
    return os.path.realpath(directory)


def end_recorded(directory: Path) -> list[int]:
    """End all processes of one service, as its records and their environment name them; keep its files.

    Returns:
        The processes that would not end.
    """
    return end_processes(mark_of(directory), _recorded(directory))


def _recorded(directory: Path) -> set[tuple[int, int]]:
    """The kernels of a service that may be alive: process id and start time, of this boot."""
    boot_id = guardian.boot_id()
    found = set()
    for _, record in guardian.read_records(str(directory)):
        if record["boot_id"] == boot_id and record["start_time"] is not None:
            found.add((record["pid"], record["start_time"]))
    return found


def end_processes(mark: str, recorded: Collection[tuple[int, int]]) -> list[int]:
    """Kill the recorded processes, all below them, and all that carry the service's mark.

    Args:
        mark: As ``mark_of`` gives it.
        recorded: Process ids with start times.

    Returns:
        The processes that would not end within ``KILL_TIMEOUT``; [] when all is gone.
    """
    deadline = time.monotonic() + KILL_TIMEOUT
    while found := _find(mark, recorded):
        if time.monotonic() >= deadline:
            return sorted(pid for pid, _ in found)
        held = _Held()
        try:
            # Stopped first: what forks while it is being killed would not be outrun.
            while held.stop(found):
                found = _find(mark, {*recorded, *found})
            held.kill(deadline)
        finally:
            held.close()
    return []


class _Held:
    """Processes that were stopped, each by a pidfd."""

    def __init__(self) -> None:
        self._descriptors: dict[tuple[int, int], int] = {}

    def stop(self, processes: Iterable[tuple[int, int]]) -> bool:
        """Stop those that are not yet. Whether there were any."""
        new = [process for process in processes if process not in self._descriptors]
        stopped = False
        for pid, start_time in new:
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            self._descriptors[pid, start_time] = descriptor
            try:
                # Looked at after opening: a signal that arrives has reached the process that was looked at.
                if guardian.start_time(pid) == start_time:
                    signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
                    stopped = True
            except ProcessLookupError:
                continue
            except PermissionError:
                _log.warning("process %s belongs to another user: it is left alone", pid)
        return stopped

    def kill(self, deadline: float) -> None:
        """Kill them, and wait until they are gone."""
        poll = select.poll()
        waiting = set()
        for (pid, start_time), descriptor in self._descriptors.items():
            if guardian.start_time(pid) != start_time:
                continue
            try:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
            poll.register(descriptor, select.POLLIN)
            waiting.add(descriptor)
        while waiting and (left := deadline - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(1000 * left):
                poll.unregister(descriptor)
                waiting.discard(descriptor)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def _find(mark: str, known: Collection[tuple[int, int]]) -> set[tuple[int, int]]:
    """The living processes of a service: those known, those marked, and all below them. Never ourselves."""
    marked = os.fsencode(f"{ENV_SERVICE}={mark}")
    table = _process_table()
    spared = _line_of(os.getpid(), table)
    found = {
        (pid, start_time)
        for pid, (_, start_time) in table.items()
        if pid not in spared and ((pid, start_time) in known or marked in _environment(pid))
    }
    below: dict[int, list[int]] = {}
    for pid, (parent, _) in table.items():
        below.setdefault(parent, []).append(pid)
    pending = [pid for pid, _ in found]
    while pending:
        for pid in below.get(pending.pop(), ()):
            process = (pid, table[pid][1])
            if process not in found and pid not in spared:
                found.add(process)
                pending.append(pid)
    return found


def _process_table() -> dict[int, tuple[int, int]]:
    """Parent and start time of every process that has not ended."""
    table = {}
    for name in os.listdir("/proc"):  # noqa: PTH208  # a thousand Path objects for nothing
        if name.isdecimal() and (found := guardian.stat(int(name))) is not None and found[0] not in "ZX":
            table[int(name)] = found[1:]
    return table


def _line_of(pid: int, table: dict[int, tuple[int, int]]) -> set[int]:
    """A process and its ancestors: a service that was started below a dead one must not end itself."""
    line = set()
    while pid in table and pid not in line:
        line.add(pid)
        pid = table[pid][0]
    return line


def _environment(pid: int) -> list[bytes]:
    """A process's environment; [] when it is another user's, or hidden."""
    try:
        if Path(f"/proc/{pid}").stat().st_uid != os.geteuid():
            return []
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []
