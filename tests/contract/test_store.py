"""What every session store promises, asked of each implementation."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa

from dspex_kernels import errors
from dspex_kernels.kernel.journal import Journal
from dspex_kernels.protocol import journal, limits
from dspex_kernels.protocol.names import new_session_id
from dspex_kernels.protocol.records import (
    Budget,
    Change,
    LMProfile,
    ProgramDeleted,
    ProgramPut,
    ProgramRecord,
    ProgramSpec,
    SessionContents,
    SessionReset,
    SessionSettings,
    SettingsChanged,
    Spent,
)
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions.model import SessionRecord
from dspex_kernels.sessions.store import SessionStore, default_store_url, sql
from dspex_kernels.sessions.store.sql import SQLStore

T0 = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

OpenStore = Callable[[], "contextlib.AbstractAsyncContextManager[SessionStore]"]


@pytest.fixture(params=["sqlite-file", "sqlite-memory"])  # PostgreSQL: a further name and its URL below
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {"sqlite-file": f"sqlite:///{tmp_path}/store/sessions.sqlite", "sqlite-memory": "sqlite://"}[
        request.param
    ]


@pytest.fixture(params=["sqlite-file"])
def shared_url(tmp_path: Path) -> str:
    """A database that several stores can open."""
    return f"sqlite:///{tmp_path}/store/sessions.sqlite"


def _record(session_id: str | None = None, owner: str = "alice", age: int = 0, **more: object) -> SessionRecord:
    moment = T0 + timedelta(seconds=age)
    values = {"session_id": session_id or new_session_id(), "owner": owner, "backend": "dedicated"}
    return SessionRecord.model_validate({**values, "created_at": moment, "last_activity": moment, **more})


def _put(program_id: str = "qa_bot", version: int = 1, text: str = "Grüße ☃ \u2028\0'") -> ProgramPut:
    spec = ProgramSpec(module_args={"z": 1, "a": [None, 1.5, {"b": text}]})
    return ProgramPut(record=ProgramRecord(program_id=program_id, version=version, spec=spec, state={"demos": []}))


SETTINGS = SettingsChanged(settings=SessionSettings(lm=LMProfile(model="offline/echo"), budget=Budget(usd=1.5)))
CHANGES: list[Change] = [
    _put(),
    SETTINGS,
    _put(version=2),
    _put("other"),
    Spent(lm_calls=3, tokens=70, usd=0.25),
    ProgramDeleted(program_id="other"),
]


@asynccontextmanager
async def _store_with_session(url: str, **values: object) -> AsyncIterator[tuple[SQLStore, SessionRecord]]:
    async with SQLStore(url) as store:
        record = _record(**values)  # type: ignore[arg-type]  # fields of the record
        await store.create(record)
        yield store, record


# Sessions


def test_a_session_reads_back_as_it_was_created(store_url: str) -> None:
    contents = SessionContents()
    for change in CHANGES:
        contents.apply(change)
    record = _record(
        "named-session_1.x",
        owner="Zoë 'O\"Brien",
        status=SessionStatus.HIBERNATED,
        generation=3,
        directory="/some where/else",
        journal_offset=1_790_000_000_000_000_000,
        contents=contents,
    )

    async def main() -> None:
        async with SQLStore(store_url) as store:
            await store.create(record)
            assert await store.get(record.session_id) == record

    asyncio.run(main())


def test_times_come_back_in_utc_whatever_zone_they_came_in(store_url: str) -> None:
    here = T0.astimezone(timezone(timedelta(hours=-7)))

    async def main() -> None:
        async with _store_with_session(store_url, created_at=here) as (store, record):
            kept = await store.get(record.session_id)
            assert kept.created_at == T0
            assert kept.created_at.tzinfo == UTC

    asyncio.run(main())


def test_an_id_is_given_once_whoever_asks(store_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url, session_id="mine") as (store, record):
            with pytest.raises(errors.SessionExists, match="'mine'"):
                await store.create(_record("mine", owner="bob"))
            assert await store.get("mine") == record

    asyncio.run(main())


def test_of_many_that_create_one_id_at_once_one_succeeds(store_url: str) -> None:
    async def main() -> None:
        async with SQLStore(store_url) as store:
            tries = [store.create(_record("wanted", owner=f"owner{n}")) for n in range(20)]
            outcomes = await asyncio.gather(*tries, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes].count(type(None)) == 1
            assert [type(outcome) for outcome in outcomes].count(errors.SessionExists) == 19

    asyncio.run(main())


def test_an_unknown_session_is_named_by_every_method(store_url: str) -> None:
    async def main() -> None:
        async with SQLStore(store_url) as store:
            for call in (
                store.get("nobody"),
                store.save_changes("nobody", CHANGES),
                store.touch("nobody", T0),
                store.set_generation("nobody", 1),
                store.set_status("nobody", SessionStatus.READY),
                store.set_backend("nobody", "pooled", None),
            ):
                with pytest.raises(errors.SessionNotFound, match="'nobody'"):
                    await call

    asyncio.run(main())


def test_deleting_a_session_takes_its_programs_and_no_others(store_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url, session_id="gone") as (store, _):
            await store.create(_record("stays"))
            for session_id in ("gone", "stays"):
                await store.save_changes(session_id, CHANGES)

            assert await store.delete("gone") is True
            assert await store.delete("gone") is False

            with pytest.raises(errors.SessionNotFound):
                await store.get("gone")
            assert list((await store.get("stays")).contents.programs) == ["qa_bot"]
            await store.create(_record("gone"))
            assert (await store.get("gone")).contents == SessionContents()

    asyncio.run(main())


def test_counting_and_listing_know_owners(store_url: str) -> None:
    async def main() -> None:
        async with SQLStore(store_url) as store:
            for n in range(5):
                await store.create(_record(f"s{n}", owner="alice" if n % 2 else "bob", age=-n))

            assert (await store.count(), await store.count("bob"), await store.count("carol")) == (5, 3, 0)
            everybody, bobs = await store.list(), await store.list("bob")
            assert [record.session_id for record in everybody.records] == ["s4", "s3", "s2", "s1", "s0"]
            assert [record.session_id for record in bobs.records] == ["s4", "s2", "s0"]
            assert everybody.next_cursor is None
            assert await store.list("carol") == type(bobs)((), None)

    asyncio.run(main())


def test_pages_tell_each_session_once_though_others_come_and_go(store_url: str) -> None:
    async def main() -> None:
        async with SQLStore(store_url) as store:
            for n in range(7):  # two of each age: the cursor must not stand between equals
                await store.create(_record(f"s{n}", age=n // 2))
            told: list[str] = []
            page = await store.list(limit=2)
            told += [record.session_id for record in page.records]
            await store.delete("s1")  # where the cursor stands
            await store.create(_record("late", age=100))
            while page.next_cursor is not None:
                page = await store.list(limit=2, after=page.next_cursor)
                told += [record.session_id for record in page.records]
            assert told == ["s0", "s1", "s2", "s3", "s4", "s5", "s6", "late"]

    asyncio.run(main())


def test_a_page_carries_what_its_sessions_hold(store_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url) as (store, record):
            await store.create(_record(age=1))
            await store.save_changes(record.session_id, CHANGES)
            first, second = (await store.list()).records
            assert first == await store.get(record.session_id)
            assert second.contents == SessionContents()

    asyncio.run(main())


@pytest.mark.parametrize(("limit", "after"), [(0, None), (1001, None), (10, "no cursor")])
def test_a_page_that_makes_no_sense_is_refused(store_url: str, limit: int, after: str | None) -> None:
    async def main() -> None:
        async with SQLStore(store_url) as store:
            with pytest.raises(errors.InvalidArguments):
                await store.list(limit=limit, after=after)

    asyncio.run(main())


# Changes


def test_saved_changes_are_what_their_fold_says(store_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url) as (store, record):
            expected = SessionContents()
            for change in [*CHANGES, SessionReset(), _put("again"), Spent(tokens=80)]:
                await store.save_changes(record.session_id, [change])
                expected.apply(change)
                assert (await store.get(record.session_id)).contents == expected

    asyncio.run(main())


def test_changes_saved_together_equal_changes_saved_one_by_one(store_url: str) -> None:
    changes = [*CHANGES, SessionReset(), _put("again"), _put("again"), _put("again", 2)]

    async def main() -> None:
        async with _store_with_session(store_url, session_id="together") as (store, _):
            await store.create(_record("apart"))
            await store.save_changes("together", changes)
            for change in changes:
                await store.save_changes("apart", [change])
            assert (await store.get("together")).contents == (await store.get("apart")).contents

    asyncio.run(main())


def test_a_record_keeps_the_order_of_its_keys(store_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url) as (store, record):
            await store.save_changes(record.session_id, [_put()])
            (kept,) = (await store.get(record.session_id)).contents.programs["qa_bot"]
            assert list(kept.spec.module_args) == ["z", "a"]

    asyncio.run(main())


def test_only_the_newest_versions_of_a_program_are_kept(store_url: str) -> None:
    newest = limits.MAX_VERSIONS_KEPT + 7

    async def main() -> None:
        async with _store_with_session(store_url) as (store, record):
            await store.save_changes(record.session_id, [_put(version=n) for n in range(1, newest)])
            await store.save_changes(record.session_id, [_put("other"), _put(version=newest)])
            programs = (await store.get(record.session_id)).contents.programs
            assert [kept.version for kept in programs["qa_bot"]] == list(range(8, newest + 1))
            assert [kept.version for kept in programs["other"]] == [1]

    asyncio.run(main())


def test_two_sessions_may_hold_programs_of_one_id(store_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url, session_id="alices") as (store, _):
            await store.create(_record("bobs", owner="bob"))
            await store.save_changes("alices", [_put(text="alice")])
            await store.save_changes("bobs", [_put(text="bob")])
            await store.save_changes("alices", [ProgramDeleted(program_id="qa_bot")])
            assert (await store.get("alices")).contents.programs == {}
            assert (await store.get("bobs")).contents.programs == {"qa_bot": [_put(text="bob").record]}

    asyncio.run(main())


def test_changes_that_fail_in_the_middle_leave_nothing(store_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url, journal_offset=5) as (store, record):
            with pytest.raises(errors.InvalidRecord, match="cannot be written as JSON"):
                await store.save_changes(record.session_id, [_put(), SETTINGS, _put("bad", text="\ud800")], 10)
            assert await store.get(record.session_id) == record

    asyncio.run(main())


def test_the_journal_offset_moves_with_the_changes_and_stays_without_one(store_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url) as (store, record):
            offsets = []
            for changes, offset in ((CHANGES, 120), ([_put()], None), ([], 130)):
                await store.save_changes(record.session_id, changes, offset)
                offsets.append((await store.get(record.session_id)).journal_offset)
            assert offsets == [120, 120, 130]

    asyncio.run(main())


def test_a_journal_folded_in_twice_changes_nothing(store_url: str) -> None:
    lines = b"".join(journal.encode(n, T0, change) for n, change in enumerate(CHANGES, start=1))
    new = journal.unread(journal.encode_header(0) + lines, None)

    async def main() -> None:
        async with _store_with_session(store_url) as (store, record):
            for _ in range(2):
                await store.save_changes(record.session_id, new.changes, new.offset)
            kept = await store.get(record.session_id)
            assert kept.contents == journal.fold(journal.decode(lines)[0])
            assert kept.journal_offset == new.offset

    asyncio.run(main())


def test_a_key_given_directly_is_not_in_the_database(tmp_path: Path) -> None:
    lm = LMProfile.model_validate({"model": "openai/x", "api_key": "sk-canary", "key_given": True})
    settings = SessionSettings(lm=lm)

    async def main() -> None:
        url = f"sqlite:///{tmp_path}/sessions.sqlite"
        async with _store_with_session(url, contents=SessionContents(settings=settings)) as (store, record):
            await store.save_changes(record.session_id, [SettingsChanged(settings=settings)])
            files = list(tmp_path.iterdir())
            assert len(files) == 3  # the database, its write-ahead log, its shared memory
            assert any(b"openai/x" in file.read_bytes() for file in files)
            assert not any(b"sk-canary" in file.read_bytes() for file in files)

    asyncio.run(main())


def test_the_last_activity_only_moves_forward(store_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url) as (store, record):
            later = T0 + timedelta(microseconds=1)
            await store.touch(record.session_id, later)
            await store.touch(record.session_id, T0 - timedelta(days=1))
            assert (await store.get(record.session_id)).last_activity == later
            with pytest.raises(errors.InvalidArguments, match="time zone"):
                await store.touch(record.session_id, T0.replace(tzinfo=None))

    asyncio.run(main())


def test_generation_status_and_backend_are_kept(store_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url, directory="/a", journal_offset=9) as (store, record):
            await store.set_generation(record.session_id, 4)
            await store.set_status(record.session_id, SessionStatus.FAILED)
            kept = await store.get(record.session_id)
            assert (kept.generation, kept.status, kept.journal_offset) == (4, SessionStatus.FAILED, 9)
            await store.set_backend(record.session_id, "pooled", None)
            kept = await store.get(record.session_id)
            assert (kept.backend, kept.directory, kept.journal_offset) == ("pooled", None, None)

    asyncio.run(main())


# Together


def test_fifty_tasks_at_once_lose_nothing(store_url: str) -> None:
    async def one(store: SessionStore, n: int) -> None:
        session_id = f"s{n % 10}"
        for version in range(1, 6):
            await store.save_changes(session_id, [_put(f"p{n}", version), Spent(tokens=version)])
            assert (await store.get(session_id)).contents.programs[f"p{n}"][-1].version == version

    async def main() -> None:
        async with SQLStore(store_url) as store:
            for n in range(10):
                await store.create(_record(f"s{n}"))
            await asyncio.gather(*(one(store, n) for n in range(50)))
            for record in (await store.list()).records:
                counts = {name: len(kept) for name, kept in record.contents.programs.items()}
                assert counts == {f"p{n}": 5 for n in range(50) if f"s{n % 10}" == record.session_id}

    asyncio.run(main())


def test_two_stores_on_one_database_see_each_others_changes(shared_url: str) -> None:
    async def main() -> None:
        async with SQLStore(shared_url) as one, SQLStore(shared_url) as two:
            await one.create(_record("shared"))
            await two.save_changes("shared", [_put()])
            await one.save_changes("shared", [_put(version=2)])
            assert await one.get("shared") == await two.get("shared")
            assert len((await one.get("shared")).contents.programs["qa_bot"]) == 2
            with pytest.raises(errors.SessionExists):
                await two.create(_record("shared"))
            await two.delete("shared")
            assert await one.count() == 0

    asyncio.run(main())


def test_many_stores_that_open_a_new_database_at_once_and_write_all_succeed(shared_url: str) -> None:
    async def one(n: int) -> None:
        async with SQLStore(shared_url) as store:
            await store.create(_record(f"s{n}"))
            for version in range(1, 6):
                await store.save_changes(f"s{n}", [_put(version=version)])

    async def main() -> None:
        await asyncio.gather(*(one(n) for n in range(8)))
        async with SQLStore(shared_url) as store:
            records = (await store.list()).records
            assert sorted(record.session_id for record in records) == [f"s{n}" for n in range(8)]
            assert all(len(record.contents.programs["qa_bot"]) == 5 for record in records)

    asyncio.run(main())


def test_what_one_store_wrote_is_there_when_another_opens_the_database(shared_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(shared_url) as (store, record):
            await store.save_changes(record.session_id, CHANGES)
            before = await store.get(record.session_id)
        async with SQLStore(shared_url) as store:
            assert await store.get(record.session_id) == before

    asyncio.run(main())


_WRITER = """
import asyncio, sys
from dspex_kernels.protocol.records import ProgramPut, ProgramRecord, ProgramSpec, Spent
from dspex_kernels.sessions.store.sql import SQLStore

