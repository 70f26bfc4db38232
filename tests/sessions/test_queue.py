"""Turns in the pool's kernels: fair, bounded, never lost, whoever leaves and whatever becomes of the kernels."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from dspex_kernels import errors
from dspex_kernels.sessions.queue import LONGEST_RETRY, SHORTEST_RETRY, FairQueue, Moved, Ticket

LONG = 1000.0  # seconds: no test waits for them

Call = asyncio.Task[Ticket]


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Calls:
    """Calls to a queue, each a task. Time is what ``step`` makes of it: the oldest running call leaves."""

    def __init__(self, queue: FairQueue) -> None:
        self.queue = queue
        self.running: deque[Ticket] = deque()
        self.order: list[str] = []
        """The names of the calls in the order of their turns; a call without a name has its session's."""

    async def enter(self, session_id: str, kernel_id: str | None = None, name: str = "", **options: Any) -> Call:
        """A call that has entered: it waits, or has its turn."""
        call = asyncio.create_task(self._call(session_id, kernel_id, name, {"timeout": LONG, **options}))
        await settled()
        return call

    async def _call(self, session_id: str, kernel_id: str | None, name: str, options: dict[str, Any]) -> Ticket:
        ticket = await self.queue.enter(session_id, kernel_id, **options)
        self.running.append(ticket)
        self.order.append(name or session_id)
        return ticket

    async def step(self) -> None:
        self.running.popleft().leave()
        await settled()

    async def finish(self) -> None:
        while self.running:
            await self.step()


async def settled() -> None:
    """Let every task go on that can."""
    for _ in range(4):
        await asyncio.sleep(0)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work()

    asyncio.run(bounded())


def queue_of(slots: int | dict[str, int] = 1, **options: Any) -> FairQueue:
    queue = FairQueue(**options)
    for kernel_id, number in (slots if isinstance(slots, dict) else {"k": slots}).items():
        queue.add_kernel(kernel_id, number)
    return queue


def running(queue: FairQueue, kernel_id: str = "k") -> int:
    return int(queue.figures()["kernels"][kernel_id]["running"])


def is_forgotten(queue: FairQueue) -> bool:
    """Nothing is kept of sessions that neither wait nor run."""
    rings = [queue._anywhere, *(kernel.ready for kernel in queue._kernels.values())]
    return not queue._sessions and not any(rings) and queue.figures()["waiting"] == 0


def test_a_free_slot_is_given_at_once() -> None:
    async def main() -> None:
        queue = queue_of(2)
        entering = queue.enter("s", timeout=LONG)
        with pytest.raises(StopIteration) as at_once:
            entering.send(None)
        ticket = at_once.value.value
        assert (ticket.session_id, ticket.kernel_id, ticket.waited) == ("s", "k", 0.0)
        assert running(queue) == 1
        ticket.leave()
        assert running(queue) == 0
        assert is_forgotten(queue)

    run(main)


def test_leaving_twice_gives_one_slot_back() -> None:
    async def main() -> None:
        queue = queue_of(2)
        first, second = [await queue.enter("s", timeout=LONG) for _ in range(2)]
        first.leave()
        first.leave()
        assert running(queue) == queue.running_of("s") == 1
        second.leave()

    run(main)


def test_turns_go_round_between_sessions_and_in_order_within_one() -> None:
    async def main() -> None:
        queue = queue_of(1)
        calls = Calls(queue)
        for name in ["a0", "a1", "a2", "a3", "b0", "b1", "c0"]:
            await calls.enter(name[0], name=name)
        await calls.finish()
        assert calls.order == ["a0", "a1", "b0", "c0", "a2", "b1", "a3"]
        assert is_forgotten(queue)

    run(main)


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "unbound"])
@pytest.mark.parametrize(("slots", "limit"), [(1, 16), (4, 16), (8, 2)])
def test_a_flooding_session_delays_another_by_at_most_one_turn(bound: bool, slots: int, limit: int) -> None:
    async def main() -> None:
        queue = queue_of(slots, max_waiting=2000, max_running_per_session=limit)
        kernel_id = "k" if bound else None
        if bound:
            queue.bind("flood", "k")
            queue.bind("victim", "k")
        calls = Calls(queue)
        for _ in range(1000):
            await calls.enter("flood", kernel_id)
        between = []
        while queue.waiting_of("flood"):
            for _ in range(min(7, len(calls.running))):
                await calls.step()
            before = len(calls.order)
            call = await calls.enter("victim", kernel_id)
            while not call.done():
                await calls.step()
            between.append(calls.order.index("victim", before) - before)
        await calls.finish()
        assert len(between) > 50
        assert max(between) <= 1
        assert Counter(calls.order)["flood"] == 1000
        assert is_forgotten(queue)

    run(main)


