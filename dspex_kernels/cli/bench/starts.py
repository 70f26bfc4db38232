"""From nothing to a first answer: a stock kernel with DSPy against sessions, by their ways of starting."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from dspex_kernels.cli.bench import machine
from dspex_kernels.cli.bench.measurement import Bar, Bench, Row, Samples
from dspex_kernels.cli.bench.stock import FIRST_PREDICTION, WITHOUT_IRI, stock_kernel
from dspex_kernels.cli.bench.ways import (
    FORKED,
    OWNER,
    STANDBY,
    STOCK,
    WAYS,
    Way,
    call_program,
    make_program,
    service_of,
)
from dspex_kernels.config import KERNEL_NAME

if TYPE_CHECKING:
    from dspex_kernels.sessions.service import SessionService

STOCK_WITH_SERVER = "stock+server"
"""The stock kernel, paying for what jupyter_server brings into its environment."""
NOTEBOOK = "notebook"
"""Our kernel, forked, as any Jupyter application starts it."""

FIRST_REPLY = "to first reply"
FIRST_PREDICTION_REPLY = "to first prediction"
FIRST_SESSION = "service's first session"

_BARS = {
    (FIRST_PREDICTION_REPLY, FORKED.name): Bar(40, "ratio", is_least=True),
    (FIRST_PREDICTION_REPLY, STANDBY.name): Bar(100, "ratio", is_least=True),
}


class Starts:
    """Session creation to first reply, and to the first ``execute_program`` reply, the session durably stored."""

    name = "starts"
    title = "Start: from nothing to a first answer"

    async def run(self, bench: Bench) -> list[Row]:
        """Each way starts some sessions, then the next; that, for some rounds."""
        self._note(bench)
        samples = Samples()
        for number in range(bench.scale.rounds):
            bench.say(f"starts: round {number + 1} of {bench.scale.rounds}")
            await _stock_turn(bench, samples, STOCK, WITHOUT_IRI)
            if machine.pays_for_jupyter_server():
                await _stock_turn(bench, samples, STOCK_WITH_SERVER, "")
            for way in WAYS:
                await _service_turn(bench, samples, way)
            await _notebook_turn(bench, samples)
        rows = samples.rows(against=(STOCK,), bars=_BARS)
        if machine.pays_for_jupyter_server():
            beside = samples.rows(against=(STOCK_WITH_SERVER,), bars=_BARS)
            rows += [row for row in beside if (row.what, row.way) in _BARS]
        return rows

    @staticmethod
    def _note(bench: Bench) -> None:
        bench.note(
            f"{STOCK}: `python -m ipykernel_launcher`, `import dspy`, a first Predict with DSPy's own offline LM; "
            "nothing is stored. It is asked at once, without the 200 ms that wait_for_ready of its client adds."
        )
        bench.note(
            "plain, forked, standby: create_session, then configure, create_program and execute_program, each "
            f"acknowledged when durable; {STANDBY.name} has spare kernels. {NOTEBOOK}: our forked kernel behind "
            "the stock manager and client."
        )
        if machine.pays_for_jupyter_server():
            bench.note(
                f"jupyter_server's dependencies ({machine.IRI_PACKAGE}) are installed and slow `import dspy` down: "
                f"{STOCK_WITH_SERVER} pays for them, {STOCK} is spared."
            )
        else:
            bench.note(
                f"jupyter_server's dependencies ({machine.IRI_PACKAGE}) are not installed: {STOCK} does not pay "
                "the second that they add to `import dspy`, and there is no stock+server."
            )


async def _stock_turn(bench: Bench, samples: Samples, way: str, before: str) -> None:
    await asyncio.sleep(bench.scale.settle_s)
    began = time.perf_counter()
    async with stock_kernel() as kernel:
        await kernel.answer()
        samples.add(FIRST_REPLY, way, "ms", _since(began))
        await kernel.execute(before + FIRST_PREDICTION)
        samples.add(FIRST_PREDICTION_REPLY, way, "ms", _since(began))


async def _service_turn(bench: Bench, samples: Samples, way: Way) -> None:
    async with service_of(bench, way) as service:
        samples.add(FIRST_SESSION, way.name, "ms", (await _start(service))[1])
        replies, predictions = [], []
        for _ in range(bench.scale.starts):
            await asyncio.sleep(bench.scale.settle_s)
            reply, prediction = await _start(service)
            replies.append(reply)
            predictions.append(prediction)
        samples.add(FIRST_REPLY, way.name, "ms", *replies)
        samples.add(FIRST_PREDICTION_REPLY, way.name, "ms", *predictions)


async def _start(service: SessionService) -> tuple[float, float]:
    """Milliseconds to a session's first reply, and to its first prediction."""
    began = time.perf_counter()
    session = await service.create_session(OWNER)
    reply = _since(began)
    await make_program(session)
    await call_program(session)
    prediction = _since(began)
    await session.destroy()
    return reply, prediction


async def _notebook_turn(bench: Bench, samples: Samples) -> None:
    options = {"kernel_name": KERNEL_NAME, "config": FORKED.settings()}
    # The fork server ends with the last of an application's kernels, so one stays.
    async with stock_kernel(**options) as first:
        await first.answer()
        replies, predictions = [], []
        for _ in range(bench.scale.starts):
            await asyncio.sleep(bench.scale.settle_s)
            began = time.perf_counter()
            async with stock_kernel(**options) as kernel:
                await kernel.answer()
                replies.append(_since(began))
                await kernel.execute(FIRST_PREDICTION)
                predictions.append(_since(began))
        samples.add(FIRST_REPLY, NOTEBOOK, "ms", *replies)
        samples.add(FIRST_PREDICTION_REPLY, NOTEBOOK, "ms", *predictions)


def _since(began: float) -> float:
    return 1000 * (time.perf_counter() - began)
