"""The queue before the pool's kernels: each call waits for its turn, and turns go round between the sessions.

A kernel has slots; a call that has one is running, and its ``Ticket`` says so until ``leave``. A session that is
bound to a kernel waits for a slot there, one that is bound to none for a slot anywhere. Sessions that wait stand in
a ring, one for each kernel and one for those that are bound to none: the first gets a turn for its oldest call, and
goes to the end. So whoever floods the queue delays another by one turn, not by all that it asked. A slot that both
rings could use goes to the session that has stood in its ring for longer.

Everything is decided on the event loop without an await, so there is no lock. After each decision this holds: where
a kernel has a free slot, no session stands in a ring that could use it. A session that runs as many calls as it may
stands in no ring; one with nothing running and nothing waiting is not known here, except for its binding.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dspex_kernels import errors

REMEMBERED_TURNS = 1000
"""Turns that the waiting times and the rate are reckoned from."""
RATE_WINDOW = 10.0
"""Seconds over which the rate of turns is reckoned."""
SHORTEST_RETRY, LONGEST_RETRY = 0.1, 60.0
"""Seconds between which ``retry_after`` is kept, however the queue moves."""


class Moved(Exception):
    """The session's kernel takes no turns any more, or is not the session's: nothing of the call ran, ask anew."""


@dataclass(eq=False, slots=True)
class _Kernel:
    """A kernel's slots."""

    kernel_id: str
    slots: int
    running: int = 0
    sessions: int = 0
    """How many are bound to it."""
    closed: bool = False
    ready: OrderedDict[str, _Session] = field(default_factory=OrderedDict)
    """The ring of the sessions bound to it that wait and may run one more."""
    quiet: asyncio.Event | None = None
    """Set when nothing runs in it; made by who waits for that."""

    @property
    def free(self) -> int:
        return 0 if self.closed else max(self.slots - self.running, 0)


@dataclass(eq=False, slots=True)
class _Session:
    """A session while calls of it wait or run."""

    session_id: str
    running: int = 0
    waiting: OrderedDict[object, _Waiter] = field(default_factory=OrderedDict)
    """Oldest first; by ``request_id`` where they have one."""
    quiet: asyncio.Event | None = None
    """Set when nothing of it runs; made by who waits for that."""
    rank: int = 0
    """When it took its place in its ring: a higher one is later."""


@dataclass(eq=False, slots=True)
class _Waiter:
    session: _Session
    key: object
    since: float
    turn: asyncio.Future[Ticket]


class Ticket:
    """A call's slot in a kernel, until it leaves.

    Attributes:
        session_id: Whose call.
        kernel_id: Where it may run.
        waited: Seconds that it waited for its turn.
    """

    __slots__ = ("_kernel", "_queue", "_session", "kernel_id", "session_id", "waited")

    def __init__(self, queue: FairQueue, session: _Session, kernel: _Kernel, waited: float) -> None:
        self.session_id = session.session_id
        self.kernel_id = kernel.kernel_id
        self.waited = waited
        self._queue: FairQueue | None = queue
        self._session = session
        self._kernel = kernel

    def leave(self) -> None:
        """Give the slot back, and let the next call have it. A second time nothing happens."""
        if self._queue is not None:
            queue, self._queue = self._queue, None
            queue._left(self._session, self._kernel)


