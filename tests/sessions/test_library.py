"""The program library: what is published stays, aliases move in one step, and who follows one is brought along."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dspex_kernels import SessionService, errors
from dspex_kernels.protocol.commands import Command
from dspex_kernels.protocol.records import ProgramDeleted, ProgramPut, ProgramRecord, ProgramSpec
from dspex_kernels.sessions import library
from dspex_kernels.sessions.backend import SessionBackend
from dspex_kernels.sessions.library import Library, Reference
from dspex_kernels.sessions.store.sql import SQLStore
from tests.sessions.memory_backend import MemoryBackend
from tests.test_cli import run_cli  # noqa: F401  # a fixture
from tests.waiting import wait_until, wait_until_stored

LOG = logging.getLogger("tests.library")


def record(seed: int, **fields: Any) -> ProgramRecord:
    """A program that can be told from others: the memory backend answers with its seed."""
    fields = {"program_id": "draft", "version": 7, "created_at": "2026-01-01T00:00:00Z", **fields}
    return ProgramRecord(spec=ProgramSpec(config={"seed": seed}), **fields)


def with_args(args: dict[str, Any]) -> dict[str, Any]:
    """A record's JSON as a client may send it."""
    return {"program_id": "draft", "version": 1, "spec": {"module_args": args}}


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work

    asyncio.run(bounded())


class CountingStore(SQLStore):
    """Counts what is asked of the library."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked: Counter[str] = Counter()

    async def library_serial(self) -> int:
        self.asked["serial"] += 1
        return await super().library_serial()

    async def resolve(self, name: str, alias: str) -> Any:
        self.asked["resolve"] += 1
        return await super().resolve(name, alias)

    async def library_entry(self, name: str, version: int) -> Any:
        self.asked["entry"] += 1
        return await super().library_entry(name, version)


class StoreThatAnswersLate(SQLStore):
    """Tells where an alias points only when ``late`` is set, though it has looked before."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.late = asyncio.Event()
        self.looked = asyncio.Event()

    async def resolve(self, name: str, alias: str) -> Any:
        target = await super().resolve(name, alias)
        self.looked.set()
        await self.late.wait()
        return target


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'store.sqlite'}"


@asynccontextmanager
async def open_library(url: str) -> AsyncIterator[Library]:
    async with SQLStore(url) as store:
        yield Library(store, LOG)


class TestReferences:
    def test_an_alias_and_a_version_are_told_apart_by_digits(self):
        assert Reference.parse("qa@prod") == Reference("qa", alias="prod")
        assert Reference.parse("qa@3") == Reference("qa", version=3)
        assert [str(Reference.parse(text)) for text in ("qa@prod", "qa@3", "a.b-c@x_1")] == [
            "qa@prod",
            "qa@3",
            "a.b-c@x_1",
        ]

    @pytest.mark.parametrize(
        "text", ["qa", "qa@", "@prod", "", "qa@Prod", "qa@0", "qa@99999999999", "qa@٣", "q a@prod", "qa@a@b", "@"]
    )
    def test_what_is_no_reference_is_refused(self, text):
        with pytest.raises(errors.InvalidArguments):
            Reference.parse(text)


