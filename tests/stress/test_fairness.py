"""One session floods: another's calls are answered about as soon as if it were alone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from dspex_kernels import SessionService
from dspex_kernels.sessions.happenings import CallEnded, Happening
from dspex_kernels.sessions.service import ServiceSession
from tests.stress import figures
from tests.stress.services import quantile, started
from tests.waiting import wait_until

FLOOD = 400
"""Calls of the flooding session that are outstanding at any moment."""
CALLS = max(figures.scaled(150), 60)
"""Calls of the other, one after another: each waits for the flood again. Of fewer, p95 would be the slowest."""
LATENCY = 0.05
"""Seconds that the LM thinks."""
MANY, FEW = 256, 8
"""Slots of a shared kernel: more than one session may have, and fewer than it would take if it could."""
RATIO, AT_LEAST = 3, 0.02
"""How much longer than alone a call may wait; and what counts as no wait at all, in seconds."""


class Waits:
    """How long the calls of a session took, and how much of that they waited for their turn."""

    def __init__(self, session_id: str) -> None:
        self._session_id = session_id
        self.answers: list[float] = []
        self.turns: list[float] = []

    def __call__(self, happening: Happening) -> None:
        if isinstance(happening, CallEnded) and happening.session_id == self._session_id:
            assert happening.outcome == "ok"
            self.answers.append(happening.duration_s)
            self.turns.append(happening.queue_wait_s)


async def make(service: SessionService, session_id: str) -> ServiceSession:
    lm = {"model": "offline/echo", "cache": False, "offline": {"latency_s": LATENCY}}
    session = await service.create_session(session_id, session_id=session_id, lm=lm)
    await session.create_program("qa", "question -> answer")
    await ask(session, 0)
    return session


async def ask(session: ServiceSession, number: int) -> None:
    await session.execute_program("qa", {"question": f"number {number}"}, timeout=60)


async def measure(service: SessionService, session: ServiceSession) -> Waits:
    waits = Waits(session.session_id)
    service.listeners.add(waits)
    for number in range(CALLS):
        await ask(session, number)
    service.listeners.remove(waits)
    return waits


@contextlib.asynccontextmanager
async def flooding(session: ServiceSession) -> AsyncIterator[list[float]]:
    """Keep so many calls of a session outstanding; yields when each was answered."""
    answered: list[float] = []

    async def keep_asking(number: int) -> None:
        while True:
            await ask(session, number)
            answered.append(time.monotonic())

    tasks = [asyncio.create_task(keep_asking(number)) for number in range(FLOOD)]
    try:
        yield answered
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ended), "the flood was refused"


@pytest.mark.stress
@pytest.mark.timeout(figures.TIMEOUT + 60)
@pytest.mark.parametrize(
    ("backend", "slots"),
    [("pooled", MANY), ("pooled", FEW), ("dedicated", MANY)],
    ids=["wide", "narrow", "dedicated"],
)
def test_a_flood_delays_only_whoever_floods(backend, slots, tmp_path):
    async def work() -> None:
        # One kernel, where it is shared: nobody is fair by being elsewhere.
        pool = {"max_calls_per_kernel": slots}
        async with started(tmp_path, backend, kernels=1, pool=pool) as service:
            quiet, loud = await make(service, "quiet"), await make(service, "loud")
            alone = await measure(service, quiet)
            async with flooding(loud) as answered:
                # Its first wave comes within one turn of the loop, which is no flood but a burst.
                await wait_until(lambda: len(answered) >= FLOOD, deadline=30)
                began, already = time.monotonic(), len(answered)
                flooded = await measure(service, quiet)
                rate = (len(answered) - already) / (time.monotonic() - began)
            again = await measure(service, quiet)
        before, during, after = (quantile(waits.answers, 0.95) for waits in (alone, flooded, again))
        turn = quantile(flooded.turns, 0.95)
        figures.tell(
            f"fairness, {backend}, {slots} slots",
            alone_ms_p95=1000 * before,
            flooded_ms_p95=1000 * during,
            flooded_ms_p50=1000 * quantile(flooded.answers, 0.5),
            after_ms_p95=1000 * after,
            turn_ms_p95=1000 * turn,
            flood_per_s=rate,
        )
        assert rate > 0, "there was no flood"
        assert turn <= max(RATIO * quantile(alone.turns, 0.95), AT_LEAST)
        assert during <= max(RATIO * before, AT_LEAST)

    asyncio.run(work())