def test_sessions_of_a_kernel_and_those_of_none_share_its_slots() -> None:
    async def main() -> None:
        queue = queue_of(1)
        queue.bind("bound", "k")
        calls = Calls(queue)
        for session_id in ["any", "bound", "any", "any", "bound", "bound", "other"]:
            await calls.enter(session_id)
        await calls.finish()
        assert calls.order == ["any", "bound", "any", "other", "bound", "any", "bound"]

    run(main)


def test_a_session_runs_so_many_calls_side_by_side_and_leaves_the_rest_to_others() -> None:
    async def main() -> None:
        queue = queue_of(4, max_running_per_session=2)
        calls = Calls(queue)
        for _ in range(4):
            await calls.enter("a")
        await calls.enter("b")
        assert calls.order == ["a", "a", "b"]
        assert (queue.running_of("a"), queue.waiting_of("a"), running(queue)) == (2, 2, 3)
        await calls.step()
        assert (queue.running_of("a"), queue.waiting_of("a"), running(queue)) == (2, 1, 3)
        await calls.finish()
        assert is_forgotten(queue)

    run(main)


def test_a_call_that_any_kernel_will_do_for_takes_the_least_loaded() -> None:
    async def main() -> None:
        queue = queue_of({"small": 2, "large": 3, "equal": 3})
        queue.bind("somebody", "large")
        calls = Calls(queue)
        taken = [(await calls.enter(f"s{n}")).result().kernel_id for n in range(8)]
        assert taken[:2] == ["equal", "large"]  # as free as each other: the one with fewer sessions first
        assert Counter(taken) == {"small": 2, "large": 3, "equal": 3}
        await calls.finish()

    run(main)


def test_a_bound_session_waits_for_its_kernel_while_others_are_free() -> None:
    async def main() -> None:
        queue = queue_of({"k": 1, "free": 5})
        queue.bind("s", "k")
        calls = Calls(queue)
        assert (await calls.enter("s", "k")).result().kernel_id == "k"
        second = await calls.enter("s")
        assert not second.done()
        await calls.step()
        assert second.result().kernel_id == "k"
        await calls.finish()

    run(main)


def test_a_full_queue_refuses_at_once_and_tells_when_to_come_again() -> None:
    async def main() -> None:
        clock = Clock()
        queue = queue_of(1, max_waiting=3, clock=clock)
        calls = Calls(queue)
        for _ in range(6):  # two turns a second
            await calls.enter("s")
            await calls.step()
            clock.now += 0.5
        waiting = [await calls.enter("s") for _ in range(4)][1:]
        refused = await calls.enter("s")
        error = refused.exception()
        assert isinstance(error, errors.PoolSaturated)
        assert (error.retryable, error.details) == (True, {"waiting": 3, "limit": 3})
        assert error.retry_after == pytest.approx(3 / (7 / 3), rel=0.01)
        assert not any(call.done() for call in waiting)
        await calls.step()
        assert not (await calls.enter("other")).done()  # there is room again
        await calls.finish()
        assert is_forgotten(queue)

    run(main)


def test_a_full_queue_refuses_the_one_who_floods_it_and_not_the_one_who_comes() -> None:
    async def main() -> None:
        queue = queue_of(1, max_waiting=3)
        calls = Calls(queue)
        first, *flood = [await calls.enter("flood") for _ in range(4)]
        assert first.done()
        other = await calls.enter("other")
        assert isinstance(flood[-1].exception(), errors.PoolSaturated), "its newest call"
        assert not any(call.done() for call in (*flood[:-1], other))
        second = await calls.enter("other")  # as many as the other has, and none is left to be taken away
        assert isinstance(second.exception(), errors.PoolSaturated)
        await calls.finish()
        assert is_forgotten(queue)

    run(main)


