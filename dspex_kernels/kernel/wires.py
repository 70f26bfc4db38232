"""The channels of a lean kernel and the threads that read them: there before it is known where they are bound.

A kernel that stands by has them ready, and is bound when it is told whose it is. A socket is its thread's once that
runs: it is bound there too.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import zmq
from ipykernel.control import ControlThread
from ipykernel.shellchannel import ShellChannelThread
from jupyter_client.session import Session
from zmq.eventloop.zmqstream import ZMQStream

from dspex_kernels.kernel.iopub import CountingIOPubThread

LINGER_MS = 1000
"""For replies that have not left when the kernel ends; as stock."""
BIND_TIMEOUT = 30.0
"""Seconds for a thread that reads nothing yet to come round."""

Socket = zmq.Socket[bytes]
Bind = Callable[[str, Socket], None]
"""Binds a channel's socket; takes the channel's name as connection files have it."""


def make_router(context: zmq.Context[Socket]) -> Socket:
    """A socket for requests, as a kernel's have to be; not bound yet."""
    socket: Socket = context.socket(zmq.ROUTER)
    socket.linger = LINGER_MS
    socket.router_handover = 1  # as stock (ipykernel#270)
    # By default a ROUTER drops in silence what exceeds 1000 messages to a peer: of 9000 commands of a client that
    # did not read meanwhile, 2500 were never answered.
    socket.sndhwm = 0
    return socket


class Wires:
    """Sockets that are not bound, and threads that do not run.

    A lean kernel has no sockets for a debugger, and its heart beats in its control thread, not in three more. Not
    without a heart: a stock client without a manager takes such a kernel for dead.

    Args:
        session: Signs what iopub tells by itself.
    """

    shell_stream: ZMQStream
    """Reads shell in its thread; from ``bind`` on, as the next."""
    control_stream: ZMQStream

    def __init__(self, session: Session) -> None:
        self.context: zmq.Context[Socket] = zmq.Context()
        self.shell, self.stdin, self.control, self.road = (make_router(self.context) for _ in range(4))
        self._heart: Any = make_router(self.context)
        iopub = self.context.socket(zmq.XPUB)
        iopub.linger = LINGER_MS
        self.iopub_thread = CountingIOPubThread(iopub, pipe=True, session=session)
        self.control_thread = ControlThread(daemon=True)
        self.shell_channel_thread = ShellChannelThread(self.context, daemon=True)

    def start(self) -> None:
        """Start the threads; a second call does nothing."""
        if not self.iopub_thread.thread.is_alive():
            self.iopub_thread.start()
        for thread in (self.control_thread, self.shell_channel_thread):
            if not thread.is_alive():
                thread.start()

    def bind(self, bind: Bind) -> None:
        """Bind Jupyter's channels, and have them read.

        Args:
            bind: Called for each in its thread.

        Raises:
            zmq.ZMQError: One cannot be bound.
        """
        control, shell = self.control_thread.io_loop, self.shell_channel_thread.io_loop

        def bind_control() -> None:
            bind("control", self.control)
            bind("hb", self._heart)
            self.control_stream = ZMQStream(self.control, control)
            self._heart = ZMQStream(self._heart, control)
            self._heart.on_recv(self._heart.send_multipart)

        def bind_shell() -> None:
            bind("shell", self.shell)
            self.shell_stream = ZMQStream(self.shell, shell)

        bound = [
            _call_on(control, bind_control),
            _call_on(shell, bind_shell),
            _call_on(self.iopub_thread.io_loop, lambda: bind("iopub", self.iopub_thread.socket)),
        ]
        self.start()
        bind("stdin", self.stdin)
        for future in bound:
            future.result(BIND_TIMEOUT)
        self.shell_channel_thread.shell_stream = self.shell_stream

    def close_heart(self) -> None:
        """Let it beat no more. Called when the control thread has ended."""
        socket = self._heart.socket if isinstance(self._heart, ZMQStream) else self._heart
        socket.close(linger=0)


def _call_on(loop: Any, work: Callable[[], None]) -> Future[None]:
    """Have ``work`` called on a thread's loop, whether or not that runs already."""
    done: Future[None] = Future()

    def call() -> None:
        try:
            work()
        except Exception as failure:  # noqa: BLE001  # whatever it is, the one who waits is told
            done.set_exception(failure)
        else:
            done.set_result(None)

    loop.add_callback(call)
    return done
