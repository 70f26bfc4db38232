"""The kernel class: a full IPython kernel that also answers commands of DSPy sessions."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import FrameType
from typing import Any, ClassVar
from uuid import uuid4

from ipykernel.iostream import OutStream
from ipykernel.ipkernel import IPythonKernel
from IPython.core.interactiveshell import InteractiveShell
from traitlets import Type

from dspex_kernels import __version__, errors
from dspex_kernels.kernel.dispatch import Ask, Dispatcher
from dspex_kernels.kernel.notebook.asker import NotebookAsker
from dspex_kernels.kernel.notebook.zmqshell import ZMQInteractiveShell
from dspex_kernels.kernel.road import Reply, Road
from dspex_kernels.kernel.status import StatusBoard
from dspex_kernels.protocol import FEATURE, PROTOCOL_VERSION
from dspex_kernels.protocol.commands import COMMANDS
from dspex_kernels.protocol.envelopes import Opened
from dspex_kernels.protocol.messages import EVENT, REPLY, REQUEST

NEEDS_CODE = (
    *("execute_request", "complete_request", "inspect_request", "comm_open", "comm_msg", "comm_close"),
    *("debug_request", "create_subshell_request", "delete_subshell_request", "list_subshell_request"),
    "history_request",  # IPython's history is the user's, of all kernels
)
"""Messages that a kernel refuses which takes data only."""

RUN_USER_CODE = ("complete_request", "inspect_request", "comm_open", "comm_msg", "comm_close")
"""Shell messages besides cells that call what a notebook wrote: attributes, widgets' callbacks."""


