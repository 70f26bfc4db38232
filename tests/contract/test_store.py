"""What every session store promises, asked of each implementation."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

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
from dspex_kernels.sessions.store import (
    ServiceRecord,
    SessionBrief,
    SessionStore,
    database,
    default_store_url,
    schema,
    sql_library,
    turns,
)
from dspex_kernels.sessions.store.library import LibraryPage, LibraryProgram
from dspex_kernels.sessions.store.sql import SQLStore
from tests.waiting import wait_until

if TYPE_CHECKING:  # pytest imports it itself, so that its assertions tell what they compared
    from tests.postgres import PostgresServer

T0 = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

MakeDatabase = Callable[[Path], AbstractContextManager[str]]
"""Makes a new database, in a directory where it is a file, and gives its URL."""


pytest_plugins = ["tests.postgres"]


# PostgreSQL's server is the session's, so what starts it is too; the database is a test's own.
@pytest.fixture(scope="session", params=["sqlite-file", "sqlite-memory", "postgresql"])
def any_kind(request: pytest.FixtureRequest) -> MakeDatabase:
    return _maker(request, request.param)


@pytest.fixture(scope="session", params=["sqlite-file", "postgresql"])
def shared_kind(request: pytest.FixtureRequest) -> MakeDatabase:
    return _maker(request, request.param)


def _maker(request: pytest.FixtureRequest, kind: str) -> MakeDatabase:
    if kind == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres_server")
        return lambda _: server.database()
    if kind == "sqlite-memory":
        return lambda _: contextlib.nullcontext("sqlite://")
    return lambda directory: contextlib.nullcontext(f"sqlite:///{directory}/store/sessions.sqlite")


@pytest.fixture
def store_url(any_kind: MakeDatabase, tmp_path: Path) -> Iterator[str]:
    with any_kind(tmp_path) as url:
        yield url


@pytest.fixture
def shared_url(shared_kind: MakeDatabase, tmp_path: Path) -> Iterator[str]:
    """A database that several stores can open."""
    with shared_kind(tmp_path) as url:
        yield url


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


# Written together


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine does not split what is written together; whoever tests that sets the bound again."""
    monkeypatch.setattr(turns, "MAX_GROUP_TIME", 60.0)


@asynccontextmanager
async def _all_waiting(store: SQLStore) -> AsyncIterator[None]:
    """What is asked meanwhile waits for the store's thread, and is there all at once at the end."""
    started, go_on = threading.Event(), threading.Event()

    def block() -> None:
        started.set()
        go_on.wait(10)

    busy = asyncio.ensure_future(store._turns.run(block))
    await asyncio.to_thread(started.wait, 10)
    yield
    await asyncio.sleep(0)  # each task has asked
    go_on.set()
    await busy


def _count_commits(store: SQLStore) -> list[None]:
    commits: list[None] = []
    sa.event.listen(store._database._engine, "commit", lambda _: commits.append(None))
    return commits


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [({}, 1), ({"MAX_GROUP": 10}, 3), ({"MAX_GROUP": 10, "MAX_GROUP_TIME": -1}, 25)],
    ids=["unbounded", "in number", "in time"],
)
def test_writes_that_wait_are_committed_together_in_their_order(
    store_url: str, monkeypatch: pytest.MonkeyPatch, bounds: dict[str, float], expected: int
) -> None:
    for name, value in bounds.items():
        monkeypatch.setattr(turns, name, value)

    async def main() -> None:
        async with _store_with_session(store_url) as (store, record):
            commits = _count_commits(store)
            async with _all_waiting(store):
                changes = [[Spent(tokens=n), _put(f"p{n}")] for n in range(25)]
                saved = [asyncio.ensure_future(store.save_changes(record.session_id, c)) for c in changes]
            await asyncio.gather(*saved)
            assert len(commits) == expected
            contents = (await store.get(record.session_id)).contents
            assert (contents.spent.tokens, list(contents.programs)) == (24, [f"p{n}" for n in range(25)])

    asyncio.run(main())


def test_of_writes_together_one_that_fails_fails_alone(store_url: str) -> None:
    def insert_twice(connection: sa.Connection) -> None:
        for _ in range(2):
            connection.execute(schema.SERVICES.insert().values(_SERVICE_ROW))

    async def main() -> None:
        async with _store_with_session(store_url, session_id="s") as (store, record):
            commits = _count_commits(store)
            async with _all_waiting(store):
                asked = [
                    asyncio.ensure_future(call)
                    for call in (
                        store.save_changes("s", [_put("first")]),
                        store.save_changes("nobody", [_put()]),
                        store.save_changes("s", [_put("half"), _put("bad", text="\ud800")]),
                        store._turns.write(insert_twice),
                        store.create(record),
                        store.set_generation("s", 2**63),
                        store.save_changes("s", [_put("last")]),
                    )
                ]
            told = await asyncio.gather(*asked, return_exceptions=True)
            assert [type(outcome) for outcome in told] == [
                type(None),
                errors.SessionNotFound,
                errors.InvalidRecord,
                errors.StoreError,
                errors.SessionExists,
                errors.InvalidArguments,
                type(None),
            ]
            assert len(commits) == 1
            assert list((await store.get("s")).contents.programs) == ["first", "last"]
            assert not await store.services()

    asyncio.run(main())