@pytest.mark.parametrize(("turns", "expected"), [(0, LONGEST_RETRY), (1, 10.0), (900, SHORTEST_RETRY)])
def test_the_time_to_come_again_is_bounded(turns: int, expected: float) -> None:
    async def main() -> None:
        clock = Clock()
        queue = queue_of(1, max_waiting=1, clock=clock)
        held = await queue.enter("s", timeout=LONG)
        clock.now += 3600  # an hour that says nothing about now
        for _ in range(turns):
            held.leave()
            held = await queue.enter("s", timeout=LONG)
        calls = Calls(queue)
        waiting = await calls.enter("s")
        with pytest.raises(errors.PoolSaturated) as refusal:
            await queue.enter("s", timeout=LONG)
        assert refusal.value.retry_after == expected
        held.leave()
        (await waiting).leave()

    run(main)


def test_the_queues_own_time_is_saturation_and_the_callers_is_a_timeout() -> None:
    async def main() -> None:
        queue = queue_of(1)
        held = await queue.enter("s", timeout=LONG)
        loop = asyncio.get_running_loop()
        with pytest.raises(errors.PoolSaturated, match="queue_timeout"):
            await queue.enter("s", timeout=0.01, deadline=loop.time() + LONG)
        with pytest.raises(errors.CommandTimeout, match="waited for its turn") as late:
            await queue.enter("s", timeout=LONG, deadline=loop.time() + 0.01)
        assert late.value.details["session_id"] == "s"
        with pytest.raises(errors.CommandTimeout):
            await queue.enter("s", timeout=LONG, deadline=loop.time() - 1)
        assert queue.waiting_of("s") == 0
        held.leave()
        assert is_forgotten(queue)

    run(main)


def test_cancel_answers_a_sessions_waiting_calls_each_with_an_error_of_its_own() -> None:
    async def main() -> None:
        queue = queue_of(1)
        calls = Calls(queue)
        await calls.enter("a")
        doomed = [await calls.enter("a") for _ in range(3)]
        other = await calls.enter("b")
        error = errors.KernelDied("the session was destroyed", retryable=True, details={"session_id": "a"})
        assert queue.cancel("a", error) == 3
        told = await asyncio.gather(*doomed, return_exceptions=True)
        assert [vars(failure) for failure in told if isinstance(failure, errors.KernelDied)] == [vars(error)] * 3
        assert len({id(failure) for failure in (error, *told)}) == 4
        assert not other.done()
        assert queue.cancel("a", error) == queue.cancel("nobody", error) == 0
        await calls.finish()
        assert calls.order == ["a", "b"]
        assert is_forgotten(queue)

    run(main)


def test_withdraw_finds_a_waiting_call_by_its_name() -> None:
    async def main() -> None:
        queue = queue_of(1)
        calls = Calls(queue)
        await calls.enter("s", request_id="runs")
        kept = await calls.enter("s", request_id="kept")
        gone = await calls.enter("s", request_id="gone")
        assert not queue.withdraw("s", "runs")
        assert not queue.withdraw("other", "gone")
        assert queue.withdraw("s", "gone")
        assert not queue.withdraw("s", "gone")
        with pytest.raises(errors.CommandCancelled, match="'gone'"):
            await gone
        with pytest.raises(errors.DuplicateRequest, match="waits already"):
            await queue.enter("s", timeout=LONG, request_id="kept")
        assert not kept.done()
        await calls.finish()
        assert is_forgotten(queue)

    run(main)


@pytest.mark.parametrize("change", ["close_kernel", "remove_kernel"])
def test_calls_that_wait_for_a_kernel_that_goes_are_handed_back(change: str) -> None:
    async def main() -> None:
        queue = queue_of({"k": 1, "other": 1}, max_running_per_session=1)
        for session_id in ("a", "b"):
            queue.bind(session_id, "k")
        calls = Calls(queue)
        await calls.enter("a")
        waiting = [await calls.enter("a"), await calls.enter("b")]
        elsewhere = [await calls.enter("c"), await calls.enter("c")]
        getattr(queue, change)("k")
        told = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(failure) for failure in told] == [Moved, Moved]
        with pytest.raises(Moved):
            await queue.enter("b", "k", timeout=LONG)
        assert [call.done() for call in elsewhere] == [True, False]
        await calls.step()
        assert not elsewhere[1].done()  # the slot that came free is not given again
        await calls.finish()
        getattr(queue, change)("k")  # gone already: nothing happens
        assert is_forgotten(queue)

    run(main)


