"""What the keeper promises: changes in order and whole, what was spent never lost, even where the store is slow."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspex_kernels import errors
from dspex_kernels.kernel.journal import Journal
from dspex_kernels.protocol.records import ProgramPut, ProgramRecord, ProgramSpec, Spent
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions import keeper as keeper_module
from dspex_kernels.sessions.keeper import Keeper
from dspex_kernels.sessions.live import LiveSession
from dspex_kernels.sessions.registry import new_record
from dspex_kernels.sessions.store.sql import SQLStore
from dspex_kernels.sessions.tasks import Tasks
from tests.sessions.memory_backend import store_that_refuses
from tests.waiting import wait_until

LOG = logging.getLogger(__name__)


class Kept:
    """A keeper with its store, and one session of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = SQLStore(f"sqlite:///{path}")
        self.tasks = Tasks(LOG)
        self.keeper = Keeper(self.store, self.tasks, LOG)
        self.keeper.refused = lambda live, why: self.refused.append((live.session_id, why))
        self.refused: list[tuple[str, str]] = []

    async def session(self, session_id: str) -> LiveSession:
        record = new_record(session_id, owner="", backend="pooled", directory=None)
        await self.store.create(record)
        live = LiveSession.of(record)
        live.held = True
        live.become(SessionStatus.STARTING)
        live.become(SessionStatus.READY)
        return live

    async def settle(self, live: LiveSession) -> None:
        await self.keeper.settle(live, live.record.generation)

    async def spent(self, session_id: str) -> Spent:
        return (await self.store.get(session_id)).contents.spent

    async def programs(self, session_id: str) -> list[str]:
        return list((await self.store.get(session_id)).contents.programs)

    @contextlib.contextmanager
    def store_is_busy(self) -> Iterator[None]:
        """Another process writes: whoever wants to write waits for it."""
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            yield
            database.execute("ROLLBACK")


@contextlib.asynccontextmanager
async def kept(tmp_path: Path) -> AsyncIterator[Kept]:
    held = Kept(tmp_path / "store.sqlite")
    async with held.store:
        yield held
        if running := held.tasks.running:
            await asyncio.wait(running)


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work

    asyncio.run(bounded())


def put(program_id: str, version: int = 1) -> dict[str, Any]:
    record = ProgramRecord(program_id=program_id, version=version, spec=ProgramSpec())
    return ProgramPut(record=record).model_dump(mode="json")


def spent(executions: int) -> dict[str, Any]:
    return Spent(executions=executions).model_dump(mode="json")


def test_settling_waits_for_what_was_told_before_and_sessions_do_not_wait_for_each_other(tmp_path):
    async def work() -> None:
        async with kept(tmp_path) as held:
            one, other = await held.session("one"), await held.session("other")
            await held.settle(other)
            with held.store_is_busy():
                held.keeper.take(one, [put("a")])
                settling = asyncio.create_task(held.settle(one))
                await held.settle(other)
                await asyncio.sleep(0)
                assert not settling.done()
            await settling
            assert await held.programs("one") == ["a"]

    run(work())


def test_what_is_told_while_a_write_runs_goes_with_the_next_in_order(tmp_path):
    async def work() -> None:
        async with kept(tmp_path) as held:
            live = await held.session("s")
            writes: list[list[str]] = []
            save = held.store.save_changes

            async def counted(session_id: str, changes: Any, *offset: Any) -> None:
                writes.append([change.record.program_id for change in changes])
                await save(session_id, changes, *offset)

            held.store.save_changes = counted
            with held.store_is_busy():
                held.keeper.take(live, [put("a"), put("b")])
                await asyncio.sleep(0)
                for name in "cdef":
                    held.keeper.take(live, [put(name)])
            await held.settle(live)
            assert await held.programs("s") == list("abcdef")
            assert writes == [["a", "b"], ["c", "d", "e", "f"]]

    run(work())


def test_a_refusal_is_told_to_each_that_waits_and_once_to_who_closes_the_place(tmp_path):
    async def work() -> None:
        async with kept(tmp_path) as held:
            live = await held.session("s")
            with store_that_refuses(held.path, "refused"):
                held.keeper.take(live, [put("a"), put("refused")])
                waiting = [asyncio.create_task(held.settle(live)) for _ in range(3)]
                await asyncio.sleep(0)
                held.keeper.take(live, [put("later")])
                waiting.append(asyncio.create_task(held.settle(live)))
                outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [errors.StoreError] * 4
            assert len({id(outcome) for outcome in outcomes}) == 4, "a shared exception gathers their tracebacks"
            assert [session_id for session_id, _ in held.refused] == ["s"]
            assert await held.programs("s") == []

    run(work())


def test_a_caller_who_asks_only_after_the_refusal_is_told_too(tmp_path):
    """Between a reply and its settling others may be awaited: a key is sealed then."""

    async def work() -> None:
        async with kept(tmp_path) as held:
            live = await held.session("s")
            with store_that_refuses(held.path, "refused"):
                held.keeper.take(live, [put("refused")])
                await wait_until(lambda: held.refused, what="the refusal")
            with pytest.raises(errors.StoreError, match="the disk is full"):
                await held.settle(live)

    run(work())


