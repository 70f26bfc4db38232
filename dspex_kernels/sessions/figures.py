"""The figures of a service: how many sessions there are, and what the last minute was like.

All is counted as it happens, so that reading costs the same with ten sessions and with ten thousand: a health check
may come every second.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from dspex_kernels.protocol.commands import COMMANDS
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions import happenings

WINDOW_S = 60
"""Seconds that rates look back."""

STATUSES = tuple(status for status in SessionStatus if status is not SessionStatus.DESTROYED)
"""What a session that there is can be."""

Readings = Callable[[], Mapping[str, Any]]
"""Tells a backend's figures of the moment. A scraper calls it in a thread of its own: it must be cheap, and go
through no dictionary that the event loop changes meanwhile."""

ENDED_ON_REQUEST = frozenset({"cancelled", "interrupted"})
"""Outcomes that are neither what was asked nor a failure."""

_COUNTED: Mapping[type[happenings.Happening], str] = {
    happenings.SessionCreated: "sessions_created",
    happenings.SessionDestroyed: "sessions_destroyed",
    happenings.SessionRestored: "sessions_restored",
    happenings.SessionHibernated: "sessions_hibernated",
    happenings.SessionMigrated: "sessions_migrated",
    happenings.SessionFailed: "sessions_failed",
    happenings.ReplyLate: "late_replies",
    happenings.PoolSaturated: "saturations",
    happenings.KernelStarted: "kernels_started",
    happenings.KernelDied: "kernels_died",
    happenings.KernelRecycled: "kernels_recycled",
}
TOTALS = ("calls", "calls_failed", *_COUNTED.values())
"""What is counted from the service's making on."""