def test_a_closed_kernel_takes_its_sessions_until_they_are_bound_elsewhere_and_is_drained() -> None:
    async def main() -> None:
        queue = queue_of({"k": 2, "next": 1})
        queue.bind("s", "k")
        calls = Calls(queue)
        await calls.enter("s")
        await calls.enter("s")
        queue.close_kernel("k")
        drained = asyncio.create_task(queue.drained("k"))
        with pytest.raises(Moved):
            await queue.enter("s", timeout=LONG)
        queue.bind("s", "next")
        assert (await calls.enter("s", "next")).result().kernel_id == "next"
        assert queue.running_of("s") == 3
        await calls.step()
        assert not drained.done()
        await calls.step()
        assert drained.done()
        await queue.drained("k")
        await queue.drained("unknown")
        await calls.finish()
        queue.remove_kernel("k")
        assert list(queue.figures()["kernels"]) == ["next"]

    run(main)


def test_who_waits_for_a_kernel_to_be_drained_is_told_though_it_is_removed() -> None:
    async def main() -> None:
        queue = queue_of(1)
        held = await queue.enter("s", timeout=LONG)
        drained = asyncio.create_task(queue.drained("k"))
        await settled()
        queue.remove_kernel("k")
        await settled()
        assert not drained.done()
        held.leave()
        await drained
        assert is_forgotten(queue)

    run(main)


def test_a_session_that_is_bound_elsewhere_has_its_waiting_calls_handed_back() -> None:
    async def main() -> None:
        queue = queue_of({"k": 1, "other": 1})
        queue.bind("s", "k")
        calls = Calls(queue)
        await calls.enter("s")
        for change in (lambda: queue.bind("s", "other"), lambda: queue.unbind("s"), lambda: queue.bind("s", "k")):
            waiting = await calls.enter("s")
            if waiting.done():  # bound to a kernel that is free, or to none
                await calls.step()
                waiting = await calls.enter("s")
            change()
            await settled()
            assert waiting.done()
        with pytest.raises(Moved):
            await queue.enter("s", "other", timeout=LONG)
        with pytest.raises(KeyError):
            queue.bind("s", "unknown")
        await calls.finish()

    run(main)


def test_calls_that_waited_for_any_kernel_go_with_their_session_to_the_one_it_is_bound_to() -> None:
    async def main() -> None:
        queue = queue_of({"k": 1, "other": 1})
        calls = Calls(queue)
        for _ in range(2):
            await calls.enter("holder")
        queue.bind("holder", "other")
        waiting = await calls.enter("s")
        queue.bind("s", "k")
        tickets = {ticket.kernel_id: ticket for ticket in calls.running}
        tickets["other"].leave()
        await settled()
        assert not waiting.done()
        tickets["k"].leave()
        await settled()
        assert waiting.result().kernel_id == "k"
        waiting.result().leave()
        assert is_forgotten(queue)

    run(main)


def test_slots_may_change_while_calls_run() -> None:
    async def main() -> None:
        queue = queue_of(2)
        calls = Calls(queue)
        for _ in range(6):
            await calls.enter("s")
        queue.resize_kernel("k", 4)
        await settled()
        assert (len(calls.running), queue.waiting_of("s")) == (4, 2)
        queue.resize_kernel("k", 1)
        for left in (3, 2, 1, 1, 1):
            await calls.step()
            assert len(calls.running) == left
        await calls.finish()
        queue.add_kernel("another", 1)
        assert is_forgotten(queue)

    run(main)


def test_calls_wait_for_the_first_kernel() -> None:
    async def main() -> None:
        queue = FairQueue()
        calls = Calls(queue)
        waiting = [await calls.enter("s") for _ in range(3)]
        assert not any(call.done() for call in waiting)
        queue.add_kernel("k", 2)
        await settled()
        assert [call.done() for call in waiting] == [True, True, False]
        await calls.finish()

    run(main)


def test_figures_tell_of_the_last_turns() -> None:
    async def main() -> None:
        clock = Clock()
        queue = queue_of(1, clock=clock)
        assert queue.figures()["wait_s"] == {"p50": 0.0, "p95": 0.0, "max": 0.0}
        queue.bind("s", "k")
        calls = Calls(queue)
        for _ in range(20):
            await calls.enter("s")
        for _ in range(19):
            clock.now += 0.5
            await calls.step()
        told = queue.figures()
        assert told["kernels"] == {"k": {"running": 1, "slots": 1, "sessions": 1, "closed": False}}
        assert (told["waiting"], told["running"]) == (0, 1)
        assert told["wait_s"] == {"p50": 5.0, "p95": 9.5, "max": 9.5}
        assert told["turns_per_s"] == pytest.approx(20 / 9.5)
        assert calls.running[0].waited == 9.5
        clock.now += 3600
        assert queue.figures()["turns_per_s"] == 0
        await calls.finish()

    run(main)