class DSPexKernel(IPythonKernel):
    """Answers ``dspex_request`` on shell and control beside everything that a Python kernel answers.

    Commands are taken off the shell channel in the channel's own thread, before they would queue behind a cell
    in the main thread, and run on the dispatcher's thread.
    """

    msg_types: ClassVar[list[str]] = [*IPythonKernel.msg_types, REQUEST]
    control_msg_types: ClassVar[list[str]] = [*IPythonKernel.control_msg_types, REQUEST]

    shell_class = Type(ZMQInteractiveShell)

    def __init__(self, **kwargs: Any) -> None:
        # Before super: it publishes states while it starts.
        self._status = StatusBoard(self._send_status)
        self._cell: Callable[[FrameType | None], None] | None = None
        self._road: Road | None = None
        self.dispatcher: Dispatcher  # from ``attach`` on
        self.asker = NotebookAsker(self)
        super().__init__(**kwargs)
        self.debugger = None  # stock has built one that reaches no debugger: see ``attach``
        assert self.shell is not None
        self.shell.user_ns.pop("__session__", None)  # of the environment in which the kernel is built
        for name in RUN_USER_CODE:
            self.shell_handlers[name] = self._interruptible(self.shell_handlers[name])

    def connect(self, **parts: Any) -> None:
        """Give it its channels.

        Args:
            parts: Session, sockets, streams and threads, by the names of ipykernel's traits. Without a
                ``debugpy_stream`` it has no debugger, and without a ``shell_channel_thread`` no subshells.
        """
        # A fork shares what was drawn by lot before it.
        self.ident = str(uuid4())
        for name, part in parts.items():
            setattr(self, name, part)
        self._stdout, self._stderr = sys.stdout, sys.stderr
        assert self.shell is not None
        for publisher in (self.shell.displayhook, self.shell.display_pub):
            publisher.session, publisher.pub_socket = self.session, self.iopub_socket
        self.shell.displayhook.topic = self._topic("execute_result")
        if self.debugpy_stream is not None:
            self.debugger = self._make_debugger()
        else:
            self.control_handlers["debug_request"] = self._refuse_debugger

    def attach(self, dispatcher: Dispatcher, road: Road | None) -> None:
        """Make it the kernel of a session: until now it was any.

        Args:
            dispatcher: Takes its commands.
            road: Our own channel; None where there is none.
        """
        self.dispatcher = dispatcher
        self._road = road
        self._guard_code(dispatcher.identity.allow_code)

    @property
    def _is_lean(self) -> bool:
        return self.debugpy_stream is None

    def _make_debugger(self) -> Any:
        return self.debugger_class(
            self.log,
            self.debugpy_stream,
            self._publish_debug_event,
            self.debug_shell_socket,
            self.session,
            self._kernel_modules,
            self.debug_just_my_code,
            self.filter_internal_frames,
        )

    def _guard_code(self, allow_code: bool) -> None:
        if allow_code:
            for name in ("execute_request", *RUN_USER_CODE):
                self.shell_handlers[name] = self._counted(self.shell_handlers[name])
            return
        for handlers in (self.shell_handlers, self.control_handlers):
            handlers.update({name: self._refuse_code for name in NEEDS_CODE if name in handlers})

    # What a client sees of us

    @property
    def kernel_info(self) -> dict[str, Any]:
        """Stock information, and that we speak DSPex."""
        info: dict[str, Any] = super().kernel_info
        stock = info["supported_features"] if self.dispatcher.identity.allow_code else []  # the debugger, subshells
        without = {"debugger"} if self.debugger is None else set()
        ours = self.dspex_info
        features = [*(feature for feature in stock if feature not in without), *ours["supported_features"]]
        return {**info, **ours, "supported_features": features}

    @property
    def dspex_info(self) -> dict[str, Any]:
        """What of ``kernel_info`` is ours: that we speak DSPex, with which session, in which version.

        Told on the road, where nobody asks for stock's banner: that makes IPython's directories.
        """
        identity = self.dispatcher.identity
        told = {
            "protocol_version": PROTOCOL_VERSION,
            "session_id": identity.session_id,
            "backend": "dedicated" if identity.session_id or identity.is_spare else "pooled",
            "kernel_id": identity.kernel_id,
            "generation": identity.generation,
            "allow_code": identity.allow_code,
            "version": __version__,
        }
        if self._road is not None:
            told["endpoint"] = self._road.endpoint
        return {"implementation": self.implementation, "supported_features": [FEATURE], FEATURE: told}

    # Commands

    async def shell_channel_thread_main(self, msg: list[Any]) -> None:
        """Take commands off the shell channel; all else goes on as stock."""
        if self.session is None or not self._took_command(msg, self.shell_stream):
            await super().shell_channel_thread_main(msg)

    async def process_control(self, msg: list[Any]) -> None:
        """Take commands off the control channel: they publish no status. All else goes on as stock."""
        if self.session is None or not self._took_command(msg, self.control_stream):
            await super().process_control(msg)

    async def dspex_request(self, stream: Any, ident: Any, parent: dict[str, Any]) -> None:
        """The handler where no thread reads the shell channel (and for the list of message types)."""
        self._submit(stream, ident, parent, parent.get("content"))

    def _took_command(self, msg: list[Any], stream: Any) -> bool:
        ident, frames = self.session.feed_identities(msg, copy=False)
        try:
            message = self.session.deserialize(frames, content=False, copy=False)
        except Exception:  # noqa: BLE001  # whatever a hostile peer sends; stock logs what it refuses
            # Not even a header, or a wrong signature: there is nobody to answer.
            return False
        if message["header"].get("msg_type") != REQUEST:
            return False
        try:
            message = self.session.deserialize(frames, content=True, copy=False)
            content = message["content"]
        except Exception as failure:  # noqa: BLE001  # answered below as a message that cannot be read
            self.log.warning("a %s whose content cannot be read: %s", REQUEST, failure)
            content = None
        self._submit(stream, ident, message, content)
        return True

    def _submit(self, stream: Any, ident: Any, parent: dict[str, Any], content: Any) -> None:
        def reply(answer: dict[str, Any]) -> None:
            # A stream is its own thread's: sending from another corrupts it.
            stream.io_loop.add_callback(self.session.send, stream, REPLY, answer, parent, ident=ident)

        self._take(ident, parent, content, reply, quiet=_is_control(content))

    def _take_from_road(self, request: Opened, content: Any, reply: Reply) -> None:
        # States are told where somebody looks: notebooks, their server's culler, a caller who awaits events.
        streams = isinstance(content, dict) and content.get("stream") is True
        watched = streams or self.dispatcher.clients() != 0
        parent = {"header": request.header}
        quiet = not watched or _is_control(content)
        self._take(request.identities, parent, content, reply, quiet=quiet)

    def _take(self, ident: Any, parent: dict[str, Any], content: Any, reply: Reply, *, quiet: bool) -> None:
        self.dispatcher.submit(
            Ask(
                content,
                message_id=str(parent["header"].get("msg_id", "")),
                reply=reply,
                emit=lambda event: self._send_event(event, parent),
                context=self._output_context(ident, parent),
                began=None if quiet else lambda: self._status.busy(parent),
                ended=None if quiet else lambda: self._finished(parent),
            )
        )

    def _finished(self, parent: dict[str, Any]) -> None:
        for stream in (sys.stdout, sys.stderr):
            # Not flush(): it waits for the iopub thread, up to ten seconds, and may be a cell's own.
            if isinstance(stream, OutStream):
                stream.pub_thread.schedule(stream._flush)
        # A flush puts what it sends at the end of that thread's line: the state goes behind it.
        self.iopub_socket.io_thread.schedule(partial(self._flushed, parent))

    def _flushed(self, parent: dict[str, Any]) -> None:
        """Called in the iopub thread when a command's output is on its way."""
        # Not idle() itself here: whoever publishes a state holds the board and may wait for this thread's line.
        try:
            self.dispatcher.loop.call_soon_threadsafe(self._status.idle, parent)
        except RuntimeError:
            self.log.debug("the command loop has ended: an idle is not told")

    def _output_context(self, ident: Any, parent: dict[str, Any]) -> contextvars.Context:
        """The variables by which what a command prints finds its way to who asked."""
        context = contextvars.Context()

        def enter() -> None:
            self._shell_parent.set(parent)
            self._shell_parent_ident.set(ident)
            for stream in (sys.stdout, sys.stderr):
                if hasattr(stream, "set_thread_parent"):
                    stream.set_thread_parent(parent)

        context.run(enter)
        return context

    def _send_event(self, event: dict[str, Any], parent: dict[str, Any]) -> None:
        self.session.send(self.iopub_socket, EVENT, event, parent=parent, ident=self._topic(EVENT))

    # Code

    def _counted(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        async def handle(stream: Any, ident: Any, parent: dict[str, Any]) -> None:
            with self.dispatcher.in_notebook():
                handled = handler(stream, ident, parent)
                if inspect.isawaitable(handled):
                    await handled

        return handle

    async def _refuse_code(self, stream: Any, ident: Any, parent: dict[str, Any]) -> None:
        """The handler of messages that run code, or belong to it, where none is allowed."""
        self._refuse(stream, ident, parent, f"this kernel takes data only; send it commands ({REQUEST})")

    async def _refuse_debugger(self, stream: Any, ident: Any, parent: dict[str, Any]) -> None:
        """The handler of messages to the debugger where there is none."""
        self._refuse(stream, ident, parent, "this kernel has no debugger; start it without DSPEX_LEAN")

    def _refuse(self, stream: Any, ident: Any, parent: dict[str, Any], reason: str) -> None:
        msg_type = parent["header"]["msg_type"]
        why = f"{msg_type} is refused: {reason}"
        refusal = {"ename": errors.PolicyDenied.__name__, "evalue": why, "traceback": [why]}
        if not msg_type.endswith("_request"):  # a comm's message has no reply
            self.log.warning(why)
            return
        content = {"status": "error", **refusal, "execution_count": 0}
        if msg_type == "execute_request":
            self.session.send(self.iopub_socket, "error", refusal, parent=parent, ident=self._topic("error"))
        self.session.send(stream, msg_type.replace("_request", "_reply"), content, parent, ident=ident)

    # Status

    def _publish_status(self, status: str, channel: str, parent: dict[str, Any] | None = None) -> None:
        """Called by ipykernel around each message, from the main, subshell and control threads."""
        if not self.session:
            return
        of = parent or self.get_parent(channel)
        match status:
            case "busy":
                self._status.busy(of)
            case "idle":
                self._status.idle(of)
            case _ if self.dispatcher.clients() or not self._is_lean:  # "starting": it wakes a thread
                self._send_status(status, of)

    def _send_status(self, status: str, parent: dict[str, Any]) -> None:
        self.session.send(
            self.iopub_socket,
            "status",
            {"execution_state": status},
            parent=parent,
            ident=self._topic("status"),
        )

    # Interrupt

    def pre_handler_hook(self) -> None:
        """Called by ipykernel before each shell message: our handler stays, whatever user code had set."""
        signal.signal(signal.SIGINT, self.on_sigint)

    def post_handler_hook(self) -> None:
        """Called by ipykernel after each shell message."""
        signal.signal(signal.SIGINT, self.on_sigint)

    def on_sigint(self, _signum: int, frame: FrameType | None) -> None:
        """End what a person means: the cell that runs, else the commands of the notebook's session.

        Installed once and for all instead of stock's swapping: a SIGINT that finds stock's handler between two
        messages is a KeyboardInterrupt in the event loop, which ends the kernel with exit code 0.
        """
        if self._cell is not None:
            self._cell(frame)
        elif self.dispatcher.identity.session_id is not None:
            self.dispatcher.interrupt()

    def _interruptible(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        async def handle(stream: Any, ident: Any, parent: dict[str, Any]) -> None:
            if threading.current_thread() is not threading.main_thread():
                interrupted_by: AbstractContextManager[None] = nullcontext()
            else:
                interrupted_by = self._interrupted_by(self._interrupt_cell)
            # KeyboardInterrupt ends it as stock: ipykernel's dispatch logs it.
            with interrupted_by:
                handled = handler(stream, ident, parent)
                if inspect.isawaitable(handled):
                    await handled

        return handle

    async def do_execute(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run a cell, interruptible from its first to its last moment."""
        if threading.current_thread() is not threading.main_thread():
            reply: dict[str, Any] = await super().do_execute(*args, **kwargs)
            return reply
        try:
            with self._interrupted_by(self._interrupt_cell):
                reply = await super().do_execute(*args, **kwargs)
        except KeyboardInterrupt:
            # Between two statements of ipykernel's own: the cell is over, its client still needs an answer.
            return self._interrupted_reply()
        return reply

    def _interrupt_cell(self, _frame: FrameType | None) -> None:
        if not self.asker.interrupt():
            raise KeyboardInterrupt

    @contextmanager
    def _interrupted_by(self, interrupt: Callable[[FrameType | None], None]) -> Iterator[None]:
        outer, self._cell = self._cell, interrupt
        try:
            yield
        finally:
            self._cell = outer

    @contextmanager
    def _cancel_on_sigint(self, future: asyncio.Future[Any]) -> Iterator[None]:
        """Called by ipykernel around an awaiting cell. Stock's does not wake a loop that sleeps in select.

        Nor does it end a cell that computes between two awaits.
        """
        loop = asyncio.get_running_loop()

        def interrupt(frame: FrameType | None) -> None:
            if self.asker.interrupt():
                return
            if asyncio.current_task(loop) is future and _in_user_code(frame):
                raise KeyboardInterrupt
            loop.call_soon_threadsafe(future.cancel)

        with self._interrupted_by(interrupt):
            yield

    def _interrupted_reply(self) -> dict[str, Any]:
        assert self.shell is not None
        return {
            "status": "error",
            "ename": "KeyboardInterrupt",
            "evalue": "",
            "traceback": [],
            "execution_count": self.shell.execution_count - 1,
            "user_expressions": {},
            "payload": [],
        }

    # Life

    def start(self) -> None:
        """Called by the application once all sockets are there."""
        self.dispatcher.start()
        if not self._is_lean:
            super().start()
        else:  # stock warns that it cannot debug, in each kernel's log
            super(IPythonKernel, self).start()
        if self._road is not None:  # last: whoever waits there is answered at once, and nobody else works then
            self._road.serve(self.dispatcher, self._take_from_road, lambda: self.dspex_info)

    async def do_shutdown(self, restart: bool) -> dict[str, Any]:
        """Called on ``shutdown_request``, in the control thread: answer what runs, close what is open."""
        reason = errors.KernelDied("the kernel is restarting" if restart else "the kernel is shutting down")
        await asyncio.to_thread(self.dispatcher.close, reason)
        if self._road is not None:
            self._road.close()  # nobody reads it any more: who asks now is answered on shell
        if not restart and self.parent is not None:
            self.parent.forget_session()
        reply: dict[str, Any] = super().do_shutdown(restart)
        return reply


def _is_control(content: Any) -> bool:
    command = content.get("command") if isinstance(content, dict) else None
    row = COMMANDS.get(command) if isinstance(command, str) else None
    return row is not None and row.control


def _in_user_code(frame: FrameType | None) -> bool:
    """Whether IPython runs a cell's code in this stack: there it makes a KeyboardInterrupt the cell's own error.

    Anywhere else in an asyncio task it would end the main loop, and the kernel.
    """
    while frame is not None:
        if frame.f_code is InteractiveShell.run_code.__code__:
            return True
        frame = frame.f_back
    return False
