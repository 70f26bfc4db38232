"""A hundred thousand calls of sessions that come and go leave nothing behind: no memory, no descriptor."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from dspex_kernels import SessionService
from dspex_kernels.sessions.kernels import Kernel
from dspex_kernels.sessions.service import ServiceSession
from tests.stress import figures
from tests.stress.services import (
    descriptors_of,
    memory_of,
    own_memory,
    pids_of_pool,
    resident_of,
    side_by_side,
    started,
)
from tests.waiting import wait_until

WARM_UP = 10_000
"""Calls after which nothing may grow any more."""
CALLS = max(figures.scaled(100_000), 2 * WARM_UP)
LIFE = 50
"""Calls of a session that comes and goes."""
SESSIONS = 200
"""At a time, in the pool."""
STEADY = 3
"""With a kernel each: sessions that stay, for growth is seen in a kernel that lives."""
LIVES = figures.scaled(10), figures.scaled(SESSIONS)
"""Sessions with a kernel each that come and go beside them: before what is weighed, and in it."""
LIVES_TIMEOUT = 4 * figures.TIMEOUT
"""Seconds: two hundred kernels are started one after another, while two processors are busy with the others."""
AT_ONCE = 8
"""Calls of a session that stays, at a time."""
EXECUTED = 8
"""Every which call runs a program; the others look at it."""
GROWTH = 0.05
"""What part of its memory a process may grow by."""
MORE_DESCRIPTORS = 4
"""A connection of the store, a thread's wake-up: what comes and goes by itself."""


@dataclass(frozen=True)
class Weight:
    """What the service and its kernels hold at one moment."""

    service: int
    kernels: dict[int, int]
    private: dict[int, int]
    descriptors: dict[int, int]

    @classmethod
    def of(cls, pids: list[int]) -> Weight:
        descriptors = {pid: descriptors_of(pid) for pid in (os.getpid(), *pids)}
        resident = {pid: resident_of(pid) for pid in pids}
        return cls(own_memory(), resident, {pid: memory_of(pid) for pid in pids}, descriptors)

    def growth_since(self, before: Weight) -> dict[str, float]:
        """The service's, and that of the kernel that grew the most, as parts of what they were."""
        assert self.kernels.keys() == before.kernels.keys(), "a kernel died, or was recycled"

        def most(now: dict[int, int], then: dict[int, int]) -> float:
            return max(now[pid] / then[pid] - 1 for pid in now)

        # By what is resident: a page of the fork server's that a kernel copies late, only because it counts a
        # reference in it, was there before. How far that goes is told beside it.
        return {
            "service": self.service / before.service - 1,
            "kernels": most(self.kernels, before.kernels),
            "private": most(self.private, before.private),
        }

    def more_descriptors_than(self, before: Weight) -> int:
        return max(self.descriptors[pid] - before.descriptors[pid] for pid in self.descriptors)


async def make(service: SessionService, session_id: str) -> ServiceSession:
    # The answer cache is bounded too, but would still be filling up.
    lm = {"model": "offline/echo", "cache": False}
    session = await service.create_session(session_id=session_id, lm=lm)
    await session.create_program("qa", "question -> answer")
    return session


async def ask(session: ServiceSession, number: int) -> None:
    if number % EXECUTED:
        assert (await session.call("get_program", {"program_id": "qa"}))["version"] == 1
    else:
        await session.execute_program("qa", {"question": f"{session.session_id}, {number}"})


def questions(session: ServiceSession, calls: int) -> Iterator[Coroutine[Any, Any, None]]:
    """Made when they are asked: all at once would weigh more than what is weighed."""
    return (ask(session, number) for number in range(calls))


async def live(service: SessionService, session_id: str) -> None:
    """A session's life: two of its calls are those that make it."""
    session = await make(service, session_id)
    for number in range(LIFE - 2):
        await ask(session, number)
    await session.destroy()


def check(title: str, before: Weight, after: Weight, calls_per_s: float, **more: object) -> None:
    growth = after.growth_since(before)
    figures.tell(
        title,
        calls_per_s=calls_per_s,
        service_mib=before.service / 2**20,
        kernel_mib=max(before.kernels.values()) / 2**20,
        service_growth=f"{growth['service']:.2%}",
        kernels_growth=f"{growth['kernels']:.2%}",
        private_mib=max(before.private.values()) / 2**20,
        private_growth=f"{growth['private']:.2%}",
        more_descriptors=after.more_descriptors_than(before),
        **more,
    )
    assert growth["service"] <= GROWTH
    assert growth["kernels"] <= GROWTH
    assert after.more_descriptors_than(before) <= MORE_DESCRIPTORS


@pytest.mark.stress
@pytest.mark.timeout(figures.TIMEOUT + 60)
def test_a_pool_stays_as_it_was(tmp_path):
    async def work() -> None:
        async with started(tmp_path, "pooled", kernels=2) as service:
            pids = pids_of_pool(service)
            names = (f"life-{number}" for number in itertools.count())

            def lives(calls: int) -> Iterator[Coroutine[Any, Any, None]]:
                return (live(service, name) for name in itertools.islice(names, calls // LIFE))

            await side_by_side(lives(WARM_UP), SESSIONS)
            before = Weight.of(pids)
            began = time.monotonic()
            await side_by_side(lives(CALLS - WARM_UP), SESSIONS)
            rate = (CALLS - WARM_UP) / (time.monotonic() - began)
            assert await service.list_sessions() == []
            check("memory, pooled", before, Weight.of(pids), rate, calls=CALLS, sessions=CALLS // LIFE)

    asyncio.run(work())


def owned(service: SessionService) -> list[Kernel]:
    """The kernels that are some session's."""
    return [kernel for kernel in service._kernels._living.values() if not kernel.spare]


@pytest.mark.stress
@pytest.mark.timeout(LIVES_TIMEOUT + 60)
def test_kernels_of_sessions_stay_as_they_were(tmp_path):
    async def work() -> None:
        async with started(tmp_path, "dedicated", timeout=LIVES_TIMEOUT) as service:
            steady = await asyncio.gather(*(make(service, f"steady-{number}") for number in range(STEADY)))
            pids = [(await session.info())["kernel_pid"] for session in steady]
            names = (f"life-{number}" for number in itertools.count())

            async def stage(calls: int, lives: int) -> None:
                """So many calls; beside them sessions come and go, a kernel each."""
                async with asyncio.TaskGroup() as group:
                    group.create_task(side_by_side((live(service, next(names)) for _ in range(lives)), 1))
                    for session in steady:
                        group.create_task(side_by_side(questions(session, calls // STEADY), AT_ONCE))
                await wait_until(lambda: len(owned(service)) == STEADY, what="the others' kernels to end")

            await stage(WARM_UP, LIVES[0])
            before = Weight.of(pids)
            began = time.monotonic()
            await stage(CALLS - WARM_UP, LIVES[1])
            rate = (CALLS - WARM_UP) / (time.monotonic() - began)
            sessions = STEADY + sum(LIVES)
            check("memory, dedicated", before, Weight.of(pids), rate, calls=CALLS, sessions=sessions)

    asyncio.run(work())
