"""Commands are taken in, run side by side on a loop of their own, and answered exactly once."""

from __future__ import annotations

import asyncio
import contextvars
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dspex_kernels import errors, logs, tracing
from dspex_kernels.kernel import handlers
from dspex_kernels.kernel.calls import Call
from dspex_kernels.kernel.failures import explain
from dspex_kernels.kernel.hops import CommandLoop
from dspex_kernels.kernel.namespaces import Namespace
from dspex_kernels.kernel.secrecy import scrub
from dspex_kernels.kernel.threads import Threads
from dspex_kernels.protocol import limits
from dspex_kernels.protocol.commands import (
    COMMANDS,
    DEFAULT_TIMEOUT_S,
    AdoptSessionArgs,
    Command,
    OpenSessionArgs,
    get_command,
)
from dspex_kernels.protocol.messages import Request, check_size, parse_request
from dspex_kernels.protocol.records import Spent

log = logs.get_logger(__name__)

MAX_HOPS = 64
"""Threads of the command loop's default executor."""

CLOSING_TIME = 2.0
"""Seconds in which stopped commands must have ended when their session or the kernel is closed."""

WRITE_SPENT_AFTER = 0.2
"""Seconds after which it is written what was spent outside finished programs: by cells, and by what still runs."""


@dataclass(frozen=True)
class Identity:
    """Who this kernel is, in its replies.

    Attributes:
        kernel_id: As its service knows it.
        session_id: Its one session; None in a pooled kernel.
        generation: How often the session has been given a kernel.
        allow_code: Whether it runs cells, or takes data only.
        is_spare: Whether it is to become a session's own.
    """

    kernel_id: str
    session_id: str | None
    generation: int = 1
    allow_code: bool = True
    is_spare: bool = False


class Ask:
    """One request as it came in: where its reply and events go. The reply goes out once, whatever happens.

    Args:
        content: The message's content; anything may come.
        message_id: Names the call where the caller did not.
        reply: Sends the reply's content; called once, from any thread, after ``claim``.
        emit: Sends an event's content; called from any thread. None drops them.
        context: The variables that the command runs with (its output's parent); None is a copy of the caller's.
        began: Told that the command runs, before its handler does. Control commands do not tell.
        ended: Told after the reply of what ``began``.
    """

    def __init__(
        self,
        content: Any,
        *,
        message_id: str,
        reply: Callable[[dict[str, Any]], None],
        emit: Callable[[dict[str, Any]], None] | None = None,
        context: contextvars.Context | None = None,
        began: Callable[[], None] | None = None,
        ended: Callable[[], None] | None = None,
    ) -> None:
        self.content = content
        self.message_id = message_id
        self.emit = emit
        self.context = context or contextvars.copy_context()
        self._began, self._ended = began, ended
        self.reply = reply
        self._lock = threading.Lock()
        self._answered = False

    def began(self) -> None:
        if self._began is not None:
            self._began()

    def ended(self) -> None:
        if self._ended is not None:
            self._ended()

    def claim(self) -> bool:
        """Take the right to reply: true once. Who has it calls ``reply`` at once."""
        with self._lock:
            claimed, self._answered = not self._answered, True
            return claimed


class CommandThread(threading.Thread):
    """The thread whose asyncio loop runs commands, so that a blocking cell holds up none of them."""

    # debugpy suspends every thread that is not marked: a breakpoint in a cell would stop the commands.
    pydev_do_not_trace = True
    is_pydev_daemon_thread = True

    def __init__(self) -> None:
        super().__init__(name="dspex-commands", daemon=True)
        self.loop = CommandLoop()
        # For those of DSPy's hops that wait for something: user code never runs in it.
        self.loop.set_default_executor(ThreadPoolExecutor(MAX_HOPS, thread_name_prefix="dspex-dspy"))
        self._stopping = False

    def run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            while not self._stopping:
                try:
                    self.loop.run_forever()
                except (SystemExit, KeyboardInterrupt):
                    # asyncio lets these two out of any task: one program's sys.exit() would end every command.
                    log.warning("a program tried to end the kernel's command loop; it goes on", exc_info=True)
        finally:
            self.loop.close()

    def stop(self, timeout: float) -> None:
        """End the loop and wait, at most ``timeout`` seconds."""
        self._stopping = True
        if self.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.join(timeout)


