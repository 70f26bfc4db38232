"""The guardian: parent of every kernel of a service, so that none outlives it, nor anything that a kernel started.

It runs in an interpreter of its own (``guardian_client`` starts it) that loads this one file and the standard
library's small modules, in one thread. That keeps it small, quick to start, and safe to fork from.

Theory of operation. The guardian is a child subreaper, and so is each kernel. What a kernel's descendants leave
behind, even after ``setsid`` and a double fork, stays below the kernel while that lives. When the kernel dies it
becomes the guardian's own child. A child that the guardian did not launch is therefore always the orphan of a dead
kernel, and is killed at once. Nothing is polled: a dying kernel's children are handed over before its SIGCHLD is
sent (``exit_notify`` in Linux's ``kernel/exit.c``), and a killed orphan's own children come with its SIGCHLD.

The service's end is seen twice: by the end of the socket, and by a pidfd, since a process that the service forked
may hold a copy of the socket. The service's locks are let go of last: a free lock means that all is gone. A service
that lives on keeps them. A guardian that is itself killed takes its kernels along (PR_SET_PDEATHSIG); what they
started is ended by the service, or by the next one's sweep.

What is to be removed at the service's end stands in the service's directory, one record a launch. It is written
before the kernel's program runs, so that what a killed guardian leaves is known.
"""

# Importing pathlib would cost another 1 MB and 3 ms: a sixth of the start.
# ruff: noqa: PTH105, PTH106, PTH108, PTH123, PTH208

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import time
import warnings  # noqa: F401  # os.execvpe does, at 1 ms in every child that finds it not loaded

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing would cost as much as all the rest
    from collections.abc import Callable
    from typing import Any

