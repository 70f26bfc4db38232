"""Commands asked from a notebook cell: the magics' way to the dispatcher."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import Any, Protocol
from uuid import uuid4

from dspex_kernels import errors
from dspex_kernels.kernel.calls import Call
from dspex_kernels.kernel.dispatch import Ask, Dispatcher
from dspex_kernels.kernel.handlers import programs
from dspex_kernels.kernel.namespaces import Namespace
from dspex_kernels.protocol.commands import DEFAULT_TIMEOUT_S


class _Waiting:
    """What a cell waits for: its command, once that is submitted, and whether the cell was interrupted."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.interrupted = False


class HasDispatcher(Protocol):
    """A kernel."""

    dispatcher: Dispatcher


class NotebookAsker:
    """Asks commands of the notebook's own session and waits, as a cell does.

    Args:
        kernel: Has the dispatcher, by the time that a cell runs.
    """

    def __init__(self, kernel: HasDispatcher) -> None:
        self._kernel = kernel
        self._waiting: _Waiting | None = None

    @property
    def session_id(self) -> str:
        """The notebook's session.

        Raises:
            InvalidMessage: The kernel is pooled: it has no session of its own.
        """
        return self._namespace().session_id

    def ask(
        self,
        command: str,
        args: dict[str, Any],
        *,
        timeout_s: float | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """As ``magics.Asker.ask``; ``on_event`` is called in another thread.

        Raises:
            DSPexError: What the command was answered with.
            KeyboardInterrupt: The cell was interrupted; the command was stopped.
        """
        answered = threading.Event()
        answers: list[dict[str, Any]] = []

        def reply(answer: dict[str, Any]) -> None:
            answers.append(answer)
            answered.set()

        content = {"command": command, "args": args, "timeout_s": timeout_s, "stream": on_event is not None}
        ask = Ask(content, message_id=uuid4().hex, reply=reply, emit=on_event, context=contextvars.copy_context())
        if threading.current_thread() is not threading.main_thread():
            # A subshell's cell: signals are the main thread's; Ctrl-C finds its command among the running ones.
            self._kernel.dispatcher.submit(ask)
            answered.wait()
            return self._result(answers[0])
        # Before the command runs: a KeyboardInterrupt inside submit would leave it without anyone who waits.
        waiting = self._waiting = _Waiting()
        try:
            waiting.call = self._kernel.dispatcher.submit(ask)
            if waiting.interrupted:
                self.interrupt()
            answered.wait()
        finally:
            self._waiting = None
        return self._result(answers[0])

    def interrupt(self) -> bool:
        """Stop the command that a cell waits for; False when none does. From the signal handler."""
        waiting = self._waiting
        if waiting is None:
            return False
        waiting.interrupted = True
        call = waiting.call
        if call is None:  # about to be submitted, or answered already
            return True
        reason = errors.CommandInterrupted(f"{call.command} was interrupted")
        # Not here: the interrupted code may hold the call's lock.
        self._kernel.dispatcher.loop.call_soon_threadsafe(call.stop, reason)
        return True

    def add_module(self, program_id: str, module: Any) -> dict[str, Any]:
        """Make a module of the notebook a program of its session.

        Returns:
            ``status``, ``program_id``, ``version``, ``signature``.

        Raises:
            CommandTimeout: The session's earlier changes took too long.
        """
        call = Call(self._namespace(), command="create_program")
        adding = asyncio.run_coroutine_threadsafe(
            programs.add_module(call, program_id, module), self._kernel.dispatcher.loop
        )
        try:
            return adding.result(DEFAULT_TIMEOUT_S).model_dump()
        except TimeoutError:
            raise call.timed_out() from None
        finally:
            adding.cancel()  # interrupted or timed out: nobody waits for it any more

    def add_tool(self, function: Callable[..., Any], name: str | None = None) -> str:
        """Make a function of the notebook a tool of its session; returns its name."""
        namespace = self._namespace()
        added: str = namespace.toolbox.add(function, name=name)
        self._kernel.dispatcher.loop.call_soon_threadsafe(namespace.forget_tool, added)
        return added

    def program_ids(self) -> list[str]:
        """The session's programs, for completion."""
        return sorted(self._namespace().contents.programs)

    def _namespace(self) -> Namespace:
        return self._kernel.dispatcher.namespace(None)

    @staticmethod
    def _result(answer: dict[str, Any]) -> dict[str, Any]:
        if answer["status"] == "ok":
            result: dict[str, Any] = answer["result"]
            return result
        error = errors.from_dict({**answer, **answer["error"]})
        if isinstance(error, errors.CommandInterrupted):
            raise KeyboardInterrupt
        raise error
