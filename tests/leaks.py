"""Finds what a test leaves behind: processes, threads, open files, sockets, runtime and temporary files.

A ``Snapshot`` is taken before the test; ``leaks_since(snapshot)`` names what has come since and does not go away.
Processes are found by a variable of the environment that every descendant inherits, so that one which was
detached from its parent is found too. Looking costs a few milliseconds; only a leak costs more, for what is about
to end is given time to.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.waiting import wait_for

RUN_VARIABLE = "LC_DSPEX_TEST_RUN"
"""In the environment of every process that a test run starts: the run's own id."""

FORK_SERVER = "dspex_kernels.provisioning.forkserver"
"""In the command line of fork servers, and of the kernels that stand by: nobody's yet."""

SETTLE_S = 5.0
"""How long something may take to go away after its test, in seconds."""

EXEC_S = 0.2
"""How long a process may be busy executing another program, in seconds: then its environment is truly empty."""

KTHREADD = 2
"""The parent of the system's own threads, which have no environment."""

ALLOWED_THREADS = {
    r"^TMonitor ": "tqdm starts one per process when a bar is first shown",
}
"""Threads of libraries that live as long as the process: a pattern of class and name, and the reason."""

ALLOWED_FILES = {
    r"^/dev/(null|u?random|pts/\d+|tty)$": "devices hold nothing",
    r"/dspy-cache/": "DSPy's disk cache is one per process and opened at the first call",
    r"^/proc/\d+/fd$": "the directory that this very look reads",
    r"\.(py|pyc|so|pem|zip|whl)$": "a library that is being imported or reads its own data",
}
"""Open files that live as long as the process: a pattern of the target, and the reason."""

ALLOWED_TEMPORARY = {
    r"^pytest-of-": "tmp_path: pytest's own, and removed with the run's directory",
    r"^matplotlib-": "matplotlib's configuration where none is set, removed by it at exit",
}
"""Entries of the run's temporary directory that may stay until its end: a pattern of the name, and the reason."""


@dataclass(frozen=True)
class RunDirectories:
    """Where a test run keeps everything: nothing of it is in the user's home.

    Attributes:
        root: The directory that is removed at the end of the run.
    """

    root: Path

    @property
    def runtime(self) -> Path:
        """``JUPYTER_RUNTIME_DIR``: connection files and ipc sockets."""
        return self.root / "run"

    @property
    def temporary(self) -> Path:
        """``TMPDIR``."""
        return self.root / "tmp"

    def environment(self) -> dict[str, str]:
        """The variables that keep Jupyter, IPython, DSPy and ourselves inside ``root``."""
        return {
            "TMPDIR": str(self.temporary),
            "JUPYTER_RUNTIME_DIR": str(self.runtime),
            "JUPYTER_DATA_DIR": str(self.root / "data"),
            "JUPYTER_CONFIG_DIR": str(self.root / "config"),
            "IPYTHONDIR": str(self.root / "ipython"),
            "DSPY_CACHEDIR": str(self.root / "dspy-cache"),
            "MPLCONFIGDIR": str(self.root / "matplotlib"),
        }

    def make(self) -> None:
        """Create them; private, as Jupyter wants its runtime directory."""
        for path in (self.root, self.runtime, self.temporary):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)


@dataclass(frozen=True)
class Snapshot:
    """What there was at one moment."""

    run_id: str
    directories: RunDirectories
    pids: frozenset[int]
    threads: frozenset[threading.Thread]
    files: frozenset[tuple[int, str]]
    runtime: frozenset[str]
    temporary: frozenset[str]

    @classmethod
    def take(cls, run_id: str, directories: RunDirectories) -> Snapshot:
        """What there is now.

        Args:
            run_id: The value of ``RUN_VARIABLE`` in this run's processes.
            directories: The run's.
        """
        return cls(
            run_id,
            directories,
            frozenset(psutil.pids()),
            frozenset(threading.enumerate()),
            frozenset(open_files()),
            frozenset(_entries(directories.runtime)),
            frozenset(_entries(directories.temporary)),
        )


def leaks_since(before: Snapshot, *, settle: float | None = None, in_process: bool = True) -> list[str]:
    """What has come since ``before`` and does not go away.

    Args:
        before: What was there.
        settle: How long it is given to, in seconds; None is ``SETTLE_S``.
        in_process: Whether threads and open files count. Not after a failure, whose traceback keeps them.

    Returns:
        One line for each thing left; [] for nothing.
    """
    if not _leaks_now(before, in_process):
        return []
    gc.collect()  # sockets of a dropped LM, sessions in reference cycles: Python's to close, not leaked
    left: list[str] = []

    def is_clean() -> bool:
        left[:] = _leaks_now(before, in_process)
        return not left

    with contextlib.suppress(AssertionError):  # the caller words the failure
        wait_for(is_clean, deadline=SETTLE_S if settle is None else settle)
    return left


