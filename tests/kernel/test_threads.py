"""Threads for programs: bounded per session, shared fairly where they are short, never waited for at the end."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future

import dspy
import pytest

from dspex_kernels.config import LMPolicy
from dspex_kernels.kernel.calls import SETTING, Call
from dspex_kernels.kernel.namespaces import Namespace
from dspex_kernels.kernel.shelf import Shelf
from dspex_kernels.kernel.threads import Threads
from tests.waiting import wait_for


class Gate:
    """Work that begins, and ends when it is let go."""

    def __init__(self) -> None:
        self.begun = 0
        self._go = threading.Event()
        self._lock = threading.Lock()

    def block(self) -> str:
        with self._lock:
            self.begun += 1
        assert self._go.wait(20)
        return "done"

    def open(self) -> None:
        self._go.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


@pytest.fixture
def make_threads() -> Iterator[Callable[..., Threads]]:
    made: list[Threads] = []

    def make(limit: int = 50, idle_time: float = 0.05) -> Threads:
        made.append(Threads(limit, idle_time))
        return made[-1]

    yield make
    for threads in made:
        threads.close()


def _ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dspex-program")]


def test_one_lane_full_of_blocking_work_delays_no_other(make_threads: Callable[..., Threads], gate: Gate) -> None:
    threads = make_threads()
    flooded, other = threads.lane(limit=3), threads.lane(limit=3)
    blocked = [flooded.submit(gate.block) for _ in range(40)]
    wait_for(lambda: gate.begun == 3, what="the lane's three threads")
    assert other.submit(lambda: "at once").result(10) == "at once"
    assert gate.begun == 3, "and no more than its three"
    gate.open()
    assert [work.result(10) for work in blocked] == ["done"] * 40


def test_waiting_lanes_take_turns_where_all_threads_are_used(
    make_threads: Callable[..., Threads], gate: Gate
) -> None:
    threads = make_threads(limit=1)
    order: list[str] = []
    held = threads.lane().submit(gate.block)
    greedy, modest = threads.lane(), threads.lane()
    waiting: list[Future[None]] = [greedy.submit(order.append, "greedy") for _ in range(5)]
    waiting.append(modest.submit(order.append, "modest"))
    assert order == []
    gate.open()
    held.result(10)
    for work in waiting:
        work.result(10)
    assert order.index("modest") == 1


def test_work_that_is_cancelled_while_it_waits_never_runs(make_threads: Callable[..., Threads], gate: Gate) -> None:
    lane = make_threads().lane(limit=1)
    lane.submit(gate.block)
    cancelled, last = lane.submit(pytest.fail, "it ran"), lane.submit(lambda: "ran")
    assert cancelled.cancel()
    gate.open()
    assert last.result(10) == "ran"


def test_work_that_is_cancelled_while_it_waits_is_kept_no_longer(
    make_threads: Callable[..., Threads], gate: Gate
) -> None:
    lane = make_threads().lane(limit=1)
    lane.submit(gate.block)
    inputs = [Gate() for _ in range(3)]
    kept = [weakref.ref(item) for item in inputs]
    waiting = [lane.submit(item.block) for item in inputs]
    del inputs
    assert all(work.cancel() for work in waiting)
    del waiting
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3, "though its lane's thread may block for ever"


def test_threads_end_when_they_have_nothing_to_do(make_threads: Callable[..., Threads]) -> None:
    lane = make_threads().lane()
    for work in [lane.submit(int) for _ in range(20)]:
        assert work.result(10) == 0
    wait_for(lambda: not _ours(), what="the end of idle threads")
    assert lane.submit(lambda: "again").result(10) == "again"


def test_closing_cancels_what_waits_and_refuses_more(make_threads: Callable[..., Threads], gate: Gate) -> None:
    threads = make_threads(limit=1)
    runs = threads.lane().submit(gate.block)
    waits = threads.lane().submit(pytest.fail, "it ran")
    wait_for(lambda: gate.begun, what="the work that runs")
    threads.close()
    with pytest.raises(CancelledError):
        waits.result(10)
    with pytest.raises(RuntimeError, match="ending"):
        threads.lane().submit(int)
    gate.open()
    assert runs.result(10) == "done"


def test_an_emptied_lane_runs_nothing_that_waited(make_threads: Callable[..., Threads], gate: Gate) -> None:
    lane = make_threads().lane(limit=1)
    lane.submit(gate.block)
    waits = lane.submit(pytest.fail, "it ran")
    lane.shutdown(cancel_futures=True)
    assert waits.cancelled()
    gate.open()
    assert lane.submit(lambda: "goes on").result(10) == "goes on"


def test_whose_call_a_thread_works_for_is_known_until_it_ends(
    make_threads: Callable[..., Threads], gate: Gate
) -> None:
    threads = make_threads()
    lane = threads.lane()
    call = Call(Namespace("s", lane=lane, shelf=Shelf(), policy=LMPolicy(), executor=lane))
    with dspy.context(**{SETTING: call}):
        work = [lane.submit(gate.block) for _ in range(2)]
    lane.submit(gate.block)
    assert threads.busy_with() == [call]
    gate.open()
    for item in work:
        item.result(10)
    wait_for(lambda: not threads.busy_with(), what="the end of the count")


def test_a_failure_is_the_works_own_and_the_thread_goes_on(make_threads: Callable[..., Threads]) -> None:
    lane = make_threads().lane(limit=1)
    failed = lane.submit(sys.exit, 3)
    assert isinstance(failed.exception(10), SystemExit)
    assert lane.submit(lambda: "next").result(10) == "next"


def test_the_process_exits_though_a_program_blocks_for_ever() -> None:
    code = (
        "import threading; from dspex_kernels.kernel.threads import Threads; begun = threading.Event()\n"
        "Threads().lane().submit(lambda: (begun.set(), threading.Event().wait()))\n"
        "assert begun.wait(10); print('exits')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "exits\n"
