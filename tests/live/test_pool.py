"""The pool with real kernels: sessions side by side, kernels that come and go under load, and no call is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest
from traitlets.config import Config

from dspex_kernels import SessionService, errors
from dspex_kernels.sessions import kernels as kernels_module
from dspex_kernels.sessions import pooled as pooled_module
from dspex_kernels.sessions.pool import KernelPool
from tests.live.kernels import plugin_path
from tests.waiting import wait_until

ECHO = {"model": "offline/echo", "cache": False}
SLOW = {**ECHO, "offline": {"latency_s": 60}}
RUN = {"program_id": "qa", "inputs": {"question": "?"}}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SessionService]:
    """Makes services whose sessions are pooled; ``pool`` are the pool's traits."""
    monkeypatch.setenv("PYTHONPATH", plugin_path())

    def make(**pool: Any) -> SessionService:
        url = f"sqlite:///{tmp_path / 'store.sqlite'}"
        return SessionService(
            backend="pooled", data_dir=str(tmp_path), store_url=url, config=Config({"KernelPool": pool})
        )

    return make


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(100):
            await work

    asyncio.run(bounded())


def pool_of(service: SessionService) -> KernelPool:
    return service._backends["pooled"].pool


async def full(service: SessionService, size: int) -> None:
    pool = pool_of(service)
    await wait_until(lambda: len(pool.serving) == size, deadline=60, what=f"a pool of {size}")


async def made(service: SessionService, name: str, lm: Any = ECHO) -> Any:
    session = await service.create_session(session_id=name, lm=lm)
    await session.create_program("qa", "question -> answer")
    return session


async def pid_of(session: Any) -> int:
    return int((await session.info())["kernel_pid"])


async def waiting(service: SessionService, count: int) -> None:
    queue = service._backends["pooled"].queue
    await wait_until(lambda: queue.figures()["waiting"] == count, what=f"{count} calls in the queue")


async def running(service: SessionService, count: int) -> None:
    queue = service._backends["pooled"].queue
    await wait_until(lambda: queue.figures()["running"] == count, what=f"{count} calls with a turn")


def ask(session: Any, **options: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(session.call("execute_program", RUN, **options))


def test_a_killed_kernel_is_replaced_and_its_sessions_come_back_on_another(make):
    async def work() -> None:
        async with make(size=2, prestart=True) as service:
            await full(service, 2)
            sessions = [await made(service, f"s{number}") for number in range(6)]
            by_pid: dict[int, list[Any]] = {}
            for session in sessions:
                by_pid.setdefault(await pid_of(session), []).append(session)
            assert [len(group) for group in by_pid.values()] == [3, 3], "placed by least load"
            killed, spared = by_pid
            await by_pid[killed][0].configure(lm=SLOW)
            call = ask(by_pid[killed][0], timeout=60)
            await running(service, 1)
            os.kill(killed, signal.SIGKILL)
            with pytest.raises(errors.KernelDied, match="was killed by SIGKILL during execute_program") as died:
                await call
            assert not died.value.retryable, "it may have reached an LM"
            assert [p["program_id"] for p in await by_pid[killed][0].list_programs()] == ["qa"]
            for session in by_pid[killed][1:]:
                assert (await session.call("execute_program", RUN))["outputs"]["answer"]
                assert (await session.info())["generation"] == 2
            for session in by_pid[spared]:
                assert (await session.call("execute_program", RUN))["outputs"]["answer"]
                assert (await session.info())["generation"] == 1
            await full(service, 2)
            figures = pool_of(service).figures()
            assert (figures["deaths"], figures["restarts"], figures["failed"]) == (1, 1, {})

    run(work())


@pytest.mark.parametrize("limit", [{"max_calls": 20}, {"max_age": 0.5}, {"max_memory": 1}], ids=str)
def test_kernels_are_recycled_while_calls_run_and_none_is_lost(make, limit):
    async def work() -> None:
        async with make(size=1, look_interval=0.05, **limit) as service:
            sessions = [await made(service, f"s{number}") for number in range(4)]
            await full(service, 1)  # a kernel may have been recycled already, and its successor be on its way
            first = pool_of(service).serving[0]
            over = asyncio.Event()
            answered = await _under_load(sessions, over, until=lambda: not psutil.pid_exists(first.kernel.pid))
            pool_of(service).set_trait(next(iter(limit)), 0)  # one is enough, and each costs a start
            assert answered == [number for number in answered if number], "each session went on"
            for session in sessions:
                programs = [program["program_id"] for program in await session.list_programs()]
                assert len(programs) == 1 + answered[int(session.session_id[1:])]
                assert (await session.info())["generation"] > 1
            assert pool_of(service).recycled >= 1
            assert pool_of(service).deaths == 0

    run(work())


async def _under_load(sessions: list[Any], over: asyncio.Event, *, until: Callable[[], bool]) -> list[int]:
    """Run programs and make new ones in all sessions until that holds; how many each made. Any failure fails."""

    async def load(session: Any) -> int:
        number = 0
        while not over.is_set():
            await session.create_program(f"p{number}", "question -> answer")
            number += 1
            assert (await session.call("execute_program", RUN))["outputs"]["answer"]
        return number

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(load(session)) for session in sessions]
        await wait_until(until, deadline=60, what="the kernel's end")
        over.set()
    return [task.result() for task in tasks]


