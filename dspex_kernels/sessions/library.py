"""The program library as the service sees it: programs are published under a name, and aliases point to them.

A reference is ``name@alias`` (``qa@prod``) or ``name@version`` (``qa@3``). What sessions make of it is
``followers``'.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging import Logger, LoggerAdapter
from typing import Any, Final, Self

import orjson
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from dspex_kernels import errors
from dspex_kernels.protocol import limits
from dspex_kernels.protocol.messages import first_problem
from dspex_kernels.protocol.records import ProgramRecord
from dspex_kernels.sessions.store import MAX_PAGE
from dspex_kernels.sessions.store.library import AliasTarget, ProgramLibrary, check_alias, check_name

LOOK_INTERVAL: Final = 1.0
"""Seconds for which an alias counts as known: what another service moved is seen after that."""
MAX_RECORD_BYTES: Final = limits.MAX_REQUEST_BYTES - 64 * 1024
"""A published record as JSON: the request that takes it into a session must hold it, and what goes with it."""
MAX_KEPT_BYTES: Final = 32 * 1024 * 1024
"""Published records that are kept in memory, as JSON: hundreds of sessions want the same one at once."""
MAX_KNOWN: Final = 10_000
"""Aliases whose target is kept in memory."""


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
    def parse(cls, text: str) -> Self:
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


@dataclass(frozen=True, slots=True)
class Following:
    """Where a session's program stands that follows an alias.

    Attributes:
        reference: The alias: ``name@alias``.
        library_version: The library's version that it is.
        version: Its own version in the session.
    """

    reference: str
    library_version: int
    version: int

    @classmethod
    def of(cls, record: ProgramRecord) -> Self | None:
        """Where the program of a record stands; None where it follows nothing."""
        if record.follows is None or record.library_version is None:
            return None
        return cls(record.follows, record.library_version, record.version)


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
        self._reading = asyncio.Lock()
        """One read of a record at a time: those who want the same one at once find it kept."""
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
            InvalidArguments: ``reference``, ``version`` or ``by`` is none.
            ProgramNotFound: There is no such version.
            ProgramLimitReached: The name has as many aliases as it may.
        """
        name, alias = _alias_of(reference)
        if not 1 <= version < 2**31:  # what a store's integer column holds
            raise errors.InvalidArguments(f"{str(version)[:64]} is no version: they begin with 1")
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
        for reference in [reference for reference in self._targets if reference.partition("@")[0] == name]:
            del self._targets[reference]

    def knows(self, reference: str) -> bool:
        """Whether ``target`` tells of an alias what was so within ``LOOK_INTERVAL``."""
        return reference in self._targets and self._clock() - self._looked_at < LOOK_INTERVAL

    def target(self, reference: str) -> int | None:
        """The version that an alias points to, as far as is known; None where there is no such alias."""
        return self._targets.get(reference)

    async def look(self, reference: str) -> None:
        """Come to know where an alias points that somebody follows; one that is gone is logged once.

        Raises:
            StoreError: The store cannot be asked, and what it told of the alias before does not stand any more.
        """
        await self._look(reference)
        if self.target(reference) is None:
            self._tell_gone(reference)

    async def _look(self, reference: str) -> None:
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
            await self._look(reference)
        version = self.target(reference)
        if version is None:
            raise errors.ProgramNotFound(
                f"the library has no alias {reference}: list_library() tells which it has",
                details={"library": reference},
            )
        return meant, version

    async def get_record(self, name: str, version: int) -> dict[str, Any]:
        """A published record as JSON; it is shared, so it must not be changed.

        A version never changes. One that another service has unpublished may still be told from memory.

        Raises:
            ProgramNotFound: There is no such version.
        """
        key = (name, version)
        if key not in self._records:
            async with self._reading:
                if key not in self._records:
                    record = (await self._store.library_entry(name, version)).record.model_dump(mode="json")
                    self._keep_record(key, record)
                    return record
        self._records.move_to_end(key)
        return self._records[key][0]

    def lose(self, reference: str) -> None:
        """Take an alias for gone, until the store tells otherwise: its version is not there."""
        self._note(reference, None)
        self._tell_gone(reference)

    async def _find(self, reference: str) -> int | None:
        try:
            name, alias = _alias_of(reference)
            return (await self._store.resolve(name, alias)).version
        except (errors.ProgramNotFound, errors.InvalidArguments):  # a record may tell anything
            return None

    def _learn(self, reference: str, version: int | None, serial: int | None) -> None:
        if serial != self._serial or len(self._targets) >= MAX_KNOWN:
            self._targets.clear()  # the others are asked for again when they are next needed
        self._serial = serial
        self._looked_at = self._clock()
        self._note(reference, version)

    def _note(self, reference: str, version: int | None) -> None:
        self._targets[reference] = version
        if version is not None:
            self._gone.discard(reference)

    def _tell_gone(self, reference: str) -> None:
        if reference in self._gone:
            return
        if len(self._gone) >= MAX_KNOWN:
            self._gone.clear()
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


def _publishable(record: ProgramRecord | Mapping[str, Any], name: str) -> ProgramRecord:
    """The record as the library keeps it: without what only told of its session, so that equal ones are equal."""
    check_name(name)
    try:
        found = record if isinstance(record, ProgramRecord) else ProgramRecord.model_validate(dict(record))
        size = len(orjson.dumps(found.model_dump(mode="json")))
    except ValidationError as failure:
        raise errors.InvalidRecord(f"no program record: {first_problem(failure)}") from None  # it quotes values
    except (TypeError, ValueError, RecursionError) as failure:  # numbers and texts that no message carries
        raise errors.InvalidRecord(
            f"no program record: it is not JSON: {str(failure)[:200]}"
        ) from None  # the cause may quote values
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
