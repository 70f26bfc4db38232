"""The service's side of the guardian: launches, signals and exit codes as futures, for any thread and event loop.

One thread does all that may block: it starts the guardian process, reads the socket, and clears away when that
process was lost. Callers write their request to the socket themselves where it takes it at once, and else put it in
the thread's queue; they get a ``concurrent.futures.Future``: a coroutine awaits it by ``asyncio.wrap_future``, on
whatever loop; blocking code asks for its ``result``. Every future is marked as running, so that a waiter which is
cancelled does not cancel it for the others.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dspex_kernels import errors, logs
from dspex_kernels.provisioning import guardian, sweep
from dspex_kernels.provisioning.fork_servers import ForkServers

Stream = int | IO[Any] | None
"""A file or descriptor, or ``subprocess.DEVNULL``; None is the service's own."""

CLAIM_TIMEOUT = 1.0
"""Seconds in which another service's sweep has seen that a new directory holds nothing."""
EXIT_TIMEOUT = guardian.END_TIMEOUT + 5.0
"""Seconds in which a guardian that has closed its socket must be gone."""

_CHUNK_BYTES = 1 << 16
_KEPT = ("LD_LIBRARY_PATH", sweep.ENV_SERVICE)
"""What the guardian gets of the service's environment: to find Python's library, to be found by an outer sweep."""
_PROGRAM = (
    *(sys.executable, "-I", "-S", "-X", "utf8", "-c"),
    "import sys; sys.path.append(sys.argv[1]); import guardian; "
    "guardian.main(sys.argv[2], *map(int, sys.argv[3:]))",
)
"""Imported by itself, so that no package of ours is loaded around it; imported, for that is compiled once."""
_log = logs.get_logger(__name__)


def unsupported() -> str | None:
    """Why there can be no guardian on this system; None where there can be."""
    if sys.platform != "linux":
        return f"{sys.platform} has no child subreapers"
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        return "/proc does not tell a process's children (CONFIG_PROC_CHILDREN)"
    return None


class GuardedProcess:
    """A process that the guardian launched, or had forked.

    Attributes:
        pid: Its process id; it leads a session and a group of its own.
        ended: Its exit code, once it has ended; negative for the signal that killed it, as Popen has it.
        template: Of a fork server: that it can fork (``sources``, a list), or why not: it says so (``refused``), or
            it has ended before (``lost``).
    """

    def __init__(self, owner: Guardian, key: str, pid: int) -> None:
        self._owner = owner
        self._key = key
        self.pid = pid
        self.ended: Future[int] = _running()
        self.template: Future[dict[str, Any]] = _running()

    def poll(self) -> int | None:
        """The exit code; None while it lives."""
        return self.ended.result() if self.ended.done() else None

    def send_signal(self, signum: int) -> Future[bool]:
        """Signal its process group. The result is whether there was one to be signalled."""
        return self._owner.signal(self._key, signum)

    def remember(self, paths: Iterable[str]) -> None:
        """Name more files, sockets and links that are removed when the service ends."""
        self._owner.post("remember", self._key, paths=[_text(path) for path in paths])

    def forget(self) -> None:
        """Its paths were removed, or are another launch's by now."""
        self._owner.post("forget", self._key)

    def fork(self) -> Future[GuardedProcess]:
        """Of a fork server: a kernel, from now on the guardian's child, that waits to be assigned.

        The future fails with an OSError when none is to be had, the fork server's end included.
        """
        return self._owner.fork(self._key)

    def assign(
        self, assignment: Mapping[str, Any], streams: Sequence[Stream], paths: Iterable[str] = ()
    ) -> Future[GuardedProcess]:
        """Of a forked kernel: tell it whose it is. Done, with the kernel itself, when its sockets are bound.

        Args:
            assignment: As ``forkserver.apply`` takes it.
            streams: stdin, stdout and stderr, as ``Guardian.launch`` takes them.
            paths: Files, sockets and links that are removed when the service ends.
        """
        return self._owner.assign(self._key, assignment, streams, paths)


@dataclass
class _Request:
    """What the guardian is to be told, and who waits for the answer.

    Attributes:
        content: The message.
        descriptors: Ours, to be sent along and closed.
        answer: Of a launch, fork or assignment the process; of a signal whether it was sent; None expects none.
    """

    content: dict[str, Any]
    descriptors: list[int] = field(default_factory=list)
    answer: Future[Any] | None = None

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())

    def give_up(self, failure: Exception) -> None:
        """Answer whoever waits: there is no guardian that would."""
        if self.answer is None:
            return
        if self.content["do"] == "signal":
            self.answer.set_result(False)
        else:
            self.answer.set_exception(failure)


