"""Dedicated against pooled sessions: what each costs, and what a crash does to it."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from typing import TYPE_CHECKING

from dspex_kernels import errors
from dspex_kernels.cli.bench import clock, processes
from dspex_kernels.cli.bench.crowd import in_turns
from dspex_kernels.cli.bench.measurement import Bench, Row, Samples
from dspex_kernels.cli.bench.pools import until_whole
from dspex_kernels.cli.bench.ways import FORKED, OWNER, call_program, make_program, only_errors, service_of

if TYPE_CHECKING:
    from dspex_kernels.sessions.service import ServiceSession, SessionService

DEDICATED, POOLED = "dedicated", "pooled"
MAX_SESSIONS = 50
"""Enough that each kernel of the pool holds several."""
KERNELS = 4
"""In the pool."""
CALLS_AT_ONCE = 100


class Backends:
    """Creation, memory, first prediction, calls per second, and a crash: in a kernel each, and in the pool."""

    name = "backends"
    title = "Dedicated against pooled sessions"

    async def run(self, bench: Bench) -> list[Row]:
        """Each backend in turn, for some rounds."""
        processes.check_supported()
        count, kernels = min(MAX_SESSIONS, bench.scale.sessions), min(KERNELS, bench.scale.pool)
        bench.note(
            f"backends: {count} sessions; dedicated in a kernel each, pooled in {kernels} that wait. Memory is "
            "the kernels' USS over the sessions in them. The crash is SIGKILL to one kernel."
        )
        samples = Samples()
        for number in range(bench.scale.rounds):
            for backend in (DEDICATED, POOLED):
                bench.say(f"backends: {backend}, round {number + 1} of {bench.scale.rounds}")
                await _turn(bench, samples, backend, count, kernels)
        return samples.rows(against=(DEDICATED,))


async def _turn(bench: Bench, samples: Samples, backend: str, count: int, kernels: int) -> None:
    pool = {"size": kernels, "prestart": backend == POOLED, "max_calls_per_kernel": CALLS_AT_ONCE}
    async with service_of(bench, FORKED, pool, backend=backend, log=only_errors()) as service:
        if backend == POOLED:
            await until_whole(service, kernels)
        else:
            await (await service.create_session(OWNER)).destroy()  # the fork server starts with the first
        sessions = await _create(service, samples, backend, count)
        pids = {info.kernel_pid for info in await service.list_sessions() if info.kernel_pid is not None}
        private = sum(processes.weigh(pid).uss for pid in pids)
        samples.add("memory of a session", backend, "MiB", private / count)
        await _call_all(bench, samples, backend, sessions)
        await _crash(service, samples, backend, sessions)
        await in_turns([session.destroy for session in sessions])


async def _create(service: SessionService, samples: Samples, backend: str, count: int) -> list[ServiceSession]:
    sessions, created, predicted = [], [], []
    for _ in range(count):
        began = time.perf_counter()
        session = await service.create_session(OWNER)
        created.append(1000 * (time.perf_counter() - began))
        await make_program(session)
        await call_program(session)
        predicted.append(1000 * (time.perf_counter() - began))
        sessions.append(session)
    samples.add("creation", backend, "ms", *created)
    samples.add("to first prediction", backend, "ms", *predicted)
    return sessions


async def _call_all(bench: Bench, samples: Samples, backend: str, sessions: list[ServiceSession]) -> None:
    turn = 0

    async def call() -> None:
        nonlocal turn
        turn += 1
        await call_program(sessions[turn % len(sessions)])

    took = await clock.one_by_one(call, bench.scale.calls)
    samples.add("call", backend, "ms", *(1000 * seconds for seconds in took))
    rate = await clock.per_second(call, concurrency=CALLS_AT_ONCE, seconds=bench.scale.seconds)
    samples.add("calls of all sessions", backend, "per s", rate)


async def _crash(service: SessionService, samples: Samples, backend: str, sessions: list[ServiceSession]) -> None:
    """Kill the first session's kernel: how many sessions moved, and how soon each answered again."""
    pid = (await service.get_session_info(sessions[0].session_id)).kernel_pid
    assert pid is not None
    before = await _generations(service)
    began = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    await _call_until_answered(sessions[0])
    samples.add("crash: answers again", backend, "ms", 1000 * (time.perf_counter() - began))
    await in_turns([partial(call_program, session) for session in sessions])
    after = await _generations(service)
    hit = sum(after[session_id] != generation for session_id, generation in before.items())
    samples.add("crash: sessions hit", backend, "%", 100 * hit / len(sessions))


async def _call_until_answered(session: ServiceSession) -> None:
    while True:
        try:
            await call_program(session)
            return
        except errors.KernelDied:  # it got to the kernel before the service knew of its death
            continue


async def _generations(service: SessionService) -> dict[str, int]:
    return {info.session_id: info.generation for info in await service.list_sessions()}