FRAME = struct.Struct("!I")
"""A message's length in bytes; the message is JSON."""
STREAMS = 3
"""Descriptors that come with a launch: stdin, stdout, stderr."""
LOCK_NAME = "lock"
RECORD_SUFFIX = ".json"
PART_SUFFIX = ".part"
END_TIMEOUT = 10.0
"""Seconds after which the guardian gives up on a process that cannot be killed (waiting for a dead disk)."""
GONE_TIMEOUT = 1.0
"""Seconds for a service whose end of the socket is closed to be gone: a process closes its files before it ends."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_CHUNK_BYTES = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)


class Launched:
    """A process that was asked for.

    Args:
        key: Its name on both sides, and its record's.
        pid: Its process id; it leads a session and group of its own.
        channel: Open until its program runs: we say "go", it says what went wrong.
    """

    def __init__(self, key: str, pid: int, channel: socket.socket) -> None:
        self.key = key
        self.pid = pid
        self.channel: socket.socket | None = channel


class Guardian:
    """Launches, signals and reaps for one service, until that is gone.

    Args:
        connection: To the service.
        service: A pidfd of the service.
        directory: The service's, where the records are.
    """

    def __init__(self, connection: socket.socket, service: int, directory: str) -> None:
        self._connection = connection
        self._directory = directory
        self._boot_id = boot_id()
        self._received = bytearray()
        self._descriptors: list[int] = []
        self._launched: dict[int, Launched] = {}
        self._records = dict(read_records(directory))
        self._serving = True
        self._asked = False
        self._refused: set[int] = set()
        self._woken, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # the wakeup descriptor tells
        self._poll = select.poll()
        self._readers: dict[int, Callable[[], None]] = {}
        self._watch(connection.fileno(), self._receive)
        self._watch(service, self._leave)
        self._watch(self._woken, self._reap)

    def serve(self) -> bool:
        """Do what the service asks, until it asks for the end or is gone. Whether it asked."""
        while self._serving:
            for descriptor, _ in self._poll.poll():
                reader = self._readers.get(descriptor)
                if reader is not None:
                    reader()
        return self._asked

    def end(self) -> bool:
        """Kill everything below us. False when something would not die within ``END_TIMEOUT``."""
        deadline = time.monotonic() + END_TIMEOUT
        while True:
            self._collect()
            mine = [pid for pid in children(os.getpid()) if pid not in self._refused]
            if not mine:
                return not self._refused
            if time.monotonic() >= deadline:
                complain(f"processes {mine} do not end")
                return False
            # Stopped first, from the top down: what forks as fast as it is killed would not be outrun.
            for pid in mine:
                freeze(pid)
            for pid in mine:
                self._kill(pid)
            select.select([self._woken], [], [], max(0.0, deadline - time.monotonic()))
            self._drain()

    def _watch(self, descriptor: int, reader: Callable[[], None]) -> None:
        self._readers[descriptor] = reader
        self._poll.register(descriptor, select.POLLIN)

    def _unwatch(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        del self._readers[descriptor]

    def _leave(self) -> None:
        self._serving = False

    def _receive(self) -> None:
        space = socket.CMSG_SPACE(STREAMS * array.array("i").itemsize)
        try:
            data, ancillary, _, _ = self._connection.recvmsg(_CHUNK_BYTES, space, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            data, ancillary = b"", []
        for _level, _kind, payload in ancillary:
            self._descriptors.extend(array.array("i", payload))
        if not data:
            self._serving = False
        self._received += data
        while self._serving and (request := self._next_request()) is not None:
            self._answer(request)

    def _next_request(self) -> dict[str, Any] | None:
        if len(self._received) < FRAME.size:
            return None
        end = FRAME.size + FRAME.unpack_from(self._received)[0]
        if len(self._received) < end:
            return None
        request: dict[str, Any] = json.loads(self._received[FRAME.size : end])
        del self._received[:end]
        return request

    def _answer(self, request: dict[str, Any]) -> None:
        operation, key = request["do"], request.get("key", "")
        if operation == "launch":
            self._launch(key, request)
        elif operation == "signal":
            self._tell(told=request["id"], sent=self._signal(key, request["signum"]))
        elif operation == "remember":
            self._remember(key, request["paths"])
        elif operation == "forget":
            self._forget(key)
        else:  # "stop"
            self._asked, self._serving = True, False

    def _tell(self, **message: Any) -> None:
        data = json.dumps(message).encode()
        try:
            self._connection.sendall(FRAME.pack(len(data)) + data)
        except OSError:  # the service is gone: the socket's end says so too
            self._serving = False

    def _launch(self, key: str, request: dict[str, Any]) -> None:
        streams, self._descriptors = self._descriptors[:STREAMS], self._descriptors[STREAMS:]
        ours, theirs = socket.socketpair()
        guardian, pid = os.getpid(), 0
        try:
            pid = os.fork()
            if pid == 0:
                run(request, streams, theirs, guardian)
            record = {
                "pid": pid,
                "start_time": start_time(pid),
                "boot_id": self._boot_id,
                "paths": request["paths"],
            }
            self._write(key, record)
            ours.send(b"g")
        except OSError as failure:  # no process is to be had, or no record of it: then it must not run
            ours.close()
            self._tell(failed=key, errno=failure.errno, filename=failure.filename)
            self._forget(key)
            if pid:
                self._kill(pid)
        else:
            launched = self._launched[pid] = Launched(key, pid, ours)
            self._watch(ours.fileno(), lambda: self._started(launched))
        finally:
            theirs.close()
            for descriptor in streams:
                os.close(descriptor)

    def _started(self, launched: Launched) -> None:
        """The process's program runs, or could not be run: its end of the channel is closed."""
        channel = launched.channel
        if channel is None:
            return
        launched.channel = None
        self._unwatch(channel.fileno())
        try:
            failure = channel.recv(_CHUNK_BYTES)
        except ConnectionError:  # it was killed before it read our "go"
            failure = b""
        channel.close()
        if failure:
            self._tell(failed=launched.key, **json.loads(failure))
            self._forget(launched.key)
        else:
            self._tell(launched=launched.key, pid=launched.pid)

    def _signal(self, key: str, signum: int) -> bool:
        """Signal a process's group. Only we reap it, so its id is still its own."""
        for pid, launched in self._launched.items():
            if launched.key == key:
                try:
                    os.killpg(pid, signum)
                except (ProcessLookupError, PermissionError):
                    return False
                return True
        return False

    def _reap(self) -> None:
        """Called for SIGCHLD: report what ended, and kill the orphans that it left."""
        self._drain()
        self._collect()
        for pid in children(os.getpid()):
            if pid not in self._launched and pid not in self._refused:
                self._kill(pid)

    def _drain(self) -> None:
        try:
            while os.read(self._woken, _CHUNK_BYTES):
                pass
        except BlockingIOError:
            return

    def _collect(self) -> None:
        """Take in the exit codes of all children that ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._refused.discard(pid)
            launched = self._launched.pop(pid, None)
            if launched is not None:
                self._started(launched)  # first things first
                self._tell(ended=launched.key, code=os.waitstatus_to_exitcode(status))
                if not self._records.get(launched.key, {}).get("paths"):
                    self._forget(launched.key)

    def _kill(self, pid: int) -> None:
        """Kill a child of ours."""
        try:
            os.kill(pid, signal.SIGKILL)
        except PermissionError:  # it became another user's (sudo): not ours to end
            self._refused.add(pid)
            self._tell(warning=f"process {pid} belongs to another user and outlives its kernel")

    def _remember(self, key: str, paths: list[str]) -> None:
        record = self._records.get(key)
        if record is None:
            return  # forgotten meanwhile
        self._rewrite(key, {**record, "paths": [*record["paths"], *paths]})

    def _forget(self, key: str) -> None:
        """Drop a launch's paths; its record goes when its process has ended."""
        if any(launched.key == key for launched in self._launched.values()):
            self._rewrite(key, {**self._records[key], "paths": []})
        elif self._records.pop(key, None) is not None:
            remove(record_path(self._directory, key))

    def _rewrite(self, key: str, record: dict[str, Any]) -> None:
        try:
            self._write(key, record)
        except OSError as failure:
            self._tell(warning=f"{failure}: what kernel {record['pid']} leaves may not be removed; make room")

    def _write(self, key: str, record: dict[str, Any]) -> None:
        path = record_path(self._directory, key)
        partial = path + PART_SUFFIX
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
            json.dump(record, file)
        os.replace(partial, path)
        self._records[key] = record


