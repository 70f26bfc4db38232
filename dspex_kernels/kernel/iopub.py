"""Who listens to this kernel: iopub's subscriptions, counted as they come and go."""

from __future__ import annotations

from typing import Any

import zmq
from ipykernel.iostream import IOPubThread


class CountingIOPubThread(IOPubThread):
    """ipykernel's thread for iopub, which also counts subscriptions.

    A plain XPUB tells of a topic's first subscriber and of its last one's end only. This one tells of each, also
    when a client's connection breaks; the welcome of JEP 65 still goes out when stock's would.
    """

    def __init__(self, socket: Any, *args: Any, **kwargs: Any) -> None:
        self._subscriptions: dict[bytes, int] = {}
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