def test_a_bound_session_that_does_nothing_is_one_entry() -> None:
    async def main() -> None:
        queue = queue_of(4)
        for number in range(10_000):
            queue.bind(f"s{number}", "k")
        for number in range(100):
            (await queue.enter(f"s{number}", timeout=LONG)).leave()
        assert queue.figures()["kernels"]["k"]["sessions"] == len(queue._homes) == 10_000
        assert is_forgotten(queue)
        queue.remove_kernel("k")
        assert queue._homes == {}

    run(main)


def _moments() -> Iterator[tuple[str, Callable[[FairQueue, Ticket, Call], object]]]:
    yield "while it waits", lambda queue, held, call: (call.cancel(),)
    yield "as its turn comes", lambda queue, held, call: (held.leave(), call.cancel())
    yield "before its turn comes", lambda queue, held, call: (call.cancel(), held.leave())
    yield "as it is withdrawn", lambda queue, held, call: (queue.withdraw("s", "r"), call.cancel())
    yield "before it is withdrawn", lambda queue, held, call: (call.cancel(), queue.withdraw("s", "r"))
    yield "as its kernel goes", lambda queue, held, call: (queue.remove_kernel("k"), call.cancel())


@pytest.mark.parametrize(("moment", "cancel"), list(_moments()), ids=[moment for moment, _ in _moments()])
def test_a_cancelled_call_loses_no_slot(moment: str, cancel: Callable[[FairQueue, Ticket, Call], object]) -> None:
    async def main() -> None:
        queue = queue_of(1)
        queue.bind("s", "k")
        held = await queue.enter("s", timeout=LONG)
        calls = Calls(queue)
        call = await calls.enter("s", request_id="r")
        cancel(queue, held, call)
        with pytest.raises(asyncio.CancelledError):
            await call
        assert queue.waiting_of("s") == 0
        held.leave()
        assert is_forgotten(queue)
        if "k" in queue.figures()["kernels"]:
            assert running(queue) == 0
            (await queue.enter("s", timeout=LONG)).leave()

    run(main)


def test_a_call_that_is_cancelled_before_it_begins_takes_nothing() -> None:
    async def main() -> None:
        queue = queue_of(1)
        call = asyncio.create_task(queue.enter("s", timeout=LONG))
        call.cancel()
        await asyncio.wait({call})
        assert running(queue) == 0
        assert is_forgotten(queue)

    run(main)