def run(request: dict[str, Any], streams: list[int], channel: socket.socket, guardian: int) -> None:
    """Become the program that was asked for. Called in the forked child; never returns.

    Undone is what a child inherits: the guardian's signals here, its descriptors by being close-on-exec.
    """
    filename = ""
    try:
        os.setsid()
        prctl(_PR_SET_CHILD_SUBREAPER, 1)  # preserved by execve, not inherited by fork: prctl(2)
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        for signum in (*_DEAF_TO, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(signum, signal.SIG_DFL)
        # A guardian that died before PR_SET_PDEATHSIG sends nothing; one that has no record of us says nothing.
        if os.getppid() != guardian or not channel.recv(1):
            os._exit(1)
        for target, descriptor in enumerate(streams):
            os.dup2(descriptor, target)
        filename = request["cwd"]
        os.chdir(filename)
        filename = request["argv"][0]
        os.execvpe(filename, request["argv"], request["env"])  # noqa: S606  # the program is the service's
    except OSError as failure:
        _report(channel, failure.errno, filename)
    except ValueError:  # a zero byte in an argument or variable
        _report(channel, errno.EINVAL, filename)
    finally:
        os._exit(1)


def _report(channel: socket.socket, number: int | None, filename: str) -> None:
    channel.send(json.dumps({"errno": number, "filename": filename}).encode())


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process.

    Raises:
        OSError: The system refuses.
    """
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def boot_id() -> str:
    """The id of the system's present run: a process id says nothing beyond it."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def stat(pid: int) -> tuple[str, int, int] | None:
    """A process's state, parent and start (clock ticks since boot); None when there is none.

    Source: proc_pid_stat(5), fields 3, 4 and 22. The name before them may hold anything, ")" too.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0].decode(), int(fields[1]), int(fields[19])


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when there is none. With its pid it names it."""
    found = stat(pid)
    return found[2] if found is not None else None


def children(pid: int) -> list[int]:
    """The children of a process, all of its threads'; those that ended and were not reaped are among them.

    Of ourselves the list is whole: only we reap, so none vanishes while it is read (proc_tid_children(5)).
    """
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found.extend(map(int, file.read().split()))
    except (FileNotFoundError, ProcessLookupError):
        return found  # it has ended meanwhile, and its children are another's
    return found


def freeze(root: int) -> None:
    """Stop a child of ours and all below it."""
    pending = [(root, os.getpid())]
    while pending:
        pid, parent = pending.pop()
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            # Looked at after opening: a signal that arrives has reached the process that was looked at.
            found = stat(pid)
            if found is None or found[1] != parent:
                continue
            signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
        except (ProcessLookupError, PermissionError):
            continue
        finally:
            os.close(descriptor)
        pending.extend((child, pid) for child in children(pid))


def record_path(directory: str, key: str) -> str:
    return f"{directory}/{key}{RECORD_SUFFIX}"


def read_records(directory: str) -> list[tuple[str, dict[str, Any]]]:
    """The launches of a service that are remembered, by key."""
    records = []
    for name in sorted(os.listdir(directory)):
        if name.endswith(RECORD_SUFFIX):
            with open(f"{directory}/{name}", "rb") as file:
                text = file.read()
            record = parse_record(text)
            if record is None:  # the machine went down before it was on disk: no process of it is left
                complain(f"{directory}/{name} is damaged: what it named is not removed")
                record = {"pid": 0, "start_time": None, "boot_id": "", "paths": []}
            records.append((name.removesuffix(RECORD_SUFFIX), record))
    return records


def parse_record(text: bytes) -> dict[str, Any] | None:
    """A launch's record; None when it is none."""
    try:
        record = json.loads(text)
        began = record["start_time"]
        return {
            "pid": int(record["pid"]),
            "start_time": None if began is None else int(began),
            "boot_id": str(record["boot_id"]),
            "paths": [os.fspath(path) for path in record["paths"]],
        }
    except (ValueError, TypeError, KeyError):
        return None


def bury(directory: str) -> None:
    """Remove what a service's records name, then the records, the lock and the directory."""
    for key, record in read_records(directory):
        for path in record["paths"]:
            remove(path)
        remove(record_path(directory, key))
    for name in os.listdir(directory):
        if name.endswith(PART_SUFFIX):  # it could not be written whole: its program was never let go
            remove(f"{directory}/{name}")
    remove(f"{directory}/{LOCK_NAME}")
    try:
        os.rmdir(directory)
    except OSError as failure:
        complain(f"{failure}: remove it")


def remove(path: str) -> None:
    """Remove a file, socket or link; it may be gone already."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as failure:
        complain(f"{failure}: remove it")


def complain(text: str) -> None:
    """Say what nobody else can be told any more."""
    print(f"dspex guardian {os.getpid()}: {text}", file=sys.stderr, flush=True)  # noqa: T201  # there is no log


def main(directory: str, descriptor: int, service_pid: int, *locks: int) -> None:
    """Guard one service until it is gone; called in the guardian's own process.

    Args:
        directory: Its directory.
        descriptor: The socket to it.
        service_pid: Its process: our parent.
        locks: Open files that it has locked (flock); where it is gone, they are unlocked last of all.
    """
    for inherited in (descriptor, *locks):
        os.set_inheritable(inherited, False)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the thread that started us may have blocked some
    for signum in _DEAF_TO:
        signal.signal(signum, signal.SIG_IGN)
    os.chdir("/")
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    service, is_asked = open_parent(service_pid), False
    if service is not None:
        guardian = Guardian(socket.socket(fileno=descriptor), service, directory)
        is_asked = guardian.serve()
        if not guardian.end():
            return
    bury(directory)
    # A service that lives may have more to do under its locks, and lets go of them itself.
    if service is None or select.select([service], [], [], 0.0 if is_asked else GONE_TIMEOUT)[0]:
        for lock in locks:
            fcntl.flock(lock, fcntl.LOCK_UN)  # not only closed: a process that the service forked may hold it open


def open_parent(pid: int) -> int | None:
    """A pidfd of our parent; None when that is another by now."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    return descriptor if os.getppid() == pid else None  # looked at after opening, so it is our parent's
