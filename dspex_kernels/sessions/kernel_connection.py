"""One kernel's channels: any number of calls at once over one lean connection, each reply to its own caller.

Theory of operation. A connection has a DEALER on the kernel's control channel, one for commands, and, once somebody
wants events, a SUB on iopub. A reply is matched to its caller by the message id in its parent header.
``jupyter_client``'s own client discards replies that are not the ones its caller waits for, and two coroutines on
one client hang past their timeouts (jupyter_client#429); it also brings a ZMQ context and threads of its own for
each kernel.

Commands travel on shell, which every kernel has, or on the kernel's own channel, the road (``kernel.road``), once
``identify`` has been told where that is and has been answered there. Where a kernel may be restarted, and its own
channel's port is another one then, the road is given up when nobody is at its end any more, and shell takes the
commands until it is found anew. As long as a call on shell waits, those that follow go there too: a kernel takes in
one channel's commands in their order, not those of two.

Not done: a heartbeat. Whoever starts a kernel watches its process, and says so here with ``fail_all``.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Self

import zmq
import zmq.asyncio

from dspex_kernels import config, errors, logs, tracing
from dspex_kernels.protocol import FEATURE, PROTOCOL_VERSION, messages
from dspex_kernels.protocol.commands import DEFAULT_TIMEOUT_S, Command, get_command
from dspex_kernels.protocol.envelopes import Envelopes, Opened
from dspex_kernels.sessions.calls import EventListener, ReplyListener
from dspex_kernels.sockets import LoopSocket
from dspex_kernels.streams import SCHEME, LoopStream

REPLY_GRACE = 2.0
"""Seconds after a call's deadline in which the kernel's own ``timeout`` answer may still arrive."""
MAX_PENDING = 1000
"""Calls waiting on one kernel: as many as one session may have running there (``MAX_RUNNING_COMMANDS``)."""
CONTROL_RESERVE = 100
"""Control calls allowed above ``MAX_PENDING``: a cancel must pass when everything waits."""
MAX_ABANDONED = 2000
"""Remembered ids of calls nobody waits for any more, so that their late replies are not taken for strays."""
MAX_SOCKETS = 65_000
"""Of one ZMQ context. The default of 1,023 ends at some 340 kernels; the kernel's own limit is open files."""
WELCOME_TIMEOUT = 1.0
"""Seconds for the kernel's ``iopub_welcome``. A kernel whose iopub is no XPUB sends none."""
DRAIN_TIMEOUT = 0.2
"""Seconds after a streamed call's reply for its last events: iopub is another socket, and may be behind."""
CANCEL_PAUSES = (0.0, 0.05, 0.5, 2.0)
"""Seconds before each try to cancel a call that nobody waits for: control may overtake the call on shell."""
RECONNECT_MS = 20
"""A kernel that is still starting has not bound its ports; ZMQ's default tries every 100 ms."""
ROAD_TIMEOUT = 1.0
"""Seconds for the first answer on a kernel's own channel, which may be out of reach: behind a tunnel."""

_log = logs.get_logger(__name__)


def new_context() -> zmq.asyncio.Context:
    """A ZMQ context wide enough for thousands of kernels; its maker ends it with ``destroy(linger=0)``."""
    context = zmq.asyncio.Context()
    context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
    return context


Channel = LoopSocket | LoopStream


@dataclass(eq=False, slots=True)
class _Waiting:
    """A caller that waits for a reply."""

    command: Command | None
    """None for a message of Jupyter's own."""
    reply: asyncio.Future[dict[str, Any]]
    on_event: EventListener | None = None
    idle: asyncio.Event | None = None
    """Set when the kernel has said that it is done with this request: no event follows. None where it need not."""


