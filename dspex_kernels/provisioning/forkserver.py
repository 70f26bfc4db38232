"""The fork server: a warm process that has built a kernel, and forks one that is ready in milliseconds.

``PYTHON [flags] -m dspex_kernels.provisioning.forkserver MODULE.template DIRECTORY``, launched by the guardian,
whose socket is its stdin. It knows nothing about kernels: that module has a function ``build`` that makes a
``Template``. The directory is its service's, for what it would leave behind, were it killed.

Theory of operation. A fork copies one thread and no kernel object: a lock that another thread holds stays locked, a
ZMQ context or event loop shares its descriptors with the parent's, an open connection carries two processes'
requests. So this process has one thread and no descriptor besides its streams and its socket, and refuses to fork
where that is no longer so. Nobody's data ever comes here: a kernel reads whose it is itself, after the fork.

It forks twice. The process between tells the guardian the kernel's id and ends, and the kernel becomes the
guardian's child (``guardian`` tells why): it is reaped there, and outlives this process.

What a child changes in memory is copied, page by page, so the garbage collector is off and all objects are frozen
before: a collection in one child would copy the whole heap (53 MiB instead of 13, measured). And since what a child
imports is its own, a throw-away child lives a short life, the *rehearsal*: what it imported is imported here, and
the code that it ran is moved together (``pages``). The first kernel does not wait for that, for somebody waits for
it since this process was started.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import functools
import gc
import importlib
import importlib.util
import json
import os
import random
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

from dspex_kernels import logs
from dspex_kernels.provisioning import guardian, pages

REHEARSAL_TIMEOUT = 60
"""Seconds for the throw-away child's life; it takes about one."""
PATIENCE = 0.1
"""Seconds after which a kernel that was forked and not assigned stands by: who waits for one assigns it in 2 ms."""
FAILED = 70
"""Exit code of a kernel that broke outside what it was told to do (sysexits.h, EX_SOFTWARE)."""

_log = logs.get_logger(__name__)


class Template(Protocol):
    """A kernel, built as far as it can be before it is known whose it is. Made by ``MODULE.template.build``."""

    sources: list[str]
    """Files that were read for it: when one changes, it is out of date."""

    def rehearse(self) -> None:
        """Live a short life. Called once, in a throw-away child whose directory is its own.

        That directory's path may be too long for a socket: relative ones are not.
        """

    def warm(self) -> None:
        """Do, and undo, what kernels do first. Called when all is imported that they will want.

        The current directory is removed afterwards; so it is when the template is built.
        """

    def park(self, is_wanted: Callable[[], bool]) -> None:
        """Do ahead what a kernel does first; what belongs to nobody's kernel is undone.

        Called in a child that is not told at once whose kernel it is, in a directory of its own: it stands by, and
        has time.

        Args:
            is_wanted: Whether it has been told now, and ought to come back.
        """

    def serve(self, connection_file: str, bound: Callable[[], None], serving: Callable[[], None]) -> None:
        """Be the kernel until it ends. Called in the child once its environment, directory and streams are set.

        Args:
            connection_file: Path of the kernel's connection file.
            bound: To be called when its sockets are bound.
            serving: To be called when it answers; it may take a moment.
        """


