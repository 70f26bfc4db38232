"""On what the figures were made: the machine, and the versions of what ran."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dspex_kernels import __version__

PACKAGES = ("dspy", "ipykernel", "jupyter_client", "pyzmq", "tornado", "jupyter_server")
IRI_PACKAGE = "rfc3987_syntax"
"""A grammar that jsonschema compiles when it is imported, if it is there: jupyter_server brings it, and `import
dspy` pays about a second for it."""


def describe() -> dict[str, str]:
    """Cores, memory, Python, versions; by name."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "dspex-kernels": __version__,
        **versions,
    }


def pays_for_jupyter_server() -> bool:
    """Whether importing DSPy here costs what jupyter_server's dependencies add to it."""
    return importlib.util.find_spec(IRI_PACKAGE) is not None


def has_fork_server() -> bool:
    """Whether kernels can be forked here at all."""
    found = importlib.metadata.entry_points(group="jupyter_client.kernel_provisioners", name="dspex-forkserver")
    return bool(found)


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Keep the processors from halting meanwhile, by a process of idle priority on each.

    On a virtual machine a thread that wakes another one on a halted processor pays for that itself: 0.35 ms a
    message on the one where this was measured.
    """
    spinning = [
        subprocess.Popen([sys.executable, "-I", "-S", "-c", _SPIN])  # noqa: S603  # our own program
        for _ in os.sched_getaffinity(0)
    ]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


_SPIN = """
import os
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
parent = os.getppid()
while os.getppid() == parent:
    pass
"""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _memory() -> str:
    try:
        total = int(Path("/proc/meminfo").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return "unknown"
    return f"{total / 1024 / 1024:.1f} GiB"
