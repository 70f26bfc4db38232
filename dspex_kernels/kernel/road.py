"""The fast road: one more channel of the kernel's own, ``dspex``, read by the loop that runs commands.

On shell a message changes threads three times, and states and flushes go around it; here it is taken in where it
runs, and its reply leaves from there. The messages are the same, signed with the same key, encrypted where the
kernel encrypts; ``kernel_info`` tells the endpoint, and is answered here too. Besides it, only commands are.

Over tcp the port is free to choose. Over ipc the socket is one more file, beside the other channels' ones: who
starts the kernel names it in the environment and removes it when the kernel was killed. A kernel that nobody told
of one has no road over ipc, for nobody would remove the file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import zmq

from dspex_kernels import config, logs
from dspex_kernels.kernel.dispatch import Dispatcher
from dspex_kernels.protocol.envelopes import Envelopes, Opened
from dspex_kernels.protocol.messages import REPLY, REQUEST
from dspex_kernels.sockets import LoopSocket

log = logs.get_logger(__name__)

PORTS = (20_000, 32_000)
"""Where a free port is looked for: below those that systems hand out, which Jupyter promises to kernels that start
meanwhile."""
LINGER_MS = 1000
"""For replies that have not left when the kernel ends; as for the other channels."""

INFO_REQUEST, INFO_REPLY = "kernel_info_request", "kernel_info_reply"

Reply = Callable[[dict[str, Any]], None]
Take = Callable[[Opened, Any, Reply], None]
"""Takes a request, its content (None where that cannot be read), and what sends its reply, from any thread."""


class Road:
    """The channel, from its binding to the kernel's end.

    Args:
        socket: Bound.
        session: The kernel's, whose key signs.
    """

    def __init__(self, socket: zmq.Socket[bytes], session: Any) -> None:
        self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        """Where it is bound."""
        self._socket = socket
        self._session = session
        self._channel: LoopSocket | None = None
        self._leaving: list[list[bytes]] = []
        """What is sent at the end of the loop's turn."""
        self._dispatcher: Dispatcher | None = None
        self._envelopes = Envelopes(session.key, session.signature_scheme, replayed=self._replayed)

    @classmethod
    def bind(cls, app: Any, socket: zmq.Socket[bytes]) -> Road | None:
        """Bind the channel of a kernel application whose other channels are bound; None where it can have none.

        Args:
            app: The ``IPKernelApp``.
            socket: Of ``wires.make_router``; closed where there is no road.
        """
        if app.transport == "ipc" and os.environ.get(config.ENV_ROAD) != config.road_path(app.ip):
            socket.close(linger=0)
            return None
        app._apply_curve_server_options(socket)
        try:
            if app.transport == "ipc":
                socket.bind(f"ipc://{config.road_path(app.ip)}")
            else:
                socket.bind_to_random_port(f"{app.transport}://{app.ip}", *PORTS)
        except (zmq.ZMQError, zmq.ZMQBindError) as failure:  # a path may be too long
            log.warning("this kernel answers commands on shell only: its own channel cannot be bound: %s", failure)
            socket.close(linger=0)
            return None
        return cls(socket, app.session)

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
        """Close the socket; from any thread. Called when no command runs any more."""
        if self._channel is not None:
            try:
                self._send_all()  # what the loop's last turn left
            finally:
                self._channel.close(linger=LINGER_MS)
        else:
            self._socket.close(linger=0)

    def _begin(self, take: Take) -> None:
        self._channel = LoopSocket(self._socket, lambda frames: self._open(frames, take))

    def _open(self, frames: list[bytes], take: Take) -> None:
        try:
            opened = self._envelopes.open(frames)
        except ValueError as failure:
            # Not even a header, or a wrong signature: there is nobody to answer.
            log.warning("a message on the dspex channel is dropped: %s", failure)
            return
        if opened.msg_type == INFO_REQUEST:
            self._reply(opened, {"status": "ok", **self._info()}, INFO_REPLY)
            return
        if opened.msg_type != REQUEST:
            log.warning("a %s on the dspex channel is dropped: only %s is answered here", opened.msg_type, REQUEST)
            return
        try:
            content = opened.content()
        except ValueError as failure:
            log.warning("a %s whose content cannot be read: %s", REQUEST, failure)
            content = None
        take(opened, content, lambda answer: self._reply(opened, answer))

    def _reply(self, opened: Opened, answer: dict[str, Any], msg_type: str = REPLY) -> None:
        _, frames = self._envelopes.seal(msg_type, answer, opened.header)
        assert self._dispatcher is not None
        if threading.get_ident() == self._dispatcher.thread.ident:
            self._send_soon([*opened.identities, *frames])
        else:
            self._dispatcher.loop.call_soon_threadsafe(self._send_soon, [*opened.identities, *frames])

    def _send_soon(self, message: list[bytes]) -> None:
        """Send a message at the end of this turn of the loop, together with those of other calls that end now.

        Each that goes by itself wakes ZMQ's thread: a twelfth of a prediction, with a hundred side by side.
        """
        assert self._dispatcher is not None
        if not self._leaving:
            self._dispatcher.loop.call_soon(self._send_all)
        self._leaving.append(message)

    def _send_all(self) -> None:
        leaving, self._leaving = self._leaving, []
        assert self._channel is not None
        for message in leaving:
            self._channel.send(message)

    def _replayed(self, signature: bytes) -> bool:
        """One history for all channels: what was recorded on one of them is refused on the others too."""
        if signature in self._session.digest_history:
            return True
        self._session._add_digest(signature)
        return False
