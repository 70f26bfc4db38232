"""What a living kernel takes: private memory, descriptors, threads, and the processor while nothing happens."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dspex_kernels.cli.bench import machine, processes
from dspex_kernels.cli.bench.crowd import in_turns
from dspex_kernels.cli.bench.measurement import Bar, Bench, Row, Samples
from dspex_kernels.cli.bench.stock import FIRST_PREDICTION, WITHOUT_IRI, stock_kernel
from dspex_kernels.cli.bench.ways import (
    FORKED,
    OWNER,
    PLAIN,
    STOCK,
    Way,
    call_program,
    make_program,
    service_of,
)
from dspex_kernels.config import KERNEL_NAME

if TYPE_CHECKING:
    from dspex_kernels.sessions.service import ServiceSession

LEAN, FULL = "forked lean", "forked full"
IDLE, AFTER = "idle", "after a program"
IDLE_CPU = "processor of 100 idle kernels"
FEW = 5
"""Kernels that idle where each takes seconds to start."""

_BARS = {
    (f"USS, {IDLE}", LEAN): Bar(11.0),
    (f"USS, {AFTER}", LEAN): Bar(16.0),
    (IDLE_CPU, LEAN): Bar(0.1),
}


@dataclass(frozen=True, slots=True)
class _Living:
    """A kernel that idles."""

    pid: int
    call: Callable[[], Awaitable[object]]
    """Makes a program, if need be, and runs it."""


class Memory:
    """USS, PSS, descriptors and threads of a kernel, and how much a hundred of them compute while they idle."""

    name = "memory"
    title = "A living kernel: memory, descriptors, threads, processor"

    async def run(self, bench: Bench) -> list[Row]:
        """One way after another: figures of memory do not depend on the hour."""
        processes.check_supported()
        bench.note(
            "USS is what a process has for itself alone; PSS adds its share of what it has with others. The stock "
            "kernel is weighed with DSPy imported. lean: a session's kernel; full: one that a notebook starts."
        )
        samples = Samples()
        few = min(FEW, bench.scale.idle_kernels)
        many = bench.scale.idle_kernels if machine.has_fork_server() else few
        async with _stock(max(bench.scale.kernels, few)) as kernels:
            await _measure(bench, samples, STOCK, kernels)
        for name, way, count in ((PLAIN.name, PLAIN, few), (LEAN, FORKED, many)):
            async with _sessions(bench, way, max(bench.scale.kernels, count)) as kernels:
                await _measure(bench, samples, name, kernels)
        async with _notebooks(max(bench.scale.kernels, few)) as kernels:
            await _measure(bench, samples, FULL, kernels)
        return samples.rows(against=(STOCK,), bars=_BARS)


async def _measure(bench: Bench, samples: Samples, way: str, kernels: Sequence[_Living]) -> None:
    bench.say(f"memory: {len(kernels)} kernels, {way}, for {bench.scale.idle_s:g} s")
    samples.add(IDLE_CPU, way, "%", await _idle_cpu([kernel.pid for kernel in kernels], bench.scale.idle_s))
    weighed = kernels[: bench.scale.kernels]
    _weigh(samples, way, IDLE, weighed)
    for kernel in weighed:
        await kernel.call()
    _weigh(samples, way, AFTER, weighed)


def _weigh(samples: Samples, way: str, when: str, kernels: Sequence[_Living]) -> None:
    weights = [processes.weigh(kernel.pid) for kernel in kernels]
    samples.add(f"USS, {when}", way, "MiB", *(weight.uss for weight in weights))
    samples.add(f"PSS, {when}", way, "MiB", *(weight.pss for weight in weights))
    if when == AFTER:
        samples.add("descriptors", way, "", *(weight.descriptors for weight in weights))
        samples.add("threads", way, "", *(weight.threads for weight in weights))


async def _idle_cpu(pids: Sequence[int], seconds: float) -> float:
    """Percent of a core that a hundred such kernels compute."""
    await asyncio.sleep(min(1.0, seconds))  # what their start left to do
    before, began = processes.computed_ns(pids), time.perf_counter()
    await asyncio.sleep(seconds)
    computed, took = processes.computed_ns(pids) - before, time.perf_counter() - began
    return 100 * (100 / len(pids)) * computed / (1e9 * took)


@contextlib.asynccontextmanager
async def _stock(count: int) -> AsyncIterator[list[_Living]]:
    """Stock kernels with DSPy imported."""
    async with contextlib.AsyncExitStack() as stack:
        living = []
        for _ in range(count):
            kernel = await stack.enter_async_context(stock_kernel())
            await kernel.execute(f"{WITHOUT_IRI}import dspy")
            living.append(_Living(kernel.pid, partial(kernel.execute, FIRST_PREDICTION)))
        yield living


@contextlib.asynccontextmanager
async def _notebooks(count: int) -> AsyncIterator[list[_Living]]:
    """Our kernels as a Jupyter application starts them: full."""
    async with contextlib.AsyncExitStack() as stack:
        living = []
        for _ in range(count):
            starting = stock_kernel(kernel_name=KERNEL_NAME, config=FORKED.settings())
            kernel = await stack.enter_async_context(starting)
            await kernel.answer()
            living.append(_Living(kernel.pid, partial(kernel.execute, FIRST_PREDICTION)))
        yield living


@contextlib.asynccontextmanager
async def _sessions(bench: Bench, way: Way, count: int) -> AsyncIterator[list[_Living]]:
    """Kernels of sessions."""
    async with service_of(bench, way) as service:
        sessions = await in_turns([lambda: service.create_session(OWNER)] * count)
        living = []
        for session in sessions:
            info = await service.get_session_info(session.session_id)
            assert info.kernel_pid is not None
            living.append(_Living(info.kernel_pid, partial(_make_and_call, session)))
        yield living


async def _make_and_call(session: ServiceSession) -> None:
    await make_program(session)
    await call_program(session)