def test_nobody_is_told_that_a_write_succeeded_whose_commit_fails(shared_url: str) -> None:
    def fail_at_commit(connection: sa.Connection) -> None:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA defer_foreign_keys=ON")
        else:
            connection.exec_driver_sql(
                "ALTER TABLE dspex_secrets ALTER CONSTRAINT dspex_secrets_session_id_fkey DEFERRABLE"
            )
            connection.exec_driver_sql("SET CONSTRAINTS ALL DEFERRED")
        connection.execute(schema.SECRETS.insert().values(session_id="nobody", token=b""))

    async def main() -> None:
        async with _store_with_session(shared_url) as (store, record):
            async with _all_waiting(store):
                calls = [
                    store.save_changes(record.session_id, [_put("before")]),
                    store._turns.write(fail_at_commit),
                    store.save_changes(record.session_id, [_put("behind")]),
                ]
                asked = [asyncio.ensure_future(call) for call in calls]
            told = await asyncio.gather(*asked, return_exceptions=True)
            assert [type(outcome) for outcome in told] == [errors.StoreError] * 3
            assert len({id(outcome) for outcome in told}) == 3  # each has an exception of its own
            assert await store.get(record.session_id) == record
            await store.save_changes(record.session_id, [_put()])

    asyncio.run(main())


def test_a_write_that_ends_the_whole_transaction_is_told_to_all_that_were_in_it(store_url: str) -> None:
    def lose_the_transaction(connection: sa.Connection) -> None:
        if connection.dialect.name == "sqlite":  # as a full disk does
            insert = "INSERT OR ROLLBACK INTO dspex_schema (id, version) VALUES (1, 1)"
        else:  # as a server that is restarted does
            insert = "SELECT pg_terminate_backend(pg_backend_pid())"
        connection.exec_driver_sql(insert)

    async def main() -> None:
        async with _store_with_session(store_url) as (store, record):
            async with _all_waiting(store):
                calls = [
                    store.save_changes(record.session_id, [_put("before")]),
                    store._turns.write(lose_the_transaction),
                    store.save_changes(record.session_id, [_put("behind")]),
                ]
                asked = [asyncio.ensure_future(call) for call in calls]
            before, lost, behind = await asyncio.gather(*asked, return_exceptions=True)
            assert isinstance(before, errors.StoreError)
            assert isinstance(lost, errors.StoreError)
            assert re.search("UNIQUE constraint failed|terminating connection", before.message)
            assert behind is None  # it had not begun, and had a transaction of its own
            assert list((await store.get(record.session_id)).contents.programs) == ["behind"]

    asyncio.run(main())


def test_what_a_full_disk_refuses_is_not_there_and_what_was_told_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with _store_with_session(f"sqlite:///{tmp_path}/s.sqlite") as (store, record):

            def limit(pages: int) -> Callable[[sa.Connection], int]:
                return lambda connection: connection.exec_driver_sql(f"PRAGMA max_page_count={pages}").scalar_one()

            await store._turns.read(limit(1))  # as many as there are
            async with _all_waiting(store):
                sizes = {"a": 10, "big": 500_000, "b": 10}
                asked = {
                    name: asyncio.ensure_future(
                        store.save_changes(record.session_id, [_put(name, text="x" * size)])
                    )
                    for name, size in sizes.items()
                }
            await asyncio.gather(*asked.values(), return_exceptions=True)
            assert isinstance(asked["big"].exception(), errors.StoreError)
            kept = [name for name, saved in asked.items() if saved.exception() is None]
            assert list((await store.get(record.session_id)).contents.programs) == kept
            await store._turns.read(limit(1_000_000))
            await store.save_changes(record.session_id, [_put("big", text="x" * 500_000)])

    asyncio.run(main())


def test_a_write_whose_caller_is_gone_is_dropped_and_its_neighbours_are_kept(store_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url) as (store, record):
            async with _all_waiting(store):
                asked = [
                    asyncio.ensure_future(store.save_changes(record.session_id, [_put(name)])) for name in "abc"
                ]
                await asyncio.sleep(0)
                asked[1].cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            assert list((await store.get(record.session_id)).contents.programs) == ["a", "c"]

    asyncio.run(main())


# The order of programs, and sessions in brief


def test_programs_come_in_the_order_of_their_making(store_url: str) -> None:
    changes = [
        *(_put(name) for name in ("zeta", "alpha", "mid")),
        *(_put("zeta", 2), _put("alpha"), _put("last")),  # a new version, or the same again, moves nothing
        *(ProgramDeleted(program_id="mid"), _put("mid")),  # made anew
    ]

    async def main() -> None:
        async with _store_with_session(store_url, session_id="saved") as (store, _):
            await store.save_changes("saved", changes)
            contents = (await store.get("saved")).contents
            assert list(contents.programs) == ["zeta", "alpha", "last", "mid"]
            assert [record.version for record in contents.programs["zeta"]] == [1, 2]

            await store.create(_record("created", age=1, contents=contents))
            await store.save_changes("created", [_put("alpha", 2), _put("new")])
            assert list((await store.get("created")).contents.programs) == ["zeta", "alpha", "last", "mid", "new"]
            assert (await store.list_brief()).sessions[1].programs == ("zeta", "alpha", "last", "mid", "new")

    asyncio.run(main())


def test_a_program_whose_first_versions_were_dropped_keeps_its_place(store_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url) as (store, record):
            await store.save_changes(record.session_id, [_put("b"), _put("a")])
            await store.save_changes(record.session_id, [_put("b", n) for n in range(2, 60)])
            assert list((await store.get(record.session_id)).contents.programs) == ["b", "a"]

    asyncio.run(main())