class ForkServer:
    """Forks kernels of one template.

    Args:
        connection: To the guardian.
        template: What they are.
        program: The file that a plainly started kernel runs: its ``sys.argv[0]``.
        directory: For the rehearsal.
    """

    def __init__(self, connection: socket.socket, template: Template, program: str, directory: str) -> None:
        self._connection = connection
        self._template = template
        self._program = program
        self._directory = directory

    def serve(self) -> None:
        """Fork whenever the guardian asks, until it is gone."""
        is_rehearsed = False
        while True:
            request, descriptors, _, _ = socket.recv_fds(self._connection, guardian.MESSAGE_BYTES, 1)
            if not request:
                return
            with socket.socket(fileno=descriptors[0]) as channel:
                self._fork(channel, guardian_pid=int(request))
            if not is_rehearsed:
                is_rehearsed = True
                self._rehearse()

    def _rehearse(self) -> None:
        try:
            learnt = learn(self._template, self._directory)
            for name in learnt.modules:
                _import(name)
            pages.gather(learnt.ran)
            with _own_directory(self._directory):
                self._template.warm()
        except Exception:  # noqa: BLE001  # whatever it is, kernels can be forked without
            _log.warning(
                "the rehearsal failed: kernels copy more pages, and import some things themselves", exc_info=True
            )
        freeze()
        pages.join()

    def _fork(self, channel: socket.socket, guardian_pid: int) -> None:
        try:
            check(self._connection.fileno(), channel.fileno())
            between = os.fork()
            if between == 0:
                self._fork_again(channel, guardian_pid)
            _, status = os.waitpid(between, 0)  # when it is reaped, its child is the guardian's
            number = os.waitstatus_to_exitcode(status)
        except OSError as failure:
            number = failure.errno or errno.EAGAIN
        except RuntimeError:
            _log.exception("this fork server cannot fork any more")
            raise SystemExit(FAILED) from None
        self._tell(errno=number if number >= 0 else errno.ECHILD)

    def _fork_again(self, channel: socket.socket, guardian_pid: int) -> NoReturn:
        """The process between: announce the kernel, and end with 0, or an error's number."""
        try:
            pid = os.fork()
            if pid == 0:
                self._connection.close()
                be_kernel(self._template, channel, guardian_pid, self._program, self._directory)
            self._tell(pid=pid)
        except OSError as failure:
            os._exit(failure.errno or errno.EAGAIN)
        os._exit(0)

    def _tell(self, **message: Any) -> None:
        self._connection.send(json.dumps(message).encode())


def check(*sockets: int) -> None:
    """Make sure that a fork is safe now.

    Args:
        *sockets: Descriptors that may be open beside the streams.

    Raises:
        RuntimeError: There is more than one thread, or something is open: a ZMQ context, an event loop, a cache, a
            connection.
    """
    threads = list(Path("/proc/self/task").iterdir())
    if len(threads) != 1:
        raise RuntimeError(f"{len(threads)} threads ({', '.join(t.name for t in threading.enumerate())})")
    allowed = {0, 1, 2, *sockets}
    if unknown := [target for descriptor, target in _descriptors() if descriptor not in allowed]:
        raise RuntimeError(f"open descriptors: {', '.join(unknown)}")


def _descriptors() -> Iterator[tuple[int, str]]:
    """What is open, and what it stands for."""
    for path in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # it was open for listing them
            yield int(path.name), str(path.readlink())


