"""A ZMQ socket on an asyncio loop, read by a callback: ``zmq.asyncio`` makes two futures for each message."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import zmq

from dspex_kernels import logs

BURST = 100
"""Messages read in one turn of the loop: everything else is to have its turn too."""

# As plain numbers: joining pyzmq's flags for each frame takes longer than sending it.
_MORE, _LAST = int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.NOBLOCK)

_log = logs.get_logger(__name__)


_numbers = itertools.count()


class LoopSocket:
    """Sends without waiting, and has each message taken as it comes.

    Made and used on the loop's thread; only ``close`` may come from another.

    Args:
        socket: Bound or connected, with no limit on what waits to be sent (``sndhwm`` 0).
        take: Takes a message's frames, on the loop.
    """

    def __init__(self, socket: zmq.Socket[bytes], take: Callable[[list[bytes]], Any]) -> None:
        self._socket = socket
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._writable: asyncio.Event | None = None
        self._monitor: LoopSocket | None = None
        # A socket is one thread's, but a kernel that ends closes it while its loop may be stuck.
        self._lock = threading.Lock()
        self._descriptor = cast(int, socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._read)
        # The descriptor tells of changes only: what came before is to be looked for.
        self._loop.call_soon(self._read)

    def send(self, frames: Sequence[bytes]) -> bool:
        """Send a message; False where nobody is connected who could take it, or the socket is closed."""
        with self._lock:
            if self._socket.closed:
                return False
            try:
                for frame in frames[:-1]:
                    self._socket.send(frame, _MORE)
                self._socket.send(frames[-1], _LAST)
            except zmq.Again:
                return False
            # Sending may have taken note of what came in, of which the descriptor does not tell again then.
            if self._events() & zmq.POLLIN:
                with contextlib.suppress(RuntimeError):  # a loop that is closed reads nothing any more
                    self._loop.call_soon(self._read)
        return True

    async def until_writable(self) -> None:
        """Return when somebody is connected who takes what is sent. Who waits bounds the wait."""
        self._writable = asyncio.Event()
        self._loop.call_soon(self._read)
        await self._writable.wait()

    def when_disconnected(self, call: Callable[[], Any]) -> None:
        """Have ``call`` called, on the loop, when the peer has gone. That costs some descriptors.

        ``ZMQ_IMMEDIATE`` would tell by refusing what is sent, but ends the process: a peer that goes takes the rest
        of a message along that is just being read (libzmq aborts: "Assertion failed: !_more (src/fq.cpp)").
        """
        address = f"inproc://disconnected-{next(_numbers)}"
        self._socket.monitor(address, zmq.EVENT_DISCONNECTED)
        events = cast("zmq.Socket[bytes]", self._socket.context.socket(zmq.PAIR, socket_class=zmq.Socket))
        events.connect(address)
        self._monitor = LoopSocket(events, lambda _: call())

    def close(self, *, linger: int) -> None:
        """Close the socket; nothing is taken after that. From any thread, and a second time.

        Args:
            linger: Milliseconds for what is not sent yet.
        """
        with self._lock:
            if self._socket.closed:
                return
            # A loop that is closed watches nothing; one that runs in another thread ends with its process.
            with contextlib.suppress(RuntimeError):
                if asyncio.get_running_loop() is self._loop:
                    self._loop.remove_reader(self._descriptor)
            self._socket.close(linger=linger)
        if self._monitor is not None:
            self._monitor.close(linger=0)

    def _read(self) -> None:
        for _ in range(BURST):
            frames = self._next()
            if frames is None:
                return
            try:
                self._take(frames)
            except Exception:  # noqa: BLE001  # one message's fault must not cost the others
                _log.exception("a message could not be taken in")
        self._loop.call_soon(self._read)

    def _next(self) -> list[bytes] | None:
        with self._lock:
            if self._socket.closed:
                return None
            if self._writable is not None and self._events() & zmq.POLLOUT:
                self._writable.set()
                self._writable = None
            try:
                return self._socket.recv_multipart(_LAST)
            except zmq.Again:
                return None

    def _events(self) -> int:
        return cast(int, self._socket.getsockopt(zmq.EVENTS))
