"""Which service has which sessions: one at a time, by a lease in the store and a lock on the machine.

A service is registered in the store for ``LEASE`` seconds, renewed long before they are over, and each session
names the service that has it. What a service writes to a session that another has taken over is refused by the
store. On one machine nobody waits for a lease to run out: a service holds a file lock as long as it or any of its
kernels lives (the lock is shared with the process that ends them), so a lock that is free tells that its service is
gone, with all its kernels.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from logging import Logger, LoggerAdapter
from pathlib import Path
from typing import Any

from dspex_kernels import errors
from dspex_kernels.sessions.model import SessionRecord
from dspex_kernels.sessions.store import ServiceRecord, SessionStore

LEASE = 15.0
"""Seconds after its last renewal from when a service on another machine counts as dead."""
RENEW_INTERVAL = 4.0
"""Seconds between renewals: three may fail."""
RENEW_TIMEOUT = 10.0
"""Seconds for the store to answer a renewal; what waits for the lease waits as long."""
DYING_TIMEOUT = 8.0
"""Seconds to wait for the kernels of a service on this machine whose process is gone."""
DYING_PAUSE = 0.05
"""Seconds between two looks at that."""
KERNELS_TIMEOUT = 15.0
"""Seconds after which the kernels of a service whose process is gone are gone too: its guardian ends them in 10."""


class Tenure:
    """This service's hold on its sessions.

    Args:
        service_id: As the store was told it.
        store: Open, once ``begin`` is called.
        directory: Where services of this machine have their locks, a file each.
        log: Is told what goes wrong.
        deposed: Called when another service has taken this one for dead: its kernels have to go, for its sessions
            are another's now.
    """

    def __init__(
        self,
        service_id: str,
        store: SessionStore,
        directory: Path,
        log: Logger | LoggerAdapter[Any],
        deposed: Callable[[], Awaitable[None]],
    ) -> None:
        self.service_id = service_id
        self.lock = -1
        """The descriptor of the lock; -1 while there is none."""
        self._store = store
        self._directory = directory
        self._log = log
        self._deposed = deposed
        self._renewing: asyncio.Task[None] | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._lapses_at = 0.0
        self.times_deposed = 0
        """How often another service has taken this one for dead."""

    @property
    def is_lapsed(self) -> bool:
        """Whether the lease has run out, as after a sleep: the sessions may be another's by now."""
        return _now() >= self._lapses_at

    async def begin(self) -> None:
        """Register this service; what is left of dead ones is freed.

        Raises:
            StoreError: The store or the disk refuses.
        """
        try:
            self.lock = await asyncio.to_thread(_make_lock, self._path_of(self.service_id))
        except OSError as failure:
            raise errors.StoreError(
                f"cannot lock {self._path_of(self.service_id)}: {failure.strerror}; make it writable, or set "
                "SessionService.data_dir"
            ) from failure
        await self._register()
        for other in await self._store.services():
            if other.service_id != self.service_id and await self._is_dead(other):
                await self._bury(other)
        self._renewing = asyncio.create_task(self._renew())

    async def end(self) -> None:
        """Leave the sessions to whichever service comes next. Called when every kernel has ended."""
        ending = {task for task in (self._renewing, self._renewal) if task is not None}
        for task in ending:
            task.cancel()
        if ending:
            await asyncio.wait(ending)
        try:
            await self._store.unregister(self.service_id)
        except errors.DSPexError as failure:  # the lease runs out, and the lock is free
            self._log.warning("service %s could not sign off: %s", self.service_id, failure)
        lock, self.lock = self.lock, -1
        if lock >= 0:
            await asyncio.to_thread(_drop_lock, lock, self._path_of(self.service_id))

    async def claim(self, session_id: str) -> SessionRecord:
        """Make a session this service's; what the store holds of it now.

        Raises:
            SessionNotReady: Another service has it.
            SessionNotFound: There is none.
        """
        deadline = asyncio.get_running_loop().time() + DYING_TIMEOUT
        while True:
            try:
                return await self._store.claim(session_id, self.service_id)
            except errors.SessionNotReady as taken:
                holder = next(
                    (s for s in await self._store.services() if s.service_id == taken.details["holder"]), None
                )
                if asyncio.get_running_loop().time() > deadline:
                    raise
                if holder is None:
                    continue
                if await self._is_dead(holder):
                    await self._bury(holder)
                    continue
                # Its process is gone and its lock is held: its kernels are just being ended.
                if not _is_dying(holder):
                    raise
            await asyncio.sleep(DYING_PAUSE)

    def _path_of(self, service_id: str) -> Path:
        return self._directory / service_id

    async def _bury(self, service: ServiceRecord) -> None:
        """Free a dead service's sessions."""
        self._log.info("service %s (pid %d on %s) is dead", service.service_id, service.pid, service.host)
        # Not if it has shown itself meanwhile.
        if await self._store.bury(service.service_id, seen=service.expires_at):
            await asyncio.to_thread(self._path_of(service.service_id).unlink, missing_ok=True)

    async def _is_dead(self, service: ServiceRecord) -> bool:
        if service.host == socket.gethostname():
            held = await asyncio.to_thread(_is_held, self._path_of(service.service_id))
            if held is not None:
                return not held or _is_left_locked(service)
        return service.expires_at < datetime.now(UTC)

    async def confirm(self) -> None:
        """Return when the lease holds; where it has run out it is renewed, or what another has is given up first.

        Raises:
            StoreError: The store cannot be asked, or does not answer within ``RENEW_TIMEOUT``.
        """
        if self.is_lapsed:
            await asyncio.shield(self._begin_renewal())

    def _begin_renewal(self) -> asyncio.Task[None]:
        """The renewal that is under way, or a new one: who waits for the lease waits for the same."""
        if self._renewal is None or self._renewal.done():
            self._renewal = asyncio.create_task(self._renew_once())
            self._renewal.add_done_callback(self._renewed)
        return self._renewal

    def _renewed(self, renewal: asyncio.Task[None]) -> None:
        if not renewal.cancelled() and (failure := renewal.exception()) is not None:
            self._log.warning("service %s could not renew its lease: %s", self.service_id, failure)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_INTERVAL)
            await asyncio.wait({self._begin_renewal()})

    async def _renew_once(self) -> None:
        lapses_at, expires_at = _now() + LEASE, datetime.now(UTC) + timedelta(seconds=LEASE)
        try:
            async with asyncio.timeout(RENEW_TIMEOUT):
                is_kept = await self._store.renew(self.service_id, expires_at)
        except TimeoutError:
            raise errors.StoreError(
                f"the store did not answer within {RENEW_TIMEOUT:g} s: see whether it can be reached"
            ) from None  # the TimeoutError tells nothing more
        if is_kept:
            self._lapses_at = lapses_at
            return
        self._log.error("service %s was taken for dead: its sessions are another's now", self.service_id)
        self.times_deposed += 1
        try:
            await self._deposed()
        except Exception:  # noqa: BLE001  # a kernel's end may fail in any way; the store refuses what it writes
            self._log.exception("service %s could not give up all it had", self.service_id)
        await self._register()

    async def _register(self) -> None:
        lapses_at, now = _now() + LEASE, datetime.now(UTC)
        expires_at = now + timedelta(seconds=LEASE)
        await self._store.register(
            ServiceRecord(self.service_id, socket.gethostname(), os.getpid(), now, expires_at)
        )
        self._lapses_at = lapses_at


def new_service_id() -> str:
    """A name for a service, never used before."""
    return f"service_{uuid.uuid4().hex[:16]}"


def _now() -> float:
    """Seconds on a clock that nobody sets, and that goes on while the machine sleeps where there is such a one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _make_lock(path: Path) -> int:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _drop_lock(descriptor: int, path: Path) -> None:
    with contextlib.suppress(OSError):  # what cannot be tidied up is in nobody's way
        path.unlink()
    os.close(descriptor)


def _is_held(path: Path) -> bool | None:
    """Whether somebody holds a lock; None where there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        # Shared, so that two services that look at once do not take each other for the holder.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _is_dying(service: ServiceRecord) -> bool:
    return service.host == socket.gethostname() and _has_ended(service.pid)


def _is_left_locked(service: ServiceRecord) -> bool:
    """Whether only a process that the service had forked holds its lock: it and its guardian were both killed."""
    ended_by = service.expires_at + timedelta(seconds=KERNELS_TIMEOUT)
    return _has_ended(service.pid) and ended_by < datetime.now(UTC)


def _has_ended(pid: int) -> bool:
    """Whether a process of this machine is gone, or waits only to be reaped."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):  # it ended just now, or there is no /proc
        return False
    return state in b"ZX"
