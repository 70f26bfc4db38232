"""The figures of a service follow what happens, never drift, and cost the same however much there is."""

from __future__ import annotations

import random

import pytest

from dspex_kernels import errors
from dspex_kernels.protocol.states import MOVES, SessionStatus
from dspex_kernels.sessions import happenings
from dspex_kernels.sessions.figures import ENDED_ON_REQUEST, Figures, LastMinute
from dspex_kernels.sessions.happenings import (
    CallEnded,
    Happening,
    KernelDied,
    KernelRecycled,
    KernelStarted,
    OfSession,
    PoolSaturated,
    ReplyLate,
    SessionCreated,
    SessionDestroyed,
    SessionRestored,
)


class Clock:
    """Stands still until it is moved."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def call(outcome: str = "ok", **more: object) -> CallEnded:
    fields = {"backend": "pooled", "session_id": "s", "command": "execute_program", "duration_s": 0.5, **more}
    return CallEnded(outcome=outcome, **fields)


class TestLastMinute:
    def test_what_is_older_than_a_minute_is_gone_and_leaves_nothing(self):
        clock = Clock()
        minute = LastMinute(clock)
        minute.add("a", 3)
        clock.now += 30
        minute.add("a", 4)
        minute.add("b")
        clock.now += 29.5
        assert minute.read()[0] == {"a": 7, "b": 1}
        clock.now += 0.5
        assert minute.read()[0] == {"a": 4, "b": 1}
        clock.now += 30
        assert minute.read()[0] == {}

    def test_a_silence_longer_than_the_window_forgets_all_at_the_next_count(self):
        clock = Clock()
        minute = LastMinute(clock)
        for _ in range(100):
            minute.add("a")
            clock.now += 1
        clock.now += 3600
        minute.add("b")
        assert minute.read()[0] == {"b": 1}

    def test_it_says_of_how_many_seconds_its_sums_are(self):
        clock = Clock(1000.5)
        minute = LastMinute(clock)
        assert minute.read()[1] == 1.0, "never less: a rate of one call in a millisecond says nothing"
        clock.now += 10
        assert minute.read()[1] == 10
        clock.now += 1000
        assert minute.read()[1] == 59.5

    def test_a_steady_rate_is_told_as_it_is_at_any_moment(self):
        clock = Clock()
        minute = LastMinute(clock)
        for _ in range(1000):
            clock.now += 0.25
            minute.add("a")
            sums, seconds = minute.read()
            if clock.now > 1060:
                assert sums["a"] / seconds == pytest.approx(4, rel=0.01)


class TestFigures:
    def test_counts_by_status_follow_every_move_of_the_table(self):
        chosen, figures = random.Random(4711), Figures()
        sessions: dict[int, tuple[str, SessionStatus]] = {}
        for number in range(3000):
            backend, old = sessions.get(number % 200, (chosen.choice(["dedicated", "pooled"]), None))
            new = chosen.choice(sorted(MOVES[old])) if old is not None else SessionStatus.HIBERNATED
            figures.moved(backend, old, new)
            sessions[number % 200] = (backend, new)
            if new is SessionStatus.DESTROYED:
                del sessions[number % 200]
        scanned = {backend: dict.fromkeys(counts, 0) for backend, counts in figures.sessions().items()}
        for backend, status in sessions.values():
            scanned[backend][status] += 1
        assert figures.sessions() == scanned
        assert sum(figures.read()["sessions"].values()) == len(sessions)
        assert set(figures.read()["sessions"]) == {"starting", "ready", "hibernated", "failed"}

    def test_a_session_that_migrates_leaves_one_backend_and_comes_to_the_other(self):
        figures = Figures()
        figures.moved("dedicated", None, SessionStatus.READY)
        figures.moved("dedicated", SessionStatus.READY, None)
        figures.moved("pooled", None, SessionStatus.READY)
        assert {backend: counts["ready"] for backend, counts in figures.sessions().items()} == {
            "dedicated": 0,
            "pooled": 1,
        }

    def test_a_service_that_starts_anew_counts_its_sessions_once(self):
        figures = Figures()
        figures.moved("pooled", None, SessionStatus.READY)
        figures.forget_sessions()
        figures.moved("pooled", None, SessionStatus.HIBERNATED)
        assert figures.read()["sessions"] == {"starting": 0, "ready": 0, "hibernated": 1, "failed": 0}

    def test_calls_are_told_as_rates_means_and_per_kernel(self):
        clock = Clock()
        figures = Figures(clock)
        clock.now += 600
        for kernel_id, duration_s in [("a", 0.1), ("a", 0.2), ("a", 0.3), ("b", 0.4)]:
            figures.take(call(kernel_id=kernel_id, duration_s=duration_s, queue_wait_s=0.05))
        figures.take(call("pool_saturated", duration_s=0.0))
        figures.take(call("cancelled", duration_s=0.0, kernel_id="b"))
        told = figures.read()["backends"]["pooled"]
        minute = told["last_minute"]
        assert minute["calls_per_s"] == pytest.approx(6 / 59)
        assert minute["calls_failed_per_s"] == pytest.approx(1 / 59)
        assert minute["mean_response_s"] == pytest.approx(1.0 / 6)
        assert minute["mean_queue_wait_s"] == pytest.approx(0.2 / 6)
        assert minute["kernels_that_answered"] == 2
        assert minute["calls_per_s_per_kernel"] == pytest.approx(2.5 / 59)
        assert minute["calls_per_s_of_busiest_kernel"] == pytest.approx(3 / 59)
        clock.now += 60
        later = figures.read()["backends"]["pooled"]
        assert later["last_minute"]["calls_per_s"] == 0
        assert later["last_minute"]["mean_response_s"] is None
        assert later["totals"] == told["totals"], "what was counted since the beginning stays"
        assert (told["totals"]["calls"], told["totals"]["calls_failed"]) == (6, 1)

    def test_what_a_watcher_asks_is_no_measure_of_the_service(self):
        figures = Figures()
        figures.take(call(command="ping"))
        figures.take(call(command="get_stats"))
        assert figures.read()["backends"]["pooled"]["totals"]["calls"] == 0

    def test_every_kind_of_happening_is_counted_where_it_came_to_pass(self):
        clock = Clock()
        figures = Figures(clock)
        for happening in (
            SessionCreated(backend="pooled", session_id="s"),
            SessionDestroyed(backend="pooled", session_id="s"),
            SessionRestored(backend="dedicated", session_id="s", generation=2, duration_s=1.0),
            KernelStarted(backend="dedicated", kernel_id="k", duration_s=1.0),
            KernelDied(backend="dedicated", kernel_id="k", how="was killed by SIGKILL"),
            KernelRecycled(backend="pooled", kernel_id="k", reason="age"),
            PoolSaturated(backend="pooled", session_id="s"),
            ReplyLate(backend="pooled", kernel_id="k"),
        ):
            figures.take(happening)
        counted = {
            backend: {name for name, total in told["totals"].items() if total}
            for backend, told in figures.read()["backends"].items()
        }
        assert counted == {
            "dedicated": {"sessions_restored", "kernels_started", "kernels_died"},
            "pooled": {
                *("sessions_created", "sessions_destroyed", "kernels_recycled", "saturations", "late_replies"),
            },
        }
        clock.now += 10
        assert figures.read()["backends"]["pooled"]["last_minute"]["sessions_created_per_s"] == pytest.approx(0.1)

    def test_no_happening_was_forgotten(self):
        kinds = {cls for cls in vars(happenings).values() if isinstance(cls, type) and issubclass(cls, Happening)}
        figures = Figures()
        for kind in kinds - {Happening, OfSession, CallEnded}:
            values = {"generation": 1, "duration_s": 1.0}
            names = set(kind.__dataclass_fields__)
            figures.take(kind(**{name: values.get(name, "x") for name in names}))
        totals = figures.read()["backends"]["x"]["totals"]
        assert {name for name, total in totals.items() if not total} == {"calls", "calls_failed"}

    def test_a_backend_tells_of_itself_when_it_is_read(self):
        figures = Figures()
        pool = {"size": 4, "available": 4}
        figures.watch("dedicated")
        figures.watch("pooled", lambda: pool)
        pool["available"] = 3
        told = figures.read()["backends"]
        assert told["pooled"]["pool"] == {"size": 4, "available": 3}
        assert "pool" not in told["dedicated"]
        assert told["dedicated"]["sessions"]["ready"] == 0

    def test_the_codes_of_calls_that_ended_on_request_exist(self):
        aborted = {code for code, cls in errors.by_code().items() if cls.status == "aborted"}
        assert aborted == ENDED_ON_REQUEST
