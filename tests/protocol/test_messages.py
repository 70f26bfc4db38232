"""The three messages: what is taken, what is refused and in which words, and that no refusal repeats a secret."""

from __future__ import annotations

import re
import traceback
from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from dspex_kernels import errors
from dspex_kernels.protocol import PROTOCOL_VERSION, limits, messages, names

CANARY = "sk-canary-3141592653"


def _nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def test_a_request_may_say_no_more_than_its_command() -> None:
    request = messages.parse_request({"command": "ping"}, default_request_id="msg-1")

    assert (request.protocol_version, request.session_id, request.request_id) == (PROTOCOL_VERSION, None, "msg-1")
    assert (request.args, request.timeout_s, request.stream) == ({}, None, False)


def test_a_callers_own_request_id_is_kept() -> None:
    content = {"command": "ping", "request_id": "mine"}

    assert messages.parse_request(content, default_request_id="msg-1").request_id == "mine"


@pytest.mark.parametrize("content", [None, "text", b"bytes", 7, ["command", "ping"]])
def test_what_is_no_object_is_refused(content: object) -> None:
    with pytest.raises(errors.InvalidMessage, match="carries a JSON object, not"):
        messages.parse_request(content)


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({}, "command"),
        ({"command": 7}, "command"),
        ({"command": "x" * 129}, "command"),
        ({"command": "ping", "args": [1]}, "args"),
        ({"command": "ping", "surplus": 1}, "surplus"),
        ({"command": "ping", "session_id": "../etc"}, "session_id"),
        ({"command": "ping", "session_id": ""}, "session_id"),
        ({"command": "ping", "session_id": "s\n"}, "session_id"),
        ({"command": "ping", "request_id": "with space"}, "request_id"),
        ({"command": "ping", "request_id": "r" * 129}, "request_id"),
        ({"command": "ping", "timeout_s": 0}, "timeout_s"),
        ({"command": "ping", "timeout_s": 86_401}, "timeout_s"),
        ({"command": "ping", "stream": "perhaps"}, "stream"),
    ],
)
def test_a_field_that_does_not_fit_is_named(content: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.InvalidMessage, match=rf"not a dspex_request: {field}: "):
        messages.parse_request(content)


@pytest.mark.parametrize("version", ["2.0", "0.9", "", "one", "10.0", None, 1, 1.0, ["1.0"], "2" * 100_000])
def test_another_major_version_is_refused_with_both_told(version: object) -> None:
    with pytest.raises(errors.ProtocolMismatch, match=f"this side speaks {PROTOCOL_VERSION}") as caught:
        messages.parse_request({"command": "ping", "protocol_version": version})

    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("version", ["1", "1.0", "1.99"])
def test_any_minor_version_of_ours_is_taken(version: str) -> None:
    assert messages.parse_request({"command": "ping", "protocol_version": version}).command == "ping"


def test_a_request_of_exactly_the_limit_is_taken_and_one_byte_more_is_not() -> None:
    content = {"command": "ping", "args": {"text": ""}}
    room = limits.MAX_REQUEST_BYTES - messages.check_size(content, limits.MAX_REQUEST_BYTES, what="request")

    messages.parse_request({"command": "ping", "args": {"text": "x" * room}})
    with pytest.raises(errors.TooLarge, match="has 8,388,609 bytes, the limit is 8,388,608") as caught:
        messages.parse_request({"command": "ping", "args": {"text": "x" * (room + 1)}})

    assert caught.value.details == {"size": 8_388_609, "limit": 8_388_608, "what": "request"}


def test_bytes_are_counted_not_characters() -> None:
    assert messages.check_size("☃", 5, what="text") == 5
    with pytest.raises(errors.TooLarge):
        messages.check_size("☃☃", 5, what="text")


@pytest.mark.parametrize(("depth", "fits"), [(limits.MAX_DEPTH, True), (limits.MAX_DEPTH + 1, False)])
def test_nesting_has_a_limit(depth: int, fits: bool) -> None:
    if fits:
        messages.check_size(_nested(depth), 10_000, what="request")
    else:
        with pytest.raises(errors.TooLarge, match="nests deeper than 64 levels: flatten it"):
            messages.check_size(_nested(depth), 10_000, what="request")


