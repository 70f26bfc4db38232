"""The journal's lines: how a change is written, read back and folded. No I/O: bytes in, bytes out.

A session's journal is a file of JSON lines. The kernel appends a line for each change before it replies; the
service reads the same file. The first line is the header, each further line an entry::

    {"check":"1a2b3c4d","body":{"journal_version":1,"start":1767225600000000000}}
    {"check":"5e6f7a8b","body":{"sequence":1,"at":"2026-01-01T00:00:00Z","change":{…}}}

``check`` is the CRC-32 of the body's bytes as they stand in the file, so that no rewriting of JSON can upset it.

*Offsets* count bytes over a journal's whole life and never run backwards: ``start`` is the offset of the first
byte behind the header. A compaction writes a new file whose ``start`` is the old file's end; a journal made anew
starts at the clock's nanoseconds, beyond every offset of the one it replaces. So one integer tells a reader where
it stands: an offset before ``start`` is older than the last compaction, and what it missed is in the snapshot
that the file begins with. A snapshot begins with ``session_reset``, so it may be applied over anything.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticSerializationError

from dspex_kernels import errors
from dspex_kernels.protocol.messages import first_problem
from dspex_kernels.protocol.records import (
    Change,
    ProgramPut,
    SessionContents,
    SessionReset,
    SettingsChanged,
)

FILE_NAME = "journal.jsonl"
"""The journal's name in its session's own directory."""

JOURNAL_VERSION = 1

_BEFORE_CHECK, _BEFORE_BODY, _AFTER_BODY = b'{"check":"', b'","body":', b"}\n"
_CHECK_LENGTH = 8  # hexadecimal digits of a CRC-32
_BODY_AT = len(_BEFORE_CHECK) + _CHECK_LENGTH + len(_BEFORE_BODY)


class JournalHeader(BaseModel):
    """The first line: which form the file has, and where it stands in the journal's life."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    journal_version: Literal[1] = 1
    start: int = Field(ge=0, lt=2**62, description="The offset of the first byte behind this line.")


