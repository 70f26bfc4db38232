"""A unix socket on an asyncio loop, that takes and sends messages of frames as a ``LoopSocket`` does.

Over ZMQ a message changes threads twice on its way: each end has one that does nothing but read and write. Where a
thread that wakes has to wait for a processor, that takes longer than all else: of 2.7 ms that a call took above its
program, on two processors, 0.9 were those threads'. Here the loop itself writes to the socket, and reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from dspex_kernels import logs
from dspex_kernels.protocol import limits

ACCEPT_AGAIN_AFTER = 1.0
"""Seconds, where there is no descriptor for a peer."""
BACKLOG = 128
"""Peers that may have connected before the loop comes round to them."""
CHUNK_BYTES = 1 << 16
"""Read in one turn of the loop, some hundred requests: everything else is to have its turn too."""
MAX_MESSAGE_BYTES = 2 * limits.MAX_SESSION_BYTES
"""A peer that announces more is not listened to any more."""

SCHEME = "unix://"
"""Of an endpoint; a path follows."""

_SIZE = struct.Struct("!I")
"""Before each message, and before each of its frames."""
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
"""Python ignores SIGPIPE, but what runs in a kernel may want it."""

_FULL = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM)
"""Why a socket takes nothing for a moment."""

_log = logs.get_logger(__name__)

Take = Callable[[list[bytes]], Any]
TakeFrom = Callable[[list[bytes], Callable[[list[bytes]], Any]], Any]
"""Takes a message's frames, and what sends its answer."""