class WatchedQueue(FairQueue):
    """Notes the turns in the order in which they are given; who gets one may come round a little later."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.given: list[Ticket] = []

    def _start(self, *args: Any) -> Ticket:
        self.given.append(super()._start(*args))
        return self.given[-1]


class Chaos:
    """Calls, cancellations and changes of kernels at random, with what must hold checked after each."""

    LIMIT, WAITING = 3, 60

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.queue = WatchedQueue(max_waiting=self.WAITING, max_running_per_session=self.LIMIT)
        self.queue.add_kernel("k0", 2)
        self.queue.add_kernel("k1", 3)
        self.sessions = [f"s{n}" for n in range(8)]
        self.kernels = ["k0", "k1"]
        self.made = 0
        self.held: list[Ticket] = []
        self.calls: dict[Call, tuple[str, int]] = {}
        self.numbers: dict[Ticket, int] = {}
        """Of the calls that had their turn."""

    async def call(self, session_id: str, number: int) -> Ticket:
        ticket = await self.queue.enter(session_id, timeout=LONG, request_id=str(number))
        self.numbers[ticket] = number
        self.held.append(ticket)
        return ticket

    def enter(self) -> None:
        session_id = self.draw.choices(self.sessions, weights=[20, *[1] * 7])[0]
        self.made += 1
        self.calls[asyncio.create_task(self.call(session_id, self.made))] = (session_id, self.made)

    def leave(self) -> None:
        if self.held:
            self.held.pop(self.draw.randrange(len(self.held))).leave()

    def cancel_call(self) -> None:
        if waiting := [call for call in self.calls if not call.done()]:
            self.draw.choice(waiting).cancel()

    def withdraw(self) -> None:
        if self.calls:
            session_id, number = self.draw.choice(list(self.calls.values()))
            self.queue.withdraw(session_id, str(number))

    def cancel_session(self) -> None:
        self.queue.cancel(self.draw.choice(self.sessions), errors.CommandCancelled("destroyed"))

    def bind(self) -> None:
        self.queue.bind(self.draw.choice(self.sessions), self.draw.choice(self.kernels))

    def unbind(self) -> None:
        self.queue.unbind(self.draw.choice(self.sessions))

    def resize(self) -> None:
        self.queue.resize_kernel(self.draw.choice(self.kernels), self.draw.randint(1, 5))

    def close_kernel(self) -> None:
        self.queue.close_kernel(self.draw.choice(self.kernels))

    def replace_kernel(self) -> None:
        gone = self.kernels.pop(self.draw.randrange(len(self.kernels)))
        self.queue.remove_kernel(gone)
        self.made += 1
        self.kernels.append(f"new{self.made}")
        self.queue.add_kernel(self.kernels[-1], self.draw.randint(1, 4))

    async def go(self, steps: int) -> None:
        often = [self.enter] * 12 + [self.leave] * 9 + [self.cancel_call, self.withdraw] * 2
        seldom = [self.cancel_session, self.bind, self.bind, self.unbind, self.resize, self.close_kernel]
        for _ in range(steps):
            for _ in range(self.draw.randint(1, 4)):  # several in one round of the loop
                self.draw.choice([*often, *seldom, self.replace_kernel])()
                self.check()
            if self.draw.random() < 0.7:
                await asyncio.sleep(0)
                self.check()
        await self.end()

    async def end(self) -> None:
        """All that still wait have their turn once the others leave."""
        self.replace_kernel()
        for session_id in self.sessions:
            self.queue.unbind(session_id)
        for _ in range(10 * self.WAITING):
            await settled()
            self.leave()
            self.check()
        ended = await asyncio.gather(*self.calls, return_exceptions=True)
        expected = (Ticket, Moved, errors.CommandCancelled, errors.PoolSaturated, asyncio.CancelledError)
        assert [outcome for outcome in ended if not isinstance(outcome, expected)] == []
        assert sum(isinstance(outcome, Ticket) for outcome in ended) > len(ended) / 4
        for session_id in self.sessions:
            given = [ticket for ticket in self.queue.given if ticket.session_id == session_id]
            numbers = [self.numbers[ticket] for ticket in given if ticket in self.numbers]
            assert numbers == sorted(numbers), "a later call of the session had its turn before"
        assert self.held == []
        assert is_forgotten(self.queue)
        assert all(kernel["running"] == 0 for kernel in self.queue.figures()["kernels"].values())

    def check(self) -> None:
        queue = self.queue
        held = Counter(session.session_id for session in queue._sessions.values() for _ in range(session.running))
        assert all(count <= self.LIMIT for count in held.values())
        # A ticket that was given is in its caller's hands one round of the loop later.
        assert held >= Counter(ticket.session_id for ticket in self.held)
        assert queue._waiting == sum(len(session.waiting) for session in queue._sessions.values()) <= self.WAITING
        for session in queue._sessions.values():
            may_run = bool(session.waiting) and session.running < self.LIMIT
            assert session.running or session.waiting
            assert (session.session_id in queue._ring(session)) == may_run
        for kernel in queue._kernels.values():
            assert kernel.running >= 0
            assert kernel.sessions == sum(home is kernel for home in queue._homes.values())
            assert not (kernel.free and (kernel.ready or queue._anywhere)), (
                "a slot is free and somebody waits for it"
            )
            assert [s.rank for s in kernel.ready.values()] == sorted(s.rank for s in kernel.ready.values())


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_no_slot_is_lost_and_nobody_starves(seed: int) -> None:
    run(lambda: Chaos(seed).go(400))


def test_a_coroutine_that_is_closed_gives_its_turn_back() -> None:
    async def main() -> None:
        queue = queue_of(1)
        held = await queue.enter("s", timeout=LONG)
        entering = queue.enter("s", timeout=LONG)
        entering.send(None)
        held.leave()  # the turn is its own now
        assert running(queue) == 1
        entering.close()
        assert running(queue) == 0
        assert is_forgotten(queue)

    run(main)
