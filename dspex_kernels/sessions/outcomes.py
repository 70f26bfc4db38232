"""How named calls ended, for callers who went away: kept for a while, bounded by number, bytes and age.

Only calls that their caller gave a ``request_id`` are known here. What was kept is a copy: results as JSON, errors
without their traceback, whose frames would keep a call's arguments alive.
"""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from dspex_kernels import errors

MAX_COUNT = 1000
"""Outcomes kept of all sessions together."""
MAX_BYTES = 64 * 1024 * 1024
"""Their size as JSON, all together."""
MAX_AGE = 600.0
"""Seconds that one is kept."""

_UNANSWERED = (errors.CommandCancelled, errors.CommandTimeout)
"""How a call ends whose caller left, or had no more time: its kernel may answer yet."""


@dataclass(eq=False, slots=True)
class _Call:
    session_id: str
    request_id: str
    outcome: bytes | errors.DSPexError | None = None
    """The result as JSON, or the error; None while it runs, or when its session was forgotten."""
    size: int = 0
    """Bytes."""
    kept_at: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    reply: Mapping[str, Any] | None = None
    """What the kernel answered, while the call runs."""


class Outcomes:
    """Remembers how calls ended.

    Args:
        max_count: Outcomes at most; the oldest go first.
        max_bytes: Bytes at most, as JSON; a single outcome above it is not kept.
        max_age: Seconds.
        clock: Seconds; injected by tests.
    """

    def __init__(
        self,
        *,
        max_count: int = MAX_COUNT,
        max_bytes: int = MAX_BYTES,
        max_age: float = MAX_AGE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._clock = clock
        self._sessions: dict[str, dict[str, _Call]] = {}
        self._kept: OrderedDict[_Call, None] = OrderedDict()
        """Those that have ended, oldest first."""
        self._bytes = 0

    def begin(self, session_id: str, request_id: str) -> None:
        """Note that a call runs; what an earlier one of that name ended with is forgotten.

        Raises:
            DuplicateRequest: A call of that name runs already.
        """
        call = self._find(session_id, request_id)
        if call is not None and not call.ended.is_set():
            raise errors.DuplicateRequest(
                f"request {request_id!r} of session {session_id!r} is running already: give each call an id of its "
                "own",
                details={"request_id": request_id},
            )
        if call is not None:
            self._drop(call)
        self._sessions.setdefault(session_id, {})[request_id] = _Call(session_id, request_id)

    def keep(self, session_id: str, request_id: str, outcome: Mapping[str, Any] | errors.DSPexError) -> None:
        """Note how a call ended, for ``fetch``; one that was not begun, or was forgotten, stays unknown.

        Args:
            session_id: Of which session.
            request_id: The call's name.
            outcome: Its result or its error. Where that says only that nobody waited for its kernel's answer any
                more (it was cancelled, or its time was over), the answer is kept if it has come (``replied``).
        """
        call = self._find(session_id, request_id)
        if call is None or call.ended.is_set():
            return
        if call.reply is not None and isinstance(outcome, _UNANSWERED):
            outcome = _told(call.reply)
        self._keep(call, outcome)

    def knows(self, session_id: str, request_id: Any) -> bool:
        """Whether a call of that name runs, or is remembered."""
        return self._find(session_id, str(request_id)) is not None

    def replied(self, content: Mapping[str, Any]) -> None:
        """Take in what a kernel answered, in case that its caller has left.

        What the answer changed must be durable before: whoever fetches it takes it for done.

        Args:
            content: A ``dspex_reply``'s; of a call that is not known here, nothing happens.
        """
        session_id, request_id = content.get("session_id"), content.get("request_id")
        if not isinstance(session_id, str) or not isinstance(request_id, str):
            return
        call = self._find(session_id, request_id)
        if call is None:
            return
        if not call.ended.is_set():
            call.reply = content  # its caller may be leaving just now
        elif isinstance(call.outcome, _UNANSWERED):
            self._release(call)
            self._keep(call, _told(content))

    async def fetch(self, session_id: str, request_id: str, timeout: float = 0.0) -> dict[str, Any]:
        """A call's result.

        Args:
            session_id: Of which session.
            request_id: The name that its caller gave the call.
            timeout: Seconds to wait for one that still runs.

        Raises:
            DSPexError: What the call ended with.
            ResultNotFound: No such call is known, or its result is kept no more.
            CommandTimeout: It still runs.
        """
        self._expire()
        call = self._find(session_id, request_id)
        if call is None:
            raise _not_found(session_id, request_id)
        try:
            async with asyncio.timeout(timeout):
                await call.ended.wait()
        except TimeoutError:
            raise errors.CommandTimeout(
                f"request {request_id!r} of session {session_id!r} still runs: fetch its result later, or wait for "
                "it longer",
                details={"session_id": session_id, "request_id": request_id},
                retry_after=1.0,
            ) from None  # the TimeoutError tells nothing more
        if call.outcome is None:
            raise _not_found(session_id, request_id)
        if isinstance(call.outcome, errors.DSPexError):
            raise copy.copy(call.outcome)  # each raising of one would add to its traceback
        result: dict[str, Any] = json.loads(call.outcome)  # not orjson: see ``_copied``
        return result

    def forget(self, session_id: str) -> None:
        """Forget a session's calls; who waits to fetch one is told that it is not known."""
        for call in list(self._sessions.get(session_id, {}).values()):
            self._drop(call)
            call.outcome = None
            call.ended.set()

    def _find(self, session_id: str, request_id: str) -> _Call | None:
        return self._sessions.get(session_id, {}).get(request_id)

    def _keep(self, call: _Call, outcome: Mapping[str, Any] | errors.DSPexError) -> None:
        call.reply = None
        call.outcome, call.size = _copied(outcome)
        call.kept_at = self._clock()
        call.ended.set()
        if call.size > self._max_bytes:  # those that wait for it have it all the same
            self._drop(call)
            return
        self._kept[call] = None
        self._bytes += call.size
        self._expire()

    def _expire(self) -> None:
        """Forget what is too old, too many or too large."""
        oldest = self._clock() - self._max_age
        while self._kept:
            call = next(iter(self._kept))
            full = len(self._kept) > self._max_count or self._bytes > self._max_bytes
            if not full and call.kept_at > oldest:
                return
            self._drop(call)

    def _drop(self, call: _Call) -> None:
        self._release(call)
        calls = self._sessions[call.session_id]
        del calls[call.request_id]
        if not calls:
            del self._sessions[call.session_id]

    def _release(self, call: _Call) -> None:
        """Count what a call ended with no more. Those that wait for it just now still have it."""
        if call in self._kept:
            del self._kept[call]
            self._bytes -= call.size


def _copied(outcome: Mapping[str, Any] | errors.DSPexError) -> tuple[bytes | errors.DSPexError, int]:
    """A copy that nobody else changes, and its bytes as JSON."""
    if not isinstance(outcome, errors.DSPexError):
        try:
            data = orjson.dumps(outcome)  # the kernel has checked that it is such JSON
        except TypeError:  # but its owner's code may have answered in its place, with what only Python reads
            data = json.dumps(outcome).encode()
        return data, len(data)
    # Not orjson: a failure of user code may hold lone surrogates and integers of any size.
    return copy.copy(outcome), len(json.dumps(vars(outcome), default=repr, skipkeys=True))


def _told(content: Mapping[str, Any]) -> Mapping[str, Any] | errors.DSPexError:
    """What a reply tells."""
    result = content.get("result")
    if content.get("status") == "ok" and isinstance(result, dict):
        return result
    failure = content.get("error")
    if not isinstance(failure, dict):
        failure = {"message": f"the kernel answered {content.get('status')!r}: {content.get('evalue', '')}"}
    told = {name: content[name] for name in ("ename", "evalue", "traceback") if name in content}
    return errors.from_dict({**told, **failure})


def _not_found(session_id: str, request_id: str) -> errors.ResultNotFound:
    return errors.ResultNotFound(
        f"no result of request {request_id!r} of session {session_id!r} is kept: it was not asked under that name, "
        "ended too long ago, or is too large; ask again",
        details={"session_id": session_id, "request_id": request_id},
    )
