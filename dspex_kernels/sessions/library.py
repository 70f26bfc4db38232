"""The program library as sessions see it: programs are published, instantiated under a reference, and follow it.

A reference is ``name@alias`` (``qa@prod``) or ``name@version`` (``qa@3``). A program that was made from an alias
follows it: when the alias has moved, the next call that needs the program's latest version first takes the new one
in, so moving an alias costs nothing for sessions that are not called. A program made from a version stays as it is,
and so does one that was changed in its session since.

``Library`` publishes, moves, and knows where aliases point; ``Followers`` changes the calls of sessions accordingly.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from logging import Logger, LoggerAdapter
from typing import Any, Final

import orjson
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from dspex_kernels import errors
from dspex_kernels.protocol import limits
from dspex_kernels.protocol.commands import CreateProgramArgs, get_command
from dspex_kernels.protocol.messages import first_problem
from dspex_kernels.protocol.records import ProgramRecord
from dspex_kernels.sessions.calls import Call
from dspex_kernels.sessions.keeper import Keeper
from dspex_kernels.sessions.live import Following, LiveSession
from dspex_kernels.sessions.store import MAX_PAGE
from dspex_kernels.sessions.store.library import AliasTarget, ProgramLibrary, check_alias, check_name
from dspex_kernels.sessions.tasks import Tasks

LOOK_INTERVAL: Final = 1.0
"""Seconds for which an alias counts as known: what another service moved is seen after that."""
MAX_RECORD_BYTES: Final = limits.MAX_REQUEST_BYTES - 64 * 1024
"""A published record as JSON: the request that takes it into a session must hold it, and what goes with it."""
MAX_KEPT_BYTES: Final = 32 * 1024 * 1024
"""Published records that are kept in memory, as JSON: hundreds of sessions want the same one at once."""
MAX_KNOWN: Final = 10_000
"""Aliases whose target is kept in memory."""

_FOLLOWING_COMMANDS: Final = frozenset({"execute_program", "get_program", "export_program"})
"""They read a program's latest version, unless they name one."""
_FROM_THE_RECORD: Final = ("signature", "module", "module_args", "config", "tools", "adapter")
"""Arguments of ``create_program`` that a published record answers itself."""

Carry = Callable[[LiveSession, Call], Awaitable[dict[str, Any]]]
"""Carries a command of the service's own to a session; what it changed is durable when it returns."""


class PublishedVersion(BaseModel):
    """A program as it was published."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: int = Field(ge=1, description="Ascending within the name; not the version that it had in its session.")
    alias: str | None = Field(None, description="The alias that points to it since; null where none was asked for.")
    made_by: str
    made_at: AwareDatetime


class AliasInfo(BaseModel):
    """Where an alias points."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    alias: str
    version: int = Field(ge=1)
    previous: int | None = Field(None, description="Where a roll-back would move it; null where there is nothing.")
    made_by: str = Field(description="Who pointed it there.")
    made_at: AwareDatetime


class PublishedProgram(BaseModel):
    """What the library has under one name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    versions: list[int] = Field(description="Ascending.")
    aliases: dict[str, int] = Field(description="Each with the version it points to.")


@dataclass(frozen=True, slots=True)
class Reference:
    """What ``name@alias`` or ``name@version`` means.

    Attributes:
        name: The program's name in the library.
        alias: None where a version is meant.
        version: None where an alias is meant.
    """

    name: str
    alias: str | None = None
    version: int | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference.

        Raises:
            InvalidArguments: It is none.
        """
        name, at, target = text.partition("@")
        if not at or not target:
            raise errors.InvalidArguments(
                f"{text[:200]!r} refers to no program of the library: write name@alias, or name@3 for version 3"
            )
        check_name(name)
        if not target.isdecimal():
            check_alias(target)
            return cls(name, alias=target)
        if not target.isascii() or len(target) > 10 or not 1 <= int(target) < 2**31:
            raise errors.InvalidArguments(f"{target[:64]!r} is no version of {name!r}: versions begin with 1")
        return cls(name, version=int(target))

    def __str__(self) -> str:
        return f"{self.name}@{self.alias if self.version is None else self.version}"