class TestPublishing:
    def test_versions_ascend_and_the_same_program_is_published_once(self, url):
        async def work() -> None:
            async with open_library(url) as library:
                first = await library.publish_record(record(1), "qa", by="alice")
                again = await library.publish_record(
                    record(1, program_id="other", version=2, created_at="", follows="x@y", library_version=4), "qa"
                )
                second = await library.publish_record(record(2).model_dump(mode="json"), "qa", alias="prod")
                assert (first.version, again.version, second.version) == (1, 1, 2)
                assert (first.made_by, again.made_by, second.made_by) == ("alice", "alice", "nobody")
                assert (first.alias, second.alias) == (None, "prod")
                assert await library.resolve("qa@prod") == (Reference("qa", alias="prod"), 2)
                published = await library.get_record("qa", 2)
                assert (published["program_id"], published["version"], published["follows"]) == ("qa", 1, None)
                [program] = await library.list_library()
                assert program.model_dump() == {"name": "qa", "versions": [1, 2], "aliases": {"prod": 2}}

        run(work())

    def test_only_what_any_session_can_take_in_is_published(self, url, monkeypatch):
        monkeypatch.setattr(library, "MAX_RECORD_BYTES", 2000)
        local = record(1, portable=False, not_portable_because=["its tool 'f' is a function of the notebook"])
        cases: list[tuple[Any, str, str | None, type[errors.DSPexError], str]] = [
            (local, "qa", None, errors.NotPortable, "'f' is a function of the notebook"),
            (record(1, dspy_version="x" * 2000), "qa", None, errors.TooLarge, "2,000 is what a session"),
            ({"program_id": "qa", "version": 0}, "qa", None, errors.InvalidRecord, "version"),
            (with_args({"n": 2**70}), "qa", None, errors.InvalidRecord, "not JSON"),
            (with_args({"text": "\ud800"}), "qa", None, errors.InvalidRecord, "not JSON"),
            (record(1), "q a", None, errors.InvalidArguments, "no name"),
            (record(1), "qa", "Prod", errors.InvalidArguments, "no alias"),
            (record(1), "qa", "3", errors.InvalidArguments, "is a version"),
        ]

        async def work() -> None:
            async with open_library(url) as library:
                for given, name, alias, error, message in cases:
                    with pytest.raises(error, match=message):
                        await library.publish_record(given, name, alias=alias)
                assert await library.list_library() == []

        run(work())

    def test_an_alias_moves_forward_and_back_and_a_version_never(self, url):
        async def work() -> None:
            async with open_library(url) as library:
                for seed in (1, 2, 3):
                    await library.publish_record(record(seed), "qa", alias="prod")
                moved = await library.move_alias("qa@prod", 1, by="alice")
                assert (moved.version, moved.previous, moved.made_by) == (1, 3, "alice")
                back = [await library.roll_back_alias("qa@prod") for _ in range(3)]
                assert [(alias.version, alias.previous) for alias in back] == [(3, 2), (2, 1), (1, None)]
                with pytest.raises(errors.VersionConflict):
                    await library.roll_back_alias("qa@prod")
                with pytest.raises(errors.ProgramNotFound):
                    await library.move_alias("qa@prod", 4)
                with pytest.raises(errors.ProgramNotFound):
                    await library.roll_back_alias("qa@beta")
                for attempt in (library.move_alias("qa@3", 1), library.roll_back_alias("qa@3")):
                    with pytest.raises(errors.InvalidArguments, match="qa@3 is a version"):
                        await attempt
                assert (await library.resolve("qa@prod"))[1] == 1

        run(work())