class FairQueue:
    """Calls that wait for a kernel of the pool.

    Args:
        max_waiting: Calls that may wait; more are refused at once.
        max_running_per_session: Calls of one session that may run side by side.
        clock: Seconds, for the figures; injected by tests.
    """

    def __init__(
        self,
        *,
        max_waiting: int = 1000,
        max_running_per_session: int = 16,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_waiting = max_waiting
        self._max_running = max_running_per_session
        self._clock = clock
        self._kernels: dict[str, _Kernel] = {}
        self._homes: dict[str, _Kernel] = {}
        """The kernel of each session that is bound."""
        self._sessions: dict[str, _Session] = {}
        self._anywhere: OrderedDict[str, _Session] = OrderedDict()
        """The ring of the sessions that any kernel will do for."""
        self._ranks = itertools.count(1)
        self._waiting = 0
        self._waits: deque[float] = deque(maxlen=REMEMBERED_TURNS)
        self._turns: deque[float] = deque(maxlen=REMEMBERED_TURNS)
        """When the last turns came."""
        self._began = clock()

    async def enter(
        self,
        session_id: str,
        kernel_id: str | None = None,
        *,
        timeout: float,
        deadline: float | None = None,
        request_id: str | None = None,
    ) -> Ticket:
        """Wait for a call's turn; the ticket must ``leave`` when the call has ended.

        Args:
            session_id: Whose call.
            kernel_id: Where the session is believed to be; None takes its kernel, or any if it is bound to none.
            timeout: Seconds that a call may wait here.
            deadline: When the call's own time is over, on the loop's clock; None is never.
            request_id: By which ``withdraw`` finds it; None is none.

        Raises:
            PoolSaturated: Too many wait already; or it waited for ``timeout``.
            CommandTimeout: ``deadline`` came first.
            CommandCancelled: ``withdraw`` found it.
            DuplicateRequest: A call of that ``request_id`` waits already.
            Moved: The session is not bound to ``kernel_id``, or its kernel takes no turns any more.
            DSPexError: What ``cancel`` was given.
        """
        home = self._homes.get(session_id)
        if (kernel_id is not None and (home is None or home.kernel_id != kernel_id)) or (home and home.closed):
            raise Moved(session_id)
        session = self._sessions.get(session_id) or _Session(session_id)
        if not session.waiting and session.running < self._max_running:
            kernel = home or self._freest()
            if kernel is not None and kernel.free:
                return self._start(session, kernel, 0.0)
        return await self._wait(session, timeout, deadline, request_id)

    def cancel(self, session_id: str, error: errors.DSPexError) -> int:
        """Answer every waiting call of a session with an error of its own; how many those were."""
        session = self._sessions.get(session_id)
        waiters = list(session.waiting.values()) if session is not None else []
        for waiter in waiters:
            self._refuse(waiter, copy.copy(error))  # raised in several tasks, one would gather their tracebacks
        return len(waiters)

    def withdraw(self, session_id: str, request_id: str) -> bool:
        """Cancel a call that still waits; False where none of that id does."""
        session = self._sessions.get(session_id)
        waiter = session.waiting.get(request_id) if session is not None else None
        if waiter is None:
            return False
        cancelled = errors.CommandCancelled(
            f"call {request_id!r} of session {session_id!r} was cancelled while it waited for its turn",
            details={"session_id": session_id, "request_id": request_id},
        )
        return self._refuse(waiter, cancelled)

    def add_kernel(self, kernel_id: str, slots: int) -> None:
        """Give turns in a kernel from now on.

        Args:
            kernel_id: One that is not here.
            slots: Calls that it runs side by side; at least 1.
        """
        assert kernel_id not in self._kernels
        kernel = self._kernels[kernel_id] = _Kernel(kernel_id, slots)
        self._serve(kernel)

    def resize_kernel(self, kernel_id: str, slots: int) -> None:
        """Change how many calls a kernel runs side by side; what runs goes on.

        Raises:
            KeyError: There is no such kernel.
        """
        kernel = self._kernels[kernel_id]
        kernel.slots = slots
        self._serve(kernel)

    def close_kernel(self, kernel_id: str) -> None:
        """Give no more turns in a kernel; calls that wait for it are answered ``Moved``, what runs goes on.

        Its sessions stay bound to it until they are bound elsewhere. A kernel that is gone stays gone.
        """
        kernel = self._kernels.get(kernel_id)
        if kernel is None:
            return
        kernel.closed = True
        # A scan, for a kernel is seldom closed: sessions with as many running as they may stand in no ring.
        for session in list(self._sessions.values()):
            if self._homes.get(session.session_id) is kernel:
                self._hand_back(session)

    def remove_kernel(self, kernel_id: str) -> None:
        """Forget a kernel and its bindings; calls that wait for it are answered ``Moved``.

        Tickets that are still held there may leave later. A kernel that is gone stays gone.
        """
        self.close_kernel(kernel_id)
        kernel = self._kernels.pop(kernel_id, None)
        for session_id in [bound for bound, home in self._homes.items() if home is kernel]:
            del self._homes[session_id]

    async def drained(self, kernel_id: str) -> None:
        """Return when nothing runs in a kernel; at once if it is gone. Who waits bounds the wait."""
        kernel = self._kernels.get(kernel_id)
        while kernel is not None and kernel.running:
            kernel.quiet = kernel.quiet or asyncio.Event()
            await kernel.quiet.wait()

    async def idle(self, session_id: str) -> None:
        """Return when no call of a session holds a ticket. Who waits bounds the wait."""
        while (session := self._sessions.get(session_id)) is not None and session.running:
            session.quiet = session.quiet or asyncio.Event()
            await session.quiet.wait()

    def running_in(self, kernel_id: str) -> int:
        """How many calls run in a kernel."""
        kernel = self._kernels.get(kernel_id)
        return kernel.running if kernel is not None else 0

    def bind(self, session_id: str, kernel_id: str) -> None:
        """Let a session run in one kernel only.

        Calls that waited for any kernel now wait for this one; those for another are answered ``Moved``.

        Raises:
            KeyError: There is no such kernel.
        """
        kernel = self._kernels[kernel_id]
        if self._homes.get(session_id) is kernel:
            return
        self.unbind(session_id)
        session = self._sessions.get(session_id)
        if session is not None:
            self._anywhere.pop(session_id, None)
        self._homes[session_id] = kernel
        kernel.sessions += 1
        if session is not None:
            if kernel.closed:
                self._hand_back(session)
            self._stand(session)
            self._serve(kernel)

    def unbind(self, session_id: str) -> None:
        """Let a session run anywhere; calls that waited for its kernel are answered ``Moved``."""
        kernel = self._homes.get(session_id)
        if kernel is None:
            return
        if (session := self._sessions.get(session_id)) is not None:
            self._hand_back(session)
        del self._homes[session_id]
        kernel.sessions -= 1

    def running_of(self, session_id: str) -> int:
        """How many calls of a session hold a ticket."""
        session = self._sessions.get(session_id)
        return session.running if session is not None else 0

    def waiting_of(self, session_id: str) -> int:
        """How many calls of a session wait for their turn."""
        session = self._sessions.get(session_id)
        return len(session.waiting) if session is not None else 0

    @property
    def waiting(self) -> int:
        """How many calls wait for their turn."""
        return self._waiting

    def waits(self) -> dict[str, float]:
        """How long the last calls waited: ``p50``, ``p95``, ``max``, in seconds; from any thread."""
        waits = sorted(self._waits.copy())
        return {"p50": _quantile(waits, 0.5), "p95": _quantile(waits, 0.95), "max": _quantile(waits, 1.0)}

    def figures(self) -> dict[str, Any]:
        """``waiting`` and ``running`` calls, ``kernels`` by id, ``wait_s`` of the last turns, ``turns_per_s``."""
        return {
            "waiting": self._waiting,
            "running": sum(session.running for session in self._sessions.values()),
            "kernels": {
                kernel.kernel_id: {
                    "running": kernel.running,
                    "slots": kernel.slots,
                    "sessions": kernel.sessions,
                    "closed": kernel.closed,
                }
                for kernel in self._kernels.values()
            },
            "wait_s": self.waits(),
            "turns_per_s": self._rate(),
        }

    async def _wait(
        self, session: _Session, timeout: float, deadline: float | None, request_id: str | None
    ) -> Ticket:
        if self._waiting >= self._max_waiting:
            self._make_room_for(session)
        if request_id is not None and request_id in session.waiting:
            raise errors.DuplicateRequest(
                f"a call {request_id!r} of session {session.session_id!r} waits already: give each call an id of "
                "its own",
                details={"request_id": request_id},
            )
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[Ticket] = loop.create_future()
        waiter = _Waiter(session, turn if request_id is None else request_id, self._clock(), turn)
        when, expire = loop.time() + timeout, self._expire
        if deadline is not None and deadline < when:
            when, expire = deadline, self._time_over
        # A timer that answers the waiter, where asyncio.timeout() would cancel it: a turn and the end of its time
        # then cannot both come to it.
        timer = loop.call_at(when, expire, waiter)
        self._waiting += 1
        self._sessions[session.session_id] = session
        session.waiting[waiter.key] = waiter
        self._stand(session)
        try:
            return await turn
        except BaseException:
            self._abandon(waiter)
            raise
        finally:
            timer.cancel()

    def _make_room_for(self, session: _Session) -> None:
        """Refuse the newest call of whoever floods the full queue, if that is not the one who comes.

        Raises:
            PoolSaturated: Nobody has more calls waiting than the session would have then.
        """
        full = self._saturated(f"{self._waiting} calls wait for the pool's kernels, the limit (max_queue_size)")
        flooding = max(self._sessions.values(), key=lambda other: len(other.waiting))
        if len(flooding.waiting) <= len(session.waiting) + 1:
            raise full
        self._refuse(next(reversed(flooding.waiting.values())), full)

    def _abandon(self, waiter: _Waiter) -> None:
        """A waiter is cancelled or was refused: it leaves the queue, and the turn that it may have got just now."""
        self._remove(waiter)
        if waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
            waiter.turn.result().leave()

    def _expire(self, waiter: _Waiter) -> None:
        waited = self._clock() - waiter.since
        self._refuse(waiter, self._saturated(f"the call waited {waited:.1f} s for its turn (queue_timeout)"))

    def _time_over(self, waiter: _Waiter) -> None:
        session_id = waiter.session.session_id
        late = errors.CommandTimeout(
            f"session {session_id!r}: the call's time was over while it waited for its turn, with {self._waiting} "
            "calls waiting for the pool; call again, or give more time",
            details={"session_id": session_id, "waiting": self._waiting},
            retry_after=self._retry_after(),
        )
        self._refuse(waiter, late)

    def _saturated(self, what: str) -> errors.PoolSaturated:
        return errors.PoolSaturated(
            f"{what}: call again later, or make the pool larger",
            details={"waiting": self._waiting, "limit": self._max_waiting},
            retry_after=self._retry_after(),
        )

    def _refuse(self, waiter: _Waiter, error: Exception) -> bool:
        """Answer a waiter with an error; False if its caller has left already."""
        self._remove(waiter)
        if waiter.turn.done():
            return False
        waiter.turn.set_exception(error)
        return True

    def _hand_back(self, session: _Session) -> None:
        for waiter in list(session.waiting.values()):
            self._refuse(waiter, Moved(session.session_id))

    def _remove(self, waiter: _Waiter) -> None:
        """Take a waiter out of its session; if it was taken out already, nothing happens."""
        session = waiter.session
        if session.waiting.get(waiter.key) is not waiter:
            return
        del session.waiting[waiter.key]
        self._waiting -= 1
        if not session.waiting:
            self._ring(session).pop(session.session_id, None)
            self._forget_idle(session)

    def _forget_idle(self, session: _Session) -> None:
        if not session.waiting and not session.running:
            self._sessions.pop(session.session_id, None)

    def _ring(self, session: _Session) -> OrderedDict[str, _Session]:
        home = self._homes.get(session.session_id)
        return self._anywhere if home is None else home.ready

    def _stand(self, session: _Session) -> None:
        """Put a session at the end of its ring, if it waits and may run one more; in the ring already, it stays."""
        ring = self._ring(session)
        if session.waiting and session.running < self._max_running and session.session_id not in ring:
            session.rank = next(self._ranks)
            ring[session.session_id] = session

    def _freest(self) -> _Kernel | None:
        """The kernel for a call that any will do for. A scan: a pool has tens of kernels, not thousands."""
        free = [kernel for kernel in self._kernels.values() if kernel.free]
        return min(free, key=lambda kernel: (-kernel.free, kernel.sessions), default=None)

    def _serve(self, kernel: _Kernel) -> None:
        """Give a kernel's free slots to those who stand first."""
        while kernel.free:
            rings = [ring for ring in (kernel.ready, self._anywhere) if ring]
            if not rings:
                return
            self._give_turn(min(rings, key=_rank_of_first), kernel)

    def _serve_anywhere(self) -> None:
        """Give free slots to those that any kernel will do for."""
        while self._anywhere and (kernel := self._freest()) is not None:
            self._give_turn(self._anywhere, kernel)

    def _give_turn(self, ring: OrderedDict[str, _Session], kernel: _Kernel) -> None:
        """Let the first of a ring run its oldest call, and stand at the end again."""
        _, session = ring.popitem(last=False)
        waiter = next(iter(session.waiting.values()))
        self._remove_first(session)
        if not waiter.turn.done():  # a cancelled one is still here until its task comes round
            ticket = self._start(session, kernel, self._clock() - waiter.since)
            waiter.turn.set_result(ticket)
        self._forget_idle(session)
        self._stand(session)

    def _remove_first(self, session: _Session) -> None:
        session.waiting.popitem(last=False)
        self._waiting -= 1

    def _start(self, session: _Session, kernel: _Kernel, waited: float) -> Ticket:
        self._sessions[session.session_id] = session
        session.running += 1
        kernel.running += 1
        self._waits.append(waited)
        self._turns.append(self._clock())
        return Ticket(self, session, kernel, waited)

    def _left(self, session: _Session, kernel: _Kernel) -> None:
        """A ticket was given back."""
        kernel.running -= 1
        session.running -= 1
        if not session.running and session.quiet is not None:
            session.quiet.set()
            session.quiet = None
        if not kernel.running and kernel.quiet is not None:
            kernel.quiet.set()
            kernel.quiet = None
        self._forget_idle(session)
        self._stand(session)
        self._serve(kernel)
        # The session may run one more now, and that not in the kernel which it left.
        home = self._homes.get(session.session_id)
        if home is None:
            self._serve_anywhere()
        elif home is not kernel:
            self._serve(home)

    def _rate(self) -> float:
        """Turns a second, of late."""
        now = self._clock()
        while self._turns and self._turns[0] <= now - RATE_WINDOW:
            self._turns.popleft()
        # With as many as are remembered, older ones in the window are forgotten.
        full = len(self._turns) == REMEMBERED_TURNS
        seconds = now - self._turns[0] if full else min(now - self._began, RATE_WINDOW)
        return len(self._turns) / max(seconds, 0.001)

    def _retry_after(self) -> float:
        """Seconds until those who wait have had their turns, if it goes on as of late."""
        rate = self._rate()
        seconds = self._waiting / rate if rate else LONGEST_RETRY
        return round(min(max(seconds, SHORTEST_RETRY), LONGEST_RETRY), 3)


def _rank_of_first(ring: OrderedDict[str, _Session]) -> int:
    return next(iter(ring.values())).rank


def _quantile(ascending: list[float], share: float) -> float:
    """The value that this share of all does not exceed; 0 where there are none."""
    return ascending[min(int(len(ascending) * share), len(ascending) - 1)] if ascending else 0.0
