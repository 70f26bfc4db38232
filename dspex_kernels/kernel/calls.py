"""One command on its way: what may end it, what it may still spend, and how it reports."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dspex_kernels import tracing
from dspex_kernels.errors import CallStopped, CommandTimeout, DSPexError
from dspex_kernels.kernel.ledger import Ledger
from dspex_kernels.protocol.records import Budget, Change

if TYPE_CHECKING:
    from dspex_kernels.kernel.namespaces import Namespace

SETTING = "dspex_call"
"""The DSPy setting that holds the current Call.

A setting and not a ContextVar of our own: DSPy carries its settings into its threads (Parallel, asyncify), and
nothing else reaches all of them.
"""

STOPPING_TIME = 1.0
"""Seconds after which the caller of a stopped call is answered, even if its program will not end."""


class Call:
    """One command of one session, or (without a request id) what the cells of a dedicated kernel do.

    Stopping is thread-safe and takes effect at once: the command's task is cancelled, requests that are waiting
    for a provider are cancelled (their sockets close), and the LM gate refuses every later one.

    Args:
        namespace: Whose call.
        command: Its name; "" for cells.
        request_id: The caller's name for it; None for cells.
        deadline: On the ``time.monotonic`` clock; None is no deadline.
        budget: Limits of this call alone; None is none.
        emit: Takes the fields of an event; None where nobody listens.
        stream: Whether tokens and status are to be reported as well.
    """

    def __init__(
        self,
        namespace: Namespace,
        *,
        command: str = "",
        request_id: str | None = None,
        deadline: float | None = None,
        budget: Budget | None = None,
        emit: Callable[[dict[str, Any]], None] | None = None,
        stream: bool = False,
    ) -> None:
        self.namespace = namespace
        self.command = command
        self.request_id = request_id
        self.deadline = deadline
        self.stream = stream
        self.ledger = Ledger(budget or Budget(), of=f"call {request_id!r}")
        self.changes: list[Change] = []
        """What it changed in a pooled kernel, where the reply carries that to the store."""
        self.span = tracing.NO_SPAN
        self.stopped: DSPexError | None = None
        self.stopped_at: float | None = None
        """When, on the ``time.monotonic`` clock; None while it goes on."""
        self.last_provider_error: Exception | None = None
        self.last_event_at = time.monotonic()
        self._emit = emit
        self._sequence = 0
        # Guards the four below: stop() comes from any thread.
        self._lock = threading.Lock()
        self._task: asyncio.Task[Any] | None = None
        self._abandon: Callable[[], None] | None = None
        self._requests: set[asyncio.Task[Any]] = set()

    def stop(self, error: DSPexError) -> None:
        """End the call with ``error``; the first reason stays. Thread-safe."""
        with self._lock:
            if self.stopped is not None:
                return
            self.stopped, self.stopped_at = error, time.monotonic()
            tasks = [t for t in (self._task, *self._requests) if t is not None]
            running, abandon = self._task, self._abandon
        for task in tasks:
            _cancel_from_anywhere(task)
        if running is not None and abandon is not None and not running.get_loop().is_closed():
            loop = running.get_loop()
            loop.call_soon_threadsafe(loop.call_later, STOPPING_TIME, abandon)

    def is_overdue(self) -> bool:
        """Whether it was stopped so long ago that what still runs for it ignores its end."""
        return self.stopped_at is not None and time.monotonic() - self.stopped_at > STOPPING_TIME

    def check(self) -> None:
        """Let the call go on.

        Raises:
            CallStopped: It was stopped, or its deadline has passed.
        """
        if self.stopped is None and self.deadline is not None and time.monotonic() >= self.deadline:
            self.stop(self.timed_out())
        if self.stopped is not None:
            raise CallStopped(self.stopped)

    def timed_out(self) -> CommandTimeout:
        """The error of a call that reached its deadline."""
        return CommandTimeout(
            f"{self.command or 'the call'} did not end before its deadline: give a larger timeout, "
            "or look at what it waits for (inspect_history)",
            details={"request_id": self.request_id, "command": self.command},
        )

    @contextmanager
    def running_in(self, task: asyncio.Task[Any], abandon: Callable[[], None]) -> Iterator[None]:
        """``task`` runs the command: stop() cancels it.

        Args:
            task: Its program may swallow the cancellation, and go on.
            abandon: Answers the caller then; called on the task's loop, perhaps after the answer.

        Raises:
            CallStopped: It was stopped before it ran: nothing of it happens.
        """
        with self._lock:
            if self.stopped is not None:
                raise CallStopped(self.stopped)
            self._task, self._abandon = task, abandon
        try:
            yield
        finally:
            with self._lock:
                self._task = self._abandon = None

    @contextmanager
    def requesting(self, task: asyncio.Task[Any]) -> Iterator[None]:
        """``task`` waits for a provider on this call's behalf: stop() cancels it."""
        with self._lock:
            self._requests.add(task)
            stopped = self.stopped is not None
        if stopped:
            _cancel_from_anywhere(task)
        try:
            yield
        finally:
            with self._lock:
                self._requests.discard(task)

    def emit(self, event: str, **fields: Any) -> None:
        """Report something on the way; dropped where nobody listens. Thread-safe."""
        if self._emit is None or self.request_id is None:
            return
        with self._lock:
            sequence, self._sequence = self._sequence, self._sequence + 1
            self.last_event_at = time.monotonic()
        self._emit(
            {
                "event": event,
                "request_id": self.request_id,
                "session_id": self.namespace.session_id,
                "sequence": sequence,
                **fields,
            }
        )


def _cancel_from_anywhere(task: asyncio.Task[Any]) -> None:
    loop = task.get_loop()
    if not loop.is_closed():
        # From a signal handler or another thread only this wakes a loop that sleeps in select().
        loop.call_soon_threadsafe(task.cancel)
