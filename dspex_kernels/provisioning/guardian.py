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

Kernels are also forked, by a *fork server* (``forkserver``): a process that we launched, and that forks twice. The
process between them announces the kernel to us and ends, and so the kernel becomes our child as if we had
launched it; a fork server that dies takes none along. The announcement is in its socket before the kernel can be
seen among our children: whoever reads the children first and the sockets then takes no kernel for an orphan. A
forked kernel waits until it is assigned: until it is told its arguments, environment and streams.
"""

# Importing pathlib would cost another 1 MB and 3 ms: a sixth of the start.
# ruff: noqa: PTH105, PTH106, PTH108, PTH110, PTH123, PTH208

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
ASSIGNED = 1 + STREAMS
"""Descriptors that come with an assignment: a file that tells whose kernel it is, and the streams."""
GO, ASSIGN = b"g", b"a"
"""What a process reads off its channel: that there is a record of it; that an assignment's descriptors are here."""
MESSAGE_BYTES = 1 << 16
"""The longest message between us and a fork server."""
LOCK_NAME = "lock"
RECORD_SUFFIX = ".json"
PART_SUFFIX = ".part"
REHEARSAL_PREFIX = "rehearsal-"
"""Of a directory that a fork server uses for a moment."""
SPARE_PREFIX = "spare-"
"""Of the service's own files, of kernels that are nobody's yet."""
END_TIMEOUT = 10.0
"""Seconds after which the guardian gives up on a process that cannot be killed (waiting for a dead disk)."""
GONE_TIMEOUT = 1.0
"""Seconds for a service whose end of the socket is closed to be gone: a process closes its files before it ends."""

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
_DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_CHUNK_BYTES = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)


class Launched:
    """A process that was asked for.

    Args:
        key: Its name on both sides, and its record's.
        pid: Its process id; it leads a session and group of its own. 0 until it is forked.
        channel: Open until its program runs: we say "go", it says what went wrong.
        asked: The request that is answered when it closes its end of the channel.
    """

    def __init__(self, key: str, pid: int, channel: socket.socket, asked: int) -> None:
        self.key = key
        self.pid = pid
        self.channel: socket.socket | None = channel
        self.asked = asked


