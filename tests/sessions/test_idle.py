"""Which sessions are culled, and what keeps them: the service's side of the culler, with backends in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dspex_kernels import errors
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions.store.sql import SQLStore
from tests.sessions.memory_backend import MemoryService
from tests.waiting import wait_until

SLOW = {"model": "offline/echo", "offline": {"latency_s": 60}}
HOUR = timedelta(hours=1)


@pytest.fixture(params=["dedicated", "pooled"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


only_dedicated = pytest.mark.parametrize("mode", ["dedicated"])


@pytest.fixture
def make(tmp_path: Path, mode: str) -> Callable[..., MemoryService]:
    """Makes services that cull what was idle for an hour, when they are told to look."""

    def make(**traits: Any) -> MemoryService:
        url = f"sqlite:///{tmp_path / 'store.sqlite'}"
        rare = {"cull_interval": 86400.0}
        return MemoryService(data_dir=str(tmp_path), store_url=url, backend=mode, **rare, **traits)

    return make


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work

    asyncio.run(bounded())


async def look(service: MemoryService, *, after: timedelta = 2 * HOUR) -> None:
    """One pass of the culler, so much later."""
    service._culler._now = lambda: datetime.now(UTC) + after
    await service._culler.cull()


async def status(service: MemoryService, session_id: str = "s") -> SessionStatus:
    return (await service.get_session_info(session_id)).status


def kernel_tells(service: MemoryService, **told: Any) -> None:
    """Have kernels answer this to pings."""
    ask = service.memory._answer

    async def answer(room: Any, row: Any, args: Any) -> dict[str, Any]:
        answered = await ask(room, row, args)
        return {**answered, **told} if row.name == "ping" else answered

    service.memory._answer = answer


def test_an_idle_session_is_hibernated_and_its_next_call_brings_it_back(make):
    async def work() -> None:
        async with make() as service:
            session = await service.create_session(session_id="s")
            await session.create_program("qa", "question -> answer")
            await look(service, after=timedelta(minutes=59))
            assert await status(service) == "ready"
            await look(service)
            assert await status(service) == "hibernated"
            assert service.memory.get_place("s") is None
            with pytest.raises(errors.SessionNotReady, match="cull_idle_timeout"):
                await session.call("list_programs", timeout=0)
            assert [program["program_id"] for program in await session.list_programs()] == ["qa"]
            info = await service.get_session_info("s")
            assert (info.status, info.generation) == ("ready", 2)

    run(work())


def test_the_session_tells_when_it_will_be_culled(make):
    async def work() -> None:
        async with make(session_ttl=7200) as service:
            session = await service.create_session(session_id="s", lm=SLOW)
            info = await service.get_session_info("s")
            assert info.cull_at == info.last_activity + HOUR
            call = asyncio.create_task(session.call("execute_program", {"program_id": "qa"}))
            await wait_until(lambda: service.memory.running("s"), what="the call")
            assert (await service.get_session_info("s")).cull_at is None, "a call runs"
            call.cancel()
            await asyncio.wait({call})
            await look(service, after=1.5 * HOUR)
            info = await service.get_session_info("s")
            assert info.cull_at == info.last_activity + 2 * HOUR, "then it is destroyed"
        async with make(cull_idle_timeout=0) as service:
            assert (await service.get_session_info("s")).cull_at is None

    run(work())


def test_a_call_that_runs_keeps_its_session_and_health_checks_do_not(make):
    async def work() -> None:
        async with make() as service:
            busy = await service.create_session(session_id="busy", lm=SLOW)
            watched = await service.create_session(session_id="watched")
            call = asyncio.create_task(busy.call("execute_program", {"program_id": "qa"}))
            await wait_until(lambda: service.memory.running("busy"), what="the call")
            before = (await service.get_session_info("watched")).last_activity
            await watched.ping()
            await watched.get_stats()
            assert (await service.get_session_info("watched")).last_activity == before
            await look(service)
            assert await status(service, "busy") == "ready"
            assert await status(service, "watched") == "hibernated"
            assert not call.done()
            call.cancel()
            await asyncio.wait({call})

    run(work())


def test_pinging_a_hibernated_session_is_no_reason_for_keeping_it(make):
    async def work() -> None:
        async with make(session_ttl=7200) as service:
            session = await service.create_session(session_id="s")
            await look(service, after=1.5 * HOUR)
            await session.get_stats()
            await look(service, after=3 * HOUR)
            with pytest.raises(errors.SessionNotFound):
                await service.get_session_info("s")

    run(work())


@only_dedicated
@pytest.mark.parametrize(
    ("told", "switch"), [({"busy": True}, "cull_busy"), ({"clients": 1}, "cull_connected")], ids=["busy", "clients"]
)
def test_what_happens_in_a_dedicated_kernel_keeps_its_session_unless_the_policy_says_else(make, told, switch):
    async def work() -> None:
        async with make() as service:
            await service.create_session(session_id="s")
            kernel_tells(service, **told)
            await look(service)
            assert await status(service) == "ready"
            setattr(service, switch, True)
            await look(service)
            assert await status(service) == "hibernated"

    run(work())


@only_dedicated
def test_a_cell_that_ran_of_late_counts_from_its_end(make):
    async def work() -> None:
        async with make() as service:
            await service.create_session(session_id="s")
            ended = datetime.now(UTC) + 1.5 * HOUR
            kernel_tells(service, last_activity=ended.isoformat())
            await look(service)
            assert await status(service) == "ready"
            assert (await service.get_session_info("s")).last_activity == ended
            await look(service, after=3 * HOUR)
            assert await status(service) == "hibernated"

    run(work())


@only_dedicated
def test_a_kernel_that_answers_no_look_does_not_keep_the_others(make):
    async def work() -> None:
        async with make() as service:
            for session_id in ("deaf", "s"):
                await service.create_session(session_id=session_id)
            ask = service.memory.call

            async def deaf(session_id: str, call: Any) -> Any:
                if session_id == "deaf":
                    raise errors.CommandTimeout("no answer")
                return await ask(session_id, call)

            service.memory.call = deaf
            await look(service)
            assert await status(service, "s") == "hibernated"

    run(work())


def test_a_session_not_used_for_its_whole_life_is_destroyed_hibernated_or_not(make, tmp_path):
    async def work() -> None:
        async with make(session_ttl=7200, cull_idle_timeout=0) as service:
            await service.create_session(session_id="awake")
            await look(service, after=3 * HOUR)
            assert await service.list_sessions() == []
            await service.create_session(session_id="s")
        async with make(session_ttl=7200) as service:
            assert await status(service) == "hibernated"
            await look(service, after=3 * HOUR)
            assert await service.list_sessions() == []
            assert list((tmp_path / "sessions").iterdir()) == []
            async with SQLStore(service.store_url) as store:
                assert await store.count() == 0

    run(work())


def test_sessions_of_another_service_are_left_alone(make):
    async def work() -> None:
        async with make() as first:
            theirs = await first.create_session(session_id="s")
            async with make(session_ttl=7200) as second:
                await look(second, after=3 * HOUR)
                assert await status(second) == "hibernated", "as far as the second knows"
                assert await theirs.list_programs() == []
                assert await status(first) == "ready"

    run(work())


def test_a_session_that_another_service_used_of_late_is_not_destroyed_for_what_this_one_knows(make):
    async def work() -> None:
        async with make() as first:
            await first.create_session(session_id="s")
        async with make(session_ttl=7200) as second:
            used = datetime.now(UTC) + 2.5 * HOUR
            async with SQLStore(second.store_url) as store:
                await store.touch("s", used)
            await look(second, after=3 * HOUR)
            assert (await second.get_session_info("s")).last_activity == used

    run(work())


def test_a_call_that_comes_while_its_session_is_culled_is_answered(make):
    async def work() -> None:
        async with make() as service:
            session = await service.create_session(session_id="s")
            service.memory.closing.clear()
            culling = asyncio.create_task(look(service))
            await wait_until(lambda: service._registry.get("s").closing, what="the end of its place")
            call = asyncio.create_task(session.list_programs())
            await asyncio.sleep(0)
            assert not call.done()
            service.memory.closing.set()
            await culling
            assert await call == []
            assert (await service.get_session_info("s")).generation == 2

    run(work())
