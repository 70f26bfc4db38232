"""The fast road: one more channel of the kernel's own, ``dspex``, read by the loop that runs commands.

On shell a message changes threads three times, and states and flushes go around it; here it is taken in where it
runs, and its reply leaves from there. The messages are the same, signed with the same key, encrypted where the
kernel encrypts; ``kernel_info`` tells the endpoint, and our part of it is told here too. Else only commands are
answered.

Over tcp it is a ROUTER whose port is free to choose. Over ipc it is one more file, beside the other channels' ones:
a plain unix socket (``streams`` tells why), or a ROUTER where the kernel encrypts. Who starts the kernel names it
in the environment and removes it when the kernel was killed. A kernel that nobody told of one has no road over ipc:
the file would be removed by nobody.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

import zmq

from dspex_kernels import config, logs
from dspex_kernels.kernel.dispatch import Dispatcher
from dspex_kernels.kernel.wires import make_router
from dspex_kernels.protocol.envelopes import Envelopes, Opened
from dspex_kernels.protocol.messages import REPLY, REQUEST
from dspex_kernels.sockets import LoopSocket
from dspex_kernels.streams import SCHEME, StreamListener, TakeFrom

log = logs.get_logger(__name__)

PORTS = (20_000, 32_000)
"""Where a free port is looked for: below those that systems hand out, which Jupyter promises to kernels that start
meanwhile."""
LINGER_MS = 1000
"""For replies that have not left when the kernel ends; as for the other channels."""

INFO_REQUEST, INFO_REPLY = "kernel_info_request", "kernel_info_reply"

Send = Callable[[list[bytes]], Any]
"""Sends a message to where another came from."""
Reply = Callable[[dict[str, Any]], None]
Take = Callable[[Opened, Any, Reply], None]
"""Takes a request, its content (None where that cannot be read), and what sends its reply, from any thread."""


class Listener(Protocol):
    """Where requests come in."""

    def listen(self, take: TakeFrom) -> None:
        """Take in messages from now on. Called on the loop."""

    def close(self, *, linger: int) -> None:
        """Take in none any more; from any thread. Replies have ``linger`` milliseconds to leave."""


class Road:
    """The channel, from its binding to the kernel's end.

    Args:
        listener: Bound.
        endpoint: Where.
        session: The kernel's, whose key signs.
    """

    def __init__(self, listener: Listener, endpoint: str, session: Any) -> None:
        self.endpoint = endpoint
        self._listener = listener
        self._session = session
        self._dispatcher: Dispatcher | None = None
        self._envelopes = Envelopes(session.key, session.signature_scheme, replayed=self._replayed)

    @classmethod
    def bind(cls, app: Any) -> Road | None:
        """Bind the channel of a kernel application whose other channels are bound; None where it can have none.

        Args:
            app: The ``IPKernelApp``.
        """
        try:
            if app.transport != "ipc":
                router = _Router(app, lambda socket: _bind_to_port(socket, app))
                return cls(router, router.endpoint, app.session)
            path = config.road_path(app.ip)
            if os.environ.get(config.ENV_ROAD) != path:
                return None
            if app.curve_secretkey is not None:
                router = _Router(app, lambda socket: socket.bind(f"ipc://{path}"))
                return cls(router, router.endpoint, app.session)
            return cls(StreamListener(path), SCHEME + path, app.session)
        except (zmq.ZMQError, zmq.ZMQBindError, OSError) as failure:  # a path may be too long
            log.warning("this kernel answers commands on shell only: its own channel cannot be bound: %s", failure)
            return None

    def serve(self, dispatcher: Dispatcher, take: Take, info: Callable[[], dict[str, Any]]) -> None:
        """Read requests on the command loop from now on.

        Args:
            dispatcher: Whose loop.
            take: Takes each.
            info: The kernel's answer to ``kernel_info_request``.
        """
        self._dispatcher = dispatcher
        self._info = info
        dispatcher.loop.call_soon_threadsafe(self._begin, take)

    def close(self) -> None:
        """Take in nothing more; from any thread. Called when no command runs any more."""
        self._listener.close(linger=LINGER_MS)

    def _begin(self, take: Take) -> None:
        self._listener.listen(lambda frames, send: self._open(frames, send, take))

    def _open(self, frames: list[bytes], send: Send, take: Take) -> None:
        try:
            opened = self._envelopes.open(frames)
        except ValueError as failure:
            # Not even a header, or a wrong signature: there is nobody to answer.
            log.warning("a message on the dspex channel is dropped: %s", failure)
            return
        if opened.msg_type == INFO_REQUEST:
            self._reply(send, opened, {"status": "ok", **self._info()}, INFO_REPLY)
            return
        if opened.msg_type != REQUEST:
            log.warning("a %s on the dspex channel is dropped: only %s is answered here", opened.msg_type, REQUEST)
            return
        try:
            content = opened.content()
        except ValueError as failure:
            log.warning("a %s whose content cannot be read: %s", REQUEST, failure)
            content = None
        take(opened, content, lambda answer: self._reply(send, opened, answer))

    def _reply(self, send: Send, opened: Opened, answer: dict[str, Any], msg_type: str = REPLY) -> None:
        _, frames = self._envelopes.seal(msg_type, answer, opened.header)
        assert self._dispatcher is not None
        if threading.get_ident() == self._dispatcher.thread.ident:
            _send(send, [*opened.identities, *frames])
        else:
            self._dispatcher.loop.call_soon_threadsafe(_send, send, [*opened.identities, *frames])

    def _replayed(self, signature: bytes) -> bool:
        """One history for all channels: what was recorded on one of them is refused on the others too."""
        if signature in self._session.digest_history:
            return True
        self._session._add_digest(signature)
        return False


def _send(send: Send, message: list[bytes]) -> None:
    if send(message) is False:
        log.info("a reply has nobody to go to any more: its caller's connection is closed")


class _Router:
    """A ZMQ socket to which requests come."""

    def __init__(self, app: Any, bind: Callable[[zmq.Socket[bytes]], Any]) -> None:
        self._socket = make_router(app.context)
        self._channel: LoopSocket | None = None
        self._leaving: list[list[bytes]] = []
        """What is sent at the end of the loop's turn."""
        try:
            app._apply_curve_server_options(self._socket)
            bind(self._socket)
        except BaseException:
            self._socket.close(linger=0)
            raise
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def listen(self, take: TakeFrom) -> None:
        self._loop = asyncio.get_running_loop()
        self._channel = LoopSocket(self._socket, lambda frames: take(frames, self._send_soon))

    def close(self, *, linger: int) -> None:
        if self._channel is not None:
            try:
                self._send_all()  # what the loop's last turn left
            finally:
                self._channel.close(linger=linger)
        else:
            self._socket.close(linger=0)

    def _send_soon(self, message: list[bytes]) -> None:
        """Send a message at the end of this turn of the loop, together with those of other calls that end now.

        Each that goes by itself wakes ZMQ's thread: a twelfth of a prediction, with a hundred side by side.
        """
        if not self._leaving:
            self._loop.call_soon(self._send_all)
        self._leaving.append(message)

    def _send_all(self) -> None:
        leaving, self._leaving = self._leaving, []
        assert self._channel is not None
        for message in leaving:
            self._channel.send(message)


def _bind_to_port(socket: zmq.Socket[bytes], app: Any) -> None:
    socket.bind_to_random_port(f"{app.transport}://{app.ip}", *PORTS)