class ForkServer:
    """A process that forks for us, one kernel after another: a queue of ours never fills its socket.

    Args:
        connection: Its stdin's other end, a ``SOCK_SEQPACKET``.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.waiting: list[tuple[str, int]] = []
        """Who is to be forked next: the key, and the request that is answered."""
        self.forking: Launched | None = None
        """Who is being forked now."""


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
        self._fork_servers: dict[str, ForkServer] = {}
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
        space = socket.CMSG_SPACE(ASSIGNED * array.array("i").itemsize)
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
        elif operation == "fork":
            self._fork(key, request)
        elif operation == "assign":
            self._assign(key, request)
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
        streams = self._take_descriptors(STREAMS)
        if request["forks"]:
            self._expect_fork_server(key, streams)
        ours, theirs = socket.socketpair()
        guardian, pid = os.getpid(), 0
        try:
            pid = os.fork()
            if pid == 0:
                run(request, streams, theirs, guardian)
            self._record(key, pid, request["paths"])
            ours.send(GO)
        except OSError as failure:  # no process is to be had, or no record of it: then it must not run
            ours.close()
            self._refuse(key, request["id"], failure)
            if pid:
                self._kill(pid)
        else:
            launched = self._launched[pid] = Launched(key, pid, ours, request["id"])
            self._watch(ours.fileno(), lambda: self._started(launched))
        finally:
            theirs.close()
            for descriptor in streams:
                os.close(descriptor)

    def _expect_fork_server(self, key: str, streams: list[int]) -> None:
        """Put a socket to us in the place of its stdin."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.close(streams[0])
        streams[0] = theirs.detach()
        self._fork_servers[key] = ForkServer(ours)
        self._watch(ours.fileno(), lambda: self._hear(key))

    def _take_descriptors(self, number: int) -> list[int]:
        taken, self._descriptors = self._descriptors[:number], self._descriptors[number:]
        return taken

    def _refuse(self, key: str, asked: int, failure: OSError) -> None:
        self._tell(told=asked, errno=failure.errno, filename=failure.filename)
        self._forget(key)

    def _close_channel(self, launched: Launched) -> None:
        """A process has ended: whoever waits for its start is answered."""
        if launched.channel is None:
            return
        if launched.channel.fileno() in self._readers:
            self._started(launched)
        else:  # it was forked, and nobody's yet
            launched.channel.close()
            launched.channel = None

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
            self._tell(told=launched.asked, **json.loads(failure))
            self._forget(launched.key)
        else:
            self._tell(told=launched.asked, pid=launched.pid)

    def _fork(self, key: str, request: dict[str, Any]) -> None:
        server = self._fork_servers.get(request["server"])
        if server is None:
            self._refuse(key, request["id"], ConnectionError(errno.ECONNRESET, "fork server"))
            return
        server.waiting.append((key, request["id"]))
        self._fork_next(server)

    def _fork_next(self, server: ForkServer) -> None:
        while server.forking is None and server.waiting:
            key, asked = server.waiting.pop(0)
            try:
                ours, theirs = socket.socketpair()
            except OSError as failure:
                self._refuse(key, asked, failure)
                continue
            with theirs:
                try:
                    socket.send_fds(server.connection, [b"%d" % os.getpid()], [theirs.fileno()])
                except OSError as failure:  # it is gone: its socket's end is read next
                    ours.close()
                    self._refuse(key, asked, failure)
                else:
                    server.forking = Launched(key, 0, ours, asked)

    def _hear(self, name: str) -> None:
        """Called when a fork server says something, and before a child of ours is taken for an orphan."""
        server = self._fork_servers.get(name)
        while server is not None:
            try:
                text = server.connection.recv(MESSAGE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionError:
                text = b""
            if not text:
                self._lose(name)
                return
            self._heed(name, server, json.loads(text))

    def _heed(self, name: str, server: ForkServer, message: dict[str, Any]) -> None:
        launched = server.forking
        if launched is None:
            self._tell(template=name, **message)  # whether it can fork at all
        elif "pid" in message:  # comes to us when the process between has ended
            launched.pid = message["pid"]
            self._launched[launched.pid] = launched
        else:
            server.forking = None
            self._settle(launched, message["errno"])
            self._fork_next(server)

    def _settle(self, launched: Launched, number: int) -> None:
        """A forked kernel is our child now, or (with an error's number) nobody's."""
        assert launched.channel is not None
        failure = OSError(number, os.strerror(number)) if number else None
        if failure is None:
            try:
                self._record(launched.key, launched.pid, [])
                launched.channel.send(GO)
            except OSError as refused:
                failure = refused
        if failure is None:
            self._tell(told=launched.asked, pid=launched.pid)
        else:
            launched.channel.close()  # that ends it, where it is
            launched.channel = None
            self._refuse(launched.key, launched.asked, failure)

    def _lose(self, name: str) -> None:
        """A fork server is gone. Its kernels are ours, but for the one that it was about to hand over."""
        server = self._fork_servers.pop(name)
        self._unwatch(server.connection.fileno())
        server.connection.close()
        if server.forking is not None:
            self._settle(server.forking, errno.ECONNRESET)
        for key, asked in server.waiting:
            self._refuse(key, asked, ConnectionError(errno.ECONNRESET, "fork server"))

    def _assign(self, key: str, request: dict[str, Any]) -> None:
        """Pass on to a forked kernel whose it is."""
        descriptors = self._take_descriptors(ASSIGNED)
        launched = self._find(key)
        try:
            if launched is None or launched.channel is None:
                raise ConnectionError(errno.ECONNRESET, "kernel")
            self._record(key, launched.pid, request["paths"])
            socket.send_fds(launched.channel, [ASSIGN], descriptors)
        except OSError as failure:
            self._tell(told=request["id"], errno=failure.errno, filename=failure.filename)
        else:
            launched.asked = request["id"]
            self._watch(launched.channel.fileno(), lambda: self._started(launched))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _find(self, key: str) -> Launched | None:
        return next((launched for launched in self._launched.values() if launched.key == key), None)

    def _signal(self, key: str, signum: int) -> bool:
        """Signal a process's group. Only we reap it, so its id is still its own."""
        launched = self._find(key)
        if launched is None:
            return False
        for send in (os.killpg, os.kill):  # one that was forked just now leads no group yet, and is alone
            try:
                send(launched.pid, signum)
            except ProcessLookupError:
                continue
            except PermissionError:
                return False
            return True
        return False

    def _reap(self) -> None:
        """Called for SIGCHLD: report what ended, and kill the orphans that it left."""
        self._drain()
        self._collect()
        mine = children(os.getpid())
        for name in list(self._fork_servers):  # after that: each forked kernel among them is announced by now
            self._hear(name)
        for pid in mine:
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
                self._close_channel(launched)  # first things first
                remove_aside(self._directory, pid)
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
        if self._find(key) is not None and key in self._records:  # else it was announced, and never ours
            self._rewrite(key, {**self._records[key], "paths": []})
        elif self._records.pop(key, None) is not None:
            remove(record_path(self._directory, key))

    def _rewrite(self, key: str, record: dict[str, Any]) -> None:
        try:
            self._write(key, record)
        except OSError as failure:
            self._tell(warning=f"{failure}: what kernel {record['pid']} leaves may not be removed; make room")

    def _record(self, key: str, pid: int, paths: list[str]) -> None:
        record = {"pid": pid, "start_time": start_time(pid), "boot_id": self._boot_id, "paths": paths}
        self._write(key, record)

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
        if not request["forks"]:  # what a fork server forks is to become ours
            prctl(PR_SET_CHILD_SUBREAPER, 1)  # preserved by execve, not inherited by fork: prctl(2)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
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
        limit_memory(request["memory_limit"])
        filename = request["argv"][0]
        os.execvpe(filename, request["argv"], request["env"])  # noqa: S606  # the program is the service's
    except OSError as failure:
        report(channel, failure.errno, filename)
    except ValueError:  # a zero byte in an argument or variable
        report(channel, errno.EINVAL, filename)
    finally:
        os._exit(1)


def limit_memory(size: int) -> None:
    """Bound what this process may allocate, in bytes; 0 is no limit. Beyond it, allocations fail (setrlimit(2))."""
    if size:
        import resource  # where no limit is set, nobody needs it

        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def report(channel: socket.socket, number: int | None, filename: str) -> None:
    """Tell a channel's other end why the program does not run."""
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
    remove_all_aside(directory)
    for name in os.listdir(directory):
        if name.startswith(SPARE_PREFIX):
            remove(f"{directory}/{name}")
        if name.endswith(PART_SUFFIX):  # it could not be written whole: its program was never let go
            remove(f"{directory}/{name}")
    remove(f"{directory}/{LOCK_NAME}")
    try:
        os.rmdir(directory)
    except OSError as failure:
        complain(f"{failure}: remove it")


def aside_path(directory: str, pid: int) -> str:
    """Where a forked kernel that stands by has its own directory, in the service's."""
    return f"{directory}/{REHEARSAL_PREFIX}{pid}"


def remove_aside(directory: str, pid: int) -> None:
    """Remove what a kernel left that was killed while it stood by."""
    path = aside_path(directory, pid)
    if os.path.exists(path):
        remove_tree(path)


def remove_all_aside(directory: str) -> None:
    """Remove what kernels left that were forked and are gone, and their fork server."""
    for name in os.listdir(directory):
        if name.startswith(REHEARSAL_PREFIX):
            remove_tree(f"{directory}/{name}")


def remove_tree(path: str) -> None:
    """Remove a directory and all in it."""
    import shutil  # hardly ever

    shutil.rmtree(path, ignore_errors=True)


def remove(path: str) -> None:
    """Remove a file, socket or link, which may be gone already; or a directory, with the last that was in it."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        if not os.listdir(path):
            os.rmdir(path)
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
    prctl(PR_SET_CHILD_SUBREAPER, 1)
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
