"""The journal's lines: written, read back, folded; torn tails, damage and compactions as a reader meets them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from dspex_kernels import errors
from dspex_kernels.protocol import journal, limits
from dspex_kernels.protocol.records import (
    Budget,
    Change,
    FieldSpec,
    LMProfile,
    ProgramDeleted,
    ProgramPut,
    ProgramRecord,
    ProgramSpec,
    SessionContents,
    SessionReset,
    SessionSettings,
    SettingsChanged,
    SignatureSpec,
    Spent,
)

AT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
START = 1_000_000


def _put(program_id: str = "qa_bot", version: int = 1, text: str = "Grüße ☃ \n\u2028") -> ProgramPut:
    signature = SignatureSpec(
        inputs=[FieldSpec(name="question")], outputs=[FieldSpec(name="answer", type={"type": "object"})]
    )
    spec = ProgramSpec(signature=signature, module_args={"z": 1, "a": [None, 1.5, {"b": text}]})
    record = ProgramRecord(program_id=program_id, version=version, spec=spec, state={"demos": [{"text": text}]})
    return ProgramPut(record=record)


SETTINGS = SettingsChanged(settings=SessionSettings(lm=LMProfile(model="offline/echo"), budget=Budget(usd=1.5)))
CHANGES: list[Change] = [
    _put(),
    SETTINGS,
    _put(version=2),
    Spent(lm_calls=3, tokens=70, usd=0.25),
    _put("other"),
    ProgramDeleted(program_id="other"),
]


def _lines(changes: list[Change], first: int = 1) -> list[bytes]:
    return [journal.encode(n, AT, change) for n, change in enumerate(changes, start=first)]


def _file(changes: list[Change], *, start: int = START, first: int = 1) -> bytes:
    return journal.encode_header(start) + b"".join(_lines(changes, first))


@pytest.mark.parametrize("change", [*CHANGES, SessionReset()], ids=lambda change: change.change)
def test_a_change_reads_back_as_it_was_written(change: Change) -> None:
    line = journal.encode(7, AT, change)

    entries, sound = journal.decode(line)

    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert sound == len(line)
    assert entries == [journal.JournalEntry(sequence=7, at=AT, change=change)]


def test_the_order_of_keys_survives() -> None:
    (entry,), _ = journal.decode(journal.encode(1, AT, _put()))

    assert isinstance(entry.change, ProgramPut)
    assert list(entry.change.record.spec.module_args) == ["z", "a"]


def test_a_key_given_directly_is_never_written() -> None:
    lm = LMProfile.model_validate({"model": "openai/x", "api_key": "sk-canary", "key_given": True})

    line = journal.encode(1, AT, SettingsChanged(settings=SessionSettings(lm=lm)))

    assert b"sk-canary" not in line
    assert b'"key_given":true' in line


def test_what_json_cannot_hold_is_refused_and_named() -> None:
    with pytest.raises(errors.InvalidRecord, match="cannot be written as JSON"):
        journal.encode(1, AT, _put(text="\ud800"))


def test_folding_gives_what_the_session_holds() -> None:
    entries, _ = journal.decode(_file(CHANGES))

    contents = journal.fold(entries)

    assert [record.version for record in contents.programs["qa_bot"]] == [1, 2]
    assert list(contents.programs) == ["qa_bot"]
    assert contents.settings == SETTINGS.settings
    assert contents.spent.tokens == 70


def test_folding_keeps_the_newest_versions_only() -> None:
    more = limits.MAX_VERSIONS_KEPT + 3
    entries, _ = journal.decode(_file([_put(version=n) for n in range(1, more + 1)]))

    versions = [record.version for record in journal.fold(entries).programs["qa_bot"]]

    assert versions == list(range(4, more + 1))


def test_a_reset_drops_programs_and_settings_but_not_what_was_spent() -> None:
    contents = journal.fold(journal.decode(_file([*CHANGES, SessionReset()]))[0])

    assert contents == SessionContents(spent=Spent(lm_calls=3, tokens=70, usd=0.25))


def test_a_file_cut_anywhere_in_its_last_line_reads_up_to_that_line() -> None:
    data = _file(CHANGES)
    last = len(_lines(CHANGES)[-1])
    whole = len(data) - last

    for length in range(whole, len(data)):
        entries, sound = journal.decode(data[:length])
        assert (len(entries), sound) == (len(CHANGES) - 1, whole), f"cut to {length} of {len(data)} bytes"


def test_a_last_line_whose_blocks_were_never_written_is_torn() -> None:
    data = _file(CHANGES)
    last = len(_lines(CHANGES)[-1])

    for tail in (b"\0" * last, b"\0" * (last - 20) + data[-20:], data[-last:-10] + b"\0" * 9 + b"\n"):
        entries, sound = journal.decode(data[:-last] + tail)
        assert (len(entries), sound) == (len(CHANGES) - 1, len(data) - last)


@pytest.mark.parametrize("which", range(len(CHANGES)))
def test_a_changed_byte_in_an_acknowledged_line_is_an_error_that_names_its_place(which: int) -> None:
    lines = [journal.encode_header(START), *_lines(CHANGES)]
    place = sum(map(len, lines[: which + 1]))
    data = bytearray(b"".join(lines))
    data[place + len(lines[which + 1]) // 2] ^= 1

    with pytest.raises(errors.StoreError, match=f"byte {place:,} is damaged") as caught:
        journal.decode(bytes(data))

    assert caught.value.details == {"offset": place}


def test_a_line_that_is_missing_is_noticed() -> None:
    lines = _lines(CHANGES)

    with pytest.raises(errors.StoreError, match="entry 4 follows entry 2"):
        journal.decode(b"".join(lines[:2] + lines[3:]))


@pytest.mark.parametrize("data", [b"\n", b"no journal\n", b"half a line", _lines([SessionReset()])[0]])
def test_a_file_without_a_header_is_refused(data: bytes) -> None:
    with pytest.raises(errors.StoreError, match="does not begin with a header"):
        journal.unread(data, None)


def test_a_newer_journal_is_refused_with_both_versions_told(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = journal.JournalHeader.model_construct(journal_version=2, start=0)
    data = journal._line(newer)

    with pytest.raises(errors.StoreError, match=r"knows journal version 1.*use the newer"):
        journal.decode_header(data)
    with pytest.raises(errors.StoreError, match="use the newer"):
        journal.decode(data)


def test_a_reader_gets_each_change_once() -> None:
    first, second = _file(CHANGES[:2]), _file(CHANGES)

    one = journal.unread(first, None)
    two = journal.unread(second, one.offset)
    three = journal.unread(second, two.offset)

    assert one.changes == CHANGES[:2]
    assert two.changes == CHANGES[2:]
    assert three == journal.Unread([], two.offset)
    assert two.offset == START + len(second) - len(journal.encode_header(START))


def test_a_reader_leaves_a_line_that_is_being_written_for_the_next_time() -> None:
    data = _file(CHANGES)

    early = journal.unread(data[:-5], None)
    late = journal.unread(data, early.offset)

    assert early.changes + late.changes == CHANGES


def test_a_reader_from_before_a_compaction_is_given_the_snapshot() -> None:
    before = _file(CHANGES)
    behind = journal.unread(_file(CHANGES[:1]), None)
    end = journal.unread(before, None).offset
    contents = journal.fold(journal.decode(before)[0])
    compacted = _file(journal.snapshot(contents), start=end, first=len(CHANGES) + 1)
    seen = SessionContents()
    for change in [*behind.changes, *journal.unread(compacted, behind.offset).changes]:
        seen.apply(change)

    assert seen == contents
    assert journal.unread(compacted, behind.offset).offset > end


@pytest.mark.parametrize("stale", [0, START - 1, START + 3, START + 10**9])
def test_an_offset_that_is_not_in_the_file_reads_it_whole(stale: int) -> None:
    assert journal.unread(_file(CHANGES), stale).changes == CHANGES


def test_no_file_yet_is_nothing_unread() -> None:
    assert journal.unread(b"", None) == journal.Unread([], 0)
    assert journal.unread(b"", 17) == journal.Unread([], 17)


def test_damage_behind_an_offset_is_named_by_its_place_in_the_file() -> None:
    data = _file(CHANGES)
    offset = journal.unread(_file(CHANGES[:2]), None).offset
    place = len(_file(CHANGES[:3]))

    with pytest.raises(errors.StoreError, match=f"byte {place:,} "):
        journal.unread(data[: place + 40] + b"X" + data[place + 41 :], offset)


def test_a_snapshot_folds_to_the_same_over_anything() -> None:
    contents = journal.fold(journal.decode(_file(CHANGES))[0])
    over = journal.fold(journal.decode(_file([_put("stranger")]))[0])

    for change in journal.snapshot(contents):
        over.apply(change)

    assert over == contents
