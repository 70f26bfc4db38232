"""All kernels of a pool are killed at once: how soon it is whole again."""

from __future__ import annotations

import asyncio
import os
import signal
import time

from dspex_kernels.cli.bench import clock
from dspex_kernels.cli.bench.measurement import Bar, Bench, Row, Samples
from dspex_kernels.cli.bench.pools import TIMEOUT_S, died, occupy, until_whole
from dspex_kernels.cli.bench.ways import OWNER, WAYS, Way, call_program, make_program, only_errors, service_of

WHOLE = "whole again"
ANSWERS = "a session of it answers"


class Refill:
    """Seconds until a pool of killed kernels has its size again."""

    name = "refill"
    title = "A pool whose kernels are all killed"

    async def run(self, bench: Bench) -> list[Row]:
        """Each way of starting kernels in turn, for some rounds."""
        samples = Samples()
        for number in range(bench.scale.rounds):
            for way in WAYS:
                bench.say(f"refill: {way.name}, round {number + 1} of {bench.scale.rounds}")
                await _turn(bench, samples, way)
        bars = {(WHOLE, way.name): Bar(3.0) for way in WAYS if way.forks}
        return samples.rows(against=(WAYS[0].name,), bars=bars)


async def _turn(bench: Bench, samples: Samples, way: Way) -> None:
    size = bench.scale.pool
    pool = {"size": size, "prestart": True, "max_restarts": 100}
    async with service_of(bench, way, pool, backend="pooled", log=only_errors()) as service:
        await until_whole(service, size)
        sessions, pids = await occupy(service, size, OWNER)
        await make_program(sessions[0])
        await asyncio.sleep(bench.scale.settle_s)
        before = died(service)
        began = time.perf_counter()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        await clock.until(lambda: died(service) >= before + size, timeout=TIMEOUT_S)
        await until_whole(service, size)
        samples.add(WHOLE, way.name, "s", time.perf_counter() - began)
        await call_program(sessions[0])
        samples.add(ANSWERS, way.name, "s", time.perf_counter() - began)