def test_sessions_in_brief_are_those_of_the_list_without_their_records(store_url: str) -> None:
    async def main() -> None:
        async with SQLStore(store_url) as store:
            for n in range(5):
                await store.create(_record(f"s{n}", owner="alice" if n % 2 else "bob", age=n))
            for version in (1, 2):
                await store.save_changes("s1", [_put("z", version), _put("a", version), SETTINGS, Spent(tokens=7)])

            told: list[SessionBrief] = []
            page = await store.list_brief(limit=2)
            told += page.sessions
            while page.next_cursor is not None:
                page = await store.list_brief(limit=2, after=page.next_cursor)
                told += page.sessions

            whole = (await store.list()).records
            assert [brief.record.session_id for brief in told] == [record.session_id for record in whole]
            for brief, record in zip(told, whole, strict=True):
                assert brief.programs == tuple(record.contents.programs)
                assert brief.record.contents.programs == {}
                assert brief.record.contents.settings == record.contents.settings
                assert brief.record.contents.spent == record.contents.spent
                assert brief.record.model_dump(exclude={"contents"}) == record.model_dump(exclude={"contents"})
            bobs = await store.list_brief("bob")
            assert [brief.record.session_id for brief in bobs.sessions] == ["s0", "s2", "s4"]
            for wrong in ({"limit": 0}, {"limit": 1001}, {"after": "no cursor"}):
                with pytest.raises(errors.InvalidArguments):
                    await store.list_brief(**wrong)  # type: ignore[arg-type]  # wrong on purpose

    asyncio.run(main())


# Services


def _service(service_id: str, age: int = 0) -> ServiceRecord:
    started = T0 + timedelta(seconds=age)
    return ServiceRecord(service_id, "host.example", 4711, started, started + timedelta(seconds=30))


_SERVICE_ROW = {"service_id": "x", "host": "h", "pid": 1, "started_at": "", "expires_at": ""}


@asynccontextmanager
async def _service_store(url: str, service_id: str, age: int = 0) -> AsyncIterator[SQLStore]:
    async with SQLStore(url, service_id) as store:
        await store.register(_service(service_id, age))
        yield store


def test_services_are_told_until_they_leave(store_url: str) -> None:
    here = timezone(timedelta(hours=5))

    async def main() -> None:
        async with SQLStore(store_url) as store:
            assert list(await store.services()) == []
            await store.register(_service("second", age=1))
            await store.register(_service("first"))
            assert list(await store.services()) == [_service("first"), _service("second", age=1)]

            later = (T0 + timedelta(hours=1)).astimezone(here)
            assert await store.renew("first", later) is True
            assert await store.renew("nobody", later) is False
            first, second = await store.services()
            assert (first.expires_at, first.expires_at.tzinfo) == (later, UTC)
            assert second == _service("second", age=1)

            await store.register(_service("first", age=9))  # it was taken for dead, and comes again
            assert list(await store.services()) == [_service("second", age=1), _service("first", age=9)]
            await store.unregister("first")
            assert await store.bury("second") is True
            assert await store.bury("second") is False
            await store.unregister("first")
            assert list(await store.services()) == []
            assert await store.renew("second", later) is False
            with pytest.raises(errors.InvalidArguments, match="time zone"):
                await store.renew("second", T0.replace(tzinfo=None))

    asyncio.run(main())


def test_a_session_is_claimed_by_one_service_and_comes_with_what_it_holds(store_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url, session_id="s") as (store, _):
            await store.save_changes("s", CHANGES)
            for name in ("one", "two"):
                await store.register(_service(name))

            assert await store.claim("s", "one") == await store.get("s")
            assert await store.claim("s", "one") == await store.get("s")
            with pytest.raises(
                errors.SessionNotReady, match=r"'s' is used by another service, 'one' \(host"
            ) as caught:
                await store.claim("s", "two")
            assert caught.value.details == {"session_id": "s", "holder": "one", "host": "host.example", "pid": 4711}
            with pytest.raises(errors.SessionNotFound, match="'nobody'"):
                await store.claim("nobody", "one")

    asyncio.run(main())


@pytest.mark.parametrize("way", ["unregister", "bury", "row lost"])
def test_a_session_of_a_service_that_is_gone_can_be_claimed(store_url: str, way: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url, session_id="s") as (store, _):
            for name in ("old", "new"):
                await store.register(_service(name))
            await store.claim("s", "old")
            match way:
                case "unregister" | "bury":
                    await getattr(store, way)("old")
                case "row lost":
                    await store._turns.write(
                        lambda connection: connection.execute(
                            schema.SERVICES.delete().where(schema.SERVICES.c.service_id == "old")
                        )
                    )

            await store.claim("s", "new")

            await store.register(_service("old"))
            with pytest.raises(errors.SessionNotReady) as caught:
                await store.claim("s", "old")
            assert caught.value.details["holder"] == "new"

    asyncio.run(main())


def test_a_service_that_is_not_registered_claims_nothing(store_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url, session_id="s") as (store, _):
            with pytest.raises(errors.StoreError, match=r"'one' is not registered.*register it again"):
                await store.claim("s", "one")
            await store.register(_service("one"))
            await store.claim("s", "one")

    asyncio.run(main())


def test_of_services_that_claim_a_session_at_once_one_gets_it(shared_url: str) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            names = [f"service{n}" for n in range(4)]
            stores = [await stack.enter_async_context(_service_store(shared_url, name)) for name in names]
            tool = await stack.enter_async_context(SQLStore(shared_url))
            for n in range(10):
                await tool.create(_record(f"s{n}"))
                tries = [store.claim(f"s{n}", name) for store, name in zip(stores, names, strict=True)]
                outcomes = await asyncio.gather(*tries, return_exceptions=True)
                assert sorted(type(outcome).__name__ for outcome in outcomes) == [
                    *["SessionNotReady"] * 3,
                    "SessionRecord",
                ]

    asyncio.run(main())


