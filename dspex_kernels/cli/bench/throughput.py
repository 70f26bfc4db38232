"""Calls side by side: how many predictions a second one kernel gives."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from dspex_kernels.cli.bench import in_process
from dspex_kernels.cli.bench.in_process import DSPY, EXECUTE
from dspex_kernels.cli.bench.measurement import Bar, Bench, Row, Samples
from dspex_kernels.cli.bench.sides import COMMAND, EXECUTE_REQUEST, NOTE, Here, Side, all_sides
from dspex_kernels.cli.bench.ways import FORKED, LM, OWNER, call_program, make_program, service_of

LATENCY_S = 0.1
"""Of the LM that takes its time."""
POOLED = "command, pooled"
MOST_REQUESTS = 500
"""``execute_request`` at once: a stock kernel drops replies in silence of which more than 1,000 wait (ROUTER's
high-water mark), and who asked waits for ever."""
WANTED = 100
"""The concurrency for which there are bars."""


class Throughput:
    """Predictions per second from one kernel, and of an LM that takes 100 ms."""

    name = "throughput"
    title = "Calls per second from one kernel"

    async def run(self, bench: Bench) -> list[Row]:
        """For each number of calls at once, each side in turn; that, for some rounds."""
        bench.note(in_process.NOTE)
        bench.note(NOTE)
        bench.note(f"{EXECUTE_REQUEST}: {MOST_REQUESTS} at once at most, of more a stock kernel loses replies.")
        rows = await _at_once(bench)
        return [*rows, *await _slow_lm(bench)]


async def _at_once(bench: Bench) -> list[Row]:
    samples = Samples()
    async with all_sides(bench) as sides:
        for number in range(bench.scale.rounds):
            bench.say(f"throughput: round {number + 1} of {bench.scale.rounds}")
            for concurrency in bench.scale.concurrency:
                await _turn(bench, samples, _at(concurrency), sides, concurrency)
    rows = samples.rows(against=(DSPY,), bars={(_at(WANTED), COMMAND): Bar(0.8, "ratio", is_least=True)})
    return [*rows, *_against_execute_request(samples)]


def _against_execute_request(samples: Samples) -> list[Row]:
    """The commands' rows once more, beside what they replace."""
    bars = {(_at(WANTED), COMMAND): Bar(3.0, "ratio", is_least=True)}
    rows = samples.rows(against=(EXECUTE_REQUEST,), bars=bars)
    return [row for row in rows if row.way == COMMAND]


async def _slow_lm(bench: Bench) -> list[Row]:
    """Many calls at once to an LM that takes its time, through one pooled kernel."""
    concurrency = bench.scale.concurrency[-1]
    what = f"{concurrency} at once, LM of {1000 * LATENCY_S:.0f} ms"
    pool = {"size": 1, "max_calls_per_kernel": concurrency, "max_calls_per_session": concurrency}
    samples = Samples()
    async with contextlib.AsyncExitStack() as stack:
        alone = await stack.enter_async_context(in_process.in_process("dspy", bench.directory, latency_s=LATENCY_S))
        execute = await stack.enter_async_context(
            in_process.in_process("pooled", bench.directory, latency_s=LATENCY_S)
        )
        service = await stack.enter_async_context(service_of(bench, FORKED, pool, backend="pooled"))
        session = await stack.enter_async_context(service.session(OWNER))
        await make_program(session)
        await session.call("configure", {"lm": LM | {"offline": {"latency_s": LATENCY_S}}})
        sides: dict[str, Side] = {DSPY: alone, EXECUTE: execute, POOLED: Here(lambda: call_program(session))}
        for number in range(bench.scale.rounds):
            bench.say(f"throughput, {what}: round {number + 1} of {bench.scale.rounds}")
            await _turn(bench, samples, what, sides, concurrency)
    return samples.rows(against=(DSPY,), bars={(what, POOLED): Bar(0.8, "ratio", is_least=True)})


async def _turn(bench: Bench, samples: Samples, what: str, sides: Mapping[str, Side], concurrency: int) -> None:
    for name, side in sides.items():
        if name == EXECUTE_REQUEST and concurrency > MOST_REQUESTS:
            continue
        rate = await side.per_second(concurrency=concurrency, seconds=bench.scale.seconds)
        samples.add(what, name, "per s", rate)


def _at(concurrency: int) -> str:
    return f"{concurrency} at once"
