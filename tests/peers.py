"""The plainest peers of a socket on a loop: they block, and share no code with it."""

from __future__ import annotations

import select
import socket
import struct
from typing import Any, Self

import zmq

SIZE = struct.Struct("!I")


def packed(*frames: bytes) -> bytes:
    """A message as it goes over a unix socket."""
    message = b"".join(SIZE.pack(len(frame)) + frame for frame in frames)
    return SIZE.pack(len(message)) + message


class DealerPeer:
    """A ZMQ DEALER.

    Args:
        endpoint: Where it connects.
        context: None is the process's own.
        options: Of its socket.
    """

    def __init__(self, endpoint: str, *, context: zmq.Context[Any] | None = None, **options: Any) -> None:
        self.socket = (context or zmq.Context.instance()).socket(zmq.DEALER)
        for name, value in {"linger": 0, "sndhwm": 0, **options}.items():
            setattr(self.socket, name, value)
        self.socket.connect(endpoint)

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def has_come(self) -> bool:
        """Whether there is something to receive."""
        return bool(self.socket.poll(0))

    def receive(self, deadline: float = 10.0) -> list[bytes]:
        assert self.socket.poll(int(deadline * 1000)), f"nothing came in {deadline:g} s"
        return list(self.socket.recv_multipart())

    def close(self) -> None:
        self.socket.close()


class UnixPeer:
    """A unix socket.

    Args:
        connected: Its own from now on.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.socket.settimeout(10.0)

    @classmethod
    def connect(cls, path: str) -> Self:
        peer = cls(socket.socket(socket.AF_UNIX))
        try:
            peer.socket.connect(path)
        except OSError:
            peer.close()
            raise
        return peer

    def send(self, *frames: bytes) -> None:
        self.socket.sendall(packed(*frames))

    def has_come(self) -> bool:
        """Whether there is something to receive, be it the end."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(0))

    def receive(self, deadline: float = 10.0) -> list[bytes]:
        """The next message.

        Raises:
            EOFError: The other end is closed.
        """
        self.socket.settimeout(deadline)
        message, frames = self._bytes(self._size()), []
        while message:
            end = SIZE.size + SIZE.unpack_from(message)[0]
            assert end <= len(message)
            frames.append(bytes(message[SIZE.size : end]))
            message = message[end:]
        return frames

    def close(self) -> None:
        self.socket.close()

    def _size(self) -> int:
        return int(SIZE.unpack(self._bytes(SIZE.size))[0])

    def _bytes(self, count: int) -> bytearray:
        found = bytearray()
        while len(found) < count:
            part = self.socket.recv(count - len(found))
            if not part:
                raise EOFError(f"the other end is closed, {count - len(found)} bytes too early")
            found += part
        return found