WRITES: dict[str, Callable[[SessionStore], Awaitable[object]]] = {
    "save_changes": lambda store: store.save_changes("s", CHANGES, 9),
    "touch": lambda store: store.touch("s", T0 + timedelta(days=1)),
    "set_generation": lambda store: store.set_generation("s", 9),
    "set_status": lambda store: store.set_status("s", SessionStatus.FAILED),
    "set_backend": lambda store: store.set_backend("s", "pooled", None),
    "set_secret": lambda store: store.set_secret("s", b"other"),
    "replace_secret": lambda store: store.replace_secret("s", b"token", b"other"),
    "delete": lambda store: store.delete("s"),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_service_that_lost_a_session_changes_nothing_of_it(shared_url: str, write: str) -> None:
    async def main() -> None:
        async with (
            _service_store(shared_url, "slept") as slept,
            _service_store(shared_url, "took") as took,
            SQLStore(shared_url) as tool,
        ):
            await slept.create(_record("s", journal_offset=3))
            await slept.set_secret("s", b"token")
            with pytest.raises(errors.SessionNotReady):
                await took.claim("s", "took")
            await took.bury("slept")
            before = await took.claim("s", "took")

            with pytest.raises(
                errors.SessionNotReady, match="another service has taken session 's' over"
            ) as caught:
                await WRITES[write](slept)
            assert caught.value.details == {
                "session_id": "s", "holder": "took", "host": "host.example", "pid": 4711
            }  # fmt: skip
            assert (await tool.get("s"), await tool.get_secret("s")) == (before, b"token")

            await WRITES[write](took)
            if write != "delete":
                assert (await tool.get("s"), await tool.get_secret("s")) != (before, b"token")
                await WRITES[write](tool)  # a tool may do all

    asyncio.run(main())


@pytest.mark.parametrize("write", WRITES)
def test_a_service_changes_nothing_of_a_session_that_its_successor_left(shared_url: str, write: str) -> None:
    """Nobody holds it then, and yet what the one that slept would write is older than what is there."""

    async def main() -> None:
        async with _service_store(shared_url, "slept") as slept:
            await slept.create(_record("s", journal_offset=3))
            async with _service_store(shared_url, "took") as took:
                await took.bury("slept")
                await took.claim("s", "took")
                await took.save_changes("s", [_put()])
                await took.set_secret("s", b"token")
                before = await took.get("s")
                await took.unregister("took")

            for _ in range(2):  # the second time it is registered again, and has not claimed the session yet
                with pytest.raises(
                    errors.SessionNotReady, match="'s' is not this service's, or was taken"
                ) as caught:
                    await WRITES[write](slept)
                assert caught.value.details == {"session_id": "s", "holder": None, "host": None, "pid": None}
                await slept.register(_service("slept"))
            assert (await slept.get("s"), await slept.get_secret("s")) == (before, b"token")

            await slept.claim("s", "slept")
            await WRITES[write](slept)

    asyncio.run(main())


def test_a_service_that_changes_a_session_that_is_gone_is_told_so(store_url: str) -> None:
    async def main() -> None:
        async with _service_store(store_url, "one") as store:
            await store.create(_record("s"))
            assert await store.delete("s") is True
            with pytest.raises(errors.SessionNotFound):
                await store.set_generation("s", 1)
            assert await store.delete("s") is False

    asyncio.run(main())


def test_a_service_that_renewed_or_came_again_is_not_buried_for_what_was_seen_before(store_url: str) -> None:
    """Of three services, two may find the third dead: the second's word must not hit what it is by then."""

    async def main() -> None:
        async with _service_store(store_url, "late") as store:
            await store.create(_record("s"))
            (seen,) = await store.services()
            assert await store.renew("late", seen.expires_at + timedelta(seconds=1))
            assert await store.bury("late", seen=seen.expires_at) is False
            await store.set_generation("s", 2)  # it holds what it held

            (seen,) = await store.services()
            assert await store.bury("late", seen=seen.expires_at) is True
            await store.register(_service("late", age=9))
            await store.claim("s", "late")
            assert await store.bury("late", seen=seen.expires_at) is False
            await store.set_generation("s", 3)
            with pytest.raises(errors.InvalidArguments, match="time zone"):
                await store.bury("late", seen=T0.replace(tzinfo=None))

    asyncio.run(main())


# Secrets


def test_a_secret_is_kept_beside_its_session_and_told_in_no_record(store_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url, session_id="s") as (store, record):
            assert await store.get_secret("s") is None
            for token in (b"\0\xff token", b"another", b"x" * 65536):
                await store.set_secret("s", token)
                assert await store.get_secret("s") == token
            assert await store.get("s") == record
            with pytest.raises(errors.TooLarge, match=r"65,537 bytes: at most 65,536"):
                await store.set_secret("s", b"x" * 65537)
            await store.set_secret("s", None)
            await store.set_secret("s", None)
            assert await store.get_secret("s") is None
            for call in (store.get_secret("nobody"), store.set_secret("nobody", b"x")):
                with pytest.raises(errors.SessionNotFound, match="'nobody'"):
                    await call

    asyncio.run(main())


def test_a_secret_goes_with_its_session(store_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url, session_id="s") as (store, record):
            await store.set_secret("s", b"token")
            await store.delete("s")
            assert list(await store.secrets()) == []
            await store.create(record)
            assert await store.get_secret("s") is None

    asyncio.run(main())


def test_secrets_are_paged_and_replaced_only_where_they_are_still_the_same(store_url: str) -> None:
    async def main() -> None:
        async with SQLStore(store_url) as store:
            for n in range(5):
                await store.create(_record(f"s{n}", age=-n))
                if n != 3:
                    await store.set_secret(f"s{n}", f"token{n}".encode())
            first = await store.secrets(limit=2)
            rest = await store.secrets(limit=10, after=first[-1][0])
            assert [*first, *rest] == [(f"s{n}", f"token{n}".encode()) for n in (0, 1, 2, 4)]
            for limit in (0, 1001):
                with pytest.raises(errors.InvalidArguments, match="out of range"):
                    await store.secrets(limit=limit)

            assert await store.replace_secret("s0", b"token0", b"new") is True
            assert await store.replace_secret("s0", b"token0", b"newer") is False
            assert await store.replace_secret("nobody", b"token0", b"new") is False
            assert await store.get_secret("s0") == b"new"

    asyncio.run(main())


# The program library


def _program(text: str = "Grüße ☃ \0'", version: int = 1) -> ProgramRecord:
    return _put("qa_bot", version, text).record


def test_a_program_is_published_in_ascending_versions_that_never_change(store_url: str) -> None:
    async def main() -> None:
        async with SQLStore(store_url) as store:
            one = await store.publish("qa", _program("one"), by="alice")
            two = await store.publish("qa", _program("two"), by="bob")
            other = await store.publish("other", _program("one"), by="bob")
            assert [(e.name, e.version, e.made_by) for e in (one, two, other)] == [
                ("qa", 1, "alice"),
                ("qa", 2, "bob"),
                ("other", 1, "bob"),
            ]
            assert one.made_at.tzinfo == UTC
            assert (await store.library_entry("qa", 1), await store.library_entry("qa", 2)) == (one, two)
            assert one.record == _program("one")

            assert await store.publish("qa", _program("two"), by="carol") == two  # it is the latest already
            assert (await store.publish("qa", _program("one"), by="carol")).version == 3  # it is not the latest
            for name, version in (("qa", 4), ("qa", 0), ("nobody", 1)):
                with pytest.raises(errors.ProgramNotFound, match=f"no version {version} of '{name}'"):
                    await store.library_entry(name, version)

    asyncio.run(main())


def test_of_many_that_publish_at_once_each_gets_a_version_of_its_own(shared_url: str) -> None:
    async def main() -> None:
        async with SQLStore(shared_url) as one, SQLStore(shared_url) as two:
            calls = [(one, two)[n % 2].publish("qa", _program(f"{n}"), by="alice") for n in range(20)]
            entries = await asyncio.gather(*calls)
            assert sorted(entry.version for entry in entries) == list(range(1, 21))
            for n, entry in enumerate(entries):
                assert (await one.library_entry("qa", entry.version)).record == _program(f"{n}")

    asyncio.run(main())


def test_an_alias_moves_and_rolls_back_through_where_it_was(store_url: str) -> None:
    async def main() -> None:
        async with SQLStore(store_url) as store:
            for n in range(1, 5):
                await store.publish("qa", _program(f"{n}"), by="alice")
            first = await store.point("qa", "prod", 1, by="alice")
            assert (first.name, first.alias, first.version, first.previous) == ("qa", "prod", 1, None)
            with pytest.raises(errors.VersionConflict, match=r"qa@prod has no target before version 1"):
                await store.roll_back("qa", "prod", by="bob")
            for version in (2, 2, 3):  # again to the same one is no move
                target = await store.point("qa", "prod", version, by="alice")
            assert (target.version, target.previous) == (3, 2)

            back = await store.roll_back("qa", "prod", by="bob")
            assert (back.version, back.previous, back.made_by) == (2, 1, "bob")
            assert await store.resolve("qa", "prod") == back
            moved = await store.point("qa", "prod", 4, by="alice")  # what was rolled back is not returned to
            assert (moved.version, moved.previous) == (4, 2)
            told = [await store.roll_back("qa", "prod", by="bob") for _ in range(2)]
            assert [(target.version, target.previous) for target in told] == [(2, 1), (1, None)]
            with pytest.raises(errors.VersionConflict):
                await store.roll_back("qa", "prod", by="bob")
            assert await store.resolve("qa", "prod") == told[-1]

            assert (await store.point("qa", "canary-2", 4, by="alice")).previous is None
            for call in (
                store.resolve("qa", "nobody"),
                store.resolve("nobody", "prod"),
                store.roll_back("qa", "nobody", by="bob"),
                store.point("qa", "prod", 5, by="bob"),
                store.point("nobody", "prod", 1, by="bob"),
            ):
                with pytest.raises(errors.ProgramNotFound):
                    await call

    asyncio.run(main())


def test_an_alias_forgets_its_oldest_targets(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_library, "MAX_TARGETS", 3)

    async def main() -> None:
        async with SQLStore(store_url) as store:
            for n in range(1, 6):
                await store.publish("qa", _program(f"{n}"), by="alice")
                await store.point("qa", "prod", n, by="alice")
            back = await store.roll_back("qa", "prod", by="alice")
            assert (back.version, back.previous) == (4, None)  # the move back is remembered too
            with pytest.raises(errors.VersionConflict, match="none of its last 3"):
                await store.roll_back("qa", "prod", by="alice")

    asyncio.run(main())


def test_the_library_is_told_by_page(store_url: str) -> None:
    async def main() -> None:
        async with SQLStore(store_url) as store:
            assert await store.library() == LibraryPage((), None)
            for name in ("c", "a", "b"):
                await store.publish(name, _program(name), by="alice")
            await store.publish("b", _program("2"), by="alice")
            for alias, version in (("prod", 1), ("next", 1), ("next", 2)):
                await store.point("b", alias, version, by="alice")
            page = await store.library(limit=2)
            assert page.programs == (
                LibraryProgram("a", (1,), {}),
                LibraryProgram("b", (1, 2), {"next": 2, "prod": 1}),
            )
            rest = await store.library(limit=2, after=page.next_cursor)
            assert rest == LibraryPage((LibraryProgram("c", (1,), {}),), None)
            with pytest.raises(errors.InvalidArguments, match="out of range"):
                await store.library(limit=0)

    asyncio.run(main())


def test_the_serial_rises_with_every_change_of_the_library_and_only_then(shared_url: str) -> None:
    async def main() -> None:
        async with SQLStore(shared_url) as store, SQLStore(shared_url) as other:
            serials = [await other.library_serial()]
            for call, changes in (
                (store.publish("qa", _program("1"), by="alice"), True),
                (store.publish("qa", _program("1"), by="alice"), False),
                (store.publish("qa", _program("2"), by="alice"), True),
                (store.point("qa", "prod", 1, by="alice"), True),
                (store.point("qa", "prod", 1, by="alice"), False),
                (store.point("qa", "prod", 2, by="alice"), True),
                (store.roll_back("qa", "prod", by="alice"), True),
                (store.resolve("qa", "prod"), False),
                (store.unpublish("qa"), True),
            ):
                await call
                serials.append(await other.library_serial())
                assert (serials[-1] > serials[-2]) is changes, serials

    asyncio.run(main())


def test_what_is_unpublished_is_gone_and_its_versions_are_never_given_again(store_url: str) -> None:
    async def main() -> None:
        async with SQLStore(store_url) as store:
            for text in ("1", "2"):
                await store.publish("qa", _program(text), by="alice")
            await store.publish("stays", _program(), by="alice")
            await store.point("qa", "prod", 2, by="alice")
            await store.unpublish("qa")

            assert [program.name for program in (await store.library()).programs] == ["stays"]
            for call in (store.library_entry("qa", 2), store.resolve("qa", "prod"), store.unpublish("qa")):
                with pytest.raises(errors.ProgramNotFound):
                    await call
            assert (await store.publish("qa", _program("2"), by="alice")).version == 3
            with pytest.raises(errors.ProgramNotFound):
                await store.resolve("qa", "prod")

    asyncio.run(main())


def test_the_library_is_bounded(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in {"MAX_NAMES": 2, "MAX_VERSIONS": 3, "MAX_ALIASES": 2}.items():
        monkeypatch.setattr(sql_library, name, limit)

    async def main() -> None:
        async with SQLStore(store_url) as store:
            for n in range(3):
                await store.publish("a", _program(f"{n}"), by="alice")
            await store.publish("b", _program(), by="alice")
            for alias in ("x", "y", "x"):
                await store.point("a", alias, 1, by="alice")
            for call, told in (
                (store.publish("a", _program("more"), by="alice"), "3 versions of 'a'"),
                (store.publish("c", _program(), by="alice"), "has 2 programs"),
                (store.point("a", "z", 1, by="alice"), "2 aliases of 'a'"),
            ):
                with pytest.raises(errors.ProgramLimitReached, match=told):
                    await call
            await store.unpublish("b")
            await store.publish("c", _program(), by="alice")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "alias", "by"),
    [
        ("", "", ""),
        ("a b", "Prod", "x" * 257),
        ("qa@x", "a.b", ""),
        ("x" * 129, "x" * 65, ""),
        ("qa\n", "prod\n", ""),
    ],
    ids=["empty", "foreign", "dotted", "long", "newline"],
)
def test_what_is_no_name_alias_or_author_is_refused(name: str, alias: str, by: str) -> None:
    async def main() -> None:
        async with SQLStore("sqlite://") as store:
            await store.publish("qa", _program(), by="alice")
            for call, told in (
                (store.publish(name, _program("2"), by="alice"), "no name for the library"),
                (store.publish("qa", _program("2"), by=by), "by has"),
                (store.point("qa", alias, 1, by="alice"), "no alias"),
                (store.point("qa", "prod", 1, by=by), "by has"),
                (store.roll_back("qa", "prod", by=by), "by has"),
            ):
                with pytest.raises(errors.InvalidArguments, match=told):
                    await call

    asyncio.run(main())