def be_kernel(
    template: Template, channel: socket.socket, guardian_pid: int, program: str, directory: str
) -> NoReturn:
    """Become a kernel. Called in the forked child.

    Undone is what a child inherits: descriptors, signals, random state, environment, directory.
    """
    code = FAILED
    try:
        os.setsid()
        guardian.prctl(guardian.PR_SET_CHILD_SUBREAPER, 1)
        # Our parent may be the one between, until the guardian has a record of us; it says nothing if it has none.
        if channel.recv(1) != guardian.GO:
            os._exit(1)
        guardian.prctl(guardian.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guardian_pid:
            os._exit(1)
        reseed()
        gc.enable()
        with contextlib.ExitStack() as aside:
            _stand_by(template, channel, directory, aside)
            code = _serve(template, channel, program, aside)
    except BaseException:  # noqa: BLE001  # nothing may get back into the fork server's code
        traceback.print_exc()
    finally:
        _leave(code)


def _stand_by(template: Template, channel: socket.socket, directory: str, aside: contextlib.ExitStack) -> None:
    """Use the time in which nobody wants this kernel; ``aside`` is to be closed when it serves."""
    if _is_wanted(channel, within=PATIENCE):
        return
    own = guardian.aside_path(directory, os.getpid())
    shutil.rmtree(own, ignore_errors=True)  # of one with that pid, whose guardian was killed
    Path(own).mkdir(0o700)
    aside.callback(_remove_aside, own)
    os.chdir(own)
    _be_at_home(own)
    template.park(lambda: _is_wanted(channel))


def _remove_aside(own: str) -> None:
    try:
        Path(own).rmdir()  # what was in it has its name by now
    except OSError:
        shutil.rmtree(own, ignore_errors=True)


def _is_wanted(channel: socket.socket, within: float = 0) -> bool:
    return bool(select.select([channel], [], [], within)[0])


def _serve(template: Template, channel: socket.socket, program: str, aside: contextlib.ExitStack) -> int:
    """Wait for whose kernel this is, and be it. The exit code."""
    request, descriptors, _, _ = socket.recv_fds(channel, 1, guardian.ASSIGNED)
    if request != guardian.ASSIGN:
        return 1  # nobody's any more: the guardian has closed the channel
    try:
        connection_file = apply(descriptors, program)
    except OSError as failure:
        guardian.report(channel, failure.errno, failure.filename or "")
        return 1
    try:
        template.serve(connection_file, channel.close, aside.close)
    except SystemExit as end:
        return _exit_code(end)
    finally:
        channel.close()
    return 0


def _exit_code(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return (end.code or 0) & 0xFF
    print(end.code, file=sys.stderr)  # noqa: T201  # as the interpreter does
    return 1


def apply(descriptors: list[int], program: str) -> str:
    """Put on what an assignment tells: streams, directory, environment, arguments.

    Args:
        descriptors: A file with the assignment as JSON; stdin, stdout, stderr.
        program: The file that a plainly started kernel runs.

    Returns:
        The connection file's path.

    Raises:
        OSError: The directory cannot be entered.
    """
    told, *streams = descriptors
    with open(told, "rb") as file:  # noqa: PTH123  # a descriptor
        file.seek(0)
        assignment = json.load(file)
    for target, descriptor in enumerate(streams):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(assignment["cwd"])
    _set_environment({**assignment["env"], "JPY_PARENT_PID": str(os.getppid())})
    time.tzset()
    tempfile.tempdir = None
    sys.argv[:] = [program, *assignment["argv"][-2:]]
    show_as(assignment["argv"])
    if assignment["imports_from_cwd"]:
        sys.path.insert(0, str(Path.cwd()))  # as ``python -m`` has it
    for stream in (sys.__stdout__, sys.__stderr__):
        stream.reconfigure(line_buffering=stream is sys.__stderr__ or stream.isatty())  # type: ignore[union-attr]  # a TextIOWrapper
    guardian.limit_memory(assignment["memory_limit"])
    return str(assignment["argv"][-1])


def _set_environment(env: dict[str, str]) -> None:
    """Have this environment, most of which a fork server has too."""
    for name in [name for name in os.environ if name not in env]:
        del os.environ[name]
    os.environ.update({name: value for name, value in env.items() if os.environ.get(name) != value})


def show_as(argv: list[str]) -> None:
    """Have ``ps`` and ``/proc`` show this process as if it had been started so, as far as there is room.

    The room is the fork server's own command line (proc_pid_stat(5), fields 48 and 49), which has words to spare.
    """
    start, end = _room()
    text = b"\0".join(map(os.fsencode, argv))[: end - start - 1]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))


@functools.cache  # read before the fork: it is where it was in the child
def _room() -> tuple[int, int]:
    """Where this process's command line begins and ends."""
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[45]), int(fields[46])


def reseed() -> None:
    """Give a child random numbers of its own. Python's own generator is reseeded by ``os.fork``."""
    random.seed()
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        numpy.seed()


def _leave(code: int) -> NoReturn:
    """End as an interpreter does, but for tearing down a heap that is not all ours."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as multiprocessing's children do
        atexit._run_exitfuncs()
    except BaseException:  # noqa: BLE001  # other people's exit functions
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or full: there is nobody to tell
            stream.flush()
    os._exit(code)


def freeze() -> None:
    """Keep a child's garbage collector from all objects that there are: it would write to each, and so copy it."""
    gc.collect()
    pages.fill_gaps()
    gc.freeze()