class _Link:
    """A running guardian process, and the socket to it."""

    def __init__(self, directory: Path, locks: Sequence[int]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            numbers = map(str, (theirs.fileno(), os.getpid(), *locks))
            try:
                self.process = subprocess.Popen(  # noqa: S603  # our own program
                    [*_PROGRAM, str(Path(guardian.__file__).parent), str(directory), *numbers],
                    env={name: os.environ[name] for name in _KEPT if name in os.environ},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=None if _is_open(2) else subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), *locks),
                    start_new_session=True,  # a terminal's signals are for the service
                )
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        self.connection = ours
        self._received = bytearray()
        self._unsent: deque[tuple[bytearray, _Request]] = deque()

    @property
    def interest(self) -> int:
        """What to poll the socket for."""
        return select.POLLIN | (select.POLLOUT if self._unsent else 0)

    def queue(self, request: _Request) -> None:
        data = json.dumps(request.content).encode()
        self._unsent.append((bytearray(guardian.FRAME.pack(len(data)) + data), request))

    def send(self) -> bool:
        """Write as much as the socket takes. False where that is not all."""
        while self._unsent:
            data, request = self._unsent[0]
            descriptors = array.array("i", request.descriptors)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)] if descriptors else []
            try:
                sent = self.connection.sendmsg([data], ancillary)
            except BlockingIOError:
                return False
            except ConnectionError:  # the guardian is gone: that is read off the socket next
                return True
            except OSError:  # too many descriptors under way, no memory: for a moment
                return False
            request.close()
            del data[:sent]
            if not data:
                self._unsent.popleft()
        return True

    def read(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived; None when there will be no more."""
        try:
            data = self.connection.recv(_CHUNK_BYTES)
        except ConnectionError:
            return None
        if not data:
            return None
        self._received += data
        messages = []
        while len(self._received) >= guardian.FRAME.size:
            end = guardian.FRAME.size + guardian.FRAME.unpack_from(self._received)[0]
            if len(self._received) < end:
                break
            messages.append(json.loads(self._received[guardian.FRAME.size : end]))
            del self._received[:end]
        return messages

    def close(self) -> None:
        """Let the guardian go, and reap it."""
        self.connection.close()
        for _, request in self._unsent:
            request.close()
        try:
            self.process.wait(EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            _log.warning("guardian %s does not end: it is killed", self.process.pid)
            self.process.kill()
            self.process.wait()


class Guardian:
    """A service's guardian: started at once, and started anew for later kernels should it be killed.

    Args:
        service_id: A file name.
        services: Where services have their directories. What dead ones left there is ended first.
        lease: One more open file that the service has locked (``flock``), beside the lock in its directory: however
            the service ends, both are free only when it and all its kernels are gone. ``stop`` leaves this one to
            the service. None is none.

    Attributes:
        directory: The service's own: lock and records. Removed at the end.
        fork_servers: Those that it launched.
        ready: Done when what dead services left is ended, and processes can be launched. Fails with StoreError when
            the disk refuses, or a living service has this id.
    """

    def __init__(self, service_id: str, services: Path, lease: int | None = None) -> None:
        self.service_id = service_id
        self.directory = services / service_id
        self.ready: Future[None] = _running()
        self.owner_pid = os.getpid()
        """The process in which this object works: not in a fork of it, which has no such thread."""
        self.fork_servers = ForkServers(self)
        self._locks = [] if lease is None else [os.dup(lease)]
        self._name = f"{self.owner_pid}-{guardian.start_time(self.owner_pid)}"
        self._numbers = itertools.count(1)
        self._guard = threading.Lock()  # of the next three: nothing is queued behind "stop"
        self._queue: deque[_Request] = deque()
        self._link: _Link | None = None
        self._stopping = False
        self._stopped: Future[None] = _running()
        self._alarms: dict[object, tuple[float, Callable[[], object]]] = {}
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._asked: dict[int, _Request] = {}
        """What the guardian was asked: whoever writes a request puts it in, the thread takes it out."""
        # The thread's own.
        self._processes: dict[str, GuardedProcess] = {}
        # A daemon: a process that ends without stop() must not wait for it, the guardian sees its end.
        threading.Thread(target=self._run, name=f"dspex-guardian-{service_id}", daemon=True).start()

    @property
    def stopping(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stopping

    @property
    def pid(self) -> int | None:
        """The guardian's process id; None where there is none just now."""
        link = self._link
        return link.process.pid if link is not None else None

    def launch(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | None = None,
        stdin: Stream = subprocess.DEVNULL,
        stdout: Stream = None,
        stderr: Stream = None,
        paths: Iterable[str] = (),
        memory_limit: int = 0,
        forks: bool = False,
    ) -> Future[GuardedProcess]:
        """Start a process: in a session of its own, inheriting nothing but the three streams.

        Args:
            argv: The program, found by ``env``'s PATH, and its arguments.
            env: The whole environment; ``DSPEX_SERVICE`` and ``JPY_PARENT_PID`` are added.
            cwd: Where it runs; None is where the service is.
            stdin: As Popen has it, without PIPE.
            stdout: Likewise.
            stderr: Likewise; ``subprocess.STDOUT`` is where stdout goes.
            paths: Files, sockets and links that are removed when the service ends.
            memory_limit: Bytes that it may allocate; 0 is no limit.
            forks: Whether it is a fork server: its stdin is a socket to the guardian then.

        Returns:
            The process, once its program runs. The future fails with an OSError when the program cannot be run, and
            with KernelStartFailed when the guardian is lost before.

        Raises:
            OSError: A stream is closed, or there is no current directory.
            ServiceClosed: ``stop`` was called.
        """
        content: dict[str, Any] = {
            "key": self._new_key(),
            "argv": [_text(argument) for argument in argv],
            "env": self._environment(env),
            "cwd": _text(cwd if cwd is not None else str(Path.cwd())),
            "paths": [_text(path) for path in paths],
            "memory_limit": memory_limit,
            "forks": forks,
        }
        return self._ask("launch", content, _duplicates(stdin, stdout, stderr))

    def fork(self, server: str) -> Future[GuardedProcess]:
        """Have a fork server fork; for ``GuardedProcess.fork``."""
        return self._ask("fork", {"key": self._new_key(), "server": server})

    def assign(
        self, key: str, assignment: Mapping[str, Any], streams: Sequence[Stream], paths: Iterable[str]
    ) -> Future[GuardedProcess]:
        """Tell a forked kernel whose it is; for ``GuardedProcess.assign``."""
        told = {**assignment, "env": self._environment(assignment["env"])}
        content = {"key": key, "paths": [_text(path) for path in paths]}
        descriptors = _duplicates(*streams)
        try:
            descriptors.insert(0, _written(json.dumps(told).encode()))
        except BaseException:
            _Request({}, descriptors).close()
            raise
        return self._ask("assign", content, descriptors)

    def signal(self, key: str, signum: int) -> Future[bool]:
        """Signal a launched process's group; for ``GuardedProcess.send_signal``."""
        try:
            return self._ask("signal", {"key": key, "signum": int(signum)})
        except errors.ServiceClosed:
            nobody: Future[bool] = _running()
            nobody.set_result(False)
            return nobody

    def _new_key(self) -> str:
        return f"{self._name}-{next(self._numbers)}"

    def _environment(self, env: Mapping[str, str]) -> dict[str, str]:
        named = {_text(name): _text(value) for name, value in env.items()}
        return {**named, sweep.ENV_SERVICE: sweep.mark_of(self.directory)}

    def _ask(self, operation: str, content: dict[str, Any], descriptors: Sequence[int] = ()) -> Future[Any]:
        answer = _running()
        request = _Request({"do": operation, "id": next(self._numbers), **content}, list(descriptors), answer)
        if not self._put(request):
            request.close()
            raise errors.ServiceClosed(f"the guardian of service {self.service_id!r} was stopped")
        return answer

    def post(self, operation: str, key: str, **arguments: Any) -> None:
        """Tell the guardian something that has no answer; for ``GuardedProcess``."""
        self._put(_Request({"do": operation, "key": key, **arguments}))

    def stop(self) -> Future[None]:
        """End all processes, remove all paths, and the directory with its lock. Asking twice is fine."""
        with self._guard:
            if not self._stopping:
                self._stopping = True
                self._queue.append(_Request({"do": "stop"}))
                os.eventfd_write(self._wakeup, 1)
        return self._stopped

    def call_later(self, whose: object, seconds: float, callback: Callable[[], object]) -> None:
        """Have ``callback`` called in the guardian's thread, instead of what the same one had asked for before."""
        with self._guard:
            if not self._stopping:
                self._alarms[whose] = time.monotonic() + seconds, callback
                os.eventfd_write(self._wakeup, 1)

    def _wait(self, poll: select.poll) -> list[tuple[int, int]]:
        """What is to be read or written now. Calls who is due to be called meanwhile."""
        with self._guard:
            next_at = min((at for at, _ in self._alarms.values()), default=None)
        found = poll.poll(None if next_at is None else max(0.0, next_at - time.monotonic()) * 1000)
        now = time.monotonic()
        with self._guard:
            due = [self._alarms.pop(whose)[1] for whose, (at, _) in list(self._alarms.items()) if at <= now]
        for callback in due:
            callback()
        return found

    def _put(self, request: _Request) -> bool:
        with self._guard:
            if self._stopping:
                return False
            self._queue.append(request)
            # Not left to the thread: it would have to wait for a processor, and for this one's interpreter lock.
            if self._link is None or not self._send(self._link):
                os.eventfd_write(self._wakeup, 1)
        return True

    def _send(self, link: _Link) -> bool:
        """Write what is queued, under the guard. False where the socket does not take all of it now."""
        while self._queue:
            self._submit(link, self._queue.popleft())
        return link.send()

    def _take(self) -> list[_Request]:
        with self._guard:
            taken = list(self._queue)
            self._queue.clear()
        return taken

    def _run(self) -> None:
        """The thread: one guardian process after another."""
        try:
            self._prepare()
            while not self.ready.exception():
                self._guard_once()
                if self._stopping:
                    break
                # Not before it is needed: a guardian that cannot live would be started over and over.
                self._wait_until_needed()
            self._clear()
        except Exception as failure:  # noqa: BLE001  # whatever broke, nobody may wait for this thread any more
            _log.exception(
                "service %s: the thread of its guardian broke; it starts no more kernels", self.service_id
            )
            self._give_up(failure)

    def _wait_until_needed(self) -> None:
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        while not (self._queue or self._stopping):
            self._wait(poll)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wakeup)

    def _prepare(self) -> None:
        try:
            sweep.sweep(self.directory.parent)
            self._locks.append(self._claim())
        except errors.StoreError as failure:
            self.ready.set_exception(failure)
        else:
            self.ready.set_result(None)

    def _claim(self) -> int:
        lock = sweep.claim(self.directory, timeout=CLAIM_TIMEOUT)
        if lock is None:
            raise errors.StoreError(
                f"service {self.service_id!r} lives already: {self.directory} is locked; choose another id"
            )
        return lock

    def _guard_once(self) -> None:
        try:
            link = _Link(self.directory, self._locks)
        except OSError as failure:
            _log.exception("service %s: its guardian could not be started", self.service_id)
            self._refuse(self._take(), f"its guardian could not be started: {failure}")
        else:
            self._serve(link)

    def _serve(self, link: _Link) -> None:
        """Work with one guardian process until it has gone."""
        with self._guard:
            self._link = link
        try:
            self._exchange(link)
        finally:
            with self._guard:
                self._link = None
            link.close()
        if not self._stopping:
            pid, code = link.process.pid, link.process.returncode
            _log.warning("service %s: its guardian %s ended with code %s", self.service_id, pid, code)
        self._end_rest()
        self._tell_all("its guardian was lost")

    def _exchange(self, link: _Link) -> None:
        """Pass on what is asked and answered, until the guardian has gone."""
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        while True:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wakeup)
            with self._guard:
                self._send(link)
            poll.register(link.connection, link.interest)
            if any(descriptor != self._wakeup for descriptor, _ in self._wait(poll)):
                try:
                    messages = link.read()
                except BlockingIOError:  # it was only writable
                    continue
                if messages is None:
                    return
                for message in messages:
                    self._heed(message)

    def _submit(self, link: _Link, request: _Request) -> None:
        if request.answer is not None:
            self._asked[request.content["id"]] = request
        if request.content["do"] == "launch":
            # Its parent, for the poller of ipykernel: another id would have it wait for a parent of id 1 for ever.
            request.content["env"]["JPY_PARENT_PID"] = str(link.process.pid)
        link.queue(request)

    def _heed(self, message: dict[str, Any]) -> None:
        match message:
            case {"told": number, "pid": pid}:
                request = self._asked.pop(number)
                assert request.answer is not None
                request.answer.set_result(self._process(request.content["key"], pid))
            case {"told": number, "sent": sent}:
                answer = self._asked.pop(number).answer
                assert answer is not None
                answer.set_result(sent)
            case {"told": number, "errno": code, "filename": filename}:
                self._asked.pop(number).give_up(OSError(code, os.strerror(code), filename))
            case {"template": key, **told}:
                self._processes[key].template.set_result(told)
            case {"ended": key, "code": code}:
                if (ended := self._processes.pop(key, None)) is not None:  # else its launch has failed
                    _tell_end(ended, code)
            case {"warning": text}:
                _log.warning("service %s: %s", self.service_id, text)

    def _process(self, key: str, pid: int) -> GuardedProcess:
        """A process that is told of: when it is forked, and again when it is assigned."""
        if key not in self._processes:
            self._processes[key] = GuardedProcess(self, key, pid)
        return self._processes[key]

    def _end_rest(self) -> bool:
        """End what a guardian that was killed left: its kernels die with it, what they started does not."""
        if not self.directory.exists():
            return True
        try:
            left = sweep.end_recorded(self.directory)
            guardian.remove_all_aside(str(self.directory))
        except OSError:
            _log.exception("service %s: what its guardian left could not be ended", self.service_id)
            return False
        if left:
            _log.warning("service %s: processes %s do not end", self.service_id, left)
        return not left

    def _tell_all(self, why: str) -> None:
        """Answer everybody who waits: there is no process any more."""
        asked, processes = list(self._asked.values()), list(self._processes.values())
        self._asked.clear()
        self._processes.clear()
        for request in asked:
            request.give_up(self._no_kernel(why))
        for process in processes:
            _tell_end(process, -signal.SIGKILL)

    def _refuse(self, requests: Iterable[_Request], why: str) -> None:
        for request in requests:
            request.close()
            request.give_up(self._no_kernel(why))

    def _no_kernel(self, why: str) -> errors.KernelStartFailed:
        return errors.KernelStartFailed(f"service {self.service_id!r}: no kernel was started: {why}; call again")

    def _clear(self) -> None:
        """After ``stop``: the guardian has done all this, unless it was lost just then."""
        failure = self.ready.exception()
        self._close(f"the service stops ({failure})" if failure else "the service stops")
        if failure is None:
            if self._end_rest() and self.directory.exists():
                guardian.bury(str(self.directory))
            fcntl.flock(self._locks[-1], fcntl.LOCK_UN)  # its own, of which a forked process may have a copy
        self._free_locks()
        self._stopped.set_result(None)

    def _give_up(self, failure: Exception) -> None:
        """After what must not happen: nobody may wait for this thread any more."""
        why = f"its guardian's thread broke: {failure!r}"
        self._close(why)
        self._tell_all(why)
        self._free_locks()
        if not self.ready.done():
            self.ready.set_exception(failure)
        self._stopped.set_exception(failure)

    def _close(self, why: str) -> None:
        """Take no request any more, and refuse those that came."""
        with self._guard:
            self._stopping = True
            if self._wakeup >= 0:
                os.close(self._wakeup)
                self._wakeup = -1
        self._refuse(self._queue, why)
        self._queue.clear()

    def _free_locks(self) -> None:
        while self._locks:
            os.close(self._locks.pop())