class LoopStream:
    """One end of a connection: sends without waiting, and has each message taken as it comes.

    Made and used on the loop's thread; only ``close`` may come from another.

    Args:
        connection: Connected.
        take: Takes a message's frames, on the loop.
    """

    def __init__(self, connection: socket.socket, take: Take) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._take = take
        self._gone: Callable[[], Any] | None = None
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._unsent = bytearray()
        self._sent_now = False
        """Whether something was sent in this turn of the loop: what follows in it goes together, at its end."""
        self._is_behind = False
        """Whether the peer is, and the loop watches for room."""
        self._is_closed = False
        # A connection is one thread's, but a kernel that ends closes it while its loop may be stuck.
        self._lock = threading.Lock()
        self._loop.add_reader(connection, self.read)

    @classmethod
    def connect(cls, path: str, take: Take) -> Self:
        """Connect to who listens there.

        Raises:
            OSError: Nobody does, or too many try it just now.
        """
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.setblocking(False)  # a unix socket is connected at once, or not
            connection.connect(path)
            return cls(connection, take)
        except BaseException:
            connection.close()
            raise

    def send(self, frames: Sequence[bytes]) -> bool:
        """Send a message; False where the peer is gone, or the stream is closed."""
        message = _packed(frames)
        with self._lock:
            if self._is_closed:
                return False
            if self._sent_now or self._unsent:
                self._unsent += message
                return True
            sent = self._write(message)
            if sent is None:
                return False
            self._sent_now = True
            if sent < len(message):
                self._unsent += memoryview(message)[sent:]
                self._wait_for_room()
        with contextlib.suppress(RuntimeError):  # a loop that is closed has no next turn
            self._loop.call_soon(self._end_turn)
        return True

    async def until_writable(self) -> None:
        """Return at once: what is not connected is no stream."""

    def when_disconnected(self, call: Callable[[], Any]) -> None:
        """Have ``call`` called, on the loop, when the peer has gone; soon, where it has."""
        self._gone = call
        if self._is_closed:
            self._loop.call_soon(call)

    def close(self, *, linger: int) -> None:
        """Close the stream; nothing is taken after that. From any thread, and a second time.

        Args:
            linger: Milliseconds for what is not sent yet.
        """
        with self._lock:
            if self._is_closed:
                return
            if self._unsent and linger:
                with contextlib.suppress(OSError):  # TimeoutError, or the peer is gone
                    self._connection.settimeout(linger / 1000)
                    self._connection.sendall(self._unsent, _NO_SIGNAL)
            self._close()

    def _close(self) -> None:
        self._is_closed = True
        self._unsent.clear()
        # A loop that is closed watches nothing; one that runs in another thread ends with its process.
        with contextlib.suppress(RuntimeError):
            if asyncio.get_running_loop() is self._loop:
                self._loop.remove_reader(self._connection)
                self._loop.remove_writer(self._connection)
        self._connection.close()

    def _lose(self) -> None:
        """The peer is gone."""
        with self._lock:
            if self._is_closed:
                return
            self._close()
        if self._gone is not None:
            self._gone()

    # What goes out; under the lock

    def _write(self, message: bytes | bytearray) -> int | None:
        """Write what there is room for; how much that is. None where the peer is gone, which the reader is told."""
        try:
            return self._connection.send(message, _NO_SIGNAL)
        except OSError as failure:
            return 0 if failure.errno in _FULL else None

    def _wait_for_room(self) -> None:
        with contextlib.suppress(RuntimeError):  # a loop that is closed watches nothing: ``close`` sends the rest
            self._loop.add_writer(self._connection, self._write_more)
            self._is_behind = True

    def _write_more(self) -> None:
        with self._lock:
            if self._is_closed or not self._unsent:
                return
            sent = self._write(self._unsent)
            if sent is None:
                return
            del self._unsent[:sent]
            if self._unsent and not self._is_behind:
                self._wait_for_room()
            elif not self._unsent and self._is_behind:
                self._is_behind = False
                self._loop.remove_writer(self._connection)

    def _end_turn(self) -> None:
        self._sent_now = False
        if not self._is_behind:
            self._write_more()

    # What comes in

    def read(self) -> None:
        """Take in what has come. Called by the loop, and by who knows that there is something."""
        try:
            data = self._connection.recv(CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose()
            return
        self._received += data
        try:
            for frames in self._messages():
                self._take_one(frames)
        except ValueError as failure:
            _log.warning("a peer on a unix socket is not listened to any more: %s", failure)
            self._lose()

    def _messages(self) -> Iterator[list[bytes]]:
        """The messages that are whole."""
        start, there = 0, len(self._received)
        try:
            while there - start >= _SIZE.size:
                (size,) = _SIZE.unpack_from(self._received, start)
                if size > MAX_MESSAGE_BYTES:
                    raise ValueError(f"it announced {size} bytes, the limit is {MAX_MESSAGE_BYTES}")
                end = start + _SIZE.size + size
                if end > there:
                    break
                message = bytes(memoryview(self._received)[start + _SIZE.size : end])
                start = end
                yield _unpacked(message)
        finally:
            del self._received[:start]

    def _take_one(self, frames: list[bytes]) -> None:
        if self._is_closed:  # by who took the one before
            return
        try:
            self._take(frames)
        except Exception:  # noqa: BLE001  # one message's fault must not cost the others
            _log.exception("a message could not be taken in")


class StreamListener:
    """Listens at a path, and has what its peers send taken on the loop.

    Args:
        path: Of its socket, which is made now: who connects before ``listen`` is heard then. A socket that a
            predecessor left there is removed.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._streams: set[LoopStream] = set()
        try:
            Path(path).unlink(missing_ok=True)
            self._socket.bind(path)
            self._socket.listen(BACKLOG)
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise

    def listen(self, take: TakeFrom) -> None:
        """Take in messages from now on. Called on the loop.

        Args:
            take: Takes them.
        """
        if self._socket.fileno() == -1:
            return
        asyncio.get_running_loop().add_reader(self._socket, self._accept, take)
        self._accept(take)

    def close(self, *, linger: int) -> None:
        """Listen to nobody any more; from any thread, and a second time.

        Args:
            linger: Milliseconds for what the peers have not read yet, all together.
        """
        if self._socket.fileno() == -1:
            return
        with contextlib.suppress(RuntimeError):  # no loop in this thread
            asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):  # who started this process was quicker
            os.unlink(self.path)  # noqa: PTH108  # no file
        deadline = time.monotonic() + linger / 1000
        for stream in list(self._streams):
            stream.close(linger=max(0, round(1000 * (deadline - time.monotonic()))))

    def _accept(self, take: TakeFrom) -> None:
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # it has left again
        except OSError as failure:
            _log.warning("a peer on %s waits: %s", self.path, failure)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._socket)
            loop.call_later(ACCEPT_AGAIN_AFTER, self.listen, take)
            return
        stream = LoopStream(connection, lambda frames: take(frames, stream.send))
        self._streams.add(stream)
        stream.when_disconnected(lambda: self._streams.discard(stream))
        stream.read()  # who connects has something to say, mostly


def _packed(frames: Sequence[bytes]) -> bytes:
    parts = [b""]
    for frame in frames:
        parts += _SIZE.pack(len(frame)), frame
    parts[0] = _SIZE.pack(sum(map(len, parts)))
    return b"".join(parts)


def _unpacked(message: bytes) -> list[bytes]:
    frames, start = [], 0
    while start < len(message):
        if start + _SIZE.size > len(message):
            raise ValueError("a frame's size is cut off")
        (size,) = _SIZE.unpack_from(message, start)
        start += _SIZE.size
        if start + size > len(message):
            raise ValueError("a frame is cut off")
        frames.append(message[start : start + size])
        start += size
    return frames