@dataclass(frozen=True)
class Learnt:
    """What a kernel does in its life.

    Attributes:
        modules: The names of what it imports.
        ran: The code that runs.
    """

    modules: list[str] = field(default_factory=list)
    ran: set[pages.CodeKey] = field(default_factory=set)


def learn(template: Template, directory: str) -> Learnt:
    """See what a kernel does in its life. Nothing is learnt where the throw-away child broke."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _rehearse(template, directory, writer)
    os.close(writer)
    with open(reader, "rb") as file:  # noqa: PTH123  # a descriptor
        text = file.read()
    _, status = os.waitpid(pid, 0)
    if status != 0:
        code = os.waitstatus_to_exitcode(status)
        _log.warning("the rehearsal ended with code %s: kernels import some things themselves", code)
        return Learnt()
    told = json.loads(text)
    return Learnt(told["modules"], {(file, line, name) for file, line, name in told["ran"]})


def _import(name: str) -> None:
    # A name may be made in place by its importer, or be broken: the child had it some other way.
    with contextlib.suppress(Exception):
        importlib.import_module(name)


def _rehearse(template: Template, directory: str, writer: int) -> NoReturn:
    """Live a short life in a throw-away child, and write down what it imported, and what ran."""
    code = FAILED
    ran: set[pages.CodeKey] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            ran.add(pages.key_of(frame.f_code))

    try:
        signal.alarm(REHEARSAL_TIMEOUT)
        with _own_directory(directory) as own:
            _be_at_home(own)
            before = set(sys.modules)
            threading.settrace(note)
            sys.settrace(note)  # not a profiler, which is called for functions in C too
            template.rehearse()
            sys.settrace(None)
            names = [name for name in sys.modules if name not in before and not name.startswith("__")]
        with open(writer, "wb") as file:
            file.write(json.dumps({"modules": names, "ran": list(ran)}).encode())
        code = 0
    except BaseException:  # noqa: BLE001  # nothing may get back into the fork server's code
        traceback.print_exc()
    finally:
        os._exit(code)


@contextlib.contextmanager
def _own_directory(parent: str) -> Iterator[str]:
    """Be in a directory that is removed afterwards: by the guardian, where this process is killed before."""
    with tempfile.TemporaryDirectory(prefix=guardian.REHEARSAL_PREFIX, dir=parent) as directory:
        os.chdir(directory)
        try:
            yield directory
        finally:
            os.chdir("/")


def _be_at_home(directory: str) -> None:
    """Have nothing of the user's: called in a child, which gets its environment later, or never."""
    names = ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    os.environ.update(dict.fromkeys(names, directory))


def build(name: str) -> tuple[Template, str]:
    """A module's template, ready to be forked, and the file that ``python -m`` runs of its package."""
    template: Template = importlib.import_module(name).build()
    package = name.rpartition(".")[0]
    found = importlib.util.find_spec(f"{package}.__main__")
    return template, (found.origin if found is not None else None) or package


def main(name: str, directory: str) -> None:
    """Serve the guardian with a module's template. Called in the fork server's own process."""
    connection = socket.socket(fileno=os.dup(0))
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    gc.disable()
    try:
        with _own_directory(directory):
            template, program = build(name)
        check(connection.fileno())
    except Exception as failure:  # noqa: BLE001  # whatever is wrong with the module, kernels are started plainly
        _log.warning("%s cannot be forked", name, exc_info=True)
        why = f"{type(failure).__name__}: {failure}"
        connection.send(json.dumps({"refused": why}).encode())
        return
    _room()
    freeze()
    connection.send(json.dumps({"sources": [*template.sources, *_package_directories()]}).encode())
    ForkServer(connection, template, program, directory).serve()


def _package_directories() -> list[str]:
    """Where packages are installed: such a directory changes with each installation."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
