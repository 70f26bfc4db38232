"""A call that is watched is told of once, however it ends, and named in the lines of all that happens in it."""

from __future__ import annotations

import asyncio
import logging

import pytest

from dspex_kernels import errors, logs
from dspex_kernels.sessions.happenings import CallEnded, Happening, Listeners, PoolSaturated
from dspex_kernels.sessions.watch import Watch, watched

log = logs.get_logger("dspex_kernels.tests_of_watch")
CALL = {"session_id": "s", "owner": "alice", "backend": "pooled", "command": "execute_program", "request_id": "r"}


@pytest.fixture
def told() -> list[Happening]:
    return []


@pytest.fixture
def listeners(told: list[Happening]) -> Listeners:
    listeners = Listeners(log)
    listeners.add(told.append)
    return listeners


def test_its_end_is_told_with_what_was_learned_on_the_way(listeners, told):
    with watched(listeners, **CALL) as watch:
        watch.waited(0.25)
        watch.waited(0.5)
        watch.asked("k")
        assert told == []
    (ended,) = told
    assert isinstance(ended, CallEnded)
    assert {name: getattr(ended, name) for name in CALL} == CALL
    assert (ended.outcome, ended.queue_wait_s, ended.kernel_id) == ("ok", 0.75, "k")
    assert ended.duration_s > 0


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (errors.KernelDied("it died"), "kernel_died"),
        (errors.ProviderFailure("slow down", code="rate_limit"), "rate_limit"),
        (asyncio.CancelledError(), "cancelled"),
        (ZeroDivisionError(), "internal_error"),
    ],
)
def test_a_failure_is_told_and_passes(listeners, told, failure, outcome):
    with pytest.raises(type(failure)), watched(listeners, **CALL):
        raise failure
    assert [ended.outcome for ended in told] == [outcome]


def test_a_call_that_the_pool_refused_is_told_as_both(listeners, told):
    with pytest.raises(errors.PoolSaturated), watched(listeners, **CALL):
        raise errors.PoolSaturated("1000 calls wait")
    saturated, ended = told
    assert saturated == PoolSaturated(backend="pooled", session_id="s", owner="alice")
    assert ended.outcome == "pool_saturated"


def test_lines_name_the_call_and_its_kernel_once_it_is_known(listeners, caplog):
    with watched(listeners, **CALL) as watch:
        log.warning("waits")
        watch.asked("k")
        log.warning("runs")
    log.warning("is over")
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["waits [session=s request=r]", "runs [session=s request=r kernel=k]", "is over"]


def test_a_listener_that_fails_neither_fails_the_call_nor_hides_its_failure(told, caplog):
    def broken(happening: Happening) -> None:
        raise RuntimeError("no disk left")

    listeners = Listeners(logging.getLogger("tests.watch"))
    listeners.add(broken)
    with watched(listeners, **CALL):
        pass
    with pytest.raises(errors.KernelDied), watched(listeners, **CALL):
        raise errors.KernelDied("it died")
    assert len(caplog.records) == 2


def test_what_nobody_watches_takes_everything_in():
    watch = Watch()
    watch.waited(0.5)
    watch.asked("k")
    assert Watch().named.kernel_id is None