def _running() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


def _tell_end(process: GuardedProcess, code: int) -> None:
    if not process.template.done():
        process.template.set_result({"lost": f"it ended with code {code}"})
    process.ended.set_result(code)


def _written(data: bytes) -> int:
    """A file of that content, in memory: only who has the descriptor can read it, and no socket has to hold it."""
    descriptor = os.memfd_create("dspex-assignment", os.MFD_CLOEXEC)
    try:
        with open(os.dup(descriptor), "wb") as file:  # noqa: PTH123  # a descriptor
            file.write(data)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _text(value: str | os.PathLike[str]) -> str:
    """As the guardian reads it, which takes file names for UTF-8 whatever the service's locale."""
    return os.fsencode(value).decode("utf-8", "surrogateescape")


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _duplicates(stdin: Stream, stdout: Stream, stderr: Stream) -> list[int]:
    """Descriptors of our own, so that the caller may close its files."""
    if stderr == subprocess.STDOUT:
        stderr = stdout if stdout is not None else 1
    found: list[int] = []
    try:
        for own, stream in enumerate((stdin, stdout, stderr)):
            found.append(_duplicate(own, stream))
    except BaseException:
        for descriptor in found:
            os.close(descriptor)
        raise
    return found


def _duplicate(own: int, stream: Stream) -> int:
    if stream == subprocess.PIPE:
        raise ValueError("a guarded kernel's streams are files or descriptors: open a pipe and give its end")
    if stream == subprocess.DEVNULL or (stream is None and not _is_open(own)):
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    if stream is None:
        return os.dup(own)
    return os.dup(stream if isinstance(stream, int) else stream.fileno())
