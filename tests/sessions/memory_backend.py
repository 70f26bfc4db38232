"""A backend without processes, for tests of what stands above backends; faults are switched on by name."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dspex_kernels import SessionService, errors
from dspex_kernels.protocol import journal
from dspex_kernels.protocol.commands import Command, LMProfileArgs, get_command
from dspex_kernels.protocol.records import (
    Change,
    ProgramDeleted,
    ProgramPut,
    ProgramRecord,
    ProgramSpec,
    SessionContents,
    SessionReset,
    SessionSettings,
    SettingsChanged,
)
from dspex_kernels.sessions.backend import Place, PlaceGone, SessionBackend
from dspex_kernels.sessions.calls import Call
from dspex_kernels.sessions.model import BackendName, SessionRecord


@dataclass(eq=False)
class _Room:
    session_id: str
    place: Place
    directory: Path | None
    """None in a pooled kernel: what changes is told with the reply."""
    contents: SessionContents
    sequence: int
    calls: dict[asyncio.Future[Any], Command] = field(default_factory=dict)


class MemoryBackend(SessionBackend):
    """Keeps each session's programs in this process.

    As "dedicated" it journals them as a kernel does; as "pooled" it has them from the record and tells its changes
    with each reply.

    Args:
        name: In which backend's place it stands.
        **kwargs: As for ``SessionBackend``.

    Attributes:
        gate: Opening waits for it; set unless a test clears it.
        closing: Closing waits for it; set unless a test clears it.
        answering: Answers wait for it, when all else is done; set unless a test clears it. What comes when its
            caller has left is a late reply.
        start_failure: Raised by ``open`` instead of opening.
        opened: The records that ``open`` was given.
        asked: Every call, with its session's id.
    """

    def __init__(self, name: BackendName = "dedicated", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.name = name
        self.gate = _set_event()
        self.closing = _set_event()
        self.answering = _set_event()
        self.start_failure: Exception | None = None
        self.opened: list[SessionRecord] = []
        self.asked: list[tuple[str, Call]] = []
        self._rooms: dict[str, _Room] = {}
        self._late: set[asyncio.Future[Any]] = set()
        self._changes: dict[asyncio.Task[Any] | None, list[Change]] = {}
        """What each call has changed so far."""

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        for session_id in list(self._rooms):
            self._leave(session_id, lambda _: errors.ServiceClosed("the service is closing"))
        for work in self._late:
            work.cancel()

    async def open(self, record: SessionRecord, *, timeout: float) -> Place:
        self.opened.append(record)
        await asyncio.wait_for(self.gate.wait(), timeout)
        if self.start_failure is not None:
            raise self.start_failure
        place = Place(f"kernel-of-{record.session_id}", None, record.generation)
        room = self._from_record(record, place) if self.name == "pooled" else _from_journal(record, place)
        self._rooms[record.session_id] = room
        return place

    async def call(self, session_id: str, call: Call) -> dict[str, Any]:
        self.asked.append((session_id, call))
        room = self._rooms.get(session_id)
        if room is None:
            raise PlaceGone(session_id)
        row = get_command(call.command)
        work = asyncio.ensure_future(self._run(room, row, call))
        failure: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        room.calls[failure] = row
        try:
            done, _ = await asyncio.wait({work, failure}, timeout=call.timeout, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise errors.CommandTimeout(f"{call.command}: {call.timeout:g} s are over")
            return (failure if failure in done else work).result()
        finally:
            del room.calls[failure]
            if work not in self._late:
                work.cancel()

    async def close(self, session_id: str) -> None:
        await self.closing.wait()
        self._leave(session_id, lambda _: errors.CommandCancelled(f"session {session_id!r} was closed"))

    def withdraw(self, session_id: str, request_id: str) -> bool:
        return False

    async def interrupt(self, session_id: str) -> None:
        pass

    def get_place(self, session_id: str) -> Place | None:
        room = self._rooms.get(session_id)
        return room.place if room else None

    @property
    def late(self) -> int:
        """Calls that have been carried out, whose replies are on their way."""
        return len(self._late)

    def running(self, session_id: str) -> int:
        """A session's calls whose callers wait."""
        return len(self._rooms[session_id].calls)

    def contents(self, session_id: str) -> SessionContents:
        """What a session's namespace holds."""
        return self._rooms[session_id].contents

    def lose(self, session_id: str) -> None:
        """What happens when a kernel dies."""
        room = self._rooms[session_id]
        self._leave(session_id, lambda row: errors.KernelDied("the kernel died", retryable=row.repeatable))
        assert self.lost is not None
        self.lost(session_id, room.place, "its kernel died")

    def _from_record(self, record: SessionRecord, place: Place) -> _Room:
        assert record.directory is None
        return _Room(record.session_id, place, None, record.contents.model_copy(deep=True), 0)

    def _leave(self, session_id: str, error_for: Callable[[Command], errors.DSPexError]) -> None:
        room = self._rooms.pop(session_id, None)
        for failure, row in room.calls.items() if room else ():
            if not failure.done():
                failure.set_exception(error_for(row))

    async def _run(self, room: _Room, row: Command, call: Call) -> dict[str, Any]:
        """What the kernel does for a call, and its reply, which comes also when nobody waits for it any more."""
        work = asyncio.current_task()
        assert work is not None
        changes = self._changes[work] = []
        try:
            result = await self._answer(room, row, row.parse(call.args))
        finally:
            del self._changes[work]
        self._late.add(work)
        try:
            await self.answering.wait()
        finally:
            self._late.discard(work)
        if self._rooms.get(room.session_id) is not room:
            return result  # it died, or was closed, before it could reply
        told = [change.model_dump(mode="json") for change in changes] if room.directory is None else []
        if told and self.changed is not None:
            self.changed(room.session_id, room.place.generation, told)
        if self.replied is not None:
            about = {"session_id": room.session_id, "request_id": call.request_id, "changes": told}
            place = {"kernel_id": room.place.kernel_id, "generation": room.place.generation}
            self.replied({"status": "ok", "result": result, **about, **place})
        return result

    async def _answer(self, room: _Room, row: Command, args: Any) -> dict[str, Any]:
        contents = room.contents
        match row.name:
            case "create_program":
                versions = contents.programs.get(args.program_id, [])
                if versions and not args.replace:
                    raise errors.ProgramExists(f"program {args.program_id!r} exists")
                version = len(versions) + 1
                reasons = list(args.tools)  # as functions of a notebook are
                record = ProgramRecord(
                    program_id=args.program_id,
                    version=version,
                    spec=ProgramSpec(),
                    portable=not reasons,
                    not_portable_because=reasons,
                )
                self._write(room, ProgramPut(record=record))
                return {"program_id": args.program_id, "version": version, "signature": str(args.signature)}
            case "delete_program":
                self._write(room, ProgramDeleted(program_id=args.program_id))
                return {"program_id": args.program_id}
            case "list_programs":
                programs = [{"program_id": program_id} for program_id in contents.programs]
                return {"programs": programs, "count": len(programs)}
            case "configure":
                if args.lm == "refused/model":
                    raise errors.PolicyDenied("model 'refused/model' is not allowed here")
                given = LMProfileArgs(model=args.lm) if isinstance(args.lm, str) else args.lm
                lm = given.profile() if given else contents.settings.lm
                budget = args.budget if args.budget is not None else contents.settings.budget
                settings = SessionSettings(lm=lm, budget=budget)
                self._write(room, SettingsChanged(settings=settings))
                return {"settings": settings.model_dump(mode="json")}
            case "reset":
                self._write(room, SessionReset())
                return {"programs": 0}
            case "execute_program":
                lm = contents.settings.lm
                if lm is not None and lm.offline is not None and lm.offline.latency_s:
                    await asyncio.get_running_loop().create_future()  # until somebody ends it
                spent = contents.spent
                self._write(room, spent.model_copy(update={"executions": spent.executions + 1, "ok": spent.ok + 1}))
                return {"program_id": args.program_id, "version": 1, "outputs": dict(args.inputs)}
            case "get_stats":
                return {"executions": contents.spent.executions}
            case "ping":
                return {"busy": False, "clients": 0, "last_activity": None}
            case "cancel":
                return {"cancelled": False}
        return {}

    def _write(self, room: _Room, change: Change) -> None:
        room.sequence += 1
        if room.directory is not None:
            with (room.directory / journal.FILE_NAME).open("ab") as file:
                file.write(journal.encode(room.sequence, datetime.now(UTC), change))
        room.contents.apply(change)
        if (changes := self._changes.get(asyncio.current_task())) is not None:
            changes.append(change)