# Size and backup


def test_the_size_grows_with_what_is_kept(store_url: str) -> None:
    async def main() -> None:
        async with _store_with_session(store_url) as (store, record):
            before = await store.size()
            assert before is not None
            text = random.Random(0).randbytes(300_000).hex()  # a database may compress it
            await store.save_changes(record.session_id, [_put(text=text)])
            after = await store.size()
            assert after is not None
            assert 300_000 < after - before < 3_000_000

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_backup_is_a_store_of_its_own_of_one_moment(tmp_path: Path, kind: str) -> None:
    url = f"sqlite:///{tmp_path}/store/s.sqlite" if kind == "file" else "sqlite://"
    copy = tmp_path / "copies" / "it's a copy.sqlite"
    copy.parent.mkdir()

    async def main() -> None:
        async with _store_with_session(url) as (store, record):
            await store.save_changes(record.session_id, CHANGES)
            before = await store.get(record.session_id)

            async def go_on() -> None:
                for version in range(3, 20):
                    await store.save_changes(record.session_id, [_put(version=version)])

            await asyncio.gather(store.backup(copy), go_on())

            assert [file.name for file in copy.parent.iterdir()] == [copy.name]
            assert stat.S_IMODE(copy.stat().st_mode) == 0o600
            with pytest.raises(errors.StoreError, match="exists: give the backup another name"):
                await store.backup(copy)
            now = await store.get(record.session_id)
        async with SQLStore(f"sqlite:///{copy}") as restored:
            kept = await restored.get(record.session_id)
            versions = now.contents.programs["qa_bot"]
            count = len(kept.contents.programs["qa_bot"])
            assert len(before.contents.programs["qa_bot"]) <= count <= len(versions)
            assert kept.contents.programs["qa_bot"] == versions[:count]
            await restored.save_changes(record.session_id, [_put("more")])

    asyncio.run(main())


