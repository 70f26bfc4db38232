"""Session states and the moves between them, as a table: a move that is not in it raises and changes nothing."""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType

from dspex_kernels import errors


class SessionStatus(StrEnum):
    """What a session is doing."""

    STARTING = "starting"
    """Its kernel is being started; calls wait or are answered ``session_status``."""
    READY = "ready"
    """It answers calls."""
    HIBERNATED = "hibernated"
    """It has no kernel; its record is kept and the next call brings it back."""
    FAILED = "failed"
    """Its kernel could not be started; the next call tries again."""
    DESTROYED = "destroyed"
    """It is gone for good."""


_S = SessionStatus
MOVES = MappingProxyType(
    {
        _S.STARTING: frozenset({_S.READY, _S.FAILED, _S.HIBERNATED, _S.DESTROYED}),
        _S.READY: frozenset({_S.STARTING, _S.HIBERNATED, _S.FAILED, _S.DESTROYED}),
        _S.HIBERNATED: frozenset({_S.STARTING, _S.DESTROYED}),
        _S.FAILED: frozenset({_S.STARTING, _S.HIBERNATED, _S.DESTROYED}),
        _S.DESTROYED: frozenset(),
    }
)


def move(session_id: str, status: SessionStatus, target: SessionStatus) -> SessionStatus:
    """``target``, if a session may go there from ``status``.

    Raises:
        SessionNotReady: The table has no such move.
    """
    if target not in MOVES[status]:
        raise errors.SessionNotReady(
            f"session {session_id!r} is {status} and cannot become {target}",
            details={"status": str(status), "target": str(target)},
        )
    return target