class TestWhereAliasesPoint:
    def test_a_move_made_here_is_known_at_once_and_one_made_elsewhere_after_a_second(self, url):
        async def work() -> None:
            clock = Clock()
            async with open_library(url) as other, CountingStore(url) as store:
                here = Library(store, LOG, clock=clock)
                for seed in (1, 2, 3):
                    await other.publish_record(record(seed), "qa")
                await other.move_alias("qa@prod", 1)
                await here.look("qa@prod")
                assert here.target("qa@prod") == 1
                await here.move_alias("qa@prod", 2)
                assert not here.knows("qa@prod")
                await here.look("qa@prod")
                assert here.target("qa@prod") == 2

                await other.move_alias("qa@prod", 3)
                clock.now += 0.9 * library.LOOK_INTERVAL
                store.asked.clear()
                assert here.knows("qa@prod"), "asked more than once a second"
                clock.now += 0.1 * library.LOOK_INTERVAL
                assert not here.knows("qa@prod")
                await asyncio.gather(*(here.look("qa@prod") for _ in range(100)))
                assert here.target("qa@prod") == 3
                assert store.asked == {"serial": 1, "resolve": 1}

                clock.now += library.LOOK_INTERVAL
                await here.look("qa@prod")
                assert store.asked == {"serial": 2, "resolve": 1}, "nothing had changed"

        run(work())

    def test_an_alias_that_is_gone_is_told_of_once(self, url, caplog):
        async def work() -> None:
            clock = Clock()
            async with open_library(url) as other, SQLStore(url) as store:
                here = Library(store, LOG, clock=clock)
                await other.publish_record(record(1), "qa", alias="prod")
                await here.look("qa@prod")
                await other.unpublish_program("qa")
                for _ in range(3):
                    await other.publish_record(record(1), "another")  # the library changes
                    await other.unpublish_program("another")
                    clock.now += library.LOOK_INTERVAL
                    await here.look("qa@prod")
                    assert here.target("qa@prod") is None
                with pytest.raises(errors.ProgramNotFound, match="qa@prod"):
                    await here.resolve("qa@prod")
                for strange in ("qa@3", "no reference"):  # a record may tell anything
                    await here.look(strange)
                    assert here.target(strange) is None

        run(work())
        assert [text for text in caplog.messages if "qa@prod" in text] == [
            "the library has no qa@prod any more: what follows it stays as it is"
        ]

    def test_an_alias_that_nobody_follows_is_not_logged_for_having_been_asked_for(self, url, caplog):
        async def work() -> None:
            async with open_library(url) as library:
                with pytest.raises(errors.ProgramNotFound, match="nothing@prod"):
                    await library.resolve("nothing@prod")
                assert "nothing@prod" not in caplog.text
                await library.look("nothing@prod")
                assert "no nothing@prod any more" in caplog.text

        run(work())

    def test_many_who_want_a_record_at_once_have_it_read_once(self, url):
        async def work() -> None:
            async with CountingStore(url) as store:
                here = Library(store, LOG)
                await here.publish_record(record(1), "qa")
                found = await asyncio.gather(*(here.get_record("qa", 1) for _ in range(20)))
                assert store.asked["entry"] == 1
                assert all(one is found[0] for one in found)

        run(work())

    def test_what_was_read_before_a_move_made_here_is_not_believed_after_it(self, url):
        async def work() -> None:
            async with StoreThatAnswersLate(url) as store:
                here = Library(store, LOG)
                for seed in (1, 2):
                    await here.publish_record(record(seed), "qa")
                await here.move_alias("qa@prod", 1)
                looking = asyncio.create_task(here.look("qa@prod"))
                await store.looked.wait()
                await here.move_alias("qa@prod", 2)
                store.late.set()
                await looking
                assert here.target("qa@prod") == 2

        run(work())

    def test_a_store_that_cannot_be_asked_leaves_what_is_known(self, url, caplog):
        async def work() -> None:
            clock = Clock()
            async with SQLStore(url) as store:
                here = Library(store, LOG, clock=clock)
                await here.publish_record(record(1), "qa", alias="prod")
                await here.look("qa@prod")
            clock.now += library.LOOK_INTERVAL
            await here.look("qa@prod")
            assert here.target("qa@prod") == 1
            assert here.knows("qa@prod"), "asked again before a second is over"
            with pytest.raises(errors.StoreError):
                await here.look("qa@beta")

        run(work())
        assert "cannot be asked where qa@prod points" in caplog.text

    def test_records_are_read_once_and_the_least_used_are_let_go(self, url, monkeypatch):
        async def work() -> None:
            async with CountingStore(url) as store:
                here = Library(store, LOG)
                for seed in (1, 2, 3):
                    await here.publish_record(record(seed), "qa")
                for _ in range(3):
                    assert (await here.get_record("qa", 1))["spec"]["config"] == {"seed": 1}
                assert store.asked["entry"] == 1
                monkeypatch.setattr(library, "MAX_KEPT_BYTES", 2 * len((await here.get_record("qa", 1)).__repr__()))
                for version in (2, 3, 1, 2, 3, 1):
                    await here.get_record("qa", version)
                assert store.asked["entry"] > 1

        run(work())