class KernelConnection:
    """Calls to one kernel.

    Use it on one event loop, from as many tasks as you like.

    Args:
        connection_info: A connection file's content: ``transport``, ``ip``, ``shell_port``, ``control_port``,
            ``iopub_port``, ``key``, ``signature_scheme``, and ``curve_publickey`` and ``curve_secretkey`` where
            the kernel encrypts.
        context: Shared by many connections; None makes one that ends with this connection.
        name: How messages and logs call the kernel; None is its address.
        max_pending: Calls that may wait at once.
        grace: Seconds to wait past a call's deadline for the kernel's own answer.
        on_reply: Takes each ``dspex_reply`` that comes in, in their order and before its caller does, those whose
            caller left too; None is nobody.
        on_late: Told of each reply whose caller had left; None is nobody.
        may_restart: Whether the kernel may come back with this connection file after its end; else its owner says
            that it has died (``fail_all``).
    """

    def __init__(
        self,
        connection_info: Mapping[str, Any],
        *,
        context: zmq.asyncio.Context | None = None,
        name: str | None = None,
        max_pending: int = MAX_PENDING,
        grace: float = REPLY_GRACE,
        on_reply: ReplyListener | None = None,
        on_late: Callable[[], None] | None = None,
        may_restart: bool = True,
    ) -> None:
        self._may_restart = may_restart
        self._info = dict(connection_info)
        self.name = name or _address(self._info, "shell")
        self.strays = 0
        """Messages that answered nobody, or were not to be read; dropped."""
        self.late = 0
        """Replies whose caller had left; dropped."""
        self.on_reply = on_reply
        self._on_late = on_late
        self._owns_context = context is None
        self._context = context
        self._max_pending = max_pending
        self._grace = grace
        self._envelopes = Envelopes(self._info.get("key", b""), self._info.get("signature_scheme") or "hmac-sha256")
        self._channels: dict[str, Channel] = {}
        self._on_shell = self._on_control = 0
        """Calls that wait there."""
        self._road: str | None = None
        """Where the kernel's own channel is; None where it is not used."""
        self._waiting: dict[str, _Waiting] = {}
        self._abandoned: dict[str, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._welcomed = asyncio.Event()
        self._failure: Callable[[Command | None], errors.DSPexError] | None = None
        self._closed = False

    @property
    def pending(self) -> int:
        """How many calls wait for their reply."""
        return len(self._waiting)

    async def open(self) -> Self:
        """Connect what every kernel is asked on; the rest is connected when it is needed.

        The kernel need not be there yet: what is sent waits for it.

        Raises:
            ValueError: A port is no number.
            ZMQError: The addresses are none.
        """
        _address(self._info, "shell")
        if self._context is None:
            self._context = new_context()
        if self._road_beside() is None:
            self._connect("control")
        return self

    async def close(self) -> None:
        """Answer whoever still waits with ``ServiceClosed``, close the sockets."""
        tasks = list(self._tasks)
        self.drop()
        await asyncio.gather(*tasks, return_exceptions=True)

    def drop(self) -> None:
        """As ``close``, where nothing can be awaited."""
        if self._closed:
            return
        self._closed = True
        self.fail_all(lambda _: errors.ServiceClosed(f"the connection to kernel {self.name} was closed"))
        for task in self._tasks:
            task.cancel()
        for channel in self._channels.values():
            channel.close(linger=0)
        self._channels.clear()
        if self._owns_context and self._context is not None:
            self._context.destroy(linger=0)

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def request(
        self,
        command: str,
        args: Mapping[str, Any] | None = None,
        *,
        session_id: str | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
        stream: bool = False,
        on_event: EventListener | None = None,
    ) -> dict[str, Any]:
        """Ask one command and wait for its result.

        The kernel keeps the deadline; this side waits ``grace`` longer for its answer, and no more. A caller that
        is cancelled, or whose deadline passes unanswered, has its call cancelled in the kernel too.

        Args:
            command: A name of the command table.
            args: Its arguments; None is none.
            session_id: Whose command; None is a dedicated kernel's own session.
            timeout: Seconds, above 0; None is the command's default.
            request_id: The caller's name for the call, for ``cancel``; None is the message's id.
            stream: Whether the kernel shall report events on the way.
            on_event: Takes each event's content; None leaves iopub alone.

        Returns:
            The command's result, as its row of the table describes it.

        Raises:
            DSPexError: What the kernel answered.
            InvalidMessage: The request is malformed: an id, the timeout.
            CommandTimeout: No answer came in time.
            KernelDied: The kernel died before it answered.
            SessionLimitReached: ``max_pending`` calls wait already.
            TooLarge: The request is over its size.
        """
        row = get_command(command)
        seconds = timeout if timeout is not None else row.timeout_s or DEFAULT_TIMEOUT_S
        content: dict[str, Any] = {
            "protocol_version": PROTOCOL_VERSION,
            "command": command,
            "args": dict(args or {}),
            "timeout_s": seconds,
            "stream": stream,
        }
        if session_id is not None:
            content["session_id"] = session_id
        if request_id is not None:
            content["request_id"] = request_id
        if (traceparent := tracing.traceparent()) is not None:
            content["traceparent"] = traceparent
        messages.parse_request(content)  # what the kernel would refuse need not travel
        if on_event is not None:
            await self._ensure_events()
        message_id, frames = self._envelopes.seal(messages.REQUEST, content)
        try:
            reply = await self._ask(
                "control" if row.control else "commands",
                message_id,
                frames,
                seconds + self._grace,
                row,
                on_event,
                stream=stream,
            )
        except (asyncio.CancelledError, TimeoutError) as stop:
            self._abandon(message_id)
            if not row.control:
                self._start_cancel(session_id, request_id or message_id, message_id)
            if isinstance(stop, asyncio.CancelledError):
                raise
            raise errors.CommandTimeout(
                f"{command}: kernel {self.name} gave no answer in {seconds:.3g} s, nor in {self._grace:g} s more; "
                "give more time, or see the kernel's log",
                details={"command": command, "timeout_s": seconds},
            ) from None  # the TimeoutError tells nothing more
        return _result(reply)

    async def kernel_info(self, *, timeout: float = DEFAULT_TIMEOUT_S) -> dict[str, Any]:
        """The kernel's ``kernel_info_reply``, over control: it answers while a cell or a command computes.

        Raises:
            CommandTimeout: No answer in ``timeout`` seconds.
            KernelDied: The kernel died first.
        """
        message_id, frames = self._envelopes.seal("kernel_info_request", {})
        try:
            return await self._ask("control", message_id, frames, timeout, None)
        except TimeoutError:
            self._abandon(message_id)
            raise errors.CommandTimeout(
                f"kernel {self.name} did not answer kernel_info within {timeout:g} s: is it running, with "
                "the ports and the key that were given?",
                details={"timeout_s": timeout},
            ) from None  # the TimeoutError tells nothing more

    async def identify(self, *, timeout: float = DEFAULT_TIMEOUT_S) -> dict[str, Any]:
        """What a dspex kernel tells about itself; ask it before anything else, other kernels never answer.

        From then on commands travel on the kernel's own channel, where it has one that can be reached.

        Returns:
            ``session_id`` (None in a pooled kernel), ``protocol_version``, ``backend``, ``kernel_id``,
            ``generation``; ``endpoint`` of its own channel, if it has one.

        Raises:
            NotADSPexKernel: It does not announce ``dspex``.
            ProtocolMismatch: It speaks another major version.
            CommandTimeout: No answer in ``timeout`` seconds.
        """
        info = await self._info_by_road() or await self.kernel_info(timeout=timeout)
        if FEATURE not in (info.get("supported_features") or []):
            raise errors.NotADSPexKernel(
                f"kernel {self.name} ({info.get('implementation', 'unknown')}) is not a dspex kernel: "
                f'start one with the kernelspec "{FEATURE}"',
                details={"implementation": info.get("implementation")},
            )
        about = dict(info.get(FEATURE) or {})
        messages.check_version(about.get("protocol_version"))
        await self._take_road(about)
        return about

    def fail_all(self, error_for: Callable[[Command | None], errors.DSPexError]) -> None:
        """Answer everyone who waits, and everyone who asks from now on, with an error.

        Called from the kernel's owner when its process died or is being ended.

        Args:
            error_for: Makes the error for a command; None stands for a message of Jupyter's own.
        """
        if self._failure is None:
            self._failure = error_for
        for waiting in list(self._waiting.values()):
            if not waiting.reply.done():
                waiting.reply.set_exception(error_for(waiting.command))

    async def _ask(
        self,
        channel: str,
        message_id: str,
        frames: list[bytes],
        timeout: float,
        row: Command | None,
        on_event: EventListener | None = None,
        *,
        stream: bool = False,
    ) -> dict[str, Any]:
        if self._failure is not None:
            raise self._failure(row)
        self._check_room(row)
        waiting = self._waiting[message_id] = _Waiting(row, asyncio.get_running_loop().create_future(), on_event)
        on_shell = channel == "commands" and not self._went_by_road(frames)
        self._on_shell += on_shell
        self._on_control += channel == "control"
        try:
            if on_event is not None and (stream or on_shell):
                waiting.idle = asyncio.Event()
            async with asyncio.timeout(timeout):
                if on_shell or channel != "commands":
                    self._channel("shell" if on_shell else channel).send(frames)
                reply = await waiting.reply
            if waiting.idle is not None:
                with contextlib.suppress(TimeoutError):  # events may be lost, and a status too
                    await asyncio.wait_for(waiting.idle.wait(), DRAIN_TIMEOUT)
            return reply
        finally:
            self._on_shell -= on_shell
            self._on_control -= channel == "control"
            del self._waiting[message_id]
            self._close_unused()
            if waiting.reply.done() and not waiting.reply.cancelled():
                waiting.reply.exception()  # marks an error as seen that came as the caller left

    def _close_unused(self) -> None:
        """Let control go when nobody waits there: of a thousand kernels, most have nothing to be asked there."""
        if self._road is not None and not self._on_control and (control := self._channels.pop("control", None)):
            control.close(linger=0)

    def _check_room(self, row: Command | None) -> None:
        limit = self._max_pending + (CONTROL_RESERVE if row is None or row.control else 0)
        if len(self._waiting) >= limit:
            raise errors.SessionLimitReached(
                f"kernel {self.name} has {len(self._waiting)} calls waiting, the limit is {limit}: "
                "wait for some to end",
                details={"pending": len(self._waiting), "limit": limit},
                retry_after=1.0,
            )

    def _channel(self, name: str) -> Channel:
        return self._channels.get(name) or self._connect(name)

    def _connect(self, name: str) -> Channel:
        channel = self._channels[name] = self._connected(name, _address(self._info, name))
        return channel

    def _connected(self, name: str, address: str) -> Channel:
        """A channel to an address.

        Raises:
            ZMQError: It is none.
            OSError: Nobody listens there, at a unix socket.
        """
        take = functools.partial(self._take, name)
        if address.startswith(SCHEME):
            return LoopStream.connect(address.removeprefix(SCHEME), take)
        assert self._context is not None
        kind = zmq.SUB if name == "iopub" else zmq.DEALER
        socket: zmq.Socket[bytes] = self._context.socket(kind, socket_class=zmq.Socket)  # type: ignore[assignment,arg-type]  # not its own class
        socket.sndhwm = 0  # no more wait than ``max_pending`` allows
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        public, secret = self._info.get("curve_publickey"), self._info.get("curve_secretkey")
        if public and secret:
            # A kernel knows one key pair only: clients use the kernel's own (jupyter_client 8.9, CurveZMQ).
            socket.curve_secretkey = _bytes(secret)
            socket.curve_publickey = _bytes(public)
            socket.curve_serverkey = _bytes(public)
        try:
            socket.connect(address)
        except zmq.ZMQError:
            socket.close(linger=0)
            raise
        if kind == zmq.SUB:
            # Not everything: by that the kernel tells notebooks, which keep it from being culled, from its service.
            socket.subscribe(b"kernel.")
        return LoopSocket(socket, take)

    async def _ensure_events(self) -> None:
        if self._failure is None:
            self._channel("iopub")
        with contextlib.suppress(TimeoutError):  # no welcome: early events may be lost, which they may
            await asyncio.wait_for(self._welcomed.wait(), WELCOME_TIMEOUT)
        self._welcomed.set()

    # The road

    def _went_by_road(self, frames: list[bytes]) -> bool:
        """Send a command on the kernel's own channel; False where shell is to take it."""
        return self._road is not None and not self._on_shell and self._channels["road"].send(frames)

    def _use_road(self, address: str, channel: Channel) -> None:
        self._road, self._channels["road"] = address, channel
        # Of ZMQ it takes descriptors, and a kernel that does not come back is its owner's to tell of.
        if self._may_restart or isinstance(channel, LoopStream):
            channel.when_disconnected(lambda: self._leave_road(channel))

    def _leave_road(self, channel: Channel) -> None:
        """Nobody is there any more: what was on its way is lost."""
        if self._channels.get("road") is not channel:
            return
        self._road = None
        self._channels.pop("road").close(linger=0)
        if self._failure is None:
            self._spawn(self._look_for_road())

    async def _look_for_road(self) -> None:
        try:
            await self.identify()
        except errors.DSPexError as failure:
            _log.debug("kernel %s: its own channel is gone: %s", self.name, failure)

    def _road_beside(self) -> str | None:
        """Where the kernel's own channel is known to be before the kernel tells: over ipc, beside the others."""
        path = config.road_path(str(self._info["ip"]))
        is_there = self._info.get("transport") == "ipc" and os.path.exists(path)  # noqa: PTH110  # it is no file
        if not is_there or self._road is not None:
            return None
        return f"ipc://{path}" if self._info.get("curve_publickey") else SCHEME + path

    async def _info_by_road(self) -> dict[str, Any] | None:
        """What the kernel tells about itself, and its own channel taken; None where it is not asked there."""
        address = self._road_beside()
        if address is None or self._failure is not None:
            return None
        try:
            channel = self._connected("road", address)
        except OSError as failure:
            _log.debug("kernel %s: its own channel %r is out of reach: %s", self.name, address, failure)
            return None
        try:
            info = await self._answer(channel, "kernel_info_request", {})
            if info is not None and self._road is None and self._failure is None:
                self._use_road(address, channel)
            return info
        finally:
            if self._channels.get("road") is not channel:
                channel.close(linger=0)

    async def _take_road(self, about: Mapping[str, Any]) -> None:
        """Use the kernel's own channel from now on, if it answers there: another may listen, or nobody."""
        address = _road_address(self._info, about.get("endpoint"))
        if address is None or address == self._road:
            return
        try:
            channel = self._connected("road", address)
        except (zmq.ZMQError, OSError) as failure:
            _log.debug("kernel %s: its own channel %r is out of reach: %s", self.name, address, failure)
            return
        unused: Channel | None = channel
        try:
            if await self._is_of(channel, about) and address != self._road and self._failure is None:
                unused = self._channels.pop("road", None)
                self._use_road(address, channel)
        finally:
            if unused is not None:
                unused.close(linger=0)

    async def _is_of(self, channel: Channel, about: Mapping[str, Any]) -> bool:
        ping = messages.Request(command="ping").model_dump(exclude_none=True)
        answer = await self._answer(channel, messages.REQUEST, ping)
        try:
            return answer is not None and _result(answer).get("kernel_id") == about.get("kernel_id")
        except errors.DSPexError as failure:
            _log.debug("kernel %s: it does not answer on its own channel: %s", self.name, failure)
            return False

    async def _answer(self, channel: Channel, msg_type: str, content: dict[str, Any]) -> dict[str, Any] | None:
        """The kernel's answer on a channel that may not be its own; None where there is none in time."""
        message_id, frames = self._envelopes.seal(msg_type, content)
        waiting = self._waiting[message_id] = _Waiting(None, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(ROAD_TIMEOUT):
                await channel.until_writable()
                channel.send(frames)
                return await waiting.reply
        except (TimeoutError, errors.DSPexError) as failure:
            _log.debug("kernel %s: it does not answer on its own channel: %s", self.name, failure)
            return None
        finally:
            del self._waiting[message_id]

    # What comes in

    def _take(self, channel: str, frames: list[bytes]) -> None:
        try:
            message = self._envelopes.open(frames)
            content = message.content()
            if channel == "iopub":
                self._take_iopub(message, content)
            else:
                self._take_reply(message, content)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as failure:
            self.strays += 1
            _log.warning("kernel %s: a message on %s cannot be read: %s", self.name, channel, failure)

    def _take_reply(self, message: Opened, content: Any) -> None:
        parent_id = message.parent_header.get("msg_id", "")
        waiting = self._waiting.get(parent_id)
        failure = self._tell_reply(message, content)
        if waiting is not None and not waiting.reply.done():
            if failure is None:
                waiting.reply.set_result(content)
            else:
                waiting.reply.set_exception(failure)
        elif parent_id in self._abandoned:
            del self._abandoned[parent_id]
            self.late += 1
            if self._on_late is not None:
                self._on_late()
        else:
            self.strays += 1
            _log.warning("kernel %s: a %s answers nobody here: dropped", self.name, message.msg_type)

    def _tell_reply(self, message: Opened, content: Any) -> errors.DSPexError | None:
        """Pass a reply on to ``on_reply``. The error for its caller where that fails: nothing is acknowledged."""
        if self.on_reply is None or message.msg_type != messages.REPLY:
            return None
        try:
            self.on_reply(content)
        except Exception as failure:  # noqa: BLE001  # the owner's code may raise anything, and the reader serves others
            _log.exception("kernel %s: a reply could not be taken in", self.name)
            why = type(failure).__name__  # its text may hold what the reply does
            return errors.InvalidMessage(
                f"the reply of kernel {self.name} could not be taken in: {why}; see the log"
            )
        return None

    def _take_iopub(self, message: Opened, content: Any) -> None:
        if message.msg_type == "iopub_welcome":
            self._welcomed.set()
            return
        waiting = self._waiting.get(message.parent_header.get("msg_id", ""))
        if waiting is None:
            return
        if message.msg_type == "status" and content.get("execution_state") == "idle":
            if waiting.idle is not None:
                waiting.idle.set()
        elif message.msg_type == messages.EVENT and waiting.on_event is not None:
            self._tell(waiting, content)

    def _tell(self, waiting: _Waiting, event: dict[str, Any]) -> None:
        assert waiting.on_event is not None
        try:
            waiting.on_event(event)
        except Exception:  # noqa: BLE001  # the caller's code may raise anything, and the reader serves others too
            _log.exception("kernel %s: an event listener failed; it gets no more events", self.name)
            waiting.on_event = None

    def _abandon(self, message_id: str) -> None:
        self._abandoned[message_id] = None
        if len(self._abandoned) > MAX_ABANDONED:
            del self._abandoned[next(iter(self._abandoned))]

    def _start_cancel(self, session_id: str | None, request_id: str, message_id: str) -> None:
        if self._failure is None:
            self._spawn(self._cancel(session_id, request_id, message_id))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _cancel(self, session_id: str | None, request_id: str, message_id: str) -> None:
        """Tell the kernel that nobody waits for a call any more, until it has stopped it or answered it."""
        row = get_command("cancel")
        request = messages.Request(session_id=session_id, command=row.name, args={"request_id": request_id})
        for pause in CANCEL_PAUSES:
            await asyncio.sleep(pause)
            if message_id not in self._abandoned:
                return
            cancel_id, frames = self._envelopes.seal(messages.REQUEST, request.model_dump())
            try:
                reply = await self._ask("control", cancel_id, frames, row.timeout_s or DEFAULT_TIMEOUT_S, row)
                if _result(reply).get("cancelled"):
                    return
            except (errors.DSPexError, TimeoutError) as failure:
                self._abandon(cancel_id)
                if self._failure is None:  # else the call has ended with its kernel
                    _log.warning("kernel %s: call %s could not be cancelled: %s", self.name, request_id, failure)
                return


def _result(content: Mapping[str, Any]) -> dict[str, Any]:
    """The result in a reply's content, or the error it tells of, raised."""
    if content.get("status") == "ok":
        result = content.get("result")
        if isinstance(result, dict):
            return result
        raise errors.InvalidMessage(f"a {messages.REPLY} of status ok carries no result object")
    failure = content.get("error")
    if not isinstance(failure, dict):
        failure = {"message": f"the kernel answered {content.get('status')!r}: {content.get('evalue', '')}"}
    told = {name: content[name] for name in ("ename", "evalue", "traceback") if name in content}
    raise errors.from_dict({**told, **failure})


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _road_address(info: Mapping[str, Any], endpoint: Any) -> str | None:
    """Where the endpoint that a kernel told of is for who has this connection file; None where it told of none."""
    transport, separator, place = str(endpoint or "").partition("://")
    theirs = info.get("transport", "tcp")
    if not separator or transport not in ((theirs, "unix") if theirs == "ipc" else (theirs,)):
        return None
    # Over tcp a kernel may name all its addresses at once: the connection file says by which it is reached.
    return f"tcp://{info['ip']}:{place.rpartition(':')[2]}" if transport == "tcp" else str(endpoint)


def _address(info: Mapping[str, Any], channel: str) -> str:
    transport, ip, port = info.get("transport", "tcp"), info["ip"], int(info[f"{channel}_port"])
    separator = "-" if transport == "ipc" else ":"
    return f"{transport}://{ip}{separator}{port}"