class LastMinute:
    """Sums of the last minute, in buckets of a second each.

    Whole numbers only: what is added is taken away again a minute later, and must leave nothing behind. Adding and
    reading take out what is too old, each of it once, so that either costs the same however much was added.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._buckets: deque[tuple[int, Counter[Hashable]]] = deque()
        self._sums: Counter[Hashable] = Counter()

    def add(self, key: Hashable, amount: int = 1) -> None:
        """Count ``amount`` under a key, now."""
        second = self._expire()
        if not self._buckets or self._buckets[-1][0] != second:
            self._buckets.append((second, Counter()))
        self._buckets[-1][1][key] += amount
        self._sums[key] += amount

    def read(self) -> tuple[dict[Hashable, int], float]:
        """The sums, and the seconds that they are of: a minute less a second at least, once it ran so long."""
        self._expire()
        now = self._clock()
        # The bucket of this second is not full yet; and nothing was before the beginning.
        seconds = min(WINDOW_S - 1 + now % 1, now - self._began)
        return dict(self._sums), max(seconds, 1.0)

    def _expire(self) -> int:
        """Take out what is too old; returns the second that it is."""
        second = int(self._clock())
        while self._buckets and self._buckets[0][0] <= second - WINDOW_S:
            _, old = self._buckets.popleft()
            self._sums.subtract(old)
            for key in old:
                if not self._sums[key]:
                    del self._sums[key]
        return second


class Figures:
    """What a service counts. Fed as a listener (``take``) and by ``moved``, on the event loop.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._sessions: Counter[tuple[str, SessionStatus]] = Counter()
        self._totals: Counter[tuple[str, str]] = Counter()
        self._minute = LastMinute(clock)
        self._backends: dict[str, Readings | None] = {}

    def watch(self, backend: str, readings: Readings | None = None) -> None:
        """Tell of a backend, also while nothing happens there. Called when the service makes its backends.

        Args:
            backend: Its name.
            readings: What it tells of the moment, shown under ``pool``; None is nothing.
        """
        self._backends[backend] = readings

    def moved(self, backend: str, old: SessionStatus | None, new: SessionStatus | None) -> None:
        """Note that a session's status changed. Called with every change, from where it is made.

        Args:
            backend: Where the session lives. One that migrates leaves there, and comes here: two calls.
            old: What it was; None where it is new here.
            new: What it is; None, or ``destroyed``, where it is here no more.
        """
        self._backends.setdefault(backend)
        for status, change in ((old, -1), (new, 1)):
            if status is not None and status is not SessionStatus.DESTROYED:
                self._sessions[backend, status] += change

    def forget_sessions(self) -> None:
        """Count no session. Called when a service starts anew, before it knows the sessions of its store."""
        self._sessions.clear()

    def take(self, happening: happenings.Happening) -> None:
        """Count a happening. Added to the service's ``Listeners``."""
        self._backends.setdefault(happening.backend)
        if isinstance(happening, happenings.CallEnded):
            self._take_call(happening)
        elif (name := _COUNTED.get(type(happening))) is not None:
            self._count(happening.backend, name)

    def sessions(self) -> dict[str, dict[str, int]]:
        """How many sessions there are, by backend and by status; from any thread."""
        counts = self._sessions.copy()  # at once, while the event loop goes on counting
        return {
            backend: {str(status): counts[backend, status] for status in STATUSES}
            for backend in list(self._backends)
        }

    def readings(self) -> dict[str, Mapping[str, Any]]:
        """What the backends tell of the moment, of those that do; from any thread."""
        return {backend: tell() for backend, tell in list(self._backends.items()) if tell is not None}

    def read(self) -> dict[str, Any]:
        """All of it, as JSON.

        Returns:
            ``sessions`` by status, of all backends; ``backends`` by name, each with its ``sessions``, its
            ``last_minute`` (``calls_per_s``, ``mean_response_s``, …: None where there was nothing to measure), its
            ``totals`` since the service was made, and, where it tells of itself, its ``pool``.
        """
        sums, seconds = self._minute.read()
        kernels: dict[str, list[int]] = {backend: [] for backend in self._backends}
        for key, calls in sums.items():
            match key:
                case (str(backend), "kernel", _):
                    kernels[backend].append(calls)
        sessions, readings = self.sessions(), self.readings()
        told = {}
        for backend in self._backends:
            told[backend] = {
                "sessions": sessions[backend],
                "last_minute": _last_minute(sums, seconds, backend, kernels[backend]),
                "totals": {name: self._totals[backend, name] for name in TOTALS},
            }
            if backend in readings:
                told[backend]["pool"] = dict(readings[backend])
        return {
            "sessions": {str(status): sum(counts[status] for counts in sessions.values()) for status in STATUSES},
            "backends": told,
        }

    def _take_call(self, call: happenings.CallEnded) -> None:
        row = COMMANDS.get(call.command)
        if row is not None and row.control:
            return  # answered while everything computes, and often asked by a watcher: no measure of the service
        self._count(call.backend, "calls")
        if call.outcome != happenings.OK and call.outcome not in ENDED_ON_REQUEST:
            self._count(call.backend, "calls_failed")
        self._minute.add((call.backend, "response_us"), round(call.duration_s * 1e6))
        self._minute.add((call.backend, "queue_wait_us"), round(call.queue_wait_s * 1e6))
        if call.kernel_id is not None:
            self._minute.add((call.backend, "kernel", call.kernel_id))

    def _count(self, backend: str, name: str) -> None:
        self._totals[backend, name] += 1
        self._minute.add((backend, name))


def _last_minute(
    sums: Mapping[Hashable, int], seconds: float, backend: str, kernels: list[int]
) -> dict[str, float | int | None]:
    def count(name: str) -> int:
        return sums.get((backend, name), 0)

    calls = count("calls")
    return {
        "seconds": seconds,
        "calls_per_s": calls / seconds,
        "calls_failed_per_s": count("calls_failed") / seconds,
        "sessions_created_per_s": count("sessions_created") / seconds,
        "sessions_destroyed_per_s": count("sessions_destroyed") / seconds,
        "mean_response_s": count("response_us") / 1e6 / calls if calls else None,
        "mean_queue_wait_s": count("queue_wait_us") / 1e6 / calls if calls else None,
        "kernels_that_answered": len(kernels),
        "calls_per_s_per_kernel": sum(kernels) / len(kernels) / seconds if kernels else None,
        "calls_per_s_of_busiest_kernel": max(kernels) / seconds if kernels else None,
    }
