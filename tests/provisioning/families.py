"""Kernels as the guardian sees them, with a child and a detached grandchild; and services to be killed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dspex_kernels.provisioning import guardian as guardian_process
from dspex_kernels.provisioning.guardian_client import GuardedProcess, Guardian
from tests.waiting import halt, wait_for

PYTHON = (sys.executable, "-I", "-S", "-c")

FAMILY = """
import json, os, signal, sys, time
def detached():
    if os.fork():
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    with open(sys.argv[1] + ".grandchild", "w") as file:
        file.write(str(os.getpid()))
    os.rename(sys.argv[1] + ".grandchild", sys.argv[1] + ".done")
    signal.pause()
child = os.fork()
if not child:
    signal.pause()
detached()
os.wait()  # the one between
while not os.path.exists(sys.argv[1] + ".done"):
    time.sleep(0.001)
with open(sys.argv[1] + ".part", "w") as file:
    json.dump([os.getpid(), child, int(open(sys.argv[1] + ".done").read())], file)
os.rename(sys.argv[1] + ".part", sys.argv[1])
signal.pause()
"""
"""A kernel that has a child, and a grandchild which called setsid and was forked twice. Its argument is a file for
their process ids, in this order."""

SERVICE = """
import fcntl, json, os, signal, sys
from pathlib import Path
from dspex_kernels.provisioning.guardians import Guardians
root, service_id, script, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
lock = os.open(root / f"{service_id}.lease", os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(lock, fcntl.LOCK_EX)
guardian = Guardians().open(service_id, root / "services", lock)
paths = [root / f"{service_id}.{n}" for n in range(2)]
for path in paths:
    path.touch()
family = str(root / f"{service_id}.family")
kernel = guardian.launch([*json.loads(script), family], env=os.environ, paths=map(str, paths)).result(30)
holder = 0
if how == "forked":
    holder = os.fork()
    if not holder:
        signal.pause()
(root / f"{service_id}.part").write_text(json.dumps([os.getpid(), guardian.pid, holder]))
(root / f"{service_id}.part").rename(root / f"{service_id}.pids")
if how == "exits":
    sys.stdin.read()
else:
    signal.pause()
"""
"""A service with one family. Arguments: directory, service id, the kernel's command, how it is to end."""


@dataclass(frozen=True)
class Identity:
    """A process that its id alone does not name."""

    pid: int
    start_time: int | None

    @classmethod
    def of(cls, pid: int) -> Identity:
        return cls(pid, guardian_process.start_time(pid))

    @property
    def is_alive(self) -> bool:
        found = guardian_process.stat(self.pid)
        return found is not None and found[0] not in "ZX" and found[2] == self.start_time

    def kill(self) -> None:
        if self.is_alive:
            os.kill(self.pid, signal.SIGKILL)


def read_family(path: Path) -> list[Identity]:
    """The kernel, its child and its grandchild, once all are there."""
    wait_for(path.exists, what="the family")
    return [Identity.of(pid) for pid in json.loads(path.read_text())]


def launch_family(guardian: Guardian, path: Path) -> tuple[GuardedProcess, list[Identity]]:
    """A family below a guardian of this process."""
    process = guardian.launch([*PYTHON, FAMILY, str(path)], env=os.environ).result(30)
    return process, read_family(path)


def wait_until_gone(*processes: Identity) -> None:
    wait_for(lambda: not [p for p in processes if p.is_alive], what=f"the end of {processes}")


class ServiceProcess:
    """A service in a process of its own, to be ended in every way.

    Attributes:
        guardian: Its guardian.
        family: Its kernel, child and grandchild.
    """

    def __init__(self, root: Path, service_id: str = "killed", how: str = "killed") -> None:
        self.service_id = service_id
        self.services = root / "services"
        self.directory = self.services / service_id
        self.paths = [root / f"{service_id}.{n}" for n in range(2)]
        self._lease = root / f"{service_id}.lease"
        script = json.dumps([*PYTHON, FAMILY])
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVICE, str(root), service_id, script, how], stdin=subprocess.PIPE
        )
        pids = wait_for(lambda: self._read(root / f"{service_id}.pids"), deadline=30, what="the service")
        self.guardian = Identity.of(pids[1])
        self.holder = Identity.of(pids[2]) if pids[2] else None
        self.family = read_family(root / f"{service_id}.family")

    @staticmethod
    def _read(path: Path) -> list[int]:
        return list(json.loads(path.read_text())) if path.exists() else []

    def kill(self) -> None:
        self.process.kill()
        self.wait()

    def kill_with_guardian(self) -> None:
        """Both, without the guardian doing anything about it."""
        halt(self.guardian.pid)
        self.kill()
        os.kill(self.guardian.pid, signal.SIGKILL)
        wait_until_gone(self.guardian)

    def wait(self) -> None:
        self.process.communicate(timeout=30)

    def wait_for_lock(self) -> None:
        """Return at the moment the service's lock is free."""
        with self._lease.open() as file:
            wait_for(lambda: _is_free(file.fileno()), what="the lock")


def _is_free(descriptor: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@contextlib.contextmanager
def service_process(root: Path, service_id: str = "killed", how: str = "killed") -> Iterator[ServiceProcess]:
    """A service that is ended with the test, whatever becomes of it."""
    service = ServiceProcess(root, service_id, how)
    try:
        yield service
    finally:
        service.kill()
        for process in filter(None, [service.holder]):
            process.kill()
        wait_until_gone(service.guardian)
