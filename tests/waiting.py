"""Waiting for what another thread or process does: the only place of the tests that may pause."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dspex_kernels.protocol.records import SessionContents
from dspex_kernels.sessions.store import SessionStore

T = TypeVar("T")

_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.05  # seconds: a poll of twenty a second costs nothing on two cores


def wait_for(condition: Callable[[], T], *, deadline: float = 10.0, what: str = "the condition") -> T:
    """Poll until ``condition()`` is truthy.

    Args:
        condition: Called again and again; cheap.
        deadline: Longest wait, in seconds.
        what: What is awaited, for the failure's message. A callable's current value is often worth naming.

    Returns:
        The first truthy value of the condition.

    Raises:
        AssertionError: The deadline passed; the message names ``what`` and the last value.
    """
    end = time.monotonic() + deadline
    pause = _FIRST_PAUSE
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= end:
            raise AssertionError(_too_late(what, deadline, value))
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


async def wait_until(condition: Callable[[], T], *, deadline: float = 10.0, what: str = "the condition") -> T:
    """``wait_for`` on an event loop: the loop goes on running between the polls."""
    end = time.monotonic() + deadline
    pause = _FIRST_PAUSE
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= end:
            raise AssertionError(_too_late(what, deadline, value))
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _too_late(what: str, deadline: float, value: object) -> str:
    return f"waited {deadline:g} s for {what}; its last value was {value!r}"


def halt(pid: int) -> None:
    """Stop a process, and return when all its threads stand still: they go on for a moment after the signal."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")

    def stands_still() -> bool:
        return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks.iterdir())

    wait_for(stands_still, what=f"process {pid} to stand still")


async def wait_until_stored(
    store: SessionStore, session_id: str, condition: Callable[[SessionContents], bool], *, deadline: float = 10.0
) -> SessionContents:
    """What a store holds of a session, once that is so: a journal's changes reach it within a second."""
    end = time.monotonic() + deadline
    while not condition(contents := (await store.get(session_id)).contents):
        if time.monotonic() >= end:
            raise AssertionError(_too_late("the store", deadline, contents))
        await asyncio.sleep(_FIRST_PAUSE)
    return contents