class Library:
    """Publishes programs, moves aliases, and knows in memory where those point that somebody follows.

    Args:
        store: Open, once anything is asked.
        log: Is told of aliases that are gone, and when the store cannot be asked.
        clock: Seconds; read to know whether it is time to look for what other services moved.
    """

    def __init__(
        self,
        store: ProgramLibrary,
        log: Logger | LoggerAdapter[Any],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._log = log
        self._clock = clock
        self._serial: int | None = None
        self._targets: dict[str, int | None] = {}
        """Where aliases point, by reference; None for one that is not there."""
        self._gone: set[str] = set()
        """Aliases of which the log was told that they are gone."""
        self._looked_at = -LOOK_INTERVAL
        self._moves = 0
        """Moves made here: what was read before one may be older than it."""
        self._looking = asyncio.Lock()
        """One look at the store at a time: who waited finds what the one before found."""
        self._records: OrderedDict[tuple[str, int], tuple[dict[str, Any], int]] = OrderedDict()
        """Published records as JSON, with their size in bytes; the last used last."""
        self._kept_bytes = 0

    async def publish_record(
        self, record: ProgramRecord | Mapping[str, Any], name: str, *, alias: str | None = None, by: str = ""
    ) -> PublishedVersion:
        """Publish a program as the next version of a name; the same program as the latest version is that version.

        The version and its alias are two steps, the alias last: what fails in between is mended by doing it again.

        Args:
            record: As ``export_program`` gives it.
            name: As a program's id is written.
            alias: Points to the new version from then on; None moves none.
            by: Who publishes, for the record; "" is nobody in particular.

        Raises:
            InvalidArguments: ``name``, ``alias`` or ``by`` is none.
            InvalidRecord: The record is none.
            NotPortable: It needs what only its notebook's kernel has.
            TooLarge: No session could take it in.
            ProgramLimitReached: The library is full.
        """
        if alias is not None:
            _check_target(name, alias)
        entry = await self._store.publish(name, _publishable(record, name), by=by or "nobody")
        if alias is not None:
            await self.move_alias(f"{name}@{alias}", entry.version, by=by)
        return PublishedVersion(
            name=name, version=entry.version, alias=alias, made_by=entry.made_by, made_at=entry.made_at
        )

    async def move_alias(self, reference: str, version: int, *, by: str = "") -> AliasInfo:
        """Let an alias, new or old, point to a version; every call that begins after this returns sees it.

        Args:
            reference: ``name@alias``.
            version: A published one.
            by: Who moves it, for the record; "" is nobody in particular.

        Raises:
            InvalidArguments: ``reference`` or ``by`` is none.
            ProgramNotFound: There is no such version.
            ProgramLimitReached: The name has as many aliases as it may.
        """
        name, alias = _alias_of(reference)
        return self._moved(await self._store.point(name, alias, version, by=by or "nobody"))

    async def roll_back_alias(self, reference: str, *, by: str = "") -> AliasInfo:
        """Let an alias point where it pointed before, in one step; the next roll-back goes one further back.

        Args:
            reference: ``name@alias``.
            by: Who does it, for the record; "" is nobody in particular.

        Raises:
            InvalidArguments: ``reference`` or ``by`` is none.
            ProgramNotFound: There is no such alias.
            VersionConflict: It never pointed elsewhere.
        """
        name, alias = _alias_of(reference)
        return self._moved(await self._store.roll_back(name, alias, by=by or "nobody"))

    async def list_library(self) -> list[PublishedProgram]:
        """All that is published, by name."""
        found: list[PublishedProgram] = []
        cursor: str | None = None
        while True:
            page = await self._store.library(limit=MAX_PAGE, after=cursor)
            found += [
                PublishedProgram(name=program.name, versions=list(program.versions), aliases=dict(program.aliases))
                for program in page.programs
            ]
            cursor = page.next_cursor
            if cursor is None:
                return found

    async def unpublish_program(self, name: str) -> None:
        """Remove a name with its versions and aliases; sessions keep what they made from it.

        Raises:
            ProgramNotFound: There is none.
        """
        await self._store.unpublish(name)
        self._moves += 1
        for key in [key for key in self._records if key[0] == name]:
            self._forget_record(key)
        for reference in [reference for reference in self._targets if Reference.parse(reference).name == name]:
            del self._targets[reference]

    def knows(self, reference: str) -> bool:
        """Whether ``target`` tells of an alias what was so within ``LOOK_INTERVAL``."""
        return reference in self._targets and self._clock() - self._looked_at < LOOK_INTERVAL

    def target(self, reference: str) -> int | None:
        """The version that an alias points to, as far as is known; None where there is no such alias."""
        return self._targets.get(reference)

    async def look(self, reference: str) -> None:
        """Come to know where an alias points.

        Raises:
            StoreError: The store cannot be asked, and what it told of the alias before does not stand any more.
        """
        async with self._looking:
            while not self.knows(reference):
                moves = self._moves
                try:
                    serial = await self._store.library_serial()
                    known = reference in self._targets and serial == self._serial
                    version = self._targets[reference] if known else await self._find(reference)
                except errors.StoreError as failure:
                    if reference not in self._targets:
                        raise
                    # A call need not fail for what may well not have happened.
                    self._log.warning("the library cannot be asked where %s points: %s", reference, failure)
                    self._looked_at = self._clock()
                    return
                if moves == self._moves:
                    self._learn(reference, version, serial)

    async def resolve(self, reference: str) -> tuple[Reference, int]:
        """What a reference means, and the version it stands for now.

        Raises:
            InvalidArguments: It is none.
            ProgramNotFound: There is no such alias. A version is not looked for.
        """
        meant = Reference.parse(reference)
        if meant.version is not None:
            return meant, meant.version
        if not self.knows(reference):
            await self.look(reference)
        version = self.target(reference)
        if version is None:
            raise errors.ProgramNotFound(
                f"the library has no alias {reference}: list_library() tells which it has",
                details={"library": reference},
            )
        return meant, version

    async def get_record(self, name: str, version: int) -> dict[str, Any]:
        """A published record as JSON; it is shared, so it must not be changed.

        Raises:
            ProgramNotFound: There is no such version.
        """
        key = (name, version)
        if key not in self._records:
            entry = await self._store.library_entry(name, version)
            self._keep_record(key, entry.record.model_dump(mode="json"))
        self._records.move_to_end(key)
        return self._records[key][0]

    def lose(self, reference: str) -> None:
        """Take an alias for gone, until the store tells otherwise: its version is not there."""
        self._learn(reference, None, self._serial)

    async def _find(self, reference: str) -> int | None:
        meant = Reference.parse(reference)
        assert meant.alias is not None
        try:
            return (await self._store.resolve(meant.name, meant.alias)).version
        except errors.ProgramNotFound:
            return None

    def _learn(self, reference: str, version: int | None, serial: int | None) -> None:
        if serial != self._serial or len(self._targets) >= MAX_KNOWN:
            self._targets.clear()  # the others are asked for again when they are next needed
        self._targets[reference] = version
        self._serial = serial
        self._looked_at = self._clock()
        if version is not None:
            self._gone.discard(reference)
        elif reference not in self._gone:
            self._log.warning("the library has no %s any more: what follows it stays as it is", reference)
            self._gone.add(reference)

    def _moved(self, target: AliasTarget) -> AliasInfo:
        self._moves += 1
        # Not the target: another service may have moved it since, and the next look tells.
        self._targets.pop(f"{target.name}@{target.alias}", None)
        return AliasInfo(
            name=target.name,
            alias=target.alias,
            version=target.version,
            previous=target.previous,
            made_by=target.made_by,
            made_at=target.made_at,
        )

    def _keep_record(self, key: tuple[str, int], record: dict[str, Any]) -> None:
        self._forget_record(key)
        size = len(orjson.dumps(record))
        self._records[key] = (record, size)
        self._kept_bytes += size
        while self._kept_bytes > MAX_KEPT_BYTES:
            self._forget_record(next(iter(self._records)))

    def _forget_record(self, key: tuple[str, int]) -> None:
        if key in self._records:
            self._kept_bytes -= self._records.pop(key)[1]


class Followers:
    """Makes programs from the library, and takes new versions in where a call needs them.

    Args:
        library: Says where aliases point.
        keeper: Says what has changed in a session.
        tasks: Where new versions are taken in: all calls that wait for one share it.
        timeout: Seconds in which a session must have taken a version in.
    """

    def __init__(self, library: Library, keeper: Keeper, tasks: Tasks, *, timeout: float) -> None:
        self._library = library
        self._keeper = keeper
        self._tasks = tasks
        self._timeout = timeout
        self._switches: dict[tuple[str, str], asyncio.Task[None]] = {}
        """By session and program, while a new version is taken in."""

    async def translate(self, call: Call) -> Call:
        """What a session is asked for a caller: ``create_program`` with ``library`` imports what is published.

        Raises:
            InvalidArguments: Its arguments do not fit, or say what the published program says itself.
            ProgramNotFound: The library does not have it.
        """
        if call.command == "import_program":
            return _import_as_its_own(call)
        if call.command != "create_program" or call.args.get("library") is None:
            return call
        args: CreateProgramArgs = get_command(call.command).parse(call.args)
        assert args.library is not None
        fields = CreateProgramArgs.model_fields
        twice = [name for name in _FROM_THE_RECORD if getattr(args, name) != fields[name].get_default(True)]
        if twice:
            raise errors.InvalidArguments(
                f"create_program: {args.library} brings its own {', '.join(twice)}: leave that out, or leave out "
                "`library`",
                details={"command": call.command},
            )
        meant, version = await self._library.resolve(args.library)
        record = dict(await self._library.get_record(meant.name, version))
        if meant.alias is not None:
            record |= {"follows": str(meant), "library_version": version}
        imported = {"record": record, "program_id": args.program_id, "replace": args.replace}
        return replace(call, command="import_program", args={**imported, "if_version": args.if_version})

    async def follow(self, live: LiveSession, call: Call, deadline: float, carry: Carry) -> bool:
        """Bring the program that a call needs to where its alias points.

        Args:
            live: Whose; it has a place.
            call: Not carried yet.
            deadline: The call's, on the loop's clock.
            carry: Asks the session on the service's own behalf.

        Returns:
            False when nothing was to be done, and nothing waited for. True: look again whether the session has its
            place, and ask again.

        Raises:
            CommandTimeout: The time was over before.
            DSPexError: The session could not take the new version in; nothing of the call ran.
        """
        program_id = _followed_by(live, call)
        if program_id is None or self._is_current(live, program_id):
            return False
        try:
            async with asyncio.timeout_at(deadline):
                await self._catch_up(live, program_id, carry)
        except TimeoutError:
            following = live.following.get(program_id)
            raise errors.CommandTimeout(
                f"{call.command}: the time was over while program {program_id!r} was brought to "
                f"{following.reference if following else 'its alias'}; call again, or give more time",
                details={"session_id": live.session_id, "command": call.command},
                retry_after=1.0,
            ) from None  # the TimeoutError tells nothing more
        return True

    def _is_current(self, live: LiveSession, program_id: str) -> bool:
        # While a version is taken in, what is in the session may be newer than what is known of it.
        if (live.session_id, program_id) in self._switches:
            return False
        following = live.following[program_id]
        if not self._library.knows(following.reference):
            return False
        return self._library.target(following.reference) in (None, following.library_version)

    async def _catch_up(self, live: LiveSession, program_id: str, carry: Carry) -> None:
        following = live.following[program_id]
        key = (live.session_id, program_id)
        if key not in self._switches and not self._library.knows(following.reference):
            await self._library.look(following.reference)
            return  # most often that was all
        if key not in self._switches:
            self._switches[key] = self._tasks.spawn(self._switch(live, program_id, carry))
        switch = self._switches[key]
        await asyncio.wait({switch})
        if switch.cancelled():
            raise errors.ServiceClosed("the session service is closing")
        failure = switch.exception()
        if isinstance(failure, errors.DSPexError):
            raise errors.from_dict(failure.to_dict()) from failure  # each waiter has an exception of its own
        if failure is not None:
            raise failure

    async def _switch(self, live: LiveSession, program_id: str, carry: Carry) -> None:
        """Take a program's new version in. Runs for all who wait, whatever becomes of them."""
        try:
            await self._keeper.settle(live)  # it may have been changed from inside its kernel
            following = live.following.get(program_id)
            version = None if following is None else self._library.target(following.reference)
            if following is None or version is None or version == following.library_version:
                return
            record = await self._record(following, version)
            if record is not None:
                await self._take_in(live, program_id, following, version, record, carry)
        finally:
            del self._switches[live.session_id, program_id]

    async def _record(self, following: Following, version: int) -> dict[str, Any] | None:
        """What the alias points to; None when it was unpublished just now."""
        try:
            record = await self._library.get_record(Reference.parse(following.reference).name, version)
        except errors.ProgramNotFound:
            self._library.lose(following.reference)
            return None
        return {**record, "follows": following.reference, "library_version": version}

    async def _take_in(
        self,
        live: LiveSession,
        program_id: str,
        following: Following,
        version: int,
        record: dict[str, Any],
        carry: Carry,
    ) -> None:
        args = {"record": record, "program_id": program_id, "if_version": following.version}
        try:
            result = await carry(live, Call("follow_program", args, self._timeout))
        except errors.VersionConflict:
            if live.following.get(program_id) == following:
                raise
            return  # it was changed meanwhile: who waits looks again
        except errors.DSPexError as failure:
            told = failure.to_dict()
            told["message"] = (
                f"program {program_id!r} follows {following.reference}, and its version {version} could not be "
                f"taken in: {failure.message}"
            )
            # Nothing of the calls that wait has run, and this may be done again.
            raise errors.from_dict({**told, "retryable": True}) from failure
        if live.following.get(program_id) == following:  # its journal could not be read; it will be
            live.following[program_id] = replace(following, library_version=version, version=result["version"])


def _followed_by(live: LiveSession, call: Call) -> str | None:
    """The program of a call that follows an alias; None where the call needs no such program's latest version."""
    if not live.following or call.command not in _FOLLOWING_COMMANDS or call.args.get("version") is not None:
        return None
    program_id = call.args.get("program_id", call.args.get("id"))
    return program_id if isinstance(program_id, str) and program_id in live.following else None


def _import_as_its_own(call: Call) -> Call:
    """A caller's import without what the record followed: that is asked for by ``library``, not by a file."""
    record = call.args.get("record")
    if not isinstance(record, Mapping) or not (record.get("follows") or record.get("library_version")):
        return call
    return replace(call, args={**call.args, "record": {**record, "follows": None, "library_version": None}})


def _publishable(record: ProgramRecord | Mapping[str, Any], name: str) -> ProgramRecord:
    """The record as the library keeps it: without what only told of its session, so that equal ones are equal."""
    check_name(name)
    try:
        found = record if isinstance(record, ProgramRecord) else ProgramRecord.model_validate(dict(record))
        # NaN and the like are no JSON: what the store would refuse is refused by it.
        size = len(orjson.dumps(found.model_dump(mode="json")))
    except ValidationError as failure:
        raise errors.InvalidRecord(f"no program record: {first_problem(failure)}") from None  # it quotes values
    if not found.portable:
        raise errors.NotPortable(
            f"program {found.program_id!r} lives in its notebook's kernel only, so it cannot be published: "
            f"{'; '.join(found.not_portable_because) or 'it was made there'}",
            details={"program_id": found.program_id, "because": found.not_portable_because},
        )
    if size > MAX_RECORD_BYTES:
        raise errors.TooLarge(
            f"program {found.program_id!r} has {size:,} bytes as JSON, and {MAX_RECORD_BYTES:,} is what a session "
            "can take in: give it fewer demos",
            details={"bytes": size, "limit": MAX_RECORD_BYTES},
        )
    own = {"program_id": name, "version": 1, "created_at": "", "follows": None, "library_version": None}
    return found.model_copy(update=own)


def _alias_of(reference: str) -> tuple[str, str]:
    meant = Reference.parse(reference)
    if meant.alias is None:
        raise errors.InvalidArguments(f"{reference} is a version, which never changes: name an alias, name@prod")
    return meant.name, meant.alias


def _check_target(name: str, alias: str) -> None:
    check_name(name)
    check_alias(alias)
    _alias_of(f"{name}@{alias}")  # digits alone would be read as a version