class MemoryService(SessionService):
    """The service on backends in memory, one of each name.

    Attributes:
        dedicated: The one in the place of "dedicated".
        pooled: The one in the place of "pooled".
    """

    dedicated: MemoryBackend
    pooled: MemoryBackend

    @property
    def memory(self) -> MemoryBackend:
        """The one that sessions get by default."""
        return self.pooled if self.backend == "pooled" else self.dedicated

    def _make_backends(self) -> list[SessionBackend]:
        self.dedicated, self.pooled = MemoryBackend("dedicated", parent=self), MemoryBackend("pooled", parent=self)
        return [self.dedicated, self.pooled]


@contextlib.contextmanager
def store_that_refuses(path: Path, program_id: str) -> Iterator[None]:
    """A SQLite store that takes everything but programs of this id."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(
            "CREATE TRIGGER refusal BEFORE INSERT ON dspex_programs WHEN new.program_id = "
            f"'{program_id}' BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
        )
        yield
        database.execute("DROP TRIGGER refusal")


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


def _from_journal(record: SessionRecord, place: Place) -> _Room:
    assert record.directory is not None
    directory = Path(record.directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / journal.FILE_NAME
    if not path.exists():
        lines = [journal.encode_header(0)]
        for number, change in enumerate(journal.snapshot(record.contents), start=1):
            lines.append(journal.encode(number, datetime.now(UTC), change))
        path.write_bytes(b"".join(lines))
    entries, _ = journal.decode(path.read_bytes())
    return _Room(record.session_id, place, directory, journal.fold(entries), len(entries))