class LibraryBackend(MemoryBackend):
    """Takes records in as a kernel does, and answers with the seed of the version that it ran.

    Attributes:
        taking: New versions are taken in when it is set.
        refusal: What is said instead of taking one in; None takes it in.
        dies_after_taking: The next one is journaled, and then the kernel dies.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.taking = asyncio.Event()
        self.taking.set()
        self.refusal: errors.DSPexError | None = None
        self.dies_after_taking = False

    def taken(self, session_id: str | None = None) -> int:
        """How often a session was asked to take a new version in."""
        return sum(call.command == "follow_program" and session_id in (None, of) for of, call in self.asked)

    def change_inside(self, session_id: str, seed: int, *, anew: bool = False) -> None:
        """What a notebook's cell does: the service is told nothing."""
        room = self._rooms[session_id]
        version = room.contents.programs["qa"][-1].version + 1
        if anew:
            self._write(room, ProgramDeleted(program_id="qa"))
            version = 1
        self._write(room, ProgramPut(record=record(seed, program_id="qa", version=version)))

    async def _answer(self, room: Any, row: Command, args: Any) -> dict[str, Any]:
        programs = room.contents.programs
        match row.name:
            case "import_program" | "follow_program":
                if row.name == "follow_program":
                    await self.taking.wait()
                    if self.refusal is not None:
                        raise self.refusal
                result = self._take_in(room, args)
                if row.name == "follow_program" and self.dies_after_taking:
                    self.dies_after_taking = False
                    self.lose(room.place.kernel_id.removeprefix("kernel-of-"))
                    await asyncio.get_running_loop().create_future()  # no reply leaves
                return result
            case "create_program":
                version = len(programs.get(args.program_id, [])) + 1
                made = record(args.config["seed"], program_id=args.program_id, version=version)
                self._write(room, ProgramPut(record=made))
                return {"program_id": args.program_id, "version": version, "signature": ""}
            case "execute_program" | "get_program" | "export_program":
                await asyncio.sleep(0)
                versions = {known.version: known for known in programs[args.program_id]}
                found = versions[args.version or max(versions)]
                outputs = {"seed": found.spec.config["seed"]}
                told = {"program_id": args.program_id, "version": found.version, "outputs": outputs}
                return {"record": found.model_dump(mode="json")} if row.name == "export_program" else told
        return await super()._answer(room, row, args)

    def _take_in(self, room: Any, args: Any) -> dict[str, Any]:
        program_id = args.program_id or args.record.program_id
        latest = max((known.version for known in room.contents.programs.get(program_id, [])), default=0)
        if args.if_version is not None and args.if_version != latest:
            raise errors.VersionConflict(f"program {program_id!r} is at version {latest}, not {args.if_version}")
        if latest and not args.replace and args.if_version is None:
            raise errors.ProgramExists(f"program {program_id!r} exists")
        made = args.record.model_copy(update={"program_id": program_id, "version": latest + 1})
        self._write(room, ProgramPut(record=made))
        return {"program_id": program_id, "version": latest + 1, "signature": ""}


class Service(SessionService):
    """The service on a backend in memory."""

    def _make_backends(self) -> list[SessionBackend]:
        self.memory = LibraryBackend(parent=self)
        return [self.memory]

    async def publish(self, *seeds: int) -> None:
        """Publish ``qa`` with these seeds, as versions from 1, and let ``qa@prod`` point to the first."""
        for seed in seeds:
            await self.publish_record(record(seed).model_dump(mode="json"), "qa")
        await self.move_alias("qa@prod", 1)


@pytest.fixture
def make(tmp_path: Path, url: str) -> Callable[..., Service]:
    def make(**traits: Any) -> Service:
        return Service(data_dir=str(tmp_path), store_url=url, **traits)

    return make


async def seed_of(session: Any, **options: Any) -> int:
    """Which program answers."""
    return int((await session.execute_program("qa", {}, **options))["seed"])


async def records_of(service: Service, session_id: str, versions: int = 1) -> list[ProgramRecord]:
    async with SQLStore(service.store_url) as store:
        told = await wait_until_stored(store, session_id, lambda told: len(told.programs.get("qa", ())) == versions)
        return told.programs["qa"]


