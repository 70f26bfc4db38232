"""The program library: program records published under a name, and the aliases that point to them.

A version, once published, never changes and its number is never given again. An alias (``prod``) points to one
version and remembers where it pointed before, so that a roll-back is one step that needs no argument.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from dspex_kernels import errors
from dspex_kernels.protocol.names import PROGRAM_ID_PATTERN
from dspex_kernels.protocol.records import ProgramRecord

ALIAS_PATTERN: Final = r"^[a-z0-9_\-]{1,64}$"
MAX_NAMES: Final = 1000
"""Names that may be published at once."""
MAX_VERSIONS: Final = 1000
"""Versions of one name: they are all kept."""
MAX_ALIASES: Final = 100
"""Aliases of one name."""
MAX_TARGETS: Final = 100
"""Targets of one alias that are remembered, the one it points to among them; older ones are forgotten."""
MAX_AUTHOR: Final = 256
"""Characters of who published or pointed."""


@dataclass(frozen=True, slots=True)
class LibraryEntry:
    """A published version of a program.

    Attributes:
        name: Under which it was published.
        version: From 1, ascending within the name; not the record's own version.
        record: The program.
        made_by: Who published it.
        made_at: When, in UTC.
    """

    name: str
    version: int
    record: ProgramRecord
    made_by: str
    made_at: datetime


@dataclass(frozen=True, slots=True)
class AliasTarget:
    """Where an alias points.

    Attributes:
        name: The program's.
        alias: The alias.
        version: It points to this one.
        previous: The version that a roll-back would move it to; None where there is none.
        made_by: Who pointed it there.
        made_at: When, in UTC.
    """

    name: str
    alias: str
    version: int
    previous: int | None
    made_by: str
    made_at: datetime


@dataclass(frozen=True, slots=True)
class LibraryProgram:
    """What the library has under one name.

    Attributes:
        name: The name.
        versions: Ascending.
        aliases: Each with the version it points to.
    """

    name: str
    versions: tuple[int, ...]
    aliases: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class LibraryPage:
    """Some names of many.

    Attributes:
        programs: By name.
        next_cursor: Where the next page begins; None when this is the last.
    """

    programs: tuple[LibraryProgram, ...]
    next_cursor: str | None


class ProgramLibrary(ABC):
    """Keeps published programs, under the same promises as the store it is part of (``SessionStore``)."""

    @abstractmethod
    async def publish(self, name: str, record: ProgramRecord, *, by: str) -> LibraryEntry:
        """Keep a program as the next version of a name; a record like the latest one's is that version.

        Args:
            name: As a program's id is written.
            record: The program.
            by: Who publishes it, at most ``MAX_AUTHOR`` characters.

        Raises:
            InvalidArguments: ``name`` or ``by`` is none.
            InvalidRecord: The record holds something that JSON cannot.
            ProgramLimitReached: There are ``MAX_NAMES`` names, or ``MAX_VERSIONS`` of this one.
        """

    @abstractmethod
    async def point(self, name: str, alias: str, version: int, *, by: str) -> AliasTarget:
        """Let an alias, new or old, point to a version; where it points there already, nothing changes.

        Raises:
            InvalidArguments: ``alias`` or ``by`` is none.
            ProgramNotFound: There is no such version.
            ProgramLimitReached: The name has ``MAX_ALIASES`` aliases.
        """

    @abstractmethod
    async def roll_back(self, name: str, alias: str, *, by: str) -> AliasTarget:
        """Let an alias point where it pointed before; the next roll-back goes one further back.

        Raises:
            InvalidArguments: ``by`` is none.
            ProgramNotFound: There is no such alias.
            VersionConflict: It never pointed elsewhere, or that was more than ``MAX_TARGETS`` moves ago.
        """

    @abstractmethod
    async def library_entry(self, name: str, version: int) -> LibraryEntry:
        """One version.

        Raises:
            ProgramNotFound: There is none.
        """

    @abstractmethod
    async def resolve(self, name: str, alias: str) -> AliasTarget:
        """Where an alias points.

        Raises:
            ProgramNotFound: There is no such alias.
        """

    @abstractmethod
    async def library(self, *, limit: int = 100, after: str | None = None) -> LibraryPage:
        """What is published, by name.

        Args:
            limit: At most so many names on the page, 1 to ``MAX_PAGE``.
            after: A page's ``next_cursor``; None begins.

        Raises:
            InvalidArguments: ``limit`` is out of range.
        """

    @abstractmethod
    async def library_serial(self) -> int:
        """A number that every change of the library raises: while it stands, nothing was published or moved."""

    @abstractmethod
    async def unpublish(self, name: str) -> None:
        """Remove a name with its versions and aliases; published again, its versions count on.

        Raises:
            ProgramNotFound: There is none.
        """


def check_name(name: str) -> None:
    """Refuse what may not be a program's name in the library.

    Raises:
        InvalidArguments: The message says what a name looks like.
    """
    if re.fullmatch(PROGRAM_ID_PATTERN, name) is None:
        raise errors.InvalidArguments(
            f"{name[:128]!r} is no name for the library: give 1 to 128 letters, digits, '_', '-' or '.', the first "
            "a letter, digit or '_'"
        )


def check_alias(alias: str) -> None:
    """Refuse what may not be an alias.

    Raises:
        InvalidArguments: The message says what an alias looks like.
    """
    if re.fullmatch(ALIAS_PATTERN, alias) is None:
        raise errors.InvalidArguments(
            f"{alias[:64]!r} is no alias: give 1 to 64 lower-case letters, digits, '_' or '-'"
        )


def check_author(by: str) -> None:
    """Refuse who may not have published something.

    Raises:
        InvalidArguments: It is empty or too long.
    """
    if not 1 <= len(by) <= MAX_AUTHOR:
        raise errors.InvalidArguments(f"by has {len(by):,} characters: give 1 to {MAX_AUTHOR}")