def test_hostile_nesting_is_refused_without_recursion() -> None:
    with pytest.raises(errors.TooLarge, match="nests deeper"):
        messages.parse_request({"command": "ping", "args": _nested(100_000)})


@pytest.mark.parametrize(
    "value",
    [object(), {1: 2}, b"bytes", 2**70, "\ud800"],
    ids=["object", "number as a key", "bytes", "integer of 71 bits", "lone surrogate"],
)
def test_what_is_not_json_is_refused(value: object) -> None:
    with pytest.raises(errors.InvalidMessage, match="the request is not JSON"):
        messages.parse_request({"command": "ping", "args": {"x": value}})


def test_a_refusal_stays_short_whatever_was_sent() -> None:
    with pytest.raises(errors.InvalidMessage) as caught:
        messages.parse_request({"command": "ping", "x" * 1_000_000: 1})

    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "content",
    [
        {"command": "configure", "api_key": CANARY},
        {"command": "configure", "args": [{"api_key": CANARY}]},
        {"command": "configure", "session_id": CANARY + " "},
        {"command": ["configure", CANARY]},
    ],
)
def test_a_refusal_never_repeats_what_was_sent(content: dict[str, Any]) -> None:
    with pytest.raises(errors.DSPexError) as caught:
        messages.parse_request(content)

    assert CANARY not in "".join(traceback.format_exception(caught.value))
    assert CANARY not in str(caught.value.to_dict())


def test_replies_say_what_they_must_and_nothing_else() -> None:
    about = {"session_id": "s", "request_id": "r", "kernel_id": "k", "generation": 1}
    error = errors.ProgramNotFound("no program 'x'", details={"program_id": "x"}).to_dict()

    ok = messages.OkReply(**about, result={"n": 1})
    failed = messages.FailedReply(**about, status="error", ename="E", evalue="v", error=error)

    assert messages.OkReply.model_validate_json(ok.model_dump_json()) == ok
    assert messages.FailedReply.model_validate_json(failed.model_dump_json()) == failed
    assert type(errors.from_dict(failed.error.model_dump())) is errors.ProgramNotFound
    with pytest.raises(ValidationError):
        messages.OkReply(**about, result={}, surplus=1)
    with pytest.raises(ValidationError):
        messages.OkReply(**{**about, "generation": 0}, result={})


def test_an_event_may_carry_more_than_its_own_fields() -> None:
    event = messages.Event(event="token", request_id="r", session_id="s", sequence=0, text="Bl")  # type: ignore[call-arg]  # extra is allowed

    assert event.model_dump()["text"] == "Bl"


def test_generated_session_ids_are_of_the_given_form_and_differ() -> None:
    ids = {names.new_session_id() for _ in range(100)}

    assert len(ids) == 100
    assert all(re.fullmatch(r"session_[0-9a-f]{16}", session_id) for session_id in ids)


@pytest.mark.parametrize(
    ("session_id", "fits"),
    [("session_5f0c9a3be21d7746", True), ("A.b-c_9", True), ("x" * 128, True)]
    + [
        (bad, False)
        for bad in ("", ".", "..", ".x", "-x", "a/b", "a\\b", "a b", "a\n", "\na", "a\0", "é", "x" * 129)
    ],
)
def test_a_session_id_is_safe_as_a_directory_name(session_id: str, fits: bool) -> None:
    assert names.is_session_id(session_id) is fits
    if fits:
        assert messages.parse_request({"command": "ping", "session_id": session_id}).session_id == session_id
    else:
        with pytest.raises(errors.InvalidMessage, match="session_id: "):
            messages.parse_request({"command": "ping", "session_id": session_id})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_json_does_not_have_is_refused_wherever_it_stands(number: float) -> None:
    for content in ({"command": "ping", "timeout_s": number}, {"command": "ping", "args": {"a": [{"b": number}]}}):
        with pytest.raises(errors.InvalidMessage, match="not JSON, which has no"):
            messages.parse_request(content)


def test_a_refusal_quotes_nothing_that_a_reply_cannot_hold() -> None:
    for content in ({"command": "ping", "protocol_version": "\ud800"}, {"command": "\udfff"}):
        with pytest.raises(errors.InvalidMessage) as caught:
            messages.parse_request(content)
        orjson.dumps(caught.value.to_dict())
