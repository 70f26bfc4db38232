"""Turns in the pool's kernels: fair, bounded, never lost, whoever leaves and whatever becomes of the kernels."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from dspex_kernels import errors
from dspex_kernels.sessions.queue import LONGEST_RETRY, SHORTEST_RETRY, FairQueue, Moved, Ticket

LONG = 1000.0  # seconds: no test waits for them


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Calls:
    """Calls to a queue, each a task; ``turns`` are the tickets in the order of their coming."""

    def __init__(self, queue: FairQueue) -> None:
        self.queue = queue
        self.turns: list[Ticket] = []
        self.tasks: list[asyncio.Task[Ticket]] = []

    async def enter(self, session_id: str, kernel_id: str | None = None, **options: Any) -> asyncio.Task[Ticket]:
        """A call that has entered: it waits, or has its turn."""

        async def call() -> Ticket:
            ticket = await self.queue.enter(session_id, kernel_id, **{"timeout": LONG, **options})
            self.turns.append(ticket)
            return ticket

        task = asyncio.create_task(call())
        self.tasks.append(task)
        await settled()
        return task

    @property
    def order(self) -> list[str]:
        return [ticket.session_id for ticket in self.turns]

    async def leave_all(self) -> None:
        """Let those that run leave, oldest first, and those that come after them, until none waits."""
        while self.turns:
            for ticket in self.turns:
                ticket.leave()
            self.turns.clear()
            await settled()

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)


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
        await calls.enter("a")
        names = ["a", "a", "a", "b", "b", "c"]
        waiting = [await calls.enter(name) for name in names]
        served: list[asyncio.Task[Ticket]] = []
        while calls.turns:
            calls.turns.pop().leave()
            await settled()
            served += [task for task in waiting if task.done() and task not in served]
        assert [names[waiting.index(task)] for task in served] == ["a", "b", "c", "a", "b", "a"]
        for name in "abc":
            places = [waiting.index(task) for task in served if names[waiting.index(task)] == name]
            assert places == sorted(places)
        assert is_forgotten(queue)

    run(main)


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize(("slots", "limit"), [(1, 16), (4, 16), (8, 2)])
def test_a_flooding_session_delays_another_by_at_most_one_turn(bound: bool, slots: int, limit: int) -> None:
    """In virtual time: a turn lasts as long as it takes until ``slots`` others have left."""

    async def main() -> None:
        queue = queue_of(slots, max_waiting=2000, max_running_per_session=limit)
        kernel_id = "k" if bound else None
        for session_id in ("flood", "victim") if bound else ():
            queue.bind(session_id, "k")
        calls = Calls(queue)
        for _ in range(1000):
            calls.tasks.append(asyncio.create_task(_enter(calls, "flood", kernel_id)))
        await settled()
        draw, running_now = random.Random(3), deque(calls.turns)
        waited = []
        while running_now:
            running_now.popleft().leave()
            await settled()
            running_now.extend(calls.turns[len(calls.turns) - 1 :] if not running_now else [])
            running_now = deque(ticket for ticket in calls.turns if ticket._queue is not None)
            if queue.waiting_of("flood") > slots and draw.random() < 0.2:
                before = len(calls.turns)
                call = await calls.enter("victim", kernel_id)
                while not call.done():
                    next(ticket for ticket in calls.turns if ticket._queue is not None).leave()
                    await settled()
                waited.append(calls.turns.index(call.result()) - before)
                running_now = deque(ticket for ticket in calls.turns if ticket._queue is not None)
        assert len(waited) > 50
        assert max(waited) <= 1  # one turn of the flood came between
        assert Counter(calls.order)["flood"] == 1000
        assert is_forgotten(queue)

    run(main)


async def _enter(calls: Calls, session_id: str, kernel_id: str | None) -> Ticket:
    ticket = await calls.queue.enter(session_id, kernel_id, timeout=LONG)
    calls.turns.append(ticket)
    return ticket
