"""A session as the service holds it in memory: its record, its state, and what no store may hold."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self, TypedDict

from dspex_kernels.errors import DSPexError
from dspex_kernels.protocol.commands import LMProfileArgs
from dspex_kernels.protocol.records import (
    Change,
    LMProfile,
    ProgramDeleted,
    ProgramPut,
    ProgramRecord,
    SessionContents,
    SessionReset,
    SettingsChanged,
    Spent,
)
from dspex_kernels.protocol.states import SessionStatus, move
from dspex_kernels.sessions.library import Following
from dspex_kernels.sessions.model import SessionRecord

Moved = Callable[[str, SessionStatus | None, SessionStatus | None], None]
"""Takes a backend, and what a session there was and is (``Figures.moved``)."""


_NOTHING = SessionContents()
"""What every record holds here. One for all: an empty one for each session would be a third of its memory."""


class About(TypedDict):
    """Which session, whose, and where."""

    backend: str
    session_id: str
    owner: str


@dataclass(eq=False, slots=True)
class Batch:
    """Changes on their way into the store, in one transaction."""

    changes: list[Change]
    writing: bool = False
    """It takes no more."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    """They are kept, or refused."""


@dataclass(eq=False, slots=True)
class LiveSession:
    """A session as the service holds it, with or without a place. Its contents are the store's to hold."""

    record: SessionRecord
    """Without its contents."""
    last_activity: datetime
    status: SessionStatus = SessionStatus.HIBERNATED
    programs: dict[str, None] = field(default_factory=dict)
    """The programs' ids, in the order of their making."""
    following: dict[str, Following] = field(default_factory=dict)
    """Of programs that follow an alias of the program library, by id; known once the session had a place."""
    lm: LMProfile | None = None
    """The LM profile that the session's journal tells, without its key."""
    opening: asyncio.Task[None] | None = None
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One reader of the journal at a time: ``record.journal_offset`` is how far it came."""
    unfolded: list[Change] = field(default_factory=list)
    """What was read in the journal, and the store does not hold yet."""
    folded_to: int | None = None
    """How far the store has the journal."""
    folding: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One writer of that at a time, so that it reaches the store in order."""
    queued: dict[str, asyncio.Future[None]] = field(default_factory=dict)
    """Calls that wait for the place, by ``request_id`` where they have one; ``cancel`` resolves them."""
    sealed: bool = False
    """The store holds its LM's key, sealed."""
    lm_with_key: LMProfileArgs | None = None
    """The LM profile as it was given, when a key came with it: a new kernel must be told it again."""
    fresh: bool = False
    """It was made just now and has had no place: what the store holds of it, or will, is ``record``."""
    held: bool = False
    """This service has the session (``tenure``): no other opens or destroys it meanwhile."""
    refused: tuple[int, DSPexError] | None = None
    """The last generation of which a change could not be kept, and why: nothing it tells is taken any more."""
    ending: asyncio.Task[None] | None = None
    """Ends the session for good."""
    batches: deque[Batch] = field(default_factory=deque)
    """Changes of a pooled session that the store does not hold yet, oldest first."""
    spent: Spent | None = None
    """A pooled session's last totals; None when none were told yet."""
    closing: asyncio.Task[None] | None = None
    """Closes the place; the next one is opened after that."""
    running: int = 0
    """Calls that are counted as activity and have not been answered."""
    asking: int = 0
    """Calls that are in the place, or wait for their turn there."""
    quiet: asyncio.Event | None = None
    """Set when none is there any more; made by who waits for that."""
    creating: asyncio.Task[None] | None = None
    """Writes a new session's record; None for one that the store holds already."""
    housed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it has its directory: its place may be opened while it is written down."""
    moved: Moved | None = None
    """Told of each change of its backend or status; set while the registry has it."""
    touched: float = 0.0
    reason: str = ""
    """Why it is hibernated or failed, for messages."""
    busy: bool = False
    """Its kernel ran a cell when it was last looked at."""
    clients: int = 0
    """Notebooks that were attached to its kernel when it was last looked at."""

    @classmethod
    def of(cls, record: SessionRecord, reason: str = "") -> Self:
        """A session that has no place yet."""
        live = cls(record, record.last_activity, reason=reason)
        live.refresh(record)
        return live

    @property
    def session_id(self) -> str:
        return self.record.session_id

    @property
    def directory(self) -> Path:
        assert self.record.directory is not None  # only a session of a dedicated kernel is asked
        return Path(self.record.directory)

    def about(self) -> About:
        """What happenings say of the session."""
        return {"backend": self.record.backend, "session_id": self.session_id, "owner": self.record.owner}

    def refresh(self, record: SessionRecord) -> None:
        """Know what the store holds now: another service may have changed it."""
        self._replace(record.model_copy(update={"contents": _NOTHING}))
        self.unfolded, self.folded_to = [], record.journal_offset
        self.programs = dict.fromkeys(record.contents.programs)
        self.following = {}
        for versions in record.contents.programs.values():
            self._note_following(versions[-1])
        self.lm = record.contents.settings.lm

    def note(self, **changed: Any) -> None:
        """Change fields of the record."""
        self._replace(self.record.model_copy(update=changed))

    def _replace(self, record: SessionRecord) -> None:
        left, self.record = self.record.backend, record
        if self.moved is not None and left != record.backend:
            self.moved(left, self.status, None)
            self.moved(record.backend, None, self.status)

    def apply(self, change: Change) -> None:
        """Take in what is told about a session without asking the store."""
        match change:
            case ProgramPut(record=record):
                self.programs.setdefault(record.program_id)
                self._note_following(record)
            case ProgramDeleted(program_id=program_id):
                self.programs.pop(program_id, None)
                self.following.pop(program_id, None)
            case SettingsChanged(settings=settings):
                self.lm = settings.lm
            case SessionReset():
                self.programs.clear()
                self.following.clear()
                self.lm = None

    def _note_following(self, record: ProgramRecord) -> None:
        following = Following.of(record)
        if following is not None:
            self.following[record.program_id] = following
        else:
            self.following.pop(record.program_id, None)

    def become(self, target: SessionStatus, reason: str = "") -> None:
        was, self.status = self.status, move(self.session_id, self.status, target)
        if self.moved is not None:
            self.moved(self.record.backend, was, target)
        self.reason = reason
