"""Sessions move between backends with all they hold, or stay and are told why."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from dspex_kernels import errors
from dspex_kernels.protocol import journal
from dspex_kernels.protocol.records import SessionContents
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions.store.sql import SQLStore
from tests.sessions.memory_backend import MemoryService
from tests.waiting import wait_until

SLOW = {"model": "offline/echo", "offline": {"latency_s": 60}}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., MemoryService]:
    def make(**traits: Any) -> MemoryService:
        return MemoryService(data_dir=str(tmp_path), store_url=f"sqlite:///{tmp_path / 'store.sqlite'}", **traits)

    return make


BOTH_WAYS = pytest.mark.parametrize(("source", "target"), [("dedicated", "pooled"), ("pooled", "dedicated")])


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work

    asyncio.run(bounded())


def backend_of(service: MemoryService, name: str) -> Any:
    return {"dedicated": service.dedicated, "pooled": service.pooled}[name]


async def in_store(service: MemoryService) -> SessionContents:
    async with SQLStore(service.store_url) as store:
        return (await store.get("s")).contents


@BOTH_WAYS
def test_a_session_moves_with_versions_order_lm_budget_and_statistics(make, tmp_path, source, target):
    async def work() -> None:
        async with make() as service:
            session = await service.create_session(session_id="s", backend=source, lm="openai/gpt-x")
            await session.configure(budget={"lm_calls": 5})
            for name in ("z", "a", "z", "m"):
                await session.create_program(name, "question -> answer", replace=True)
            await session.call("execute_program", {"program_id": "z"})
            held = backend_of(service, source).contents("s").model_copy(deep=True)
            await service.migrate_session("s", backend=target)
            info = await service.get_session_info("s")
            assert (info.backend, info.status, info.generation) == (target, SessionStatus.READY, 2)
            assert info.programs == ["z", "a", "m"]
            moved = backend_of(service, target).contents("s")
            assert moved == held
            assert list(moved.programs) == list(held.programs)
            assert backend_of(service, source).get_place("s") is None
            assert (tmp_path / "sessions" / "s").exists() == (target == "dedicated")
        async with make() as service:
            await service.get_session("s").list_programs()
            assert (await service.get_session_info("s")).backend == target
            assert backend_of(service, target).contents("s") == held

    run(work())


def test_a_session_moves_there_and_back_again_and_again_under_load_and_loses_nothing(make):
    async def work() -> None:
        async with make() as service:
            session = await service.create_session(session_id="s", backend="pooled")
            made: list[str] = []
            done = asyncio.Event()

            async def keep_changing(name: str) -> None:
                number = 0
                while not done.is_set():
                    await session.create_program(f"{name}{number}", "question -> answer")
                    made.append(f"{name}{number}")
                    number += 1

            load = [asyncio.create_task(keep_changing(name)) for name in "abc"]
            for number in range(20):
                await service.migrate_session("s", backend=("dedicated", "pooled")[number % 2])
            done.set()
            await asyncio.gather(*load)
            assert len(made) > 20, "else there was no load"
            assert {program["program_id"] for program in await session.list_programs()} == set(made)
            assert set((await in_store(service)).programs) == set(made)

    run(work())


def test_in_its_own_backend_nothing_happens(make):
    async def work() -> None:
        async with make() as service:
            await service.create_session(session_id="s")
            await service.migrate_session("s", backend="dedicated")
            assert (await service.get_session_info("s")).generation == 1
            with pytest.raises(errors.InvalidSession, match="no backend 'cloud'"):
                await service.migrate_session("s", backend="cloud")
            with pytest.raises(errors.SessionNotFound):
                await service.migrate_session("none", backend="pooled")

    run(work())


def test_what_its_notebook_alone_has_is_refused_whole_with_the_reasons_and_nothing_is_changed(make):
    async def work() -> None:
        async with make() as service:
            session = await service.create_session(session_id="s")
            await session.create_program("plain", "question -> answer")
            await session.create_program("agent", "question -> answer", tools=["look_up"])
            before = await service.get_session_info("s")
            with pytest.raises(errors.NotPortable, match=r"'agent': look_up.*delete what its notebook") as refused:
                await service.migrate_session("s", backend="pooled")
            assert refused.value.details["because"] == {"agent": ["look_up"]}
            after = await service.get_session_info("s")
            assert (
                after.model_copy(update={"last_activity": before.last_activity, "cull_at": before.cull_at})
                == before
            )
            assert service.pooled.opened == []
            await session.delete_program("agent")
            await service.migrate_session("s", backend="pooled")
            assert [program["program_id"] for program in await session.list_programs()] == ["plain"]

    run(work())


@BOTH_WAYS
def test_calls_that_run_are_let_end_and_calls_that_come_wait_for_the_new_place(make, source, target):
    async def work() -> None:
        async with make() as service:
            session = await service.create_session(session_id="s", backend=source)
            old = backend_of(service, source)
            old.answering.clear()
            running = asyncio.create_task(session.create_program("old", "question -> answer"))
            await wait_until(lambda: old.late, what="the call")
            moving = asyncio.create_task(service.migrate_session("s", backend=target))
            await wait_until(lambda: service._registry.get("s").closing, what="the move")
            coming = asyncio.create_task(session.create_program("new", "question -> answer"))
            await wait_until(lambda: service._registry.get("s").queued, what="the call that comes")
            assert [task.done() for task in (running, moving, coming)] == [False] * 3
            old.answering.set()
            await asyncio.gather(running, moving, coming)
            assert [program["program_id"] for program in await session.list_programs()] == ["old", "new"]

    run(work())


@BOTH_WAYS
def test_a_call_that_does_not_end_keeps_the_session_where_it_is(make, source, target):
    async def work() -> None:
        async with make() as service:
            session = await service.create_session(session_id="s", backend=source, lm=SLOW)
            call = asyncio.create_task(session.call("execute_program", {"program_id": "qa"}, request_id="mine"))
            await wait_until(lambda: backend_of(service, source).running("s"), what="the call")
            with pytest.raises(errors.CommandTimeout, match="1 of its calls still run"):
                await service.migrate_session("s", backend=target, timeout=0.1)
            assert not call.done()
            info = await service.get_session_info("s")
            assert (info.backend, info.status, info.generation) == (source, SessionStatus.READY, 1)
            assert await session.list_programs() == []
            call.cancel()
            await asyncio.wait({call})

    run(work())


@BOTH_WAYS
def test_a_session_that_the_other_backend_cannot_open_is_where_it_was_with_all_it_held(make, source, target):
    async def work() -> None:
        async with make() as service:
            session = await service.create_session(session_id="s", backend=source)
            await session.create_program("qa", "question -> answer")
            backend_of(service, target).start_failure = errors.KernelStartFailed("no kernel today")
            with pytest.raises(errors.KernelStartFailed, match="no kernel today"):
                await service.migrate_session("s", backend=target)
            assert [program["program_id"] for program in await session.list_programs()] == ["qa"]
            assert (await service.get_session_info("s")).backend == source
            backend_of(service, target).start_failure = None
            await service.migrate_session("s", backend=target)
            assert [program["program_id"] for program in await session.list_programs()] == ["qa"]

    run(work())


def test_a_journal_that_the_store_does_not_take_keeps_the_session_and_its_directory(make, tmp_path):
    """It is the only one to hold what was acknowledged."""

    async def work() -> None:
        async with make() as service:
            session = await service.create_session(session_id="s")
            with contextlib.closing(sqlite3.connect(tmp_path / "store.sqlite")) as database:
                database.execute(
                    "CREATE TRIGGER refusal BEFORE INSERT ON dspex_programs BEGIN SELECT RAISE(ABORT, 'full'); END"
                )
                await session.create_program("acknowledged", "question -> answer")
                with pytest.raises(errors.StoreError):
                    await service.migrate_session("s", backend="pooled")
                assert (tmp_path / "sessions" / "s" / journal.FILE_NAME).exists()
                database.execute("DROP TRIGGER refusal")
            assert (await service.get_session_info("s")).backend == "dedicated"
            assert [program["program_id"] for program in await session.list_programs()] == ["acknowledged"]
            await service.migrate_session("s", backend="pooled")
            assert [program["program_id"] for program in await session.list_programs()] == ["acknowledged"]

    run(work())


@BOTH_WAYS
def test_a_session_that_moves_can_be_destroyed_without_waiting_for_its_calls(make, source, target):
    async def work() -> None:
        async with make() as service:
            session = await service.create_session(session_id="s", backend=source, lm=SLOW)
            call = asyncio.create_task(session.call("execute_program", {"program_id": "qa"}))
            await wait_until(lambda: backend_of(service, source).running("s"), what="the call")
            moving = asyncio.create_task(service.migrate_session("s", backend=target))
            await wait_until(lambda: service._registry.get("s").closing, what="the move")
            try:
                async with asyncio.timeout(5):  # far less than the ninety seconds that the calls may take
                    await session.destroy()
            finally:
                call.cancel()
                outcomes = await asyncio.gather(call, moving, return_exceptions=True)
            assert isinstance(outcomes[0], errors.CommandCancelled)
            assert isinstance(outcomes[1], errors.DSPexError)
            assert await service.list_sessions() == []

    run(work())


@BOTH_WAYS
def test_a_kernel_that_dies_while_its_session_leaves_costs_nothing(make, source, target):
    async def work() -> None:
        async with make() as service:
            session = await service.create_session(session_id="s", backend=source, lm=SLOW)
            await session.create_program("qa", "question -> answer")
            call = asyncio.create_task(session.call("execute_program", {"program_id": "qa"}))
            await wait_until(lambda: backend_of(service, source).running("s"), what="the call")
            moving = asyncio.create_task(service.migrate_session("s", backend=target))
            await wait_until(lambda: service._registry.get("s").closing, what="the move")
            backend_of(service, source).lose("s")
            with pytest.raises(errors.KernelDied):
                await call
            await moving
            assert [program["program_id"] for program in await session.list_programs()] == ["qa"]
            assert (await service.get_session_info("s")).backend == target

    run(work())


def test_the_directory_that_an_interrupted_move_left_is_not_taken_for_the_sessions_own(make, tmp_path):
    async def work() -> None:
        async with make() as service:
            session = await service.create_session(session_id="s", backend="pooled")
            await session.create_program("qa", "question -> answer")
            left = tmp_path / "sessions" / "s"
            left.mkdir()
            (left / journal.FILE_NAME).write_bytes(journal.encode_header(0))
            await service.migrate_session("s", backend="dedicated")
            assert [program["program_id"] for program in await session.list_programs()] == ["qa"]

    run(work())


def test_two_who_move_a_session_at_once_agree_or_one_is_told(make):
    async def work() -> None:
        async with make() as service:
            session = await service.create_session(session_id="s")
            await session.create_program("qa", "question -> answer")
            outcomes = await asyncio.gather(
                *(service.migrate_session("s", backend="pooled") for _ in range(3)), return_exceptions=True
            )
            assert all(told is None or isinstance(told, errors.SessionNotReady) for told in outcomes), outcomes
            assert None in outcomes
            assert [program["program_id"] for program in await session.list_programs()] == ["qa"]
            assert (await service.get_session_info("s")).backend == "pooled"

    run(work())
