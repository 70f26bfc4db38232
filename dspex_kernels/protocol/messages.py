"""The three messages: ``dspex_request``, ``dspex_reply``, ``dspex_event``, as content of Jupyter messages."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dspex_kernels import errors
from dspex_kernels.protocol import PROTOCOL_VERSION, limits
from dspex_kernels.protocol.names import RequestId, SessionId
from dspex_kernels.protocol.records import Change

AS_TEXT, AS_OBJECT = "(as text)", "(as object)"
"""Tags of what may be given as a text or as an object; a finding leaves them out: they are no fields."""

REQUEST = "dspex_request"
REPLY = "dspex_reply"
EVENT = "dspex_event"

RESTORING = "open_session"
"""The command that carries a whole session."""
RESTORING_DEPTH = 8
"""How much deeper a program record lies in that command than in the one that brought it."""


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Request(Message):
    """``dspex_request``: one command asked of one session. On shell, or on control for control commands."""

    protocol_version: str = PROTOCOL_VERSION
    session_id: SessionId | None = Field(
        None, description="Whose command; null is a dedicated kernel's own session."
    )
    request_id: RequestId | None = Field(
        None, description="The caller's name for the call, for `cancel`; null is the message id."
    )
    command: str = Field(max_length=128)
    args: dict[str, Any] = Field(default_factory=dict)
    timeout_s: Annotated[float, Field(gt=0, le=86400)] | None = Field(
        None, description="Seconds until the answer `timeout`; null is the command's default."
    )
    stream: bool = Field(False, description="Report tokens and status as events on the way.")
    traceparent: str | None = Field(
        None, max_length=256, description="The caller's span (W3C Trace Context); null is none."
    )


class ErrorContent(BaseModel):
    code: str
    message: str
    retryable: bool = False
    details: dict[str, Any] = Field(default_factory=dict)
    retry_after: float | None = None


class Answered(Message):
    """What every reply tells: whose call it answers, and which kernel answered."""

    session_id: str | None
    request_id: str | None
    kernel_id: str
    generation: int = Field(ge=1, description="How often the session has been given a kernel; 1 is the first.")
    changes: list[Change] = Field(
        default_factory=list,
        description="A pooled kernel's: what the call changed, for the service to make durable before it answers.",
    )


class OkReply(Answered):
    """``dspex_reply`` of a command that did what was asked."""

    status: Literal["ok"] = "ok"
    result: dict[str, Any]


class FailedReply(Answered):
    """``dspex_reply`` of a command that failed, or (``aborted``) was ended on request."""

    status: Literal["error", "aborted"]
    ename: str
    evalue: str
    traceback: list[str] = Field(default_factory=list)
    error: ErrorContent


class Event(BaseModel):
    """``dspex_event`` on iopub, parent header of its request. May be dropped without loss."""

    model_config = ConfigDict(extra="allow", frozen=True)

    event: Literal["token", "status", "progress", "heartbeat"]
    request_id: str
    session_id: str
    sequence: int = Field(ge=0, description="Counts from 0 within the request, without gaps as sent.")


def parse_request(content: Any, *, default_request_id: str | None = None) -> Request:
    """The request in a message's content.

    Args:
        content: What the message carried; anything may come.
        default_request_id: Used where the caller gave none: the message id.

    Raises:
        TooLarge: Over ``MAX_REQUEST_BYTES`` or ``MAX_DEPTH``.
        ProtocolMismatch: Another major version than ours.
        InvalidMessage: Not a request; the message names the field.
    """
    if not isinstance(content, dict):
        raise errors.InvalidMessage(
            f'a {REQUEST} carries a JSON object, not {type(content).__name__}: send {{"command": …, "args": {{…}}}}'
        )
    # First: what is no JSON cannot be quoted. What was accepted piece by piece must come back as a whole.
    if content.get("command") == RESTORING:
        check_size(content, limits.MAX_SESSION_BYTES, what="session", max_depth=limits.MAX_DEPTH + RESTORING_DEPTH)
    else:
        check_size(content, limits.MAX_REQUEST_BYTES, what="request")
    check_version(content.get("protocol_version", PROTOCOL_VERSION))
    try:
        request = Request.model_validate(content)
    except ValidationError as failure:
        raise errors.InvalidMessage(
            f"not a {REQUEST}: {first_problem(failure)}"
        ) from None  # the cause would carry the rejected values, a misplaced key among them
    if request.request_id is None and default_request_id:
        request = request.model_copy(update={"request_id": default_request_id[:128]})
    return request


def check_version(version: Any) -> None:
    """Refuse another major version.

    Raises:
        ProtocolMismatch: ``version`` is not ours to speak.
    """
    ours = PROTOCOL_VERSION.split(".", 1)[0]
    if not isinstance(version, str) or version.split(".", 1)[0] != ours:
        raise errors.ProtocolMismatch(
            f"protocol version {str(version)[:32]!r} is not spoken here: this side speaks {PROTOCOL_VERSION}; "
            "use the same major version of dspex-kernels on both sides",
            details={"theirs": str(version)[:32], "ours": PROTOCOL_VERSION},
        )


def check_size(value: Any, limit: int, *, what: str, max_depth: int = limits.MAX_DEPTH) -> int:
    """The size of ``value`` as JSON, in bytes.

    Raises:
        TooLarge: Over ``limit`` bytes, or nested deeper than ``max_depth``.
        InvalidMessage: Not JSON at all.
    """
    try:
        text = orjson.dumps(value)
    except (TypeError, orjson.JSONEncodeError) as failure:
        _check_depth(value, max_depth, what)
        raise errors.InvalidMessage(f"the {what} is not JSON: {failure}") from failure
    # Most have not even so many brackets, nor a null, which stands for a number that is not finite too.
    if text.count(b"{") + text.count(b"[") > max_depth or b"null" in text:
        _check_depth(value, max_depth, what)
    size = len(text)
    if size > limit:
        raise errors.TooLarge(
            f"the {what} has {size:,} bytes, the limit is {limit:,}: send less, or a reference to it",
            details={"size": size, "limit": limit, "what": what},
        )
    return size


def _check_depth(value: Any, max_depth: int, what: str) -> None:
    if _depth(value, max_depth, what) > max_depth:
        raise errors.TooLarge(
            f"the {what} nests deeper than {max_depth} levels: flatten it",
            details={"limit": max_depth, "what": what},
        )


def _depth(value: Any, limit: int, what: str) -> int:
    """How deep ``value`` nests, counted no further than ``limit`` + 1; iterative, for hostile input.

    Raises:
        InvalidMessage: A number is not finite. Python reads and writes ``NaN``, others do not; orjson writes null.
    """
    level, deepest = [value], 0
    while level and deepest <= limit:
        below: list[Any] = []
        for item in level:
            if isinstance(item, float) and not math.isfinite(item):
                raise errors.InvalidMessage(
                    f"the {what} is not JSON, which has no {item}: give null, or a text that says it"
                )
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, (list, tuple)):
                below.extend(item)
        containers = any(isinstance(item, (dict, list, tuple)) for item in level)
        deepest += containers
        level = below if containers else []
    return deepest


def first_problem(failure: ValidationError) -> str:
    """The first finding of a validation in one line: the field, and what is wrong with it."""
    problem = failure.errors(include_url=False, include_input=False)[0]
    parts = [str(part) for part in problem["loc"] if part not in (AS_TEXT, AS_OBJECT)]
    where = ".".join(parts)[:200] or "the content"  # keys are the sender's
    return f"{where}: {cut(problem['msg'])}"


def cut(text: str) -> str:
    """A finding's text, shortened: a choice's lists all that could be chosen."""
    return text if len(text) <= 500 else f"{text[:499]}…"
