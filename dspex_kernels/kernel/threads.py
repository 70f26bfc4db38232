"""Threads for programs and tools that block: a lane for each session, so that one holds up no other.

A lane runs at most ``MAX_THREADS_PER_SESSION`` pieces of work at a time; what more its session asks for waits
behind its own, never behind another's. All lanes draw from ``MAX_THREADS``. Where those are used up, work waits its
turn, one piece of each waiting session after another, as long as its call may: a call that reaches its deadline
takes its work out of the line.

Not ThreadPoolExecutor: the interpreter joins its threads at exit, and a program may block for ever.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, TypeVar

import dspy

from dspex_kernels import logs
from dspex_kernels.kernel.calls import SETTING, Call

log = logs.get_logger(__name__)

T = TypeVar("T")

MAX_THREADS_PER_SESSION = 8
"""Blocking programs and tools of one session that run side by side."""
MAX_THREADS_ALONE = 64
"""The same where the session has the process to itself."""
MAX_THREADS = 256
"""Of all sessions of this process."""
IDLE_TIME = 10.0
"""Seconds after which a thread without work ends."""


class _Work:
    """What a thread is to do, and for which call."""

    __slots__ = ("call", "future", "run")

    def __init__(self, run: Callable[[], Any], call: Call | None) -> None:
        self.run = run
        self.call = call
        self.future: Future[Any] = Future()

    def do(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.run()
        except BaseException as failure:  # noqa: BLE001  # a program's sys.exit() too is its failure only
            self.future.set_exception(failure)
        else:
            self.future.set_result(result)


class Lane(Executor):
    """One session's way to threads; made by ``Threads.lane``. Thread-safe.

    It costs nothing while nothing runs in it, and needs no end of its own.
    """

    def __init__(self, threads: Threads, limit: int) -> None:
        self._threads = threads
        self.limit = limit
        self.running = 0
        self.waiting: deque[_Work] | None = None

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run ``fn`` in a thread, at once or in its turn; cancelling the future takes waiting work out.

        Raises:
            RuntimeError: The process's threads are closed: the kernel is ending.
        """
        return self._threads.take_in(self, _Work(partial(fn, *args, **kwargs), dspy.settings.get(SETTING)))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take waiting work out (``cancel_futures``). Its threads are the process's, which are not waited for."""
        if cancel_futures:
            self._threads.empty(self)


class Threads:
    """The threads of this process in which programs and tools may block.

    Args:
        limit: How many there are at most.
        idle_time: Seconds after which one without work ends.
    """

    def __init__(self, limit: int = MAX_THREADS, idle_time: float = IDLE_TIME) -> None:
        self._limit = limit
        self._idle_time = idle_time
        # Guards all below, the lanes' counts and lines too.
        self._lock = threading.Lock()
        self._work_came = threading.Condition(self._lock)
        self._handed: deque[tuple[Lane, _Work]] = deque()
        """Work that counts as running and that no thread has taken up yet."""
        self._waiting: OrderedDict[Lane, None] = OrderedDict()
        """Lanes with work that could run if there were a thread, the next one first."""
        self._calls: Counter[Call] = Counter()
        self._running = 0
        self._idle = 0
        self._made = 0
        self._closed = False

    def lane(self, limit: int = MAX_THREADS_PER_SESSION) -> Lane:
        """A lane of its own.

        Args:
            limit: How much may run in it side by side.
        """
        return Lane(self, limit)

    def busy_with(self) -> list[Call]:
        """The calls for which a thread works."""
        with self._lock:
            return list(self._calls)

    def close(self) -> None:
        """Take no more work, cancel what waits. What runs is left to end with the process."""
        with self._lock:
            self._closed = True
            waiting = [work for lane in self._waiting for work in lane.waiting or ()]
            waiting += [work for _, work in self._handed]
            self._waiting.clear()
            self._handed.clear()
            self._work_came.notify_all()
        for work in waiting:
            work.future.cancel()

    # Below: for lanes.

    def take_in(self, lane: Lane, work: _Work) -> Future[Any]:
        with self._lock:
            if self._closed:
                raise RuntimeError("the kernel is ending: it takes no more work")
            if lane.waiting or lane.running >= lane.limit or self._running >= self._limit:
                if lane.waiting is None:
                    lane.waiting = deque()
                lane.waiting.append(work)
                work.future.add_done_callback(partial(self._leave, lane))
                if lane.running < lane.limit and lane not in self._waiting:
                    if not self._waiting:
                        log.warning("all %d threads are busy: programs wait for one", self._limit)
                    self._waiting[lane] = None
            else:
                self._hand_out(lane, work)
        return work.future

    def empty(self, lane: Lane) -> None:
        with self._lock:
            taken_out = list(lane.waiting or ())
            lane.waiting = None
            self._waiting.pop(lane, None)
        for work in taken_out:
            work.future.cancel()

    def _leave(self, lane: Lane, future: Future[Any]) -> None:
        """Called when work that waited has its end: cancelled work leaves the line, with all that it holds."""
        if not future.cancelled():  # else: also called under the lock
            return
        with self._lock:
            left = [work for work in lane.waiting or () if work.future is not future]
            lane.waiting = deque(left) or None
            if not left:
                self._waiting.pop(lane, None)

    # Below: under the lock, but for ``_serve``.

    def _hand_out(self, lane: Lane, work: _Work) -> None:
        self._count(lane, work, 1)
        self._handed.append((lane, work))
        if self._idle >= len(self._handed):
            self._work_came.notify()
            return
        self._made += 1
        try:
            threading.Thread(target=self._serve, name=f"dspex-program-{self._made}", daemon=True).start()
        except RuntimeError as failure:  # the system gives no more threads
            self._handed.pop()
            self._count(lane, work, -1)
            work.future.set_exception(failure)

    def _count(self, lane: Lane, work: _Work, one: int) -> None:
        lane.running += one
        self._running += one
        if work.call is not None:
            self._calls[work.call] += one
            if not self._calls[work.call]:
                del self._calls[work.call]

    def _serve(self) -> None:
        """Do one piece of work after another. The target of each thread."""
        with self._lock:
            self._idle += 1
        while (taken := self._next()) is not None:
            taken[1].do()
            with self._lock:
                self._idle += 1  # first: what waits for the room that it leaves is this thread's to take
                self._count(*taken, -1)
                self._follow(taken[0])
            del taken  # an idle thread would keep a session that is gone

    def _next(self) -> tuple[Lane, _Work] | None:
        with self._lock:
            self._work_came.wait_for(lambda: self._handed or self._closed, self._idle_time)
            self._idle -= 1
            return self._handed.popleft() if self._handed else None

    def _follow(self, lane: Lane) -> None:
        """Hand out what waited for the room that a lane's work left."""
        if lane.waiting:
            self._waiting.setdefault(lane, None)
        while self._waiting and self._running < self._limit and not self._closed:
            first, _ = self._waiting.popitem(last=False)
            self._take_out(first)

    def _take_out(self, lane: Lane) -> None:
        """Hand out a waiting lane's next work, and send the lane to the end of the line while it has more."""
        while lane.waiting and lane.running < lane.limit:
            work = lane.waiting.popleft()
            if not work.future.cancelled():
                self._hand_out(lane, work)
                break
        if not lane.waiting:
            lane.waiting = None
        elif lane.running < lane.limit:
            self._waiting[lane] = None