class TestMakingPrograms:
    def test_an_alias_is_followed_and_a_version_is_not(self, make):
        async def work() -> None:
            async with make() as service:
                await service.publish(10, 20)
                follower, pinned = await service.create_session(), await service.create_session()
                assert (await follower.create_program("qa", library="qa@prod")).version == 1
                await pinned.create_program("qa", library="qa@1")
                assert [await seed_of(session) for session in (follower, pinned)] == [10, 10]
                [kept] = await records_of(service, follower.session_id)
                assert (kept.program_id, kept.follows, kept.library_version) == ("qa", "qa@prod", 1)
                [kept] = await records_of(service, pinned.session_id)
                assert (kept.follows, kept.library_version) == (None, None)
                await service.move_alias("qa@prod", 2)
                assert [await seed_of(session) for session in (follower, pinned)] == [20, 10]

        run(work())

    def test_what_the_library_does_not_have_or_the_caller_says_twice_is_refused(self, make):
        async def work() -> None:
            async with make() as service:
                await service.publish(10)
                session = await service.create_session()
                for reference in ("qa@beta", "qa@2", "other@prod"):
                    with pytest.raises(errors.ProgramNotFound, match="library"):
                        await session.create_program("qa", library=reference)
                with pytest.raises(errors.InvalidArguments, match="name@alias"):
                    await session.create_program("qa", library="qa")
                with pytest.raises(errors.InvalidArguments, match=r"qa@prod brings its own signature, tools"):
                    await session.create_program("qa", "a -> b", library="qa@prod", tools=["search"])
                assert await session.list_programs() == []

        run(work())

    def test_replace_and_if_version_mean_what_they_mean(self, make):
        async def work() -> None:
            async with make() as service:
                await service.publish(10)
                session = await service.create_session()
                await session.create_program("qa", config={"seed": 1})
                with pytest.raises(errors.ProgramExists):
                    await session.create_program("qa", library="qa@prod")
                with pytest.raises(errors.VersionConflict):
                    await session.create_program("qa", library="qa@prod", if_version=0)
                assert (await session.create_program("qa", library="qa@prod", if_version=1)).version == 2
                assert (await session.create_program("qa", library="qa@prod", replace=True)).version == 3
                assert await seed_of(session) == 10

        run(work())

    def test_a_record_that_a_caller_imports_follows_nothing(self, make):
        async def work() -> None:
            async with make() as service:
                await service.publish(10, 20)
                session = await service.create_session()
                await session.create_program("qa", library="qa@prod")
                exported = await session.export_program("qa")
                assert exported["follows"] == "qa@prod"
                other = await service.create_session()
                await other.import_program(exported)
                await service.move_alias("qa@prod", 2)
                assert [await seed_of(session), await seed_of(other)] == [20, 10]

        run(work())

    def test_a_sessions_program_is_published_and_instantiated_in_five_hundred_others(self, make):
        async def work() -> None:
            async with make() as service:
                author = await service.create_session(owner="author")
                for seed in (10, 20):
                    await author.create_program("draft", config={"seed": seed})
                published = await service.publish_program(author.session_id, "draft", "qa", alias="prod", by="me")
                assert (published.version, published.alias, published.made_by) == (1, "prod", "me")
                sessions = await asyncio.gather(*(service.create_session() for _ in range(500)))
                await asyncio.gather(*(session.create_program("qa", library="qa@prod") for session in sessions))
                assert await asyncio.gather(*(seed_of(session) for session in sessions)) == [20] * 500
                assert service.memory.taken() == 0

                await author.create_program("draft", config={"seed": 30})
                await service.publish_program(author.session_id, "draft", "qa", alias="prod")
                assert await asyncio.gather(*(seed_of(session) for session in sessions)) == [30] * 500
                await service.roll_back_alias("qa@prod")
                assert await asyncio.gather(*(seed_of(session) for session in sessions)) == [20] * 500
                assert service.memory.taken() == 1000

        run(work())


@asynccontextmanager
async def a_follower(make: Callable[..., Service]) -> AsyncIterator[tuple[Service, Any]]:
    """A service with ``qa`` of the seeds 10, 20 and 30, and a session that follows ``qa@prod``."""
    async with make() as service:
        await service.publish(10, 20, 30)
        session = await service.create_session(session_id="follower")
        await session.create_program("qa", library="qa@prod")
        yield service, session


