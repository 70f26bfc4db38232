"""The thread of iopub: it counts who listens to this kernel, and sleeps while nothing is published."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zmq
from ipykernel.iostream import IOPubThread

SEND_TIMEOUT_MS = 1000
"""How long a thread waits for room among the wake-ups of the iopub thread. Stock waits for ever, also for a thread
that ended between the look and the sending: then the process does not end either."""


class CountingIOPubThread(IOPubThread):
    """ipykernel's thread for iopub, which also counts subscriptions.

    A plain XPUB tells of a topic's first subscriber and of its last one's end only. This one tells of each, also
    when a client's connection breaks; the welcome of JEP 65 still goes out when stock's would.

    Stock wakes every ten seconds to close what threads that ended left. Only what is published can leave more of
    it, so this one looks ten seconds after something was, and an idle kernel does not wake.
    """

    def __init__(self, socket: Any, *args: Any, **kwargs: Any) -> None:
        self._subscriptions: dict[bytes, int] = {}
        self._will_collect = False
        if socket.type == zmq.XPUB:
            socket.setsockopt(zmq.XPUB_VERBOSER, 1)
        super().__init__(socket, *args, **kwargs)

    def clients(self) -> int:
        """Sockets that subscribe to everything, as Jupyter's clients do, each with one of them. From any thread."""
        return self._subscriptions.get(b"", 0)

    def _handle_subscription(self, frames: list[bytes]) -> None:
        for frame in frames:
            subscribes, topic = frame[:1] == b"\x01", frame[1:]
            before = self._subscriptions.pop(topic, 0)
            if after := before + (1 if subscribes else -1):
                self._subscriptions[topic] = after
            if subscribes and not before:
                super()._handle_subscription([frame])

    @property
    def _event_pipe(self) -> Any:
        pipe = super()._event_pipe
        pipe.sndtimeo = SEND_TIMEOUT_MS
        return pipe

    def schedule(self, f: Callable[[], None]) -> None:
        """Have ``f`` called in the thread. From any thread."""
        try:
            super().schedule(f)
        except zmq.Again:
            return  # it is noted already; where the thread lives, a full line of wake-ups will do it
        except zmq.ZMQError as failure:
            if failure.errno not in (zmq.ENOTSOCK, zmq.ETERM):
                raise
            f()  # the thread has just ended: as stock does it then

    async def _run_event_pipe_gc(self) -> None:
        """Called once as a task when the thread begins: stock's endless loop of looks."""

    def _handle_event(self, msg: Any) -> None:
        super()._handle_event(msg)
        if not self._will_collect:
            self._will_collect = True
            self.io_loop.call_later(self._event_pipe_gc_seconds, self._collect)

    async def _collect(self) -> None:
        self._will_collect = False
        await self._event_pipe_gc()