class JournalEntry(BaseModel):
    """One change, as it was journaled."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sequence: int = Field(ge=1, description="Counts the journal's entries without gaps, compactions included.")
    at: AwareDatetime
    change: Change


@dataclass(frozen=True, slots=True)
class Unread:
    """What a reader has not seen yet.

    Attributes:
        changes: In the order they were made.
        offset: Where to go on the next time; hand it to the store together with the changes.
    """

    changes: list[Change]
    offset: int


def encode_header(start: int) -> bytes:
    """The first line of a journal file whose entries begin at the offset ``start`` (bytes)."""
    return _line(JournalHeader(start=start))


def encode(sequence: int, at: datetime, change: Change) -> bytes:
    """One entry as a line.

    Args:
        sequence: The entry's number, from 1.
        at: When the change was made; with a time zone.
        change: What changed.

    Raises:
        InvalidRecord: The change holds something that JSON cannot.
    """
    return _line(JournalEntry(sequence=sequence, at=at, change=change))


def snapshot(contents: SessionContents) -> list[Change]:
    """The shortest list of changes that folds to ``contents``, whatever it is applied over."""
    changes: list[Change] = [SessionReset(), SettingsChanged(settings=contents.settings), contents.spent]
    changes += [ProgramPut(record=record) for versions in contents.programs.values() for record in versions]
    return changes


def decode_header(data: bytes) -> tuple[JournalHeader, int]:
    """The header of a whole journal file, and its length in bytes.

    Raises:
        StoreError: The file does not begin with a header, or with one of a newer version.
    """
    end = data.find(b"\n") + 1
    body = _checked_body(data[:end])
    if body is None or b'"journal_version"' not in body:
        raise errors.StoreError(
            "the journal does not begin with a header line: it is not a journal of dspex-kernels, or it was "
            "damaged; move it away to start the session without it",
            details={"offset": 0},
        )
    try:
        return JournalHeader.model_validate_json(body), end
    except ValidationError as failure:
        raise errors.StoreError(
            f"the journal's header cannot be read by this dspex-kernels, which knows journal version "
            f"{JOURNAL_VERSION} ({first_problem(failure)}): use the newer dspex-kernels that wrote it",
            details={"offset": 0},
        ) from failure


def decode(data: bytes) -> tuple[list[JournalEntry], int]:
    """The entries in ``data``, and how far it is sound.

    A last line that was cut off, or whose blocks the file system never wrote (NUL bytes), is left out: its
    change was never acknowledged. Any other damage is of something that was.

    Args:
        data: A journal file from its first byte, or from the beginning of any later line.

    Returns:
        The entries in order, and the length in bytes of what was read: less than ``len(data)`` when the last
        line is torn.

    Raises:
        StoreError: A line is damaged; the message names its place in ``data``, in bytes.
    """
    has_header = data.startswith(_BEFORE_CHECK) and data.startswith(b'{"journal_version"', _BODY_AT)
    return _decode_from(data, decode_header(data)[1] if has_header else 0)


def fold(entries: Iterable[JournalEntry]) -> SessionContents:
    """What a session holds after these entries, applied in order to an empty one."""
    contents = SessionContents()
    for entry in entries:
        contents.apply(entry.change)
    return contents


def unread(data: bytes, offset: int | None) -> Unread:
    """What a reader that has come to ``offset`` has not seen; only that part is decoded.

    A reader whose offset is not in this file any more (a compaction), or not yet (a machine that crashed lost
    what was never acknowledged), is given the whole file. Applying a change twice does no harm.

    Args:
        data: The whole journal file; empty while there is none.
        offset: As the last ``Unread`` told; None when nothing was read yet.

    Raises:
        StoreError: A line is damaged, or the file is no journal of ours.
    """
    if not data:
        return Unread([], offset or 0)
    header, length = decode_header(data)
    position = length if offset is None else offset - header.start + length
    if not (length <= position <= len(data) and data[position - 1 : position] == b"\n"):
        position = length
    entries, sound = _decode_from(data, position)
    return Unread([entry.change for entry in entries], header.start + sound - length)


def _decode_from(data: bytes, position: int) -> tuple[list[JournalEntry], int]:
    entries: list[JournalEntry] = []
    while position < len(data):
        end = data.find(b"\n", position) + 1
        line = data[position : end or len(data)]
        body = _checked_body(line)
        if body is None:
            if not end or (end == len(data) and b"\0" in line):
                break  # torn: the last line, cut off or never written
            raise _damaged(position, "its checksum does not fit")
        entry = _entry(body, position)
        if entries and entry.sequence != entries[-1].sequence + 1:
            raise _damaged(position, f"entry {entry.sequence} follows entry {entries[-1].sequence}")
        entries.append(entry)
        position = end
    return entries, position


def _line(body: BaseModel) -> bytes:
    try:
        text = body.model_dump_json().encode()
    except (PydanticSerializationError, UnicodeEncodeError) as failure:
        raise errors.InvalidRecord(f"the change cannot be written as JSON: {failure}") from failure
    return _BEFORE_CHECK + _check(text) + _BEFORE_BODY + text + _AFTER_BODY


def _check(body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(body)


def _checked_body(line: bytes) -> bytes | None:
    """The body of a whole line whose checksum fits, else None."""
    body = line[_BODY_AT : -len(_AFTER_BODY)]
    return body if line == _BEFORE_CHECK + _check(body) + _BEFORE_BODY + body + _AFTER_BODY else None


def _entry(body: bytes, position: int) -> JournalEntry:
    try:
        return JournalEntry.model_validate_json(body)
    except ValidationError as failure:
        raise _damaged(
            position, f"it is whole but not an entry this version knows, {first_problem(failure)}"
        ) from (failure)


def _damaged(position: int, why: str) -> errors.StoreError:
    return errors.StoreError(
        f"the journal's line at byte {position:,} is damaged: {why}; all before it is sound: restore the file, "
        f"or cut it off at byte {position} to go on without the rest",
        details={"offset": position},
    )