def test_what_was_spent_is_written_again_and_again_and_once_more_at_the_end(tmp_path, monkeypatch):
    assert keeper_module.WRITE_INTERVAL < 1.0, "the promise is a second"
    monkeypatch.setattr(keeper_module, "WRITE_INTERVAL", 0.01)

    async def work() -> None:
        async with kept(tmp_path) as held:
            live = await held.session("s")
            held.keeper.start()
            for executions in (1, 2):
                held.keeper.take(live, [spent(executions)])
                async with asyncio.timeout(10):
                    while (await held.spent("s")).executions != executions:
                        await asyncio.sleep(0)
            held.keeper.take(live, [spent(3)])
            await held.keeper.stop()
            assert (await held.spent("s")).executions == 3

    run(work())


def test_what_was_being_written_when_the_keeper_stops_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(keeper_module, "WRITE_INTERVAL", 0.01)

    async def work() -> None:
        async with kept(tmp_path) as held:
            live = await held.session("s")
            held.keeper.start()
            begun = asyncio.Event()
            save = held.store.save_changes

            async def noted(*args: Any) -> None:
                begun.set()
                await save(*args)

            held.store.save_changes = noted
            with held.store_is_busy():
                held.keeper.take(live, [spent(1)])
                await begun.wait()
                stopping = asyncio.create_task(held.keeper.stop())
                for _ in range(10):
                    await asyncio.sleep(0)
            await stopping
            assert (await held.spent("s")).executions == 1

    run(work())


def test_what_was_spent_and_refused_is_written_when_the_store_takes_it_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(keeper_module, "WRITE_INTERVAL", 0.01)

    async def work() -> None:
        async with kept(tmp_path) as held:
            live = await held.session("s")
            with contextlib.closing(sqlite3.connect(held.path)) as database:
                database.execute("ALTER TABLE dspex_sessions RENAME TO away")
                held.keeper.start()
                held.keeper.take(live, [spent(1)])
                await wait_until(lambda: "what it spent could not be kept" in caplog.text, what="the warning")
                database.execute("ALTER TABLE away RENAME TO dspex_sessions")
            await held.keeper.stop()
            assert (await held.spent("s")).executions == 1

    run(work())


def test_a_session_that_ended_is_written_no_more(tmp_path, caplog):
    async def work() -> None:
        async with kept(tmp_path) as held:
            live = await held.session("s")
            held.keeper.take(live, [spent(1)])
            live.become(SessionStatus.DESTROYED)
            held.keeper.forget(live)
            await held.store.delete("s")
            await held.keeper.flush(live)
            await held.keeper.stop()
            assert "could not be kept" not in caplog.text

    run(work())


def test_activity_moves_forward_in_memory_at_once_and_in_the_store_now_and_then(tmp_path, monkeypatch):
    async def work() -> None:
        async with kept(tmp_path) as held:
            live = await held.session("s")
            began = live.last_activity
            monkeypatch.setattr(keeper_module, "TOUCH_INTERVAL", 0.0)
            held.keeper.touch(live)
            assert live.last_activity > began
            first = live.last_activity
            await asyncio.wait(held.tasks.running)
            monkeypatch.setattr(keeper_module, "TOUCH_INTERVAL", 3600.0)
            held.keeper.touch(live)
            assert held.tasks.running == set(), "a read need not cost a write each"
            assert (await held.store.get("s")).last_activity == first
            await held.keeper.save_activity(live)
            assert (await held.store.get("s")).last_activity == live.last_activity

    run(work())


class Journaled:
    """A session with a journal, of a keeper whose store can be made to fail."""

    def __init__(self, held: Kept, directory: Path) -> None:
        self.held = held
        self.directory = directory
        self.journal, _ = Journal.open(directory)
        self.save = held.store.save_changes

    async def live(self) -> LiveSession:
        record = new_record("s", owner="", backend="dedicated", directory=self.directory)
        await self.held.store.create(record)
        live = LiveSession.of(record)
        live.held = True
        live.become(SessionStatus.STARTING)
        live.become(SessionStatus.READY)
        return live

    def write(self, program_id: str) -> None:
        record = ProgramRecord(program_id=program_id, version=1, spec=ProgramSpec())
        self.journal.append(ProgramPut(record=record))


@pytest.mark.parametrize("failure", [errors.StoreError("it is full"), asyncio.CancelledError()])
def test_what_the_store_did_not_take_of_a_journal_it_is_told_again_in_order(tmp_path, monkeypatch, failure):
    async def work() -> None:
        async with kept(tmp_path) as held:
            session = Journaled(held, tmp_path / "s")
            live = await session.live()

            async def fails(*_: Any) -> None:
                raise failure

            monkeypatch.setattr(held.store, "save_changes", fails)
            session.write("a")
            if isinstance(failure, errors.StoreError):
                await held.keeper.fold(live)
            else:
                with pytest.raises(asyncio.CancelledError):
                    await held.keeper.fold(live)
            assert list(live.programs) == ["a"], "the service knows it all the same"
            monkeypatch.setattr(held.store, "save_changes", session.save)
            session.write("b")
            await held.keeper.fold(live)
            assert await held.programs("s") == ["a", "b"]
            session.journal.close()

    run(work())


def test_settling_a_journals_change_does_not_wait_for_the_store_and_draining_does(tmp_path):
    async def work() -> None:
        async with kept(tmp_path) as held:
            session = Journaled(held, tmp_path / "s")
            live = await session.live()
            with held.store_is_busy():
                for program_id in ("a", "b"):
                    session.write(program_id)
                    await held.settle(live)
                assert list(live.programs) == ["a", "b"]
                draining = asyncio.create_task(held.keeper.drain(live))
                await asyncio.sleep(0)
                assert not draining.done()
            await draining
            assert await held.programs("s") == ["a", "b"]
            session.journal.close()

    run(work())
