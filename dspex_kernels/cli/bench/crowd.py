"""Many sessions with a kernel each, living at once: made, asked, destroyed, and nothing left."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from jupyter_core.paths import jupyter_runtime_dir

from dspex_kernels.cli.bench import clock, processes
from dspex_kernels.cli.bench.measurement import Bar, Bench, Row, Samples
from dspex_kernels.cli.bench.ways import FORKED, OWNER, call_program, make_program, service_of

if TYPE_CHECKING:
    from dspex_kernels.sessions.service import ServiceSession, SessionService

WORKERS = 16
"""How many sessions are made, asked or destroyed at the same time."""
ENDING_S = 10.0
"""How long what the service ended may take to be gone."""

T = TypeVar("T")

_NOTHING = Bar(0.0)


class Crowd:
    """As many dedicated sessions as asked for, at once."""

    name = "crowd"
    title = "Many dedicated sessions at once"

    async def run(self, bench: Bench) -> list[Row]:
        """Make them, have each answer, have each answer again while all live, destroy them, look what is left."""
        processes.check_supported()
        count, way = bench.scale.sessions, FORKED.name
        samples = Samples()
        before, files_before = processes.descendants(os.getpid()), _files()
        async with service_of(bench, FORKED) as service:
            await (await service.create_session(OWNER)).destroy()  # the fork server starts with the first
            bench.say(f"crowd: {count} sessions")
            began = time.perf_counter()
            sessions = await in_turns([lambda: _start(service)] * count)
            samples.add("made, each with a prediction", way, "per s", count / (time.perf_counter() - began))
            began = time.perf_counter()
            await in_turns([partial(call_program, session) for session in sessions])
            samples.add("asked again, all of them", way, "per s", count / (time.perf_counter() - began))
            kernels = await _kernels(service)
            samples.add("live at once", way, "", float(sum(kernel.lives() for kernel in kernels)))
            samples.add("their USS, each", way, "MiB", *(processes.weigh(kernel.pid).uss for kernel in kernels))
            samples.add("service's descriptors, each", way, "", processes.weigh(os.getpid()).descriptors / count)
            born = processes.descendants(os.getpid()) - before
            began = time.perf_counter()
            await in_turns([session.destroy for session in sessions])
            samples.add("destroyed", way, "per s", count / (time.perf_counter() - began))
            kept = _entries(Path(service.data_dir, "sessions"))
        samples.add("processes left", way, "", float(await _left(born | set(kernels))))
        samples.add("files left", way, "", float(kept + len(_files() - files_before)))
        bars = {
            ("live at once", way): Bar(float(count), is_least=True),
            ("processes left", way): _NOTHING,
            ("files left", way): _NOTHING,
        }
        return samples.rows(bars=bars)


async def in_turns(work: Sequence[Callable[[], Awaitable[T]]], workers: int = WORKERS) -> list[T]:
    """Do all of it, so many at a time; the results in the order of the work."""
    results: dict[int, T] = {}
    left = iter(enumerate(work))

    async def keep_working() -> None:
        for number, one in left:
            results[number] = await one()

    async with asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(keep_working())
    return [results[number] for number in range(len(work))]


async def _start(service: SessionService) -> ServiceSession:
    session = await service.create_session(OWNER)
    await make_program(session)
    await call_program(session)
    return session


async def _kernels(service: SessionService) -> list[processes.Process]:
    found = [processes.identify(info.kernel_pid or 0) for info in await service.list_sessions()]
    return [process for process in found if process is not None]


async def _left(born: set[processes.Process]) -> int:
    """How many of these processes live on."""
    await clock.until(lambda: not any(process.lives() for process in born), timeout=ENDING_S)
    return sum(process.lives() for process in born)


def _entries(directory: Path) -> int:
    return sum(1 for _ in directory.iterdir())


def _files() -> set[Path]:
    """What lies in Jupyter's runtime directory: connection files, sockets."""
    return set(Path(jupyter_runtime_dir()).rglob("*"))
