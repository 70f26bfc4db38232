"""What the service promises about sessions, whatever the backend: ids, owners, limits, states, what lasts."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import sqlite3
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from dspex_kernels import errors
from dspex_kernels.protocol.commands import COMMANDS, PUBLIC
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions import keeper, places
from dspex_kernels.sessions.backend import PlaceGone
from dspex_kernels.sessions.store.sql import SQLStore
from tests.sessions.memory_backend import MemoryService as Service
from tests.sessions.memory_backend import store_that_refuses
from tests.waiting import wait_until, wait_until_stored

SLOW = {"model": "offline/echo", "offline": {"latency_s": 60}}
KEY = "sk-test-4711-canary"


@pytest.fixture(params=["dedicated", "pooled"])
def mode(request: pytest.FixtureRequest) -> str:
    """The backend in whose place the memory stands."""
    return str(request.param)


only_dedicated = pytest.mark.parametrize("mode", ["dedicated"])
only_pooled = pytest.mark.parametrize("mode", ["pooled"])


@pytest.fixture
def make(tmp_path: Path, mode: str) -> Callable[..., Service]:
    """Makes services that share one directory and one store, as one after another does."""

    def make(**traits: Any) -> Service:
        url = f"sqlite:///{tmp_path / 'store.sqlite'}"
        return Service(**{"data_dir": str(tmp_path), "store_url": url, "backend": mode, **traits})

    return make


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work

    asyncio.run(bounded())


class TestStart:
    def test_a_directory_that_cannot_be_made_is_named_with_its_setting(self, tmp_path):
        (tmp_path / "file").write_text("")

        async def work() -> None:
            service = Service(data_dir=str(tmp_path / "file"), store_url="sqlite://")
            with pytest.raises(errors.StoreError, match=r"SessionService\.data_dir"):
                await service.start()

        run(work())


def hold_up_creations(service: Any, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """The store writes new sessions down once that is set."""
    going, create = asyncio.Event(), service._store.create

    async def held_up(record: Any) -> None:
        await going.wait()
        await create(record)

    monkeypatch.setattr(service._store, "create", held_up)
    return going


async def stop_while_written(service: Any, monkeypatch: pytest.MonkeyPatch, come_so_far: Callable[[], Any]) -> None:
    """Stop a service that writes a session ``s`` down, once the creation has come so far; no place is left."""
    going = hold_up_creations(service, monkeypatch)
    creating = asyncio.create_task(service.create_session(session_id="s"))
    await wait_until(come_so_far, what="the creation")
    stopping = asyncio.create_task(service.stop())
    await asyncio.sleep(0)
    going.set()
    await stopping
    with pytest.raises(errors.ServiceClosed):
        await creating
    assert service.memory.get_place("s") is None


class TestIdsAndLimits:
    def test_an_id_is_generated_or_given_and_stands_for_one_session(self, make):
        async def work() -> None:
            async with make() as service:
                generated = await service.create_session(owner="alice")
                assert generated.session_id.startswith("session_")
                assert len(generated.session_id) == len("session_") + 16
                given = await service.create_session(owner="alice", session_id="mine")
                assert given.session_id == "mine"
                with pytest.raises(errors.SessionExists, match="'mine' exists"):
                    await service.create_session(owner="bob", session_id="mine")

        run(work())

    @pytest.mark.parametrize("session_id", ["", "../up", "a b", ".hidden", "x" * 129, "ä", "a\n"])
    def test_an_id_that_could_not_be_a_directory_is_refused(self, make, session_id):
        async def work() -> None:
            async with make() as service:
                with pytest.raises(errors.InvalidSession, match="session id"):
                    await service.create_session(session_id=session_id)
                assert await service.list_sessions() == []

        run(work())

    def test_others_have_the_event_loop_while_many_sessions_are_listed(self, make, monkeypatch):
        monkeypatch.setattr("dspex_kernels.sessions.service.PORTION", 2)

        async def work() -> None:
            async with make() as service:
                for number in range(5):
                    await service.create_session(session_id=f"s{number}")
                listing = asyncio.create_task(service.list_sessions())
                destroying = asyncio.create_task(service.destroy_session("s4"))
                await asyncio.sleep(0)
                assert not listing.done()
                listed = [info.session_id for info in await listing]
                assert listed[:4] == ["s0", "s1", "s2", "s3"]
                await destroying

        run(work())

    def test_a_service_of_many_sessions_spares_the_garbage_collector_until_it_stops(self, make):
        async def work() -> None:
            hooks = len(gc.callbacks)
            async with make(survivors_aside_from=2) as service:
                await service.create_session()
                assert len(gc.callbacks) == hooks
                await service.create_session()
                await service.create_session()
                assert len(gc.callbacks) == hooks + 1
            assert len(gc.callbacks) == hooks
            async with make(survivors_aside_from=2):  # it finds them there
                assert len(gc.callbacks) == hooks + 1
            async with make(survivors_aside_from=0):
                assert len(gc.callbacks) == hooks

        run(work())

    def test_an_owner_that_no_record_can_hold_is_refused(self, make):
        async def work() -> None:
            async with make() as service:
                with pytest.raises(errors.InvalidSession, match="owner"):
                    await service.create_session(owner="x" * 300)

        run(work())

    def test_a_backend_that_is_not_there_is_named(self, make):
        async def work() -> None:
            async with make() as service:
                with pytest.raises(
                    errors.InvalidSession, match="no backend 'cloud' here: there is dedicated, pooled"
                ):
                    await service.create_session(backend="cloud")
                assert await service.list_sessions() == []
            with pytest.raises(errors.InvalidSession, match="cloud"):
                await make(backend="cloud").start()

        run(work())

    def test_sessions_that_are_still_starting_count_against_the_limit(self, make):
        async def work() -> None:
            async with make(max_sessions=2) as service:
                service.memory.gate.clear()
                starting = [asyncio.create_task(service.create_session(owner=name)) for name in ("alice", "bob")]
                await wait_until(lambda: len(service.memory.opened) == 2, what="both starts")
                with pytest.raises(errors.SessionLimitReached, match=r"2 sessions.*max_sessions is 2"):
                    await service.create_session(owner="carol")
                service.memory.gate.set()
                first, _ = await asyncio.gather(*starting)
                await first.destroy()
                await service.create_session(owner="carol")

        run(work())

    def test_one_owner_is_limited_by_a_number_or_a_callable_and_others_are_not(self, make):
        async def work() -> None:
            async with make(max_sessions_per_owner=lambda owner: {"alice": 1}.get(owner, 0)) as service:
                await service.create_session(owner="alice")
                with pytest.raises(
                    errors.SessionLimitReached, match=r"of owner 'alice'.*max_sessions_per_owner is 1"
                ):
                    await service.create_session(owner="alice")
                for _ in range(3):
                    await service.create_session(owner="bob")
                assert await service.destroy_sessions(owner="bob") == 3
                assert [info.owner for info in await service.list_sessions()] == ["alice"]

        run(work())

    def test_a_session_that_is_not_there_is_not_found_by_any_method(self, make):
        async def work() -> None:
            async with make() as service:
                for attempt in (
                    service.call("none", "ping"),
                    service.get_session_info("none"),
                    service.destroy_session("none"),
                    service.interrupt_session("none"),
                ):
                    with pytest.raises(errors.SessionNotFound, match="'none'"):
                        await attempt
                with pytest.raises(errors.SessionNotFound):
                    service.get_session("none")

        run(work())


class TestOpening:
    def test_callers_share_one_start(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session()
                service.memory.lose(session.session_id)
                service.memory.gate.clear()
                calls = [asyncio.create_task(session.list_programs()) for _ in range(5)]
                await wait_until(lambda: len(service.memory.opened) == 2, what="the second start")
                service.memory.gate.set()
                assert await asyncio.gather(*calls) == [[]] * 5
                assert len(service.memory.opened) == 2

        run(work())

    def test_a_start_that_fails_is_told_to_all_who_wait_and_tried_again_by_the_next_call(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session()
                service.memory.lose(session.session_id)
                service.memory.start_failure = errors.KernelStartFailed("no kernel today")
                outcomes = await asyncio.gather(
                    *(session.list_programs() for _ in range(3)), return_exceptions=True
                )
                assert [str(outcome) for outcome in outcomes] == ["no kernel today"] * 3
                info = await service.get_session_info(session.session_id)
                assert info.status is SessionStatus.FAILED
                service.memory.start_failure = None
                assert await session.list_programs() == []
                assert (await service.get_session_info(session.session_id)).generation == 3

        run(work())

    def test_a_place_that_is_lost_just_as_it_opened_is_opened_again(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                await service.memory.close("s")  # and nobody was told
                assert await session.list_programs() == []
                assert (await service.get_session_info("s")).generation == 2

        run(work())

    def test_places_that_are_lost_one_after_another_before_they_are_ready_are_outlived(self, make, monkeypatch):
        monkeypatch.setattr(places, "OPEN_PAUSES", (0.0, 0.0, 0.0, 0.0))

        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                service.memory.lose("s")
                service.memory.opened.clear()
                service.memory.start_failure = PlaceGone("s")
                service.memory.gate.clear()
                asking = asyncio.create_task(session.list_programs())
                await wait_until(lambda: service.memory.opened, what="the first try")
                service.memory.gate.set()
                await wait_until(lambda: len(service.memory.opened) > 1, what="the second")
                service.memory.start_failure = None
                assert await asking == []
                info = await service.get_session_info("s")
                assert (info.status, info.generation) == (SessionStatus.READY, len(service.memory.opened) + 1)

        run(work())

    def test_a_session_whose_every_place_is_lost_fails_after_some(self, make, monkeypatch):
        monkeypatch.setattr(places, "OPEN_PAUSES", (0.0, 0.0, 0.0))

        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                service.memory.lose("s")
                service.memory.opened.clear()
                service.memory.start_failure = PlaceGone("s")
                with pytest.raises(errors.KernelStartFailed, match="3 places in a row were lost"):
                    await session.list_programs()
                assert len(service.memory.opened) == 3
                assert (await service.get_session_info("s")).status is SessionStatus.FAILED
                service.memory.start_failure = None
                assert await session.list_programs() == []

        run(work())

    def test_a_call_without_time_to_wait_is_told_the_status_and_the_start_goes_on(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session()
                service.memory.lose(session.session_id)
                with pytest.raises(errors.SessionNotReady, match=r"no kernel yet.*its kernel died") as told:
                    await session.call("list_programs", timeout=0)
                assert told.value.code == "session_status"
                await wait_until(lambda: service.memory.get_place(session.session_id), what="the start")
                assert (await session.call("list_programs", timeout=0))["count"] == 0

        run(work())

    def test_the_start_is_paid_from_the_calls_time(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session()
                service.memory.lose(session.session_id)
                service.memory.gate.clear()
                with pytest.raises(errors.CommandTimeout, match="still starting"):
                    await session.call("list_programs", timeout=0.05)
                service.memory.gate.set()
                await session.list_programs(timeout=10)
                assert 0 < service.memory.asked[-1][1].timeout < 10

        run(work())

    def test_a_call_that_waits_for_its_kernel_can_be_cancelled_by_name(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session()
                service.memory.lose(session.session_id)
                service.memory.gate.clear()
                call = asyncio.create_task(session.call("list_programs", request_id="mine"))
                await wait_until(lambda: len(service.memory.opened) == 2, what="the start")
                assert await session.cancel("mine")
                with pytest.raises(errors.CommandCancelled):
                    await call
                assert not await session.cancel("another")
                service.memory.gate.set()

        run(work())

    def test_a_session_whose_kernel_does_not_start_is_not_created(self, make, tmp_path):
        async def work() -> None:
            async with make(max_sessions=1) as service:
                service.memory.start_failure = errors.KernelStartFailed("no kernel today")
                with pytest.raises(errors.KernelStartFailed):
                    await service.create_session(session_id="s")
                assert await service.list_sessions() == []
                service.memory.start_failure = None
                await service.create_session(session_id="s")

        run(work())

    def test_a_session_that_the_store_refuses_leaves_nothing(self, make, tmp_path):
        async def work() -> None:
            async with make() as service:
                with contextlib.closing(sqlite3.connect(tmp_path / "store.sqlite")) as database:
                    database.execute("ALTER TABLE dspex_sessions RENAME TO away")
                    with pytest.raises(errors.StoreError, match="no such table"):
                        await service.create_session(session_id="s")
                    database.execute("ALTER TABLE away RENAME TO dspex_sessions")
                assert await service.list_sessions() == []
                assert list((tmp_path / "sessions").iterdir()) == []
                await service.create_session(session_id="s")

        run(work())

    @only_dedicated
    def test_a_session_is_written_down_while_its_place_is_opened_and_is_there_when_both_are_done(
        self, make, monkeypatch
    ):
        async def work() -> None:
            async with make() as service:
                going = hold_up_creations(service, monkeypatch)
                creating = asyncio.create_task(service.create_session(session_id="s"))
                await wait_until(lambda: service.memory.get_place("s"), what="the place")
                assert not creating.done()
                service.memory.lose("s")  # nobody is told of a place that is lost before it is ready
                going.set()
                await creating
                assert service.memory.get_place("s") is not None
                assert (await service.get_session_info("s")).generation == 2

        run(work())

    @only_dedicated
    def test_a_session_that_is_destroyed_while_it_is_written_down_has_not_failed(self, make, monkeypatch):
        async def work() -> None:
            async with make() as service:
                told: list[str] = []
                service.listeners.add(lambda happening: told.append(type(happening).__name__))
                going = hold_up_creations(service, monkeypatch)
                creating = asyncio.create_task(service.create_session(session_id="s"))
                await wait_until(lambda: service.memory.get_place("s"), what="the place")
                destroying = asyncio.create_task(service.destroy_session("s"))
                await asyncio.sleep(0)
                going.set()
                await destroying
                with pytest.raises(errors.SessionNotFound):
                    await creating
                assert [name for name in told if name.startswith("Session")] == [
                    "SessionCreated",
                    "SessionDestroyed",
                ]

        run(work())

    def test_a_session_whose_lm_is_refused_is_not_created(self, make):
        async def work() -> None:
            async with make() as service:
                with pytest.raises(errors.PolicyDenied):
                    await service.create_session(session_id="s", lm="refused/model")
                assert await service.list_sessions() == []
                assert service.memory.get_place("s") is None

        run(work())

    def test_a_creation_that_is_cancelled_leaves_nothing(self, make, tmp_path):
        async def work() -> None:
            async with make() as service:
                service.memory.gate.clear()
                creating = asyncio.create_task(service.create_session(session_id="s"))
                await wait_until(lambda: service.memory.opened, what="the start")
                creating.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await creating
                assert await service.list_sessions() == []
                assert not (tmp_path / "sessions" / "s").exists()
                service.memory.gate.set()
                await service.create_session(session_id="s")

        run(work())

    @pytest.mark.parametrize("turns", range(12))
    def test_a_creation_cancelled_at_any_of_its_steps_ends_as_cancelled_and_leaves_nothing(
        self, make, tmp_path, turns
    ):
        async def work() -> None:
            async with make() as service:
                creating = asyncio.create_task(service.create_session(session_id="s", lm=SLOW))
                for _ in range(turns):
                    await asyncio.sleep(0)
                creating.cancel()
                outcome = (await asyncio.gather(creating, return_exceptions=True))[0]
                assert isinstance(outcome, asyncio.CancelledError), outcome
                assert await service.list_sessions() == []
                assert not (tmp_path / "sessions" / "s").exists()
                await service.create_session(session_id="s")

        run(work())

    def test_a_stop_while_a_sessions_record_is_written_leaves_it_without_a_place(self, make, monkeypatch, mode):
        async def work() -> None:
            service = await make().start()
            await stop_while_written(service, monkeypatch, lambda: service._registry.find("s"))
            # A pooled one's place waits for the record, a dedicated one's may have been opened meanwhile.
            assert len(service.memory.opened) <= {"dedicated": 1, "pooled": 0}[mode]

        run(work())

    @only_dedicated
    def test_a_stop_while_a_sessions_record_is_written_and_its_place_is_there_opens_no_second(
        self, make, monkeypatch
    ):
        async def work() -> None:
            service = await make().start()
            await stop_while_written(service, monkeypatch, lambda: service.memory.get_place("s"))
            assert len(service.memory.opened) == 1

        run(work())

    def test_a_session_destroyed_while_its_record_is_written_is_not_found(self, make):
        async def work() -> None:
            async with make() as service:
                creating = asyncio.create_task(service.create_session(session_id="s"))
                await asyncio.sleep(0)
                await service.destroy_session("s")
                with pytest.raises(errors.SessionNotFound):
                    await creating
                async with SQLStore(service.store_url) as store:
                    assert await store.count() == 0

        run(work())

    def test_a_call_to_a_session_whose_record_is_being_written_waits_for_it(self, make):
        async def work() -> None:
            async with make() as service:
                creating = asyncio.create_task(service.create_session(session_id="s"))
                await asyncio.sleep(0)
                assert (await service.call("s", "list_programs"))["count"] == 0
                assert (await creating).session_id == "s"
                assert len(service.memory.opened) == 1

        run(work())

    def test_starting_a_service_that_runs_changes_nothing(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session()
                assert await service.start() is service
                assert await session.list_programs() == []
                assert (await service.get_session_info(session.session_id)).generation == 1

        run(work())


class TestTwoServicesOnOneStore:
    def test_a_creation_refused_for_its_id_leaves_the_others_session_as_it_is(self, make, tmp_path):
        async def work() -> None:
            async with make() as first, make() as second:
                theirs = await first.create_session(session_id="s")
                await theirs.create_program("qa", "question -> answer")
                with pytest.raises(errors.SessionExists, match="'s'"):
                    await second.create_session(session_id="s")
                assert await second.list_sessions() == []
                await theirs.create_program("more", "question -> answer")
                async with SQLStore(first.store_url) as store:
                    await wait_until_stored(store, "s", lambda told: set(told.programs) == {"qa", "more"})
            async with make() as third:
                programs = await third.get_session("s").list_programs()
                assert [p["program_id"] for p in programs] == ["qa", "more"]

        run(work())

    def test_a_session_in_use_is_neither_opened_nor_destroyed_by_the_other(self, make):
        async def work() -> None:
            async with make() as first:
                theirs = await first.create_session(session_id="s")
                async with make() as second:
                    for attempt in (second.call("s", "list_programs"), second.destroy_session("s")):
                        with pytest.raises(errors.SessionNotReady, match="used by another service"):
                            await attempt
                    assert second.memory.opened == []
                    await theirs.create_program("qa", "question -> answer")
                    await first.stop()
                    programs = await second.get_session("s").list_programs()
                    assert [p["program_id"] for p in programs] == ["qa"]
                    info = await second.get_session_info("s")
                    assert (info.generation, info.programs) == (2, ["qa"])

        run(work())

    def test_a_session_that_the_other_destroyed_is_not_found_any_more_and_leaves_nothing(self, make, tmp_path):
        async def work() -> None:
            async with make() as first:
                theirs = await first.create_session(session_id="s")
                async with make() as second:
                    await theirs.destroy()
                    with pytest.raises(errors.SessionNotFound):
                        await second.call("s", "list_programs")
                    assert await second.list_sessions() == []
                    assert list((tmp_path / "sessions").iterdir()) == []
                    await second.create_session(session_id="s")

        run(work())

    def test_a_session_that_the_other_died_destroying_is_not_brought_back(self, make):
        async def work() -> None:
            async with make() as first:
                await first.create_session(session_id="s")
            async with make() as second, SQLStore(second.store_url) as store:
                await store.set_status("s", SessionStatus.DESTROYED)  # as far as the other came
                with pytest.raises(errors.SessionNotFound):
                    await second.get_session("s").create_program("qa", "question -> answer")
                assert second.memory.opened == []
            async with make() as third:
                assert await third.list_sessions() == []

        run(work())

    @only_dedicated
    def test_a_new_session_does_not_inherit_the_directory_of_another_stores_session(self, make, tmp_path):
        async def work() -> None:
            async with make() as first:
                theirs = await first.create_session(owner="alice", session_id="s")
                await theirs.create_program("qa", "question -> answer")
            other = f"sqlite:///{tmp_path / 'other.sqlite'}"
            async with make(store_url=other) as service:
                with pytest.raises(errors.SessionExists, match=r"another SessionService\.data_dir"):
                    await service.create_session(owner="bob", session_id="s")
            async with make() as first:
                assert len(await first.get_session("s").list_programs()) == 1

        run(work())


class TestWhatOutlivesWhat:
    def test_a_change_is_in_the_store_when_its_reply_is_there_or_soon_where_a_journal_has_it(
        self, make, mode, tmp_path
    ):
        async def work() -> None:
            async with make() as service, SQLStore(service.store_url) as other:

                async def stored(programs: list[str]) -> None:
                    at_most = {"dedicated": 10, "pooled": 0}[mode]
                    await wait_until_stored(
                        other, "s", lambda told: list(told.programs) == programs, deadline=at_most
                    )

                session = await service.create_session(session_id="s")
                await session.create_program("qa", "question -> answer")
                assert (await service.get_session_info("s")).programs == ["qa"]
                await stored(["qa"])
                await session.delete_program("qa")
                assert (await service.get_session_info("s")).programs == []
                await stored([])

        run(work())

    def test_programs_are_there_in_the_next_generation_after_a_kernels_death(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                await session.create_program("qa", "question -> answer")
                service.memory.lose("s")
                info = await service.get_session_info("s")
                assert (info.status, info.kernel_id, info.programs) == (SessionStatus.HIBERNATED, None, ["qa"])
                assert [p["program_id"] for p in await session.list_programs()] == ["qa"]
                info = await service.get_session_info("s")
                assert (info.status, info.generation) == (SessionStatus.READY, 2)

        run(work())

    def test_a_call_that_was_running_is_reported_and_never_run_again(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s", lm=SLOW)
                call = asyncio.create_task(session.execute_program("qa", {"question": "?"}))
                await wait_until(lambda: service.memory.asked[-1][1].command == "execute_program", what="the call")
                service.memory.lose("s")
                with pytest.raises(errors.KernelDied) as died:
                    await call
                assert not died.value.retryable
                await session.list_programs()
                assert [c.command for _, c in service.memory.asked].count("execute_program") == 1

        run(work())

    def test_sessions_of_an_earlier_service_are_hibernated_and_come_back(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(owner="alice", session_id="s")
                await session.create_program("qa", "question -> answer")
            async with make() as service:
                info = await service.get_session_info("s")
                assert (info.owner, info.status, info.programs) == ("alice", SessionStatus.HIBERNATED, ["qa"])
                assert [p["program_id"] for p in await service.get_session("s").list_programs()] == ["qa"]
                assert (await service.get_session_info("s")).generation == 2

        run(work())

    def test_a_session_that_is_destroyed_leaves_nothing(self, make, tmp_path):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s", lm=SLOW)
                call = asyncio.create_task(session.execute_program("qa", {"question": "?"}))
                await wait_until(lambda: service.memory.asked[-1][1].command == "execute_program", what="the call")
                await session.destroy()
                with pytest.raises(errors.CommandCancelled):
                    await call
                assert not (tmp_path / "sessions" / "s").exists()
                with pytest.raises(errors.SessionNotFound):
                    await session.list_programs()
                again = await service.create_session(session_id="s")
                assert await again.list_programs() == []
            async with make() as service:
                assert [info.session_id for info in await service.list_sessions()] == ["s"]

        run(work())

    def test_a_session_destroyed_while_it_starts_answers_who_waits(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                service.memory.lose("s")
                service.memory.gate.clear()
                call = asyncio.create_task(session.list_programs())
                await wait_until(lambda: len(service.memory.opened) == 2, what="the start")
                await session.destroy()
                with pytest.raises(errors.SessionNotFound):
                    await call
                assert service.memory.get_place("s") is None

        run(work())

    def test_a_destruction_that_a_crash_interrupted_is_finished_by_the_next_service(self, make, tmp_path):
        async def work() -> None:
            async with make() as service:
                await service.create_session(session_id="s")
            async with SQLStore(service.store_url) as store:
                await store.set_status("s", SessionStatus.DESTROYED)
            async with make() as service:
                assert await service.list_sessions() == []
                assert not (tmp_path / "sessions" / "s").exists()

        run(work())

    def test_a_session_whose_end_the_store_refuses_stays_as_it_is_and_can_be_ended_later(self, make, tmp_path):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                with contextlib.closing(sqlite3.connect(tmp_path / "store.sqlite")) as database:
                    database.execute("ALTER TABLE dspex_sessions RENAME TO away")
                    with pytest.raises(errors.StoreError, match="no such table"):
                        await session.destroy()
                    database.execute("ALTER TABLE away RENAME TO dspex_sessions")
                await session.create_program("qa", "question -> answer")
                async with make() as other:
                    with pytest.raises(errors.SessionNotReady, match="used by another service"):
                        await other.call("s", "list_programs")
                await session.destroy()
                assert service.memory.get_place("s") is None
                assert not (tmp_path / "sessions" / "s").exists()

        run(work())

    @only_dedicated
    def test_a_journal_that_cannot_be_read_is_logged_and_the_call_is_answered(self, make, tmp_path, caplog):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                path = tmp_path / "sessions" / "s" / "journal.jsonl"
                path.write_bytes(b"no journal\n")
                with caplog.at_level(logging.ERROR):
                    await session.create_program("qa", "question -> answer")
                assert "session s: its journal could not be taken into the store" in caplog.text

        run(work())


class TestKeys:
    def test_a_key_given_directly_is_told_to_the_next_kernel(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s", lm={"model": "openai/gpt-x", "api_key": KEY})
                service.memory.lose("s")
                await session.list_programs()
                configured = [c.args for _, c in service.memory.asked if c.command == "configure"]
                assert configured == [{"lm": {"model": "openai/gpt-x", "api_key": KEY}}] * 2

        run(work())

    @pytest.mark.parametrize("change", [("configure", {"lm": "offline/echo"}), ("reset", {})])
    def test_a_key_whose_lm_was_replaced_is_forgotten(self, make, change):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s", lm={"model": "openai/gpt-x", "api_key": KEY})
                await session.call(*change)
                service.memory.lose("s")
                await session.list_programs()
                assert [KEY in str(c.args) for _, c in service.memory.asked].count(True) == 1

        run(work())

    @only_dedicated
    def test_a_key_is_not_repeated_when_the_lm_was_changed_from_inside_the_kernel(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s", lm={"model": "openai/gpt-x", "api_key": KEY})
                inside = service.memory
                await inside._answer(inside._rooms["s"], *_configure("offline/echo"))
                inside.lose("s")
                await session.list_programs()
                assert [KEY in str(c.args) for _, c in inside.asked].count(True) == 1

        run(work())

    def test_a_key_is_in_no_file_no_log_and_no_answer(self, make, tmp_path, caplog):
        async def work() -> None:
            with caplog.at_level(logging.DEBUG):
                async with make() as service:
                    session = await service.create_session(
                        session_id="s", lm={"model": "openai/gpt-x", "api_key": KEY}
                    )
                    answers = [await session.info(), await service.health_check(), repr(session)]
                    service.memory.lose("s")
                    service.memory.start_failure = errors.KernelStartFailed("no kernel today")
                    with pytest.raises(errors.KernelStartFailed) as failed:
                        await session.list_programs()
                    service.memory.start_failure = None
                    with pytest.raises(errors.InvalidArguments) as invalid:
                        await session.configure(lm={"model": "openai/gpt-x", "api_key": KEY, "no_such": 1})
                    assert KEY not in f"{answers} {failed.value.to_dict()} {invalid.value.to_dict()}"
            files = [path for path in tmp_path.rglob("*") if path.is_file()]
            assert files
            assert not [path for path in files if KEY.encode() in path.read_bytes()]
            assert KEY not in caplog.text

        run(work())


def _configure(model: str) -> tuple[Any, Any]:
    from dspex_kernels.protocol.commands import get_command

    row = get_command("configure")
    return row, row.parse({"lm": model})


class TestStopping:
    def test_running_and_waiting_calls_are_answered_and_new_ones_refused(self, make):
        async def work() -> None:
            service = await make().start()
            ready = await service.create_session(session_id="ready", lm=SLOW)
            starting = await service.create_session(session_id="starting")
            service.memory.lose("starting")
            service.memory.gate.clear()
            calls = [
                asyncio.create_task(ready.execute_program("qa", {"question": "?"})),
                asyncio.create_task(starting.list_programs()),
            ]
            await wait_until(lambda: len(service.memory.opened) == 3, what="the start")
            await service.stop()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [errors.ServiceClosed] * 2
            for attempt in (ready.ping(), service.create_session(), service.list_sessions()):
                with pytest.raises(errors.ServiceClosed):
                    await attempt
            await service.stop()

        run(work())

    def test_a_creation_that_the_stop_interrupts_leaves_no_session(self, make):
        async def work() -> None:
            service = await make().start()
            service.memory.gate.clear()
            creating = asyncio.create_task(service.create_session(session_id="late"))
            await wait_until(lambda: service.memory.opened, what="the start")
            await service.stop()
            with pytest.raises(errors.ServiceClosed):
                await creating
            async with make() as service:
                assert await service.list_sessions() == []

        run(work())

    def test_the_last_activity_outlives_the_service(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                for _ in range(3):
                    await session.list_programs()
                last = (await service.get_session_info("s")).last_activity
                await session.ping()
                assert (await service.get_session_info("s")).last_activity == last, "control is no activity"
            async with make() as service:
                assert (await service.get_session_info("s")).last_activity == last

        run(work())

    def test_a_session_for_a_block_is_gone_after_it_even_if_the_block_fails(self, make):
        async def work() -> None:
            async with make() as service:

                async def fail() -> None:
                    async with service.session(owner="alice") as session:
                        assert (await session.info())["owner"] == "alice"
                        raise ZeroDivisionError

                with pytest.raises(ZeroDivisionError):
                    await fail()
                assert await service.list_sessions() == []
                async with service.session() as session:
                    await session.destroy()

        run(work())

    def test_health_counts_and_names_nobody(self, make):
        async def work() -> None:
            async with make() as service:
                await service.create_session(owner="alice", session_id="s")
                health = await service.health_check()
                assert (health["status"], health["sessions"]["ready"], health["calls"]) == ("ok", 1, 0)
                assert "alice" not in str(health)
                assert "'s'" not in str(health)
            assert (await service.health_check())["status"] == "stopped"

        run(work())


class TestChoiceOfBackend:
    def test_a_session_may_name_another_backend_than_the_services(self, make, mode):
        other = "dedicated" if mode == "pooled" else "pooled"

        async def work() -> None:
            async with make() as service:
                chosen, default = await service.create_session(backend=other), await service.create_session()
                backends = [(await session.info())["backend"] for session in (chosen, default)]
                assert backends == [other, mode]
                assert [record.backend for record in service.memory.opened] == [mode]

        run(work())

    @only_dedicated
    @pytest.mark.parametrize("percent", [0, 10, 30, 50])
    def test_the_pools_share_comes_out_exactly(self, make, percent):
        async def work() -> None:
            async with make(pooled_fraction=percent / 100) as service:
                await service.create_session(backend="pooled")
                await service.create_session(backend="dedicated")
                await asyncio.gather(*(service.create_session() for _ in range(100)))
                assert len(service.pooled.opened) - 1 == percent, "those that named theirs do not count"
                assert len(service.dedicated.opened) - 1 == 100 - percent

        run(work())

    @only_dedicated
    def test_sessions_that_were_refused_take_nothing_of_the_pools_share(self, make):
        async def work() -> None:
            async with make(pooled_fraction=0.5) as service:
                await service.create_session(session_id="s")
                for _ in range(3):
                    with pytest.raises(errors.SessionExists):
                        await service.create_session(session_id="s")
                await service.create_session(session_id="t")
                assert [len(service.dedicated.opened), len(service.pooled.opened)] == [1, 1]

        run(work())


class TestCalls:
    @pytest.mark.parametrize("command", sorted(COMMANDS.keys() - PUBLIC.keys()))
    def test_what_is_between_a_service_and_its_kernels_cannot_be_asked(self, make, command):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session()
                with pytest.raises(errors.UnknownCommand, match=f"{command!r} is between"):
                    await session.call(command)
                assert service.memory.asked == []

        run(work())

    def test_a_place_that_goes_again_and_again_is_opened_again_until_the_calls_time_is_over(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                ask = service.memory.call

                async def lost_before_each_call(session_id: str, call: Any) -> Any:
                    service.memory.lose("s")
                    return await ask(session_id, call)

                service.memory.call = lost_before_each_call
                with pytest.raises(errors.CommandTimeout):
                    await session.call("list_programs", timeout=0.2)
                assert len(service.memory.opened) > 2
                service.memory.call = ask
                assert await session.list_programs() == []

        run(work())

    def test_a_place_that_takes_no_call_does_not_hold_up_other_sessions(self, make):
        async def work() -> None:
            async with make() as service:
                stuck, other = [await service.create_session(session_id=name) for name in ("stuck", "other")]
                ask = service.memory.call

                async def never_there(session_id: str, call: Any) -> Any:
                    if session_id == "stuck":
                        raise PlaceGone(session_id)
                    return await ask(session_id, call)

                service.memory.call = never_there
                call = asyncio.create_task(stuck.call("list_programs", timeout=0.3))
                await asyncio.sleep(0)
                assert await other.list_programs() == []
                assert not call.done()
                with pytest.raises(errors.CommandTimeout):
                    await call

        run(work())

    def test_a_caller_that_is_cancelled_ends_its_call(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s", lm=SLOW)
                call = asyncio.create_task(session.execute_program("qa", {"question": "?"}))
                await wait_until(lambda: service.memory.asked[-1][1].command == "execute_program", what="the call")
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                assert service.memory.running("s") == 0
                assert (await service.health_check())["calls"] == 0

        run(work())

    def test_statistics_outlive_the_service(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                for _ in range(3):
                    await session.call("execute_program", {"program_id": "qa"})
            async with make() as service:
                session = service.get_session("s")
                assert (await session.get_stats())["executions"] == 3
                await session.call("execute_program", {"program_id": "qa"})
                assert (await session.get_stats())["executions"] == 4

        run(work())

    def test_versions_lm_and_budget_outlive_the_service_and_each_restored_place_is_one_generation_later(self, make):
        async def work() -> None:
            for generation in range(1, 4):
                async with make() as service:
                    if generation == 1:
                        session = await service.create_session(session_id="s", lm="openai/x")
                        await session.configure(budget={"lm_calls": 5})
                        for _ in range(3):
                            await session.create_program("qa", "question -> answer", replace=True)
                    await service.get_session("s").list_programs()
                    assert (await service.get_session_info("s")).generation == generation
                    async with SQLStore(service.store_url) as store:
                        contents = await wait_until_stored(
                            store, "s", lambda told: len(told.programs.get("qa", ())) == 3
                        )
                    assert [record.version for record in contents.programs["qa"]] == [1, 2, 3]
                    assert contents.settings.lm.model == "openai/x"
                    assert contents.settings.budget.lm_calls == 5

        run(work())


class TestFetchingResults:
    def test_what_a_call_was_answered_can_be_fetched_by_its_name(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                await session.call("create_program", {"program_id": "qa"}, request_id="made")
                with pytest.raises(errors.ProgramExists):
                    await session.call("create_program", {"program_id": "qa"}, request_id="refused")
                assert (await service.fetch_result("s", "made"))["program_id"] == "qa"
                with pytest.raises(errors.ProgramExists):
                    await service.fetch_result("s", "refused")
                with pytest.raises(errors.ResultNotFound):
                    await service.fetch_result("s", "never")
                with pytest.raises(errors.SessionNotFound):
                    await service.fetch_result("other", "made")

        run(work())

    def test_a_call_that_still_runs_is_waited_for(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                service.memory.answering.clear()
                call = asyncio.create_task(session.call("list_programs", request_id="mine"))
                await wait_until(lambda: service.memory.asked, what="the call")
                with pytest.raises(errors.CommandTimeout):
                    await service.fetch_result("s", "mine")
                fetching = asyncio.create_task(service.fetch_result("s", "mine", timeout=20))
                with pytest.raises(errors.DuplicateRequest):
                    await session.call("list_programs", request_id="mine")
                service.memory.answering.set()
                assert await fetching == await call

        run(work())

    def test_an_answer_that_comes_when_its_caller_has_left_can_be_fetched(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                await _leave_before_the_reply(session, service, "create_program", {"program_id": "qa"})
                with pytest.raises(errors.CommandCancelled, match="its caller went away"):
                    await service.fetch_result("s", "mine")
                service.memory.answering.set()
                await wait_until(lambda: not service.memory.late, what="the late reply")
                await session.create_program("next", "question -> answer")  # durable later than the late one
                assert (await service.fetch_result("s", "mine"))["program_id"] == "qa"

        run(work())

    def test_a_new_session_of_the_same_id_does_not_get_the_former_ones_results(self, make):
        async def work() -> None:
            async with make() as service:
                first = await service.create_session(owner="alice", session_id="s")
                await first.call("create_program", {"program_id": "secret"}, request_id="mine")
                await first.destroy()
                await service.create_session(owner="bob", session_id="s")
                with pytest.raises(errors.ResultNotFound):
                    await service.fetch_result("s", "mine")

        run(work())

    @only_pooled
    def test_a_late_answer_whose_change_the_store_refused_is_not_told_as_done(self, make, tmp_path):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                await _leave_before_the_reply(session, service, "create_program", {"program_id": "qa"})
                with store_that_refuses(tmp_path / "store.sqlite", "qa"):
                    service.memory.answering.set()
                    await wait_until(lambda: service.memory.get_place("s") is None, what="the place's end")
                with pytest.raises(errors.DSPexError):
                    await service.fetch_result("s", "mine")
                assert await session.list_programs() == []

        run(work())


async def _leave_before_the_reply(session: Any, service: Service, command: str, args: dict[str, Any]) -> None:
    """Ask, let the kernel do it, and go away while its reply is on its way."""
    service.memory.answering.clear()
    call = asyncio.create_task(session.call(command, args, request_id="mine"))
    await wait_until(lambda: service.memory.late, what="the reply on its way")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


@only_pooled
class TestChangesOfPooledSessions:
    """What a pooled kernel changed is the service's to keep, before it answers."""

    def test_a_change_that_the_store_refuses_has_not_happened(self, make, tmp_path):
        async def work() -> None:
            async with make() as service:
                session, other = [await service.create_session(session_id=name) for name in ("s", "other")]
                await session.create_program("kept", "question -> answer")
                with store_that_refuses(tmp_path / "store.sqlite", "refused"):
                    with pytest.raises(errors.StoreError, match="the disk is full"):
                        await session.create_program("refused", "question -> answer")
                    assert (await service.get_session_info("s")).programs == ["kept"]
                    assert await _ids(session) == ["kept"]
                    assert (await service.get_session_info("s")).generation == 2
                    await other.create_program("theirs", "question -> answer")
                assert (await service.get_session_info("other")).generation == 1, "others notice nothing"
                await session.create_program("refused", "question -> answer")
                assert await _ids(session) == ["kept", "refused"]

        run(work())

    def test_nothing_that_came_after_a_refused_change_is_kept(self, make, tmp_path):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                names = ["a", "refused", "b", "c"]
                with store_that_refuses(tmp_path / "store.sqlite", "refused"):
                    outcomes = await asyncio.gather(
                        *(session.create_program(name, "question -> answer") for name in names),
                        return_exceptions=True,
                    )
                    failed = [name for name, told in zip(names, outcomes, strict=True) if _is_refused(told)]
                    assert failed[-3:] == ["refused", "b", "c"]
                    kept = ["a"] if failed == names[1:] else []
                    async with SQLStore(service.store_url) as store:
                        assert list((await store.get("s")).contents.programs) == kept
                    assert await _ids(session) == kept

        run(work())

    def test_what_a_kernel_tells_between_a_refusal_and_its_end_is_not_kept(self, make, tmp_path):
        """It stands on the refused change: kept alone it would be another session than anybody saw."""

        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                service.memory.answering.clear()
                after = asyncio.create_task(session.create_program("after", "question -> answer"))
                await wait_until(lambda: service.memory.late, what="its reply on its way")
                service.memory.closing.clear()
                answering, service.memory.answering = service.memory.answering, _passing()
                with store_that_refuses(tmp_path / "store.sqlite", "refused"), pytest.raises(errors.StoreError):
                    await session.create_program("refused", "question -> answer")
                answering.set()
                outcome = (await asyncio.gather(after, return_exceptions=True))[0]
                service.memory.closing.set()
                assert isinstance(outcome, errors.DSPexError), "it was told as done"
                assert await _ids(session) == []

        run(work())

    def test_changes_reach_the_store_in_the_order_of_the_replies(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                asked: list[tuple[str, dict[str, Any]]] = []
                for number in range(40):
                    asked.append(("create_program", {"program_id": f"p{number % 7}", "replace": True}))
                    if number % 5 == 4:
                        asked.append(("delete_program", {"program_id": f"p{number % 3}"}))
                await asyncio.gather(*(session.call(*one) for one in asked))
                async with SQLStore(service.store_url) as store:
                    kept = (await store.get("s")).contents.programs
                held = service.memory.contents("s").programs
                assert list(kept) == list(held)
                assert kept == held

        run(work())

    def test_a_late_replys_changes_are_kept(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                await _leave_before_the_reply(session, service, "create_program", {"program_id": "qa"})
                service.memory.answering.set()
                await wait_until(lambda: not service.memory.late, what="the late reply")
                await session.create_program("next", "question -> answer")
                async with SQLStore(service.store_url) as store:
                    assert list((await store.get("s")).contents.programs) == ["qa", "next"]
                service.memory.lose("s")
                assert await _ids(session) == ["qa", "next"]

        run(work())

    def test_what_a_former_generation_tells_changes_nothing(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                await session.create_program("qa", "question -> answer")
                service.memory.lose("s")
                await session.list_programs()
                service.memory.changed("s", 1, [{"change": "program_deleted", "program_id": "qa"}])
                await session.create_program("next", "question -> answer")
                async with SQLStore(service.store_url) as store:
                    assert list((await store.get("s")).contents.programs) == ["qa", "next"]

        run(work())

    def test_a_kernel_that_tells_nonsense_is_not_believed_and_its_caller_told(self, make):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s")
                tell = service.memory.changed
                service.memory.changed = lambda *about: tell(*about[:2], [{"change": "no_such_change"}])
                with pytest.raises(errors.DSPexError, match="cannot be read"):
                    await session.create_program("qa", "question -> answer")
                service.memory.changed = tell
                assert await _ids(session) == []
                assert (await service.get_session_info("s")).generation == 2

        run(work())

    def test_what_sessions_spent_is_in_the_store_within_a_second(self, make, monkeypatch):
        assert keeper.WRITE_INTERVAL < 1.0
        monkeypatch.setattr(keeper, "WRITE_INTERVAL", 0.01)

        async def work() -> None:
            async with make() as service, SQLStore(service.store_url) as store:
                sessions = [await service.create_session() for _ in range(3)]
                for session in sessions:
                    await session.call("execute_program", {"program_id": "qa"})
                for session in sessions:
                    async with asyncio.timeout(5):
                        while (await store.get(session.session_id)).contents.spent.executions != 1:
                            await asyncio.sleep(0)

        run(work())


async def _ids(session: Any) -> list[str]:
    return [program["program_id"] for program in await session.list_programs()]


def _is_refused(outcome: Any) -> bool:
    return isinstance(outcome, errors.StoreError)


def _passing() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


class TestEnding:
    def test_two_that_destroy_a_session_at_once_both_return_when_it_is_gone(self, make, tmp_path):
        async def work() -> None:
            async with make() as service:
                for _ in range(3):
                    await service.create_session(session_id="s")
                    service.memory.closing.clear()
                    ends = [asyncio.create_task(service.destroy_session("s")) for _ in range(2)]
                    await wait_until(lambda: service._registry.find("s") is None, what="the end's beginning")
                    await asyncio.sleep(0.05)
                    early = [task.done() for task in ends]
                    service.memory.closing.set()
                    await asyncio.gather(*ends)
                    assert early == [False, False], "it returned before its place was closed"
                    assert not (tmp_path / "sessions" / "s").exists()

        run(work())

    def test_a_backend_that_fails_to_stop_keeps_nothing_else_from_stopping(self, make):
        async def work() -> None:
            service = await make().start()
            await service.create_session(session_id="s")
            stop = service.memory.stop

            async def stop_and_fail() -> None:
                await stop()
                raise RuntimeError("it would not stop")

            service.memory.stop = stop_and_fail
            with pytest.raises(RuntimeError, match="would not stop"):
                await service.stop()
            async with make() as service:
                assert await service.get_session("s").list_programs() == []

        run(work())

    def test_a_call_whose_reply_never_comes_does_not_hold_up_the_stop(self, make):
        async def work() -> None:
            service = await make().start()
            session = await service.create_session(session_id="s")
            service.memory.answering.clear()
            call = asyncio.create_task(session.create_program("qa", "question -> answer"))
            await wait_until(lambda: service.memory.late, what="the call")
            await service.stop()
            with pytest.raises(errors.ServiceClosed):
                await call

        run(work())