class Dispatcher:
    """Runs commands of this kernel's sessions.

    Args:
        identity: Who we are, in replies.
        open_namespace: Makes a session's namespace from what the service's store holds, or (None) from its
            journal; called in the thread that received a message, so it must be quick.
        thread: Where commands run; started by ``start``.
        threads: Where programs without an async path run.
        heartbeat_interval: Seconds of silence after which a running command reports that it lives.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        open_namespace: Callable[[str, OpenSessionArgs | None], Namespace],
        thread: CommandThread,
        threads: Threads,
        heartbeat_interval: float,
    ) -> None:
        self.identity = identity
        self.thread = thread
        self.loop = thread.loop
        self.threads = threads
        self.heartbeat_interval = heartbeat_interval
        self.started_at = time.monotonic()
        self.answered = 0
        """Commands of sessions that were answered."""
        self.last_activity: datetime | None = None
        """Of any session: its last command or cell; None before the first."""
        self.clients: Callable[[], int | None] = lambda: None
        """Tells how many listen to iopub; None where unknown. Set by the application."""
        self.adopt: Callable[[AdoptSessionArgs], None] = self._refuse_adoption
        """Makes a spare kernel a session's own. Set by the application of one, until it is."""
        self._open_namespace = open_namespace
        # Guards the five below; submit comes from the shell, control and main threads.
        self._lock = threading.Lock()
        self._closed = False
        self._namespaces: dict[str, Namespace] = {}
        self._running: dict[tuple[str, str], Call] = {}
        self._cells = 0
        self._probed_at: float | None = None
        """When the command loop was asked to come round; None when it has."""
        self._tasks: dict[asyncio.Task[None], Call] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._next_beat: asyncio.TimerHandle | None = None
        """When running calls are looked at next; None while none runs."""
        self._next_writing: asyncio.TimerHandle | None = None
        """When what was spent is written next; None while all of it is. Of a dedicated kernel."""
        self._writing_spent: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to take commands."""
        if not self.thread.is_alive():
            self.thread.start()

    def submit(self, ask: Ask) -> Call | None:
        """Take a request in. It is answered through ``ask``, now or later; this never raises.

        Returns:
            The running call; None where it is answered already.
        """
        namespace: Namespace | None = None
        request: Request | None = None
        try:
            request = parse_request(ask.content, default_request_id=ask.message_id)
            command = get_command(request.command)
            args = command.parse(request.args)
            if self.identity.session_id is not None or not command.kernel_wide:
                namespace = self.namespace(request.session_id)
            if command.name in handlers.AT_ONCE:
                result = handlers.AT_ONCE[command.name](self, namespace, args)
                self._send(ask, self._ok(request, namespace, result))
                return None
            assert namespace is not None  # what is asked of the kernel itself is answered at once
            call = self._admit(ask, request, command, namespace, args)
            if not command.internal:
                self._touch(namespace)
            return call
        except errors.DSPexError as refusal:
            self._refuse(ask, request, namespace, refusal)
            return None
        except Exception as failure:  # the edge: whatever happens, the caller gets an answer
            log.exception("a request was not taken in")
            self._refuse(ask, request, namespace, errors.DSPexError(f"the kernel failed: {failure!r}"))
            return None

    def namespace(self, session_id: str | None) -> Namespace:
        """The namespace of a session; a dedicated kernel's own is made when it is first asked for.

        Raises:
            SessionMismatch: A dedicated kernel was asked for another session than its own.
            InvalidMessage: A pooled kernel was not told which session.
            SessionNotReady: A pooled kernel does not have it: its service has to open it here first.
        """
        own = self.identity.session_id
        if own is not None and session_id not in (None, own):
            raise errors.SessionMismatch(
                f"this kernel serves session {own!r}, not {session_id!r}: ask the kernel of that session",
                details={"session_id": session_id, "kernel_session_id": own},
            )
        wanted = own or session_id
        if wanted is None:
            raise errors.InvalidMessage("session_id is missing: a pooled kernel serves many sessions, name yours")
        with self._lock:
            namespace = self._namespaces.get(wanted)
            if namespace is None and own is not None:
                namespace = self._namespaces[wanted] = self._open_namespace(wanted, None)
                namespace.ledger.moved = self._spent_moved
        if namespace is None:
            raise self._not_here(wanted)
        return namespace

    def _is_here(self, namespace: Namespace) -> bool:
        return self._namespaces.get(namespace.session_id) is namespace

    def _not_here(self, session_id: str) -> errors.SessionNotReady:
        return errors.SessionNotReady(
            f"session {session_id!r} is not in this kernel: its service opens it here with open_session",
            details={"session_id": session_id, "kernel_id": self.identity.kernel_id},
        )

    def open(self, args: OpenSessionArgs) -> None:
        """Let a session into this pooled kernel; one that is there already is replaced by what the store holds.

        Raises:
            SessionMismatch: This is a dedicated kernel.
            KernelDied: It is shutting down.
        """
        own = self.identity.session_id
        if own is not None:
            raise errors.SessionMismatch(
                f"this kernel serves session {own!r} alone: open {args.session_id!r} in a pooled one",
                details={"session_id": args.session_id, "kernel_session_id": own},
            )
        namespace = self._open_namespace(args.session_id, args)
        with self._lock:
            if self._closed:
                raise errors.KernelDied("the kernel is shutting down", retryable=True)
            replaced = self._namespaces.get(args.session_id)
            self._namespaces[args.session_id] = namespace
            if replaced is not None:
                self.loop.call_soon_threadsafe(self._begin_to_close, replaced, None)

    def adopted(self, identity: Identity) -> Namespace:
        """Be a session's own kernel from now on; its namespace.

        Raises:
            StoreError: Its journal cannot be opened; the kernel is nobody's.
        """
        spare, self.identity = self.identity, identity
        try:
            namespace = self.namespace(None)
        except BaseException:
            self.identity = spare
            raise
        self.adopt = self._refuse_adoption
        return namespace

    def _refuse_adoption(self, args: AdoptSessionArgs) -> None:
        raise errors.SessionMismatch(
            f"this kernel is no spare one: it cannot become session {args.session_id!r}'s",
            details={"session_id": args.session_id, "kernel_session_id": self.identity.session_id},
        )

    async def drop(self, call: Call) -> None:
        """Let a session go: what else of it runs is stopped, what it holds open is closed.

        Bounded, though programs ignore their end, and done though the call itself is stopped meanwhile.

        Raises:
            SessionMismatch: This is a dedicated kernel.
        """
        namespace = call.namespace
        if self.identity.session_id is not None:
            raise errors.SessionMismatch(
                f"this kernel serves session {namespace.session_id!r} alone, which goes when it is shut down",
                details={"session_id": namespace.session_id},
            )
        with self._lock:
            if self._is_here(namespace):
                del self._namespaces[namespace.session_id]
        await asyncio.shield(self._begin_to_close(namespace, call))

    def untold_spent(self) -> dict[str, Spent]:
        """What sessions of this pooled kernel have spent since that was last told; a dedicated one writes it."""
        if self.identity.session_id is not None:
            return {}
        with self._lock:
            # Not those that were closed or replaced: what they spend is not the session's that is here now.
            busy = {c.namespace for c in self._running.values() if self._is_here(c.namespace)}
            # Under the lock: a reply that leaves meanwhile would tell the same, or note older totals as told.
            told = {namespace.session_id: namespace.untold_spent() for namespace in busy}
        return {session_id: spent for session_id, spent in told.items() if spent is not None}

    def cancel(self, namespace: Namespace, request_id: str, reason: errors.DSPexError) -> bool:
        """Stop a running call; False when there is none of that id. Thread-safe."""
        with self._lock:
            call = self._running.get((namespace.session_id, request_id))
        if call is None:
            return False
        call.stop(reason)
        return True

    def interrupt(self, namespace: Namespace | None = None) -> int:
        """Stop every running command, or one session's, as Ctrl-C does; how many. From signal handlers too."""
        # No lock: a handler may interrupt the very code that holds it. A copied dict is a consistent one.
        calls = [c for c in self._running.copy().values() if namespace is None or c.namespace is namespace]
        details = {"by": "SIGINT" if namespace is None else "interrupt"}
        for call in calls:
            reason = errors.CommandInterrupted(f"{call.command} was interrupted", details=details)
            self.loop.call_soon_threadsafe(call.stop, reason)
        return len(calls)

    def running(self, namespace: Namespace | None = None) -> int:
        """How many commands run: of one session, or of all."""
        with self._lock:
            return len(self._running) if namespace is None else namespace.running

    def sessions(self) -> int:
        """How many sessions have a namespace here."""
        with self._lock:
            return len(self._namespaces)

    def stuck(self) -> int:
        """How many calls were answered, whose programs ignore their end and go on."""
        calls = {*self._running.copy().values(), *self.threads.busy_with()}
        return sum(call.is_overdue() for call in calls)

    def lag(self) -> float:
        """Seconds for which the command loop has not come round, and a new question to it.

        No clock ticks for that: the question that was asked before is the measure, so the first one after a long
        time tells nothing.
        """
        with self._lock:
            now = time.monotonic()
            if self._probed_at is not None:
                return now - self._probed_at
            if not self._closed:
                self._probed_at = now
                self.loop.call_soon_threadsafe(self._came_round)
            return 0.0

    @contextmanager
    def in_notebook(self) -> Iterator[None]:
        """A cell runs, or another message of a notebook is handled: that is activity, like a command."""
        self._count_cell(1)
        try:
            yield
        finally:
            self._count_cell(-1)

    @property
    def is_busy(self) -> bool:
        """Whether a cell runs. Commands are counted by ``running``."""
        return self._cells > 0

    async def in_thread(self, call: Call, work: Callable[[], Any]) -> Any:
        """Run a program without an async path in a thread of its session's lane, with the caller's context."""
        context = contextvars.copy_context()
        return await self.loop.run_in_executor(call.namespace.lane, context.run, _without_stop_iteration, work)

    def close(self, reason: errors.DSPexError, timeout: float = 5.0) -> None:
        """Answer what runs with ``reason``, close every session, end the thread. From any other thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self.thread.is_alive():
            ended = asyncio.run_coroutine_threadsafe(self._close(reason), self.loop)
            try:
                ended.result(timeout)
            except Exception:
                log.warning("the sessions did not close in %.1f s", timeout, exc_info=True)
        self.thread.stop(timeout)
        self.threads.close()

    # Below: on the command loop.

    def _begin_to_close(self, namespace: Namespace, by: Call | None) -> asyncio.Task[None]:
        """Stop what runs in a namespace that no new call reaches, the call ``by`` apart; close it in a task."""
        reason = errors.CommandCancelled(f"session {namespace.session_id!r} was closed during the call")
        with self._lock:
            running = [c for c in self._running.values() if c.namespace is namespace and c is not by]
        for call in running:
            call.stop(reason)
        closing = self.loop.create_task(self._close_namespace(namespace, by))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        return closing

    async def _close_namespace(self, namespace: Namespace, by: Call | None) -> None:
        await asyncio.sleep(0)  # what was admitted and not launched yet is a task after that
        if tasks := [t for t, c in self._tasks.items() if c.namespace is namespace and c is not by]:
            await asyncio.wait(tasks, timeout=CLOSING_TIME)
        await namespace.close()

    def _spent_moved(self) -> None:
        """Called from any thread after a session's totals moved."""
        if self._next_writing is None and not self._closed:
            self.loop.call_soon_threadsafe(self._write_spent_later)

    def _came_round(self) -> None:
        with self._lock:
            self._probed_at = None

    def _write_spent_later(self) -> None:
        # No clock ticks for that: an idle kernel wakes for nothing.
        if self._next_writing is None:
            self._next_writing = self.loop.call_later(WRITE_SPENT_AFTER, self._begin_to_write_spent)

    def _begin_to_write_spent(self) -> None:
        self._writing_spent = self.loop.create_task(self._write_spent())

    async def _write_spent(self) -> None:
        # First: what is spent from here on may come too late for this writing.
        self._next_writing = None
        written = [await namespace.write_spent() for namespace in list(self._namespaces.values())]
        if not all(written):
            self._write_spent_later()

    async def _close(self, reason: errors.DSPexError) -> None:
        if self._next_writing is not None:
            self._next_writing.cancel()
        if self._writing_spent is not None:
            self._writing_spent.cancel()
        if self._next_beat is not None:
            self._next_beat.cancel()
        for call in list(self._running.values()):
            call.stop(reason)
        if ending := [*self._tasks, *self._closing]:
            await asyncio.wait(ending, timeout=CLOSING_TIME)
        closed = [namespace.close() for namespace in self._namespaces.values()]
        for failure in await asyncio.gather(*closed, return_exceptions=True):
            if failure is not None:
                log.error("a session did not close", exc_info=failure)

    def _admit(self, ask: Ask, request: Request, command: Command, namespace: Namespace, args: Any) -> Call:
        assert request.request_id is not None
        seconds = request.timeout_s or command.timeout_s or DEFAULT_TIMEOUT_S
        call = Call(
            namespace,
            command=command.name,
            request_id=request.request_id,
            deadline=time.monotonic() + seconds,
            budget=getattr(args, "budget", None) if command.reaches_lm else None,
            emit=ask.emit,
            stream=request.stream,
        )
        key = (namespace.session_id, request.request_id)
        with self._lock:
            if self._closed:
                raise errors.KernelDied("the kernel is shutting down", retryable=command.repeatable)
            if not self._is_here(namespace):
                raise self._not_here(namespace.session_id)
            if key in self._running:
                raise errors.DuplicateRequest(
                    f"request {request.request_id!r} is running already: give each call an id of its own",
                    details={"request_id": request.request_id},
                )
            if namespace.running >= limits.MAX_RUNNING_COMMANDS and not command.internal:
                raise errors.TooLarge(
                    f"session {namespace.session_id!r} has {limits.MAX_RUNNING_COMMANDS} commands running, the "
                    "limit: wait for some of them",
                    details={"limit": limits.MAX_RUNNING_COMMANDS},
                )
            self._running[key] = call
            namespace.running += 1
            # Under the lock: what is admitted before close() is launched before it looks at what runs.
            if threading.get_ident() == self.thread.ident:
                self._launch(ask, request, command, args, call)
            else:
                self.loop.call_soon_threadsafe(self._launch, ask, request, command, args, call)
        return call

    def _launch(self, ask: Ask, request: Request, command: Command, args: Any, call: Call) -> None:
        task = self.loop.create_task(self._watch(ask, request, command, args, call), context=ask.context)
        self._tasks[task] = call
        task.add_done_callback(lambda ended: self._tasks.pop(ended, None))
        if self._next_beat is None:
            self._next_beat = self.loop.call_later(self.heartbeat_interval / 4, self._beat)

    async def _watch(self, ask: Ask, request: Request, command: Command, args: Any, call: Call) -> None:
        about = {"session_id": call.namespace.session_id, "kernel_id": self.identity.kernel_id}
        with (
            logs.of_call(**about, request_id=call.request_id),
            tracing.of_command(
                command.name, **about, request_id=call.request_id, traceparent=request.traceparent
            ) as call.span,
        ):
            await self._run(ask, request, command, args, call)

    async def _run(self, ask: Ask, request: Request, command: Command, args: Any, call: Call) -> None:
        task = asyncio.current_task()
        assert task is not None
        assert call.deadline is not None
        timer = self.loop.call_at(call.deadline, lambda: call.stop(call.timed_out()))

        def abandon() -> None:
            assert call.stopped is not None
            self._refuse(ask, request, call.namespace, call.stopped, call)

        try:
            ask.began()
            with call.running_in(task, abandon):
                result = await handlers.HANDLERS[command.name](self, call, args)
            self._send(ask, self._ok(request, call.namespace, result), call)
        except BaseException as failure:  # noqa: BLE001  # a program's sys.exit() too is its failure only
            self._fail(ask, request, call, failure)
        finally:
            timer.cancel()
            with self._lock:
                self._running.pop((call.namespace.session_id, call.request_id or ""), None)
                call.namespace.running -= 1
            if not command.internal:
                self._touch(call.namespace)
            ask.ended()

    def _fail(self, ask: Ask, request: Request, call: Call, failure: BaseException) -> None:
        try:
            error = explain(failure, call)
            self._refuse(ask, request, call.namespace, error, call)
        except Exception:  # user code may raise what cannot be told, and is answered all the same
            log.exception("the failure of %s could not be told", call.command)
            error = errors.ProgramFailed(f"the program failed: {type(failure).__name__}, which cannot be shown")
            self._refuse(ask, request, call.namespace, error, call)

    def _ok(self, request: Request, namespace: Namespace | None, result: Any) -> dict[str, Any]:
        content = result.model_dump(mode="json")
        check_size(content, limits.MAX_RESULT_BYTES, what="result")
        return {"status": "ok", "result": content, **self._told(request, namespace)}

    def _refuse(
        self,
        ask: Ask,
        request: Request | None,
        namespace: Namespace | None,
        error: errors.DSPexError,
        call: Call | None = None,
    ) -> None:
        content = {
            "status": error.status,
            "ename": getattr(error, "ename", type(error).__name__),
            "evalue": getattr(error, "evalue", error.message),
            "traceback": getattr(error, "traceback", []),
            "error": error.to_dict(),
            **self._told(request, namespace, ask.message_id),
        }
        if call is not None:
            call.span.tell_outcome(error.code)
        secrets = namespace.secrets if namespace is not None else ()
        # Not orjson: a failure of user code may hold lone surrogates and integers of any size.
        text = json.dumps(content, default=str, ensure_ascii=False, skipkeys=True)
        self._send(ask, json.loads(scrub(text.encode(errors="replace").decode(), secrets)), call)

    def _send(self, ask: Ask, content: dict[str, Any], call: Call | None = None) -> None:
        """Send the reply, unless one was sent; ``call`` is counted then, and its changes go with it."""
        if not ask.claim():
            return
        if call is not None:
            if not COMMANDS[call.command].internal:
                self.answered += 1
                call.namespace.outcomes[content["status"]] += 1
                if self.identity.session_id is not None:  # a pooled kernel's reply carries it
                    self._spent_moved()
            if call.namespace.shares_process:
                content["changes"] = self._carried(call)
        ask.reply(content)

    def _carried(self, call: Call) -> list[dict[str, Any]]:
        """What a pooled kernel's reply carries to the store: the call's changes, and its session's totals."""
        with self._lock:
            spent = call.namespace.untold_spent()
        changes = [*call.changes, spent] if spent is not None else call.changes
        return [change.model_dump(mode="json") for change in changes]

    def _touch(self, namespace: Namespace) -> None:
        self.last_activity = datetime.now(UTC)
        namespace.touch()

    def _count_cell(self, one: int) -> None:
        with self._lock:
            self._cells += one
        self.last_activity = datetime.now(UTC)

    def _told(
        self, request: Request | None, namespace: Namespace | None, message_id: str | None = None
    ) -> dict[str, Any]:
        return {
            "session_id": namespace.session_id if namespace is not None else _asked(request, self.identity),
            "request_id": request.request_id if request is not None else message_id,
            "kernel_id": self.identity.kernel_id,
            "generation": namespace.generation if namespace is not None else self.identity.generation,
        }

    def _beat(self) -> None:
        # None without calls: an idle kernel wakes for nothing. First: an event that cannot be sent must not end it.
        again = bool(self._tasks)
        self._next_beat = self.loop.call_later(self.heartbeat_interval / 4, self._beat) if again else None
        now = time.monotonic()
        for call in list(self._running.values()):
            if now - call.last_event_at >= self.heartbeat_interval:
                call.emit("heartbeat")


def _asked(request: Request | None, identity: Identity) -> str | None:
    return identity.session_id or (request.session_id if request is not None else None)


def _without_stop_iteration(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except StopIteration as failure:
        # A future refuses this one exception, and whoever awaits it would wait for ever (as PEP 479 does it).
        raise RuntimeError("the program raised StopIteration") from failure
