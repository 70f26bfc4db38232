"""The channels of a lean kernel and the threads that read them: there before it is known whose they are.

A kernel that stands by has them ready, bound in a directory of its own; told whose it is, it gives them their
names. A socket is its thread's once that runs: it is bound there too.
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
    """Jupyter's channels; not bound yet, and the threads do not run.

    A lean kernel has no sockets for a debugger, and its heart beats in its control thread, not in three more. Not
    without a heart: a stock client without a manager takes such a kernel for dead.

    Args:
        session: Signs what iopub tells by itself.
    """

    shell_stream: ZMQStream
    """Reads shell in its thread; from ``start`` on, as the next."""
    control_stream: ZMQStream

    def __init__(self, session: Session) -> None:
        self.context: zmq.Context[Socket] = zmq.Context()
        self.shell, self.stdin, self.control = (make_router(self.context) for _ in range(3))
        self._heart: Any = make_router(self.context)
        iopub = self.context.socket(zmq.XPUB)
        iopub.linger = LINGER_MS
        self.iopub_thread = CountingIOPubThread(iopub, pipe=True, session=session)
        self.control_thread = ControlThread(daemon=True)
        self.shell_channel_thread = ShellChannelThread(self.context, daemon=True)

    def start(self, bind: Bind) -> None:
        """Start the threads; each binds its channels, and reads them from now on.

        Args:
            bind: Called for each in its thread.

        Raises:
            zmq.ZMQError: One cannot be bound.
        """
        control, shell = self.control_thread.io_loop, self.shell_channel_thread.io_loop

        def read_control() -> None:
            self.control_stream = ZMQStream(self.control, control)
            self._heart = ZMQStream(self._heart, control)
            self._heart.on_recv(self._heart.send_multipart)

        def read_shell() -> None:
            self.shell_stream = ZMQStream(self.shell, shell)

        bound = self._bind_all(bind)
        bound += [_call_on(control, read_control), _call_on(shell, read_shell)]
        self.iopub_thread.start()
        self.control_thread.start()
        self.shell_channel_thread.start()
        self._wait(bound, bind)
        self.shell_channel_thread.shell_stream = self.shell_stream

    def bind(self, bind: Bind) -> None:
        """Bind the channels once more, elsewhere.

        Args:
            bind: Called for each in its thread.

        Raises:
            zmq.ZMQError: One cannot be bound.
        """
        self._wait(self._bind_all(bind), bind)

    def _bind_all(self, bind: Bind) -> list[Future[None]]:
        def bind_control() -> None:
            bind("control", self.control)
            bind("hb", self._heart_socket)

        return [
            _call_on(self.control_thread.io_loop, bind_control),
            _call_on(self.shell_channel_thread.io_loop, lambda: bind("shell", self.shell)),
            _call_on(self.iopub_thread.io_loop, lambda: bind("iopub", self.iopub_thread.socket)),
        ]

    def _wait(self, bound: list[Future[None]], bind: Bind) -> None:
        bind("stdin", self.stdin)
        for future in bound:
            future.result(BIND_TIMEOUT)

    def close_heart(self) -> None:
        """Let it beat no more. Called when the control thread has ended."""
        self._heart_socket.close(linger=0)

    @property
    def _heart_socket(self) -> Socket:
        return self._heart.socket if isinstance(self._heart, ZMQStream) else self._heart


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
