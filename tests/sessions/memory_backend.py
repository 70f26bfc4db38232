"""A backend without processes, for tests of what stands above backends; faults are switched on by name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dspex_kernels import errors
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
from dspex_kernels.sessions.model import SessionRecord


@dataclass(eq=False)
class _Room:
    place: Place
    directory: Path
    contents: SessionContents
    sequence: int
    calls: dict[asyncio.Future[Any], Command] = field(default_factory=dict)


class MemoryBackend(SessionBackend):
    """Keeps each session's programs in this process and journals them as a kernel does.

    Attributes:
        gate: Opening waits for it; set unless a test clears it.
        start_failure: Raised by ``open`` instead of opening.
        opened: The records that ``open`` was given.
        asked: Every call, with its session's id.
    """

    name = "dedicated"  # stands in its place

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gate = asyncio.Event()
        self.gate.set()
        self.start_failure: Exception | None = None
        self.opened: list[SessionRecord] = []
        self.asked: list[tuple[str, Call]] = []
        self._rooms: dict[str, _Room] = {}

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        for session_id in list(self._rooms):
            self._leave(session_id, lambda _: errors.ServiceClosed("the service is closing"))

    async def open(self, record: SessionRecord, *, timeout: float) -> Place:
        self.opened.append(record)
        await asyncio.wait_for(self.gate.wait(), timeout)
        if self.start_failure is not None:
            raise self.start_failure
        assert record.directory is not None
        directory = Path(record.directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / journal.FILE_NAME
        if not path.exists():
            path.write_bytes(journal.encode_header(0))
        entries, _ = journal.decode(path.read_bytes())
        place = Place(f"kernel-of-{record.session_id}", None, record.generation)
        self._rooms[record.session_id] = _Room(place, directory, journal.fold(entries), len(entries))
        return place

    async def call(self, session_id: str, call: Call) -> dict[str, Any]:
        self.asked.append((session_id, call))
        room = self._rooms.get(session_id)
        if room is None:
            raise PlaceGone(session_id)
        row = get_command(call.command)
        work = asyncio.ensure_future(self._answer(room, row, row.parse(call.args)))
        failure: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        room.calls[failure] = row
        try:
            done, _ = await asyncio.wait({work, failure}, timeout=call.timeout, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise errors.CommandTimeout(f"{call.command}: {call.timeout:g} s are over")
            return done.pop().result()
        finally:
            del room.calls[failure]
            work.cancel()

    async def close(self, session_id: str) -> None:
        self._leave(session_id, lambda _: errors.CommandCancelled(f"session {session_id!r} was closed"))

    def withdraw(self, session_id: str, request_id: str) -> bool:
        return False

    async def interrupt(self, session_id: str) -> None:
        pass

    def get_place(self, session_id: str) -> Place | None:
        room = self._rooms.get(session_id)
        return room.place if room else None

    def lose(self, session_id: str) -> None:
        """What happens when a kernel dies."""
        room = self._rooms[session_id]
        self._leave(session_id, lambda row: errors.KernelDied("the kernel died", retryable=row.repeatable))
        assert self.lost is not None
        self.lost(session_id, room.place, "its kernel died")

    def _leave(self, session_id: str, error_for: Callable[[Command], errors.DSPexError]) -> None:
        room = self._rooms.pop(session_id, None)
        for failure, row in room.calls.items() if room else ():
            if not failure.done():
                failure.set_exception(error_for(row))

    async def _answer(self, room: _Room, row: Command, args: Any) -> dict[str, Any]:
        contents = room.contents
        match row.name:
            case "create_program":
                if args.program_id in contents.programs:
                    raise errors.ProgramExists(f"program {args.program_id!r} exists")
                record = ProgramRecord(program_id=args.program_id, version=1, spec=ProgramSpec())
                self._write(room, ProgramPut(record=record))
                return {"program_id": args.program_id, "version": 1, "signature": str(args.signature)}
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
                settings = SessionSettings(lm=given.profile() if given else None)
                self._write(room, SettingsChanged(settings=settings))
                return {"settings": settings.model_dump(mode="json")}
            case "reset":
                self._write(room, SessionReset())
                return {"programs": 0}
            case "execute_program":
                lm = contents.settings.lm
                if lm is not None and lm.offline is not None and lm.offline.latency_s:
                    await asyncio.get_running_loop().create_future()  # until somebody ends it
                return {"program_id": args.program_id, "version": 1, "outputs": dict(args.inputs)}
            case "cancel":
                return {"cancelled": False}
        return {}

    def _write(self, room: _Room, change: Change) -> None:
        room.sequence += 1
        with (room.directory / journal.FILE_NAME).open("ab") as file:
            file.write(journal.encode(room.sequence, datetime.now(UTC), change))
        room.contents.apply(change)