class TestFollowing:
    def test_a_session_that_is_not_called_is_not_touched_and_the_next_call_sees_the_move(self, make):
        async def work() -> None:
            async with a_follower(make) as (service, session):
                await service.move_alias("qa@prod", 2)
                await service.move_alias("qa@prod", 3)
                await session.list_programs()
                assert service.memory.taken() == 0
                assert await seed_of(session) == 30
                assert (await session.get_program("qa"))["version"] == 2
                assert service.memory.taken() == 1
                kept = await records_of(service, "follower", versions=2)
                assert [(known.version, known.library_version) for known in kept] == [(1, 1), (2, 3)]

        run(work())

    @pytest.mark.parametrize("command", ["execute_program", "get_program", "export_program"])
    def test_what_reads_the_latest_version_follows_and_what_names_one_does_not(self, make, command):
        async def work() -> None:
            async with a_follower(make) as (service, session):
                await service.move_alias("qa@prod", 2)
                await session.call(command, {"program_id": "qa", "version": 1})
                assert service.memory.taken() == 0
                await session.call(command, {"id": "qa"} if command == "execute_program" else {"program_id": "qa"})
                assert service.memory.taken() == 1

        run(work())

    def test_many_calls_share_one_new_version(self, make):
        async def work() -> None:
            async with a_follower(make) as (service, session):
                await service.move_alias("qa@prod", 2)
                service.memory.taking.clear()
                calls = [asyncio.create_task(seed_of(session)) for _ in range(50)]
                await wait_until(service.memory.taken, what="the new version")
                service.memory.taking.set()
                assert await asyncio.gather(*calls) == [20] * 50
                assert service.memory.taken() == 1

        run(work())

    def test_every_call_that_begins_after_a_move_sees_it(self, make):
        async def work() -> None:
            async with a_follower(make) as (service, session):
                seeds = {1: 10, 2: 20, 3: 30}
                stop = False
                seen = []

                async def ask() -> None:
                    while not stop:
                        seen.append(await seed_of(session))

                asking = [asyncio.create_task(ask()) for _ in range(4)]
                for version in (2, 3, 1, 2, 1, 3):
                    await service.move_alias("qa@prod", version)
                    assert await asyncio.gather(*(seed_of(session) for _ in range(5))) == [seeds[version]] * 5
                    back = await service.roll_back_alias("qa@prod")
                    assert await seed_of(session) == seeds[back.version]
                    await service.move_alias("qa@prod", version)
                stop = True
                await asyncio.gather(*asking)
                assert set(seen) == {10, 20, 30}

        run(work())

    def test_a_move_back_while_the_new_version_is_taken_in_is_seen_too(self, make):
        async def work() -> None:
            async with a_follower(make) as (service, session):
                another = await service.create_session()
                await another.create_program("qa", library="qa@prod")
                await service.move_alias("qa@prod", 2)
                service.memory.taking.clear()
                early = asyncio.create_task(seed_of(session))
                await wait_until(service.memory.taken, what="the new version")
                await service.roll_back_alias("qa@prod")
                assert await seed_of(another) == 10  # from here on it is known where the alias points
                late = asyncio.create_task(seed_of(session))  # what is known of the session says: nothing to do
                service.memory.taking.set()
                assert await late == 10
                assert await early == 10

        run(work())

    def test_a_caller_who_leaves_does_not_stop_what_others_wait_for(self, make):
        async def work() -> None:
            async with a_follower(make) as (service, session):
                await service.move_alias("qa@prod", 2)
                service.memory.taking.clear()
                leaves, stays = (asyncio.create_task(seed_of(session)) for _ in range(2))
                await wait_until(service.memory.taken, what="the new version")
                leaves.cancel()
                named = {"program_id": "qa"}
                cancelled = asyncio.create_task(session.call("execute_program", named, request_id="mine"))
                await wait_until(lambda: service._registry.get("follower").queued.get("mine"), what="its wait")
                assert await session.cancel("mine")
                with pytest.raises(errors.CommandCancelled, match="before it ran"):
                    await cancelled
                with pytest.raises(errors.CommandTimeout, match="brought to qa@prod"):
                    await seed_of(session, timeout=0.05)
                service.memory.taking.set()
                assert await stays == 20
                assert service.memory.taken() == 1

        run(work())

    def test_a_program_that_was_changed_in_its_session_follows_no_more(self, make):
        async def work() -> None:
            async with a_follower(make) as (service, session):
                await session.create_program("qa", config={"seed": 77}, replace=True)
                await service.move_alias("qa@prod", 2)
                assert await seed_of(session) == 77
                await session.delete_program("qa")
                await session.create_program("qa", library="qa@prod")
                assert await seed_of(session) == 20
                await session.call("reset")
                await service.move_alias("qa@prod", 3)
                await session.create_program("qa", config={"seed": 78})
                assert await seed_of(session) == 78
                assert service.memory.taken() == 0

        run(work())

    @pytest.mark.parametrize("anew", [False, True])
    def test_a_program_that_was_changed_inside_its_kernel_is_not_written_over(self, make, anew):
        async def work() -> None:
            async with a_follower(make) as (service, session):
                service.memory.change_inside("follower", 77, anew=anew)
                await service.move_alias("qa@prod", 2)
                assert await seed_of(session) == 77

                await session.create_program("qa", library="qa@prod", replace=True)
                await service.move_alias("qa@prod", 3)
                service.memory.taking.clear()
                asked = asyncio.create_task(seed_of(session))
                await wait_until(service.memory.taken, what="the new version")
                service.memory.change_inside("follower", 78)  # after the service looked
                service.memory.taking.set()
                assert await asked == 78

        run(work())

    def test_what_was_unpublished_stays_where_it_is(self, make, caplog):
        async def work() -> None:
            async with a_follower(make) as (service, session):
                await service.unpublish_program("qa")
                assert [await seed_of(session) for _ in range(3)] == [10, 10, 10]
                again = await service.publish_record(record(40).model_dump(mode="json"), "qa", alias="prod")
                assert again.version == 4
                assert await seed_of(session) == 40

        with caplog.at_level(logging.WARNING):
            run(work())
        assert sum("no qa@prod any more" in text for text in caplog.messages) == 1

    def test_a_version_that_cannot_be_taken_in_fails_the_calls_and_changes_nothing(self, make):
        async def work() -> None:
            async with a_follower(make) as (service, session):
                await service.move_alias("qa@prod", 2)
                service.memory.refusal = errors.ToolNotFound("no tool 'search' here")
                outcomes = await asyncio.gather(*(seed_of(session) for _ in range(3)), return_exceptions=True)
                assert {type(outcome) for outcome in outcomes} == {errors.ToolNotFound}
                assert not any(outcome.retryable for outcome in outcomes), "the session would refuse it again"
                assert {str(outcome) for outcome in outcomes} == {
                    "program 'qa' follows qa@prod, and its version 2 could not be taken in: no tool 'search' here"
                }
                await service.roll_back_alias("qa@prod")
                assert await seed_of(session) == 10
                service.memory.refusal = None
                await service.move_alias("qa@prod", 2)
                assert await seed_of(session) == 20

        run(work())

    def test_a_kernel_that_dies_between_the_new_version_and_its_reply_has_it_once(self, make):
        async def work() -> None:
            async with a_follower(make) as (service, session):
                await service.move_alias("qa@prod", 2)
                service.memory.dies_after_taking = True
                with pytest.raises(errors.KernelDied, match="follows qa@prod") as died:
                    await seed_of(session)
                assert died.value.retryable, "nothing of the call ran"
                assert await seed_of(session) == 20
                assert [known.version for known in await records_of(service, "follower", versions=2)] == [1, 2]

        run(work())

    def test_the_next_service_goes_on_following(self, make):
        async def work() -> None:
            async with a_follower(make) as (service, _):
                await service.move_alias("qa@prod", 2)
            async with make() as service:
                session = service.get_session("follower")
                assert await seed_of(session) == 20
                await service.move_alias("qa@prod", 3)
                assert await seed_of(session) == 30

        run(work())

    def test_a_move_by_another_service_on_the_store_is_seen(self, make):
        async def work() -> None:
            async with a_follower(make) as (_, session), make() as other:
                await other.move_alias("qa@prod", 2)
                seen = []

                async def has_seen() -> bool:
                    seen.append(await seed_of(session))
                    return seen[-1] == 20

                async with asyncio.timeout(20):
                    while not await has_seen():
                        pass
                assert set(seen) == {10, 20}
                assert sorted(seen) == seen, "an old version after the new one"

        run(work())

    def test_who_follows_nothing_never_asks_the_library(self, make, monkeypatch):
        async def work() -> None:
            async with a_follower(make) as (service, session):
                other = await service.create_session()
                await other.create_program("qa", library="qa@1")
                await session.create_program("own", config={"seed": 1})
                asked: Counter[str] = Counter()
                monkeypatch.setattr(Library, "knows", lambda _, reference: bool(asked.update([reference])) or True)
                await seed_of(other)
                await session.execute_program("own", {})
                await session.call("execute_program", {"program_id": "qa", "version": 1})
                assert not asked
                await seed_of(session)
                assert asked["qa@prod"]

        run(work())

    def test_the_switch_is_no_call_of_the_users(self, make):
        async def work() -> None:
            async with a_follower(make) as (service, session):
                await service.move_alias("qa@prod", 2)
                await session.call("execute_program", {"program_id": "qa"}, request_id="mine")
                taken = [call for _, call in service.memory.asked if call.command == "follow_program"]
                assert [(call.request_id, call.stream) for call in taken] == [(None, False)]
                assert "mine" not in str(taken)
                with pytest.raises(errors.UnknownCommand):
                    await session.call("follow_program", {"record": record(1).model_dump(mode="json")})

        run(work())