def _leaks_now(before: Snapshot, in_process: bool) -> list[str]:
    threads = threads_since(before) if in_process else []
    files = files_since(before) if in_process else []
    return [
        *(describe(process) for process in processes_since(before)),
        *(f"thread {thread.name!r}{' (daemon)' * thread.daemon}" for thread in threads),
        *(f"open file {fd}: {_socket_name(fd, target)}" for fd, target in files),
        *(f"runtime file {name}" for name in _new(_entries(before.directories.runtime), before.runtime)),
        *(f"temporary file {name}" for name in temporary_since(before)),
    ]


def processes_since(before: Snapshot) -> list[psutil.Process]:
    """Processes of this run that were not there before, orphans and unreaped children among them."""
    return [p for pid in psutil.pids() if pid not in before.pids and (p := _ours(pid, before))]


def threads_since(before: Snapshot) -> list[threading.Thread]:
    """Threads that were not there before, whether daemons or not."""
    return [
        thread
        for thread in threading.enumerate()
        if thread not in before.threads
        and not _is_allowed(f"{type(thread).__name__} {thread.name}", ALLOWED_THREADS)
    ]


def files_since(before: Snapshot) -> list[tuple[int, str]]:
    """File descriptors of this process, with what they stand for, that were not open before."""
    new = (pair for pair in open_files() if pair not in before.files)
    return [(fd, target) for fd, target in new if not _is_allowed(target, ALLOWED_FILES)]


def temporary_since(before: Snapshot) -> list[str]:
    """Entries of the run's temporary directory that were not there before."""
    new = _new(_entries(before.directories.temporary, depth=1), before.temporary)
    return [name for name in new if not _is_allowed(name, ALLOWED_TEMPORARY)]


def open_files() -> set[tuple[int, str]]:
    """This process's file descriptors, each with what it stands for; empty where there is no /proc."""
    found = set()
    with contextlib.suppress(FileNotFoundError), os.scandir("/proc/self/fd") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # closed meanwhile by another thread
                found.add((int(entry.name), str(Path(entry.path).readlink())))
    return found


def end_processes(before: Snapshot) -> None:
    """Kill what was left, so that one test's leak does not become the next one's failure."""
    for process in processes_since(before):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            if process.ppid() == os.getpid():
                process.wait(timeout=10)
    wait_for(lambda: not processes_since(before), what="killed processes to end")


def describe(process: psutil.Process) -> str:
    """One line about a process: its id, state and command."""
    try:
        return f"process {process.pid} ({process.status()}): {_command(process) or process.name()}"
    except psutil.NoSuchProcess:
        return f"process {process.pid} (ended just now)"


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.ZombieProcess:  # it has none any more
        return ""


def _ours(pid: int, before: Snapshot) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        if _stays(process):
            return None
        if process.ppid() == os.getpid():
            return process
        if process.status() == psutil.STATUS_ZOMBIE:  # it has ended; to reap it is its own parent's
            return None
        # A process that made itself non-dumpable hides its environment, but never its command line.
        if str(before.directories.root) in _command(process):
            return process
        is_ours = _environment(process).get(RUN_VARIABLE) == before.run_id
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None
    return process if is_ours else None


def _stays(process: psutil.Process) -> bool:
    """Whether it is a fork server of the guardian that stays with this process, or a kernel that stands by."""
    return FORK_SERVER in _command(process) and "/process-" in _command(psutil.Process(process.ppid()))


def _environment(process: psutil.Process) -> dict[str, str]:
    """A process's environment. The system shows none while the process is just executing another program."""
    if process.ppid() == KTHREADD:
        return {}
    with contextlib.suppress(AssertionError):
        return wait_for(process.environ, deadline=EXEC_S)
    return {}


def _entries(directory: Path, depth: int = 2) -> set[str]:
    """Names in a directory, those of its directories down to ``depth`` levels too."""
    found: set[str] = set()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory) as entries:
        for entry in entries:
            found.add(entry.name)
            if depth > 1 and entry.is_dir(follow_symlinks=False):
                found |= {f"{entry.name}/{name}" for name in _entries(Path(entry.path), depth - 1)}
    return found


def _new(now: set[str], before: frozenset[str]) -> list[str]:
    return sorted(now - before)


def _is_allowed(name: str, allowed: dict[str, str]) -> bool:
    return any(re.search(pattern, name) for pattern in allowed)


def _socket_name(fd: int, target: str) -> str:
    """A socket's addresses beside its inode, where the system tells them."""
    for connection in psutil.Process().net_connections("all") if target.startswith("socket:") else ():
        if connection.fd == fd:
            return f"{target} {connection.status} {connection.laddr or ''} -> {connection.raddr or ''}"
    return target