def test_a_backup_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with _store_with_session(f"sqlite:///{tmp_path}/store/s.sqlite") as (store, record):
            with pytest.raises(errors.StoreError, match=r"No such file or directory.*nowhere"):
                await store.backup(tmp_path / "nowhere" / "copy")
            assert [file.name for file in tmp_path.iterdir()] == ["store"]
            assert await store.get(record.session_id) == record

    asyncio.run(main())


def test_postgresql_is_backed_up_by_the_command_that_the_refusal_gives(postgres_url: str, tmp_path: Path) -> None:
    copy = tmp_path / "a copy"

    async def main() -> str:
        async with _store_with_session(postgres_url.replace("dspex@", "dspex:canary@"), session_id="kept") as (
            store,
            _,
        ):
            with pytest.raises(errors.StoreError) as caught:
                await store.backup(copy)
            return caught.value.message

    told = asyncio.run(main())
    assert "canary" not in told
    subprocess.run(["/bin/sh", "-c", told[told.index("pg_dump ") :]], check=True, timeout=60)
    listed = subprocess.run(["pg_restore", "--file=-", copy], check=True, timeout=60, capture_output=True)
    assert b"COPY public.dspex_sessions" in listed.stdout
    assert b"\nkept\talice\t" in listed.stdout


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
    monkeypatch.setattr(database, "BUSY_TIMEOUT", 0.05)
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
            slow = asyncio.ensure_future(store._turns.run(block))
            await asyncio.to_thread(started.wait, 10)
            with monkeypatch.context() as short:
                short.setattr(turns, "CALL_TIMEOUT", 0.05)
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
            busy = asyncio.ensure_future(store._turns.run(block))
            dropped = asyncio.ensure_future(store.save_changes(record.session_id, [_put("dropped")]))
            await asyncio.to_thread(started.wait, 10)
            dropped.cancel()
            busy.cancel()
            await asyncio.gather(dropped, busy, return_exceptions=True)
            go_on.set()
            await store.save_changes(record.session_id, [_put("kept")])
            assert list((await store.get(record.session_id)).contents.programs) == ["kept"]

    asyncio.run(main())