class TestTheCommand:
    def test_it_publishes_points_and_rolls_back_on_the_store_that_services_use(
        self,
        run_cli,  # noqa: F811  # the fixture
        make,
        tmp_path,
        monkeypatch,
    ):
        store, file = f"--store={tmp_path / 'store.sqlite'}", tmp_path / "qa.json"

        def outcome(*argv: str) -> dict[str, Any]:
            code, out, err = run_cli("library", *argv, store, "--by=alice")
            assert (code, err) == (0, "")
            answer: dict[str, Any] = json.loads(out)
            return answer

        file.write_text(record(10).model_dump_json())
        first = outcome("publish", str(file), "qa", "--alias=prod")
        assert (first["version"], first["alias"], first["made_by"]) == (1, "prod", "alice")
        exported = json.dumps({"record": record(20).model_dump(mode="json")}).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(exported)))
        assert outcome("publish", "-", "qa")["version"] == 2
        assert outcome("point", "qa@prod", "2")["previous"] == 1
        assert outcome("list") == {"name": "qa", "versions": [1, 2], "aliases": {"prod": 2}}

        async def ask(expected: int) -> None:
            async with make() as service, service.session() as session:
                await session.create_program("qa", library="qa@prod")
                assert await seed_of(session) == expected

        run(ask(20))
        assert outcome("rollback", "qa@prod")["version"] == 1
        run(ask(10))

    @pytest.mark.parametrize(
        ("argv", "code", "message"),
        [
            ((), "invalid_arguments", "list, publish, point, rollback"),
            (("move",), "invalid_arguments", "list, publish, point, rollback"),
            (("point", "qa@prod"), "invalid_arguments", "NAME@ALIAS and VERSION"),
            (("list", "--alias=prod"), "invalid_arguments", "--alias is for publish"),
            (("point", "qa@prod", "two"), "invalid_arguments", "no version"),
            (("point", "qa@prod", "9" * 40), "invalid_arguments", "no version"),
            (("point", "qa", "1"), "invalid_arguments", "name@alias"),
            (("point", "qa@prod", "1"), "program_not_found", "no version 1 of 'qa'"),
            (("rollback", "qa@prod"), "program_not_found", "qa@prod"),
            (("publish", "missing.json", "qa"), "invalid_arguments", "missing.json"),
            (("publish", "{file}", "qa"), "invalid_record", "not JSON"),
            (("list", "--store=elsewhere.sqlite"), "store_error", "no store"),
        ],
    )
    def test_what_cannot_be_done_fails_in_one_line(
        self,
        run_cli,  # noqa: F811  # the fixture
        url,
        tmp_path,
        argv,
        code,
        message,
    ):
        (tmp_path / "text").write_text("no JSON")
        (tmp_path / "store.sqlite").touch()  # SQLite takes it for an empty database
        words = [word.format(file=tmp_path / "text") for word in argv]
        store = [] if "--store=elsewhere.sqlite" in words else [f"--store={url}"]
        status, out, err = run_cli("library", *words, *store)
        assert (status, out) == (1, "")
        [line] = err.splitlines()
        assert line.startswith(f"{code}: ")
        assert message in line