def test_the_pool_grows_and_shrinks_while_calls_run_and_none_is_lost(make):
    async def work() -> None:
        async with make(size=1) as service:
            sessions = [await made(service, f"s{number}") for number in range(4)]
            over = asyncio.Event()

            async def resize() -> None:
                await service.resize_pool(2)
                await full(service, 2)
                first = pool_of(service).serving[0]
                await service.resize_pool(1)
                pool_of(service).retire(first, "the test says so", None)
                await wait_until(lambda: not psutil.pid_exists(first.kernel.pid), deadline=60, what="its end")
                await full(service, 1)

            resizing = asyncio.create_task(resize())
            answered = await _under_load(sessions, over, until=resizing.done)
            await resizing
            for session, count in zip(sessions, answered, strict=True):
                assert len(await session.list_programs()) == 1 + count
            assert pool_of(service).deaths == 0
            await wait_until(lambda: pool_of(service).figures()["retiring"] == 0, deadline=30, what="the drained")

    run(work())


def test_calls_wait_for_their_turn_and_are_refused_cancelled_and_told_when_it_does_not_come(make):
    async def work() -> None:
        traits = {"max_calls_per_kernel": 3, "max_calls_per_session": 2, "max_queue_size": 2, "queue_timeout": 60}
        async with make(size=1, **traits) as service:
            slow, other = await made(service, "slow", SLOW), await made(service, "other")
            calls = [ask(slow, timeout=60) for _ in range(3)]
            await waiting(service, 1)
            assert (await other.call("execute_program", RUN))["outputs"], (
                "a session may run two, so one slot is left"
            )

            queued = ask(slow, timeout=60, request_id="queued")
            await waiting(service, 2)
            with pytest.raises(errors.PoolSaturated, match="max_queue_size") as refused:
                await slow.call("execute_program", RUN, timeout=60)
            assert refused.value.retry_after > 0
            assert (await slow.ping())["status"] == "ok", "control does not stand in the queue"
            assert await slow.cancel("queued")
            with pytest.raises(errors.CommandCancelled, match="waited for its turn"):
                await queued
            with pytest.raises(errors.CommandTimeout, match="waited for its turn"):
                await slow.call("execute_program", RUN, timeout=0.1)
            pool_of(service).queue_timeout = 0.1
            with pytest.raises(errors.PoolSaturated, match="queue_timeout"):
                await slow.call("execute_program", RUN, timeout=60)

            named = ask(other, timeout=60, request_id="left")
            left = calls.pop()
            left.cancel()
            await asyncio.wait({left})
            await waiting(service, 0)
            assert (await named)["outputs"]

            pool_of(service).queue_timeout = 60
            calls.append(ask(slow, timeout=60))
            await waiting(service, 1)
            await slow.destroy()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [errors.CommandCancelled] * 3
            assert (await other.call("execute_program", RUN))["outputs"]
            await wait_until(lambda: _is_idle(service), what="the slots given back")

    run(work())


def _is_idle(service: SessionService) -> bool:
    figures = service._backends["pooled"].queue.figures()
    return figures["waiting"] == figures["running"] == 0


def test_a_session_that_floods_the_pool_delays_another_by_its_turns_only(make):
    async def work() -> None:
        async with make(size=1, max_calls_per_kernel=1) as service:
            brief = {**ECHO, "offline": {"latency_s": 0.01}}
            flood, other = await made(service, "flood", brief), await made(service, "other", brief)
            calls = [ask(flood, timeout=60) for _ in range(60)]
            await waiting(service, 59)
            for _ in range(3):
                await other.call("execute_program", RUN)
            done = sum(call.done() for call in calls)
            assert done < 15, "three turns of the other cost it three or four of the flood's"
            await asyncio.gather(*calls)

    run(work())