async def main():
    async with SQLStore(sys.argv[1]) as store:
        version = (await store.get("s")).contents.spent.tokens
        while True:
            version += 1
            record = ProgramRecord(program_id="p", version=version, spec=ProgramSpec())
            await store.save_changes("s", [ProgramPut(record=record), Spent(tokens=version)], version)
            print(version, flush=True)

asyncio.run(main())
"""


def test_whatever_was_acknowledged_before_a_sigkill_is_there_after_it(shared_url: str) -> None:
    async def kept() -> SessionRecord:
        async with SQLStore(shared_url) as store:
            return await store.get("s")

    async def create() -> None:
        async with SQLStore(shared_url) as store:
            await store.create(_record("s"))

    asyncio.run(create())
    acknowledged = 0
    for kill_after in (1, 25):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, shared_url], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        with writer, writer.stdout as printed:
            for _ in range(kill_after):
                acknowledged = int(printed.readline())
            writer.send_signal(signal.SIGKILL)
            acknowledged = max([acknowledged, *map(int, printed.read().split())])

        record = asyncio.run(kept())

        version = record.contents.programs["p"][-1].version
        assert version in (acknowledged, acknowledged + 1)
        assert (record.contents.spent.tokens, record.journal_offset) == (version, version)


# The event loop, opening and closing


def test_a_database_that_is_locked_does_not_hold_up_the_event_loop(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite"

    async def main() -> None:
        async with _store_with_session(f"sqlite:///{path}") as (store, record):
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                saving = asyncio.ensure_future(store.save_changes(record.session_id, [_put()]))
                turns = 0
                while turns < 1000:
                    await asyncio.sleep(0)
                    turns += 1
                assert not saving.done()
                other.execute("COMMIT")
            await asyncio.wait_for(saving, 10)
            assert "qa_bot" in (await store.get(record.session_id)).contents.programs

    asyncio.run(main())


def test_a_database_locked_for_too_long_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql, "BUSY_TIMEOUT", 0.05)
    path = tmp_path / "sessions.sqlite"

    async def main() -> None:
        async with _store_with_session(f"sqlite:///{path}") as (store, record):
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                with pytest.raises(errors.StoreError, match="database is locked") as caught:
                    await store.save_changes(record.session_id, [_put()])
                assert "\n" not in caught.value.message
                assert (await store.get(record.session_id)) == record  # readers do not wait for writers
                other.execute("COMMIT")
            await store.save_changes(record.session_id, [_put()])

    asyncio.run(main())


def test_a_store_that_does_not_answer_is_not_waited_for_longer_than_told(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go_on = threading.Event(), threading.Event()

    def block() -> None:
        started.set()
        go_on.wait(10)

    async def main() -> None:
        async with SQLStore(store_url) as store:
            slow = asyncio.ensure_future(store._run(block))
            await asyncio.to_thread(started.wait, 10)
            with monkeypatch.context() as short:
                short.setattr(sql, "CALL_TIMEOUT", 0.05)
                with pytest.raises(errors.StoreError, match=r"did not answer within 0.05 s"):
                    await store.count()
            assert not slow.done()
            go_on.set()
            await slow
            assert await store.count() == 0

    asyncio.run(main())


def test_a_call_that_is_cancelled_leaves_the_store_in_order(store_url: str) -> None:
    started, go_on = threading.Event(), threading.Event()

    def block() -> None:
        started.set()
        go_on.wait(10)

    async def main() -> None:
        async with _store_with_session(store_url) as (store, record):
            busy = asyncio.ensure_future(store._run(block))
            dropped = asyncio.ensure_future(store.save_changes(record.session_id, [_put("dropped")]))
            await asyncio.to_thread(started.wait, 10)
            dropped.cancel()
            busy.cancel()
            await asyncio.gather(dropped, busy, return_exceptions=True)
            go_on.set()
            await store.save_changes(record.session_id, [_put("kept")])
            assert list((await store.get(record.session_id)).contents.programs) == ["kept"]

    asyncio.run(main())


def test_more_callers_than_may_wait_are_refused(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "MAX_WAITING", 3)

    async def main() -> None:
        async with SQLStore(store_url) as store:
            outcomes = await asyncio.gather(*(store.count() for _ in range(5)), return_exceptions=True)
            assert outcomes[:3] == [0, 0, 0]
            assert all(isinstance(o, errors.StoreError) and "3 calls waiting" in o.message for o in outcomes[3:])
            assert await store.count() == 0

    asyncio.run(main())


def test_a_store_that_is_not_open_says_so(store_url: str) -> None:
    async def main() -> None:
        store = SQLStore(store_url)
        with pytest.raises(errors.StoreError, match="is not open"):
            await store.count()
        await store.open()
        with pytest.raises(errors.StoreError, match="is open already"):
            await store.open()
        await store.close()
        await store.close()
        with pytest.raises(errors.StoreError, match="is not open"):
            await store.count()

    asyncio.run(main())


def test_what_was_asked_before_close_is_done(store_url: str) -> None:
    async def main() -> None:
        store = SQLStore(store_url)
        await store.open()
        asked = [asyncio.ensure_future(store.create(_record(f"s{n}"))) for n in range(20)]
        await asyncio.sleep(0)
        await store.close()
        await asyncio.gather(*asked)

    asyncio.run(main())


# What is particular to SQLite, and to SQL


def test_the_database_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "dspex" / "sessions.sqlite"

    async def main() -> None:
        old = os.umask(0)
        try:
            async with _store_with_session(f"sqlite:///{path}"):
                modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
        finally:
            os.umask(old)
        assert modes == {f"sessions.sqlite{suffix}": 0o600 for suffix in ("", "-wal", "-shm")}
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

    asyncio.run(main())


def test_sqlite_is_set_so_that_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    async def main() -> None:
        async with SQLStore(f"sqlite:///{tmp_path}/sessions.sqlite") as store:

            def pragmas(connection: sa.Connection) -> list[object]:
                names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
                return [connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in names]

            assert await store._read(pragmas) == ["wal", 2, 1, 10_000]  # synchronous: 2 is FULL

    asyncio.run(main())


def test_a_newer_database_is_refused_and_left_alone(shared_url: str) -> None:
    async def set_version(version: int) -> None:
        async with SQLStore(shared_url) as store:
            await store._write(lambda connection: connection.execute(sql.SCHEMA.update().values(version=version)))

    async def main() -> None:
        await set_version(len(sql.MIGRATIONS) + 41)
        with pytest.raises(errors.StoreError, match=r"schema version 42.*knows 1.*use the newer"):
            await SQLStore(shared_url).open()

    asyncio.run(main())


def test_an_older_database_is_brought_up_to_this_version(shared_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def add_a_column(connection: sa.Connection) -> None:
        connection.exec_driver_sql("ALTER TABLE dspex_sessions ADD COLUMN note TEXT")

    async def columns(store: SQLStore) -> set[str]:
        def names(connection: sa.Connection) -> set[str]:
            return {column["name"] for column in sa.inspect(connection).get_columns("dspex_sessions")}

        return await store._read(names)

    async def main() -> None:
        async with _store_with_session(shared_url) as (store, record):
            assert "note" not in await columns(store)
        monkeypatch.setattr(sql, "MIGRATIONS", (*sql.MIGRATIONS, add_a_column))
        for _ in range(2):
            async with SQLStore(shared_url) as store:
                assert "note" in await columns(store)
                assert await store.get(record.session_id) == record

    asyncio.run(main())


def test_a_migration_that_fails_leaves_the_database_as_it_was(
    shared_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(connection: sa.Connection) -> None:
        connection.exec_driver_sql("ALTER TABLE dspex_sessions ADD COLUMN half TEXT")
        connection.exec_driver_sql("ALTER TABLE no_such_table ADD COLUMN half TEXT")

    async def main() -> None:
        async with _store_with_session(shared_url) as (_, record):
            pass
        with monkeypatch.context() as newer:
            newer.setattr(sql, "MIGRATIONS", (*sql.MIGRATIONS, fail))
            with pytest.raises(errors.StoreError, match="no_such_table"):
                await SQLStore(shared_url).open()
        async with SQLStore(shared_url) as store:
            assert await store.get(record.session_id) == record

    asyncio.run(main())


def test_the_tables_of_the_migrations_are_those_of_the_queries(store_url: str) -> None:
    async def main() -> None:
        async with SQLStore(store_url) as store:

            def compare(connection: sa.Connection) -> None:
                found = sa.inspect(connection)
                assert set(found.get_table_names()) == set(sql.METADATA.tables)
                for name, table in sql.METADATA.tables.items():
                    assert [c["name"] for c in found.get_columns(name)] == table.columns.keys()
                    keys = found.get_pk_constraint(name)["constrained_columns"]
                    assert keys == table.primary_key.columns.keys()

            await store._read(compare)

    asyncio.run(main())


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite"
    path.write_text("this is not a database, but long enough to be looked at" * 20)

    async def main() -> None:
        with pytest.raises(errors.StoreError, match=r"sessions\.sqlite.*not a database"):
            await SQLStore(f"sqlite:///{path}").open()

    asyncio.run(main())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    async def main() -> None:
        with pytest.raises(errors.StoreError, match=r"file/sessions\.sqlite"):
            await SQLStore(f"sqlite:///{tmp_path}/file/sessions.sqlite").open()

    asyncio.run(main())


def test_a_password_in_the_url_is_never_told() -> None:
    async def main() -> None:
        with pytest.raises(errors.DSPexError) as caught:
            await SQLStore("postgresql+nosuchdriver://alice:canary@127.0.0.1:9/x").open()
        assert isinstance(caught.value, (errors.StoreError, errors.DependencyMissing))
        assert "canary" not in str(caught.value)
        with pytest.raises(errors.StoreError, match="cannot be read") as unread:
            SQLStore("canary no url")
        assert "canary" not in str(unread.value)

    asyncio.run(main())


def test_the_default_store_is_in_the_jupyter_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))

    assert default_store_url() == f"sqlite:///{tmp_path}/dspex/sessions.sqlite"


@pytest.mark.parametrize("statement", ["upsert", "page"])
def test_the_queries_are_written_for_postgresql_too(statement: str) -> None:
    from sqlalchemy.dialects import postgresql

    queries = {
        "upsert": sa.select(sql.SESSIONS.c.session_id).with_for_update(),
        "page": sa.select(sql.SESSIONS).where(
            sa.tuple_(sql.SESSIONS.c.created_at, sql.SESSIONS.c.session_id) > ("a", "b")
        ),
    }
    compiled = str(queries[statement].compile(dialect=postgresql.dialect()))  # type: ignore[no-untyped-call]  # untyped there
    assert {"upsert": "FOR UPDATE", "page": "(dspex_sessions.created_at, dspex_sessions.session_id) >"}[
        statement
    ] in compiled


def test_a_value_that_fits_no_column_is_refused_and_the_store_goes_on(store_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url) as (store, record):
            for call in (
                store.get("\ud800"),
                store.list(owner="\ud800"),
                store.list(after="\ud800~x"),
                store.delete("\ud800"),
                store.set_generation(record.session_id, 2**63),
                store.save_changes(record.session_id, CHANGES, 2**63),
            ):
                with pytest.raises(errors.InvalidArguments, match="cannot hold"):
                    await call
            assert await store.get(record.session_id) == record

    asyncio.run(main())


def test_what_was_spent_is_a_number_that_can_be_read_again() -> None:
    """JSON has no infinity: written as null it made the session unreadable for ever."""
    for usd in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="usd"):
            Spent(usd=usd)
        with pytest.raises(ValueError, match="usd"):
            Budget(usd=usd)


@pytest.mark.parametrize("seed", range(5))
def test_a_random_history_folds_alike_in_the_kernel_its_journal_and_the_store(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    latest: dict[str, int] = {}

    def change() -> Change:
        program = f"p{chance.randrange(4)}"
        match chance.choices(["put", "delete", "settings", "spent", "reset"], [60, 5, 4, 10, 1])[0]:
            case "put":
                latest[program] = latest.get(program, 0) + 1
                return _put(program, latest[program], text=chance.choice(["a", "ü\u2028", "\0", "\U0001f600"]))
            case "delete":
                latest.pop(program, None)
                return ProgramDeleted(program_id=program)
            case "settings":
                return SettingsChanged(settings=SessionSettings(budget=Budget(tokens=chance.randrange(9))))
            case "spent":
                return Spent(tokens=chance.randrange(99), usd=chance.random())
        latest.clear()
        return SessionReset()

    async def main() -> None:
        contents = SessionContents()
        async with _store_with_session(f"sqlite:///{tmp_path}/s.sqlite") as (store, record):
            offset = None
            for _ in range(12):
                kernel, before = Journal.open(tmp_path)
                assert before == contents
                for _ in range(chance.randrange(40)):
                    made = change()
                    kernel.append(made)
                    contents.apply(made)
                    if chance.random() < 0.02:
                        kernel.compact()
                kernel.close()
                with kernel.path.open("ab") as file:  # a write that a kill -9 cut off
                    file.write(b'{"check":"'[: chance.randrange(10)])
                data = kernel.path.read_bytes()
                if chance.random() < 0.6:  # else the service was away
                    read = journal.unread(data, offset)
                    await store.save_changes(record.session_id, read.changes, read.offset)
                    offset = read.offset
                    assert (await store.get(record.session_id)).contents == contents
                assert journal.fold(journal.decode(data)[0]) == contents

    asyncio.run(main())
