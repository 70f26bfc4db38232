"""Services under load, and what they and their kernels weigh meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any

from traitlets.config import Config

from dspex_kernels import SessionService
from tests.stress import figures
from tests.waiting import wait_until

LOOK_INTERVAL = 0.01
"""Seconds between two health checks: more often than anybody would ask."""


@contextlib.asynccontextmanager
async def started(
    directory: Path,
    backend: str,
    *,
    kernels: int = 2,
    standby: int = 2,
    timeout: float = figures.TIMEOUT,
    **traits: Any,
) -> AsyncIterator[SessionService]:
    """A service; one whose backend is the pool has all its kernels when this begins.

    Args:
        directory: Everything of the service is in it.
        backend: The sessions' own, unless they say.
        kernels: In the pool.
        standby: Kernels that stand by.
        timeout: Seconds for all that is done with it.
        **traits: The service's.
    """
    pool = {"size": kernels, "prestart": backend == "pooled", **traits.pop("pool", {})}
    service = SessionService(
        data_dir=str(directory / "data"),
        store_url=f"sqlite:///{directory / 'store.sqlite'}",
        backend=backend,
        config=Config({"KernelPool": pool, "ForkServerProvisioner": {"standby": standby}}),
        **traits,
    )
    async with asyncio.timeout(timeout), service:
        if backend == "pooled":
            await until_whole(service, kernels)
        yield service


async def until_whole(service: SessionService, kernels: int) -> dict[str, Any]:
    """Wait until the pool has all its kernels and none besides; its figures."""

    def whole() -> dict[str, Any] | None:
        told: dict[str, Any] = service.figures.read()["backends"]["pooled"]["pool"]
        return told if (told["available"], told["starting"], told["retiring"]) == (kernels, 0, 0) else None

    found = await wait_until(whole, deadline=90, what=f"a pool of {kernels}")
    assert found is not None
    return found


async def side_by_side(work: Iterable[Coroutine[Any, Any, Any]], workers: int) -> None:
    """Do all of it, so many at a time."""
    left: Iterator[Coroutine[Any, Any, Any]] = iter(work)

    async def keep_working() -> None:
        for one in left:
            await one

    async with asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(keep_working())


def memory_of(pid: int | str) -> int:
    """Bytes of memory that a process has for itself alone."""
    told = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(line.split()[1]) for line in told.splitlines() if line.startswith("Private_"))


def resident_of(pid: int | str) -> int:
    """Bytes of memory that a process has at all, those that it shares with others too."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def own_memory() -> int:
    """The same of this process, of what is still in use."""
    gc.collect()
    return memory_of(os.getpid())


def descriptors_of(pid: int | str) -> int:
    """How many file descriptors a process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


class HealthWatch:
    """Asks for the service's health all the time, and notes how late the answers come.

    A check counts from when it was due: the event loop's own lag is what a caller sees too. On a busy machine that
    is the doing of other processes as well; the loop's alone is what it computes before it answers.
    """

    def __init__(self, service: SessionService) -> None:
        self._service = service
        self.seconds: list[float] = []
        self.alone: list[float] = []
        """Of these, what the checks themselves took."""
        self.busy: list[float] = []
        """What the loop computed in that time, and at most ``LOOK_INTERVAL`` before."""

    @contextlib.asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        watching = asyncio.create_task(self._look())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait({watching})

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        before = time.thread_time()
        while True:
            came: asyncio.Future[None] = loop.create_future()
            due = loop.time() + LOOK_INTERVAL
            loop.call_at(due, _answer, came)
            await came
            began = time.monotonic()
            await self._service.health_check()
            self.alone.append(time.monotonic() - began)
            self.seconds.append(loop.time() - due)
            computed, before = time.thread_time() - before, time.thread_time()
            self.busy.append(min(computed, self.seconds[-1]))


def _answer(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def quantile(values: Iterable[float], share: float) -> float:
    """The value that this share of all does not exceed."""
    ascending = sorted(values)
    return ascending[min(int(len(ascending) * share), len(ascending) - 1)]


def pids_of_pool(service: SessionService) -> list[int]:
    """The pool's kernels."""
    members = service._backends["pooled"].pool.members  # type: ignore[attr-defined]  # a PooledBackend
    return [member.kernel.pid for member in members]
