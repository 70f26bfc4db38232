"""What processes weigh and do, from /proc. Linux only: elsewhere there are no such figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dspex_kernels import errors

MIB = 1024.0  # a line of smaps_rollup is in KiB

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Weight:
    """What a process takes.

    Attributes:
        uss: MiB that it has for itself alone.
        pss: The same, and its share of what others have too.
        descriptors: Open files, sockets and pipes.
        threads: Its threads.
    """

    uss: float
    pss: float
    descriptors: int
    threads: int


@dataclass(frozen=True, slots=True)
class Process:
    """A process that cannot be mistaken for a later one of the same id."""

    pid: int
    started: str

    def lives(self) -> bool:
        """Whether it is there, and no zombie."""
        told = _stat(self.pid)
        return told is not None and told[19] == self.started and told[0] != "Z"


def check_supported() -> None:
    """Refuse to measure where nothing tells.

    Raises:
        DependencyMissing: This system has no /proc with what is needed.
    """
    if not (_PROC / "self" / "smaps_rollup").exists():
        raise errors.DependencyMissing("this system has no /proc/PID/smaps_rollup: bench needs Linux")


def weigh(pid: int) -> Weight:
    """What a living process takes now."""
    kibibytes: dict[str, int] = {}
    for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        kibibytes[name.rstrip(":")] = int(value)
    private = sum(size for name, size in kibibytes.items() if name.startswith("Private_"))
    return Weight(
        uss=private / MIB,
        pss=kibibytes["Pss"] / MIB,
        descriptors=sum(1 for _ in (_PROC / str(pid) / "fd").iterdir()),
        threads=sum(1 for _ in (_PROC / str(pid) / "task").iterdir()),
    )


def computed_ns(pids: Iterable[int]) -> int:
    """Nanoseconds that the living threads of processes have computed; /proc/PID/stat would tell 10 ms steps."""
    return sum(
        int((task / "schedstat").read_text().split()[0])
        for pid in pids
        for task in (_PROC / str(pid) / "task").iterdir()
    )


def identify(pid: int) -> Process | None:
    """A process by its id; None where there is none."""
    told = _stat(pid)
    return Process(pid, told[19]) if told is not None else None


def descendants(pid: int) -> set[Process]:
    """What a process has started, and what that has."""
    children: dict[int, list[Process]] = {}
    for entry in _PROC.iterdir():
        told = _stat(int(entry.name)) if entry.name.isdecimal() else None
        if told is not None:
            children.setdefault(int(told[1]), []).append(Process(int(entry.name), told[19]))
    found: set[Process] = set()
    waiting = [pid]
    while waiting:
        new = set(children.get(waiting.pop(), ())) - found
        found |= new
        waiting += [process.pid for process in new]
    return found


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; None where there is no such process."""
    try:
        # The name, in brackets, may hold anything.
        return (_PROC / str(pid) / "stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