def test_calls_whose_callers_gave_up_count_until_their_turn_comes(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the database hangs, what was asked stays in memory, whoever still waits for it."""
    monkeypatch.setattr(turns, "MAX_WAITING", 3)

    async def main() -> None:
        async with SQLStore(store_url) as store:
            async with _all_waiting(store):
                for call in (store.count, store.services, lambda: store.create(_record())):
                    asked = asyncio.ensure_future(call())
                    await asyncio.sleep(0)
                    asked.cancel()
                    await asyncio.wait({asked})
                for call in (store.count, lambda: store.create(_record())):
                    with pytest.raises(errors.StoreError, match="3 calls waiting"):
                        await call()
            monkeypatch.setattr(turns, "MAX_WAITING", 10)
            assert await store.count() == 0

    asyncio.run(main())


def test_a_close_whose_caller_is_gone_closes_all_the_same(tmp_path: Path) -> None:
    async def main() -> None:
        store = SQLStore(f"sqlite:///{tmp_path}/s.sqlite")
        await store.open()
        async with _all_waiting(store):
            closing = asyncio.ensure_future(store.close())
            await asyncio.sleep(0)
            closing.cancel()
            await asyncio.wait({closing})
        await wait_until(lambda: store._database._engine is None, what="the database to be closed")

    asyncio.run(main())


def test_more_callers_than_may_wait_are_refused(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "MAX_WAITING", 3)

    async def main() -> None:
        async with SQLStore(store_url) as store:
            async with _all_waiting(store):
                asked = [asyncio.ensure_future(store.count()) for _ in range(5)]
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
            assert outcomes[:3] == [0, 0, 0]
            assert all(isinstance(o, errors.StoreError) and "3 calls waiting" in o.message for o in outcomes[3:])
            assert await store.count() == 0

    asyncio.run(main())


def test_writers_of_postgresql_see_each_other_whatever_its_default_isolation(postgres_url: str) -> None:
    async def main() -> None:
        async with SQLStore(postgres_url) as tool:
            name = sa.make_url(postgres_url).database
            setting = f"""ALTER DATABASE "{name}" SET default_transaction_isolation = 'serializable'"""
            await tool._turns.write(lambda connection: connection.exec_driver_sql(setting))
        async with SQLStore(postgres_url) as one, SQLStore(postgres_url) as other:
            publishing = [
                store.publish("qa", _put(text=f"{n} of {name}").record, by="me")
                for n in range(20)
                for name, store in (("one", one), ("other", other))
            ]
            entries = await asyncio.gather(*publishing)
        assert sorted(entry.version for entry in entries) == list(range(1, 41))

    asyncio.run(main())


def test_a_writer_that_stopped_in_the_middle_keeps_no_other_from_writing(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "IDLE_TIMEOUT", 0.2)
    started, go_on = threading.Event(), threading.Event()

    def stop(_: sa.Connection) -> None:
        started.set()
        go_on.wait(10)

    async def main() -> None:
        async with _store_with_session(postgres_url) as (stopped, record), SQLStore(postgres_url) as other:
            late = asyncio.ensure_future(stopped._turns.write(stop))
            await asyncio.to_thread(started.wait, 10)
            await other.set_generation(record.session_id, 7)
            go_on.set()
            with pytest.raises(errors.StoreError, match="idle-in-transaction"):
                await late
            await stopped.set_generation(record.session_id, 8)
            assert (await other.get(record.session_id)).generation == 8

    asyncio.run(main())


def test_a_store_that_is_not_open_says_so(store_url: str, tmp_path: Path) -> None:
    async def main() -> None:
        store = SQLStore(store_url)
        with pytest.raises(errors.StoreError, match="is not open"):
            await store.count()
        await store.open()
        with pytest.raises(errors.StoreError, match="is open already"):
            await store.open()
        await store.close()
        await store.close()
        for call in (store.count(), store.set_generation("s", 1), store.backup(tmp_path / "copy")):
            with pytest.raises(errors.StoreError, match="is not open"):
                await call

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

            assert await store._turns.read(pragmas) == ["wal", 2, 1, 10_000]  # synchronous: 2 is FULL

    asyncio.run(main())


def test_a_newer_database_is_refused_and_left_alone(shared_url: str) -> None:
    async def set_version(version: int) -> None:
        async with SQLStore(shared_url) as store:
            await store._turns.write(
                lambda connection: connection.execute(schema.SCHEMA.update().values(version=version))
            )

    async def main() -> None:
        await set_version(len(schema.MIGRATIONS) + 41)
        with pytest.raises(errors.StoreError, match=r"schema version 43.*knows 2.*use the newer"):
            await SQLStore(shared_url).open()

    asyncio.run(main())


def test_an_older_database_is_brought_up_to_this_version(shared_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def add_a_column(connection: sa.Connection) -> None:
        connection.exec_driver_sql("ALTER TABLE dspex_sessions ADD COLUMN note TEXT")

    async def columns(store: SQLStore) -> set[str]:
        def names(connection: sa.Connection) -> set[str]:
            return {column["name"] for column in sa.inspect(connection).get_columns("dspex_sessions")}

        return await store._turns.read(names)

    async def main() -> None:
        async with _store_with_session(shared_url) as (store, record):
            assert "note" not in await columns(store)
        monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, add_a_column))
        for _ in range(2):
            async with SQLStore(shared_url) as store:
                assert "note" in await columns(store)
                assert await store.get(record.session_id) == record

    asyncio.run(main())


def _make_version_1(url: str, programs: list[ProgramRecord]) -> None:
    if (path := sa.make_url(url).database) and path.endswith(".sqlite"):
        Path(path).parent.mkdir()
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for statement in (
            "CREATE TABLE dspex_schema (id INTEGER NOT NULL PRIMARY KEY, version INTEGER NOT NULL)",
            "INSERT INTO dspex_schema (id, version) VALUES (1, 1)",
        ):
            connection.exec_driver_sql(statement)
        schema.MIGRATIONS[0](connection)
        connection.execute(
            sa.text(
                "INSERT INTO dspex_sessions VALUES ('s', 'alice', 'dedicated', 'hibernated', 3, :moment, :moment, "
                "'/a', 17, '{}', '{\"tokens\": 5}')"
            ).bindparams(moment="2026-01-02T03:04:05.678901+00:00")
        )
        for program in programs:
            connection.execute(
                sa.text("INSERT INTO dspex_programs VALUES ('s', :program_id, :version, :record)"),
                {
                    "program_id": program.program_id,
                    "version": program.version,
                    "record": program.model_dump_json(),
                },
            )
    engine.dispose()


def test_a_database_of_version_1_keeps_its_rows_and_works(shared_url: str) -> None:
    programs = [_put(name, version).record for name, version in (("z", 1), ("a", 1), ("m", 1), ("z", 2))]
    # PostgreSQL does not know in which order rows came: theirs stay in the order of their ids.
    order = ["z", "a", "m"] if shared_url.startswith("sqlite") else ["a", "m", "z"]
    contents = SessionContents(
        programs={name: [p for p in programs if p.program_id == name] for name in order}, spent=Spent(tokens=5)
    )
    expected = _record("s", status="hibernated", generation=3, directory="/a", journal_offset=17, contents=contents)

    async def main() -> None:
        for _ in range(2):
            async with SQLStore(shared_url, "service") as store:
                record = await store.get("s")
                assert record == expected
                assert list(record.contents.programs) == order
                await store.register(_service("service"))
                assert await store.claim("s", "service") == expected
        async with SQLStore(shared_url, "service") as store:
            await store.save_changes("s", [_put("new"), _put("a", 2)])
            assert list((await store.get("s")).contents.programs) == [*order, "new"]
            await store.set_secret("s", b"token")
            await store.publish("qa", _program(), by="alice")
            assert await store.delete("s")

    _make_version_1(shared_url, programs)
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
            newer.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, fail))
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
                assert set(found.get_table_names()) == set(schema.METADATA.tables)
                for name, table in schema.METADATA.tables.items():
                    assert [c["name"] for c in found.get_columns(name)] == table.columns.keys()
                    keys = found.get_pk_constraint(name)["constrained_columns"]
                    assert keys == table.primary_key.columns.keys()

            await store._turns.read(compare)

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


def test_a_database_that_is_not_known_is_named_at_once() -> None:
    with pytest.raises(errors.StoreError, match=r"cannot be kept in mysql: .*SQLite .* or PostgreSQL") as caught:
        SQLStore("mysql+pymysql://alice:canary@127.0.0.1/x")
    assert "canary" not in caught.value.message


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