async def _blocking(service: SessionService, name: str, module: str, fifo: Path) -> Any:
    session = await service.create_session(session_id=name, lm=ECHO)
    await session.create_program("qa", None, module, module_args={"fifo": str(fifo)})
    return session


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """What programs block on for as long as the test runs; their kernels are killed."""
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def test_a_program_that_never_ends_costs_its_kernel_and_no_neighbours_call(make, fifo, monkeypatch):
    monkeypatch.setattr(pooled_module, "SUSPICION_AFTER", 0.5)

    async def work() -> None:
        async with make(size=1, drain_timeout=20) as service:
            stuck = await _blocking(service, "stuck", "blocks", fifo)
            neighbours = [await made(service, f"n{number}") for number in range(3)]
            kernel = pool_of(service).serving[0]
            over = asyncio.Event()
            ending = asyncio.create_task(_end_by_timeout(stuck))
            answered = await _under_load(neighbours, over, until=lambda: not psutil.pid_exists(kernel.kernel.pid))
            await ending
            assert "a program ignores its end" in kernel.retiring
            for neighbour, count in zip(neighbours, answered, strict=True):
                assert len(await neighbour.list_programs()) == 1 + count
            await full(service, 1)
            assert [program["program_id"] for program in await stuck.list_programs()] == ["qa"]
            assert pool_of(service).deaths == 0

    run(work())


async def _end_by_timeout(session: Any) -> None:
    with pytest.raises(errors.CommandTimeout):
        await session.call("execute_program", RUN, timeout=0.3)


def test_a_program_that_hangs_the_whole_kernel_costs_its_neighbours_a_move(make, fifo, monkeypatch):
    monkeypatch.setattr(pooled_module, "SUSPICION_AFTER", 0.2)
    monkeypatch.setattr(kernels_module, "MAX_LAG", 0.5)

    async def work() -> None:
        async with make(size=1, look_interval=0.3) as service:
            hangs = await _blocking(service, "hangs", "hangs", fifo)
            neighbour = await made(service, "neighbour")
            before = await pid_of(neighbour)
            with pytest.raises((errors.CommandTimeout, errors.KernelDied)):  # whichever is noticed first
                await hangs.call("execute_program", RUN, timeout=0.5)
            with contextlib.suppress(errors.KernelDied, errors.CommandTimeout):  # it may have been asked just there
                await neighbour.call("list_programs", timeout=30)
            assert (await neighbour.call("execute_program", RUN, timeout=30))["outputs"]["answer"]
            assert await pid_of(neighbour) != before
            assert [program["program_id"] for program in await hangs.list_programs()] == ["qa"]
            await wait_until(lambda: not psutil.pid_exists(before), deadline=30, what="the hung kernel's end")
            await full(service, 1)

    run(work())


def test_sessions_move_from_a_crowded_kernel_to_one_that_has_just_come(make, monkeypatch):
    monkeypatch.setattr(pooled_module, "CROWDED_BY", 1)

    async def work() -> None:
        async with make(size=1) as service:
            sessions = [await made(service, f"s{number}") for number in range(9)]
            await service.resize_pool(2)
            await full(service, 2)
            for _ in range(2):
                answers = await asyncio.gather(*(session.call("execute_program", RUN) for session in sessions))
                assert all(answer["outputs"]["answer"] for answer in answers)
            counts = sorted(member.sessions for member in pool_of(service).serving)
            assert sum(counts) == 9
            assert counts[1] <= 2 * counts[0] + 1
            told = [await pool_of(service)._kernels.why_sick(member.kernel) for member in pool_of(service).serving]
            assert told == ["", ""]
            namespaces = [(await session.ping())["sessions"] for session in sessions]
            assert set(namespaces) == set(counts), "what they left behind is gone"

    run(work())


def test_a_pooled_session_has_no_connection_file_and_its_interrupt_is_its_own(make):
    async def work() -> None:
        async with make(size=1) as service:
            sessions = [await made(service, name, SLOW) for name in ("a", "b")]
            calls = [ask(session, timeout=60) for session in sessions]
            await running(service, 2)
            async with asyncio.timeout(10):
                while (await sessions[0].ping())["running"] < 2:
                    pass
            assert await service.get_connection_file("a") is None
            await sessions[0].interrupt()
            with pytest.raises(errors.CommandInterrupted):
                await calls[0]
            assert not calls[1].done()
            calls[1].cancel()
            await asyncio.wait({calls[1]})

    run(work())
