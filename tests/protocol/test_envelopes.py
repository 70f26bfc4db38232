"""Messages are written and read as every Jupyter program does, and what is not the kernel's own is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from jupyter_client.session import Session

from dspex_kernels.protocol.envelopes import DELIMITER, REMEMBERED, Envelopes

KEY = b"a key of the test's own"


def sealed(content: dict[str, Any], **options: Any) -> list[bytes]:
    return Envelopes(KEY, **options).seal("dspex_request", content)[1]


def test_jupyters_session_reads_what_is_written_and_the_other_way_round():
    theirs, ours = Session(key=KEY), Envelopes(KEY)
    parent_id, frames = ours.seal("dspex_request", {"q": "☃"})
    request = theirs.deserialize(theirs.feed_identities(frames)[1])
    assert (request["header"]["msg_id"], request["msg_type"], request["content"]) == (
        parent_id,
        "dspex_request",
        {"q": "☃"},
    )
    reply = theirs.msg("dspex_reply", {"a": [1, None]}, parent=request)
    opened = ours.open([b"who", b"asked", *theirs.serialize(reply)])
    assert (opened.identities, opened.msg_type, opened.content()) == (
        [b"who", b"asked"],
        "dspex_reply",
        {"a": [1, None]},
    )
    assert opened.parent_header["msg_id"] == parent_id


@pytest.mark.parametrize("scheme", ["hmac-sha256", "hmac-md5"])
def test_both_sides_sign_by_the_scheme_of_the_connection_file(scheme: str):
    session = Session(key=KEY, signature_scheme=scheme)
    frames = sealed({}, scheme=scheme)
    assert session.deserialize(session.feed_identities(frames)[1])["msg_type"] == "dspex_request"


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match="rot13"):
        Envelopes(KEY, "rot13")


def test_without_a_key_nothing_is_signed():
    assert Envelopes("").open(Envelopes("").seal("dspex_request", {"n": 1})[1]).content() == {"n": 1}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda frames: [*frames[:1], b"forged", *frames[2:]],
        lambda frames: [*frames[:1], b"", *frames[2:]],
        lambda frames: [*frames[:5], b'{"q": "another"}'],
        lambda frames: frames[1:],
        lambda frames: frames[:4],
        lambda frames: [],
        lambda frames: Envelopes(b"another key").seal("dspex_request", {})[1],
        lambda frames: [DELIMITER, Envelopes(KEY)._sign([b"[]", b"{}", b"{}", b"{}"]), b"[]", b"{}", b"{}", b"{}"],
        lambda frames: [
            DELIMITER,
            Envelopes(KEY)._sign([b"\xff", b"{}", b"{}", b"{}"]),
            b"\xff",
            b"{}",
            b"{}",
            b"{}",
        ],
    ],
    ids=["forged", "unsigned", "changed", "undelimited", "cut", "nothing", "another-key", "no-header", "no-json"],
)
def test_what_is_no_message_of_the_kernels_own_is_refused(spoil):
    with pytest.raises(ValueError, match=r"."):
        Envelopes(KEY).open(spoil(sealed({"q": 1})))


def test_a_message_that_was_recorded_and_is_sent_again_is_refused():
    reader = Envelopes(KEY)
    first = sealed({"n": 0})
    reader.open(first)
    writer = Envelopes(KEY)
    for n in range(REMEMBERED - 1):
        reader.open(writer.seal("dspex_request", {"n": n})[1])
    with pytest.raises(ValueError, match="received before"):
        reader.open(first)


@pytest.mark.parametrize("value", [10**30, "\ud800", {1: "a number as a key"}, (1, 2)])
def test_what_user_code_makes_is_written_somehow_and_never_costs_the_message(value: Any):
    assert isinstance(Envelopes(KEY).open(sealed({"value": value})).content()["value"], float | str | dict | list)


def test_a_number_that_only_python_writes_is_read():
    parts = [*sealed({})[2:5], b'{"n": NaN}']
    assert math.isnan(Envelopes(KEY).open([DELIMITER, Envelopes(KEY)._sign(parts), *parts]).content()["n"])


def test_a_content_that_is_no_json_is_told_apart_from_a_message_that_is_none():
    parts = [*sealed({})[2:5], b"{"]
    opened = Envelopes(KEY).open([DELIMITER, Envelopes(KEY)._sign(parts), *parts])
    with pytest.raises(ValueError, match="Expecting"):
        opened.content()
