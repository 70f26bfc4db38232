"""A dispatcher without a kernel around it answers each request once, however its command or the kernel ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import dspy
import pytest
from opentelemetry import trace

from dspex_kernels import errors
from dspex_kernels.config import LMPolicy
from dspex_kernels.kernel import handlers
from dspex_kernels.kernel.calls import Call
from dspex_kernels.kernel.dispatch import Ask, CommandThread, Dispatcher, Identity
from dspex_kernels.kernel.journal import Journal
from dspex_kernels.kernel.ledger import Estimate
from dspex_kernels.kernel.namespaces import Namespace
from dspex_kernels.kernel.notebook.asker import NotebookAsker
from dspex_kernels.kernel.shelf import Shelf
from dspex_kernels.kernel.threads import Threads
from dspex_kernels.protocol import limits
from dspex_kernels.protocol.commands import OpenSessionArgs
from tests.waiting import wait_for

SESSION = "session_0123456789abcdef"
CREATE = {"command": "create_program", "args": {"program_id": "qa", "signature": "question -> answer"}}
LIST = {"command": "list_programs"}


class Workbench:
    """A dispatcher with its threads, and what it answered."""

    def __init__(
        self, dispatcher: type[Dispatcher] = Dispatcher, namespace: Callable[..., Namespace] = Namespace
    ) -> None:
        self.threads = Threads(idle_time=0.05)
        self.shelf = Shelf()
        self.thread = CommandThread()
        self._namespace = namespace
        self.dispatcher = dispatcher(
            Identity("kernel", SESSION),
            open_namespace=self._open,
            thread=self.thread,
            threads=self.threads,
            heartbeat_interval=10.0,
        )
        self.answers: dict[str, list[dict[str, Any]]] = {}

    def _open(self, session_id: str, _opened: OpenSessionArgs | None) -> Namespace:
        lane = self.threads.lane()
        return self._namespace(session_id, lane=lane, shelf=self.shelf, policy=LMPolicy(), executor=lane)

    def submit(self, content: Any, request_id: str = "one") -> list[dict[str, Any]]:
        """Ask a command; returns the list that its answers come into."""
        answers = self.answers.setdefault(request_id, [])
        self.dispatcher.submit(Ask(content, message_id=request_id, reply=answers.append))
        return answers

    def ask(self, content: Any, request_id: str = "one") -> dict[str, Any]:
        """A command's answer."""
        answers = self.submit(content, request_id)
        return wait_for(lambda: answers, what="an answer")[0]

    def close(self) -> None:
        self.dispatcher.close(errors.KernelDied("the test is over"))


@pytest.fixture
def make_workbench() -> Iterator[Callable[..., Workbench]]:
    made: list[Workbench] = []

    def make(**parts: Any) -> Workbench:
        made.append(Workbench(**parts))
        made[-1].dispatcher.start()
        return made[-1]

    yield make
    for workbench in made:
        workbench.close()


@pytest.fixture
def workbench(make_workbench: Callable[..., Workbench]) -> Workbench:
    return make_workbench()


def _handle(monkeypatch: pytest.MonkeyPatch, handler: Callable[..., Any]) -> None:
    monkeypatch.setattr(handlers, "HANDLERS", {**handlers.HANDLERS, "inspect_history": handler})


ASK_HANDLER = {"command": "inspect_history"}


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (ValueError("half a character: \ud800"), "program_failed"),
        (Unprintable(), "program_failed"),
        (SystemExit(3), "program_failed"),
        (KeyboardInterrupt(), "program_failed"),
        (GeneratorExit(), "program_failed"),
        (asyncio.CancelledError(), "cancelled"),
        (dspy.DSPyError(message=3), "program_failed"),
        (errors.InvalidInput("too large", details={"value": 10**40, "text": "\udfff"}), "invalid_input"),
    ],
    ids=repr,
)
def test_whatever_a_handler_raises_is_answered_and_the_next_command_runs(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch, failure: BaseException, code: str
) -> None:
    async def fail(*_: object) -> None:
        raise failure

    _handle(monkeypatch, fail)
    assert workbench.ask(ASK_HANDLER)["error"]["code"] == code
    assert workbench.ask(LIST, "two")["status"] == "ok"
    assert len(workbench.answers["one"]) == 1


def test_a_stop_iteration_in_a_programs_thread_is_answered(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def exhaust(dispatcher: Dispatcher, call: Call, _args: object) -> None:
        await dispatcher.in_thread(call, lambda: next(iter(())))

    _handle(monkeypatch, exhaust)
    assert "StopIteration" in workbench.ask(ASK_HANDLER)["error"]["message"]


def test_a_sys_exit_in_a_task_that_a_program_began_does_not_end_the_command_loop(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []

    async def leave_behind(*_: object) -> None:
        async def leave() -> None:
            raise SystemExit(3)

        left.append(asyncio.create_task(leave()))
        await asyncio.sleep(0)
        raise errors.InvalidInput("went on")

    _handle(monkeypatch, leave_behind)
    assert workbench.ask(ASK_HANDLER)["error"]["code"] == "invalid_input"
    assert isinstance(left[0].exception(), SystemExit)
    assert workbench.ask(LIST, "two")["status"] == "ok"


def test_a_call_is_answered_soon_after_its_cancel_even_if_its_program_goes_on(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()

    async def swallow(dispatcher: Dispatcher, *_: object) -> Any:
        begun.set()
        while not go.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue
        raise errors.InvalidInput("too late")

    _handle(monkeypatch, swallow)
    answers = workbench.submit(ASK_HANDLER)
    wait_for(begun.is_set, what="the program")
    assert workbench.ask({"command": "cancel", "args": {"request_id": "one"}}, "two")["result"]["cancelled"]
    assert wait_for(lambda: answers, deadline=5, what="the answer")[0]["error"]["code"] == "cancelled"
    assert workbench.dispatcher.running() == 1, "it still runs, and says so"
    go.set()
    wait_for(lambda: not workbench.dispatcher.running(), what="the program's end")
    assert len(answers) == 1


def test_a_call_that_is_cancelled_before_it_began_changes_nothing(workbench: Workbench) -> None:
    go = threading.Event()
    workbench.thread.loop.call_soon_threadsafe(go.wait)
    answers = workbench.submit(CREATE)
    assert workbench.ask({"command": "cancel", "args": {"request_id": "one"}}, "two")["result"]["cancelled"]
    go.set()
    assert wait_for(lambda: answers, what="the answer")[0]["error"]["code"] == "cancelled"
    assert workbench.ask(LIST, "three")["result"]["count"] == 0


def test_a_request_that_comes_while_the_kernel_closes_is_answered(
    make_workbench: Callable[..., Workbench],
) -> None:
    class NamespaceWhoseKernelClosesNow(Namespace):
        def touch(self) -> None:
            super().touch()
            if threading.current_thread() is threading.main_thread():
                workbench.dispatcher.close(errors.KernelDied("closing"))

    workbench = make_workbench(namespace=NamespaceWhoseKernelClosesNow)
    answers = workbench.submit(LIST)
    assert len(answers) == 1
    assert workbench.ask(LIST, "two")["error"]["code"] == "kernel_died"


def test_an_interrupt_while_a_magic_submits_its_command_stops_the_command(
    make_workbench: Callable[..., Workbench],
) -> None:
    class DispatcherInterruptedInSubmit(Dispatcher):
        def submit(self, ask: Ask) -> Any:
            assert asker.interrupt(), "the command is the cell's: no KeyboardInterrupt between its two halves"
            self.loop.call_soon_threadsafe(go.wait)
            return super().submit(ask)

    go = threading.Event()
    workbench = make_workbench(dispatcher=DispatcherInterruptedInSubmit)
    asker = NotebookAsker(workbench)
    threading.Timer(0.05, go.set).start()
    with pytest.raises(KeyboardInterrupt):
        asker.ask("create_program", CREATE["args"])
    wait_for(lambda: not workbench.dispatcher.running(), what="the end of the command")


def test_a_command_whose_beginning_cannot_be_told_is_answered(workbench: Workbench) -> None:
    def refuse() -> None:
        raise OSError("no socket")

    answers: list[dict[str, Any]] = []
    workbench.dispatcher.submit(Ask(LIST, message_id="one", reply=answers.append, began=refuse))
    assert "no socket" in wait_for(lambda: answers, what="an answer")[0]["error"]["message"]
    wait_for(lambda: not workbench.dispatcher.running(), what="the end of the command")


def test_a_command_whose_span_cannot_begin_is_answered(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no collector")

    monkeypatch.setattr(trace, "get_tracer", refuse)
    assert workbench.ask(LIST)["status"] == "ok"
    wait_for(lambda: not workbench.dispatcher.running(), what="the end of the command")


def test_only_running_calls_wake_the_command_loop_for_heartbeats(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), asyncio.Event()

    async def wait(*_: object) -> None:
        begun.set()
        await go.wait()

    _handle(monkeypatch, wait)
    dispatcher = workbench.dispatcher
    dispatcher.heartbeat_interval = 0.01
    assert dispatcher._next_beat is None
    answers = workbench.submit(ASK_HANDLER)
    wait_for(begun.is_set, what="the command")
    assert dispatcher._next_beat is not None
    dispatcher.loop.call_soon_threadsafe(go.set)
    wait_for(lambda: answers, what="the answer")
    wait_for(lambda: dispatcher._next_beat is None, what="the end of the heartbeats")


class NamespaceOnASlowDisk(Namespace):
    """Its journal waits in the middle of a write until ``go``."""

    def __init__(self, session_id: str, directory: Path, **parts: Any) -> None:
        journal, contents = Journal.open(directory)
        super().__init__(session_id, journal=journal, contents=contents, **parts)
        self.writing, self.go = threading.Event(), threading.Event()
        self._append, journal.append = journal.append, self._append_slowly  # type: ignore[method-assign]  # a slow disk

    def _append_slowly(self, change: Any) -> None:
        self.writing.set()
        assert self.go.wait(10)
        self._append(change)


def test_settings_whose_command_is_cancelled_while_they_are_written_are_used(
    make_workbench: Callable[..., Workbench], tmp_path: Path
) -> None:
    workbench = make_workbench(namespace=partial(NamespaceOnASlowDisk, directory=tmp_path))
    namespace = workbench.dispatcher.namespace(SESSION)
    assert isinstance(namespace, NamespaceOnASlowDisk)
    answers = workbench.submit({"command": "configure", "args": {"budget": {"lm_calls": 7}}})
    wait_for(namespace.writing.is_set, what="the write")
    assert workbench.ask({"command": "cancel", "args": {"request_id": "one"}}, "two")["result"]["cancelled"]
    namespace.go.set()
    wait_for(lambda: answers, what="the answer")
    assert namespace.contents.settings.budget.lm_calls == 7
    assert namespace.ledger.budget.lm_calls == 7, "what is in the journal counts"


def test_versions_that_are_not_kept_are_not_kept_built_either(workbench: Workbench) -> None:
    again = {"program_id": "qa", "signature": "question -> answer", "replace": True}
    for number in range(limits.MAX_VERSIONS_KEPT + 5):
        workbench.ask({"command": "create_program", "args": again}, f"request {number}")
    assert len(workbench.dispatcher.namespace(SESSION)._live) == limits.MAX_VERSIONS_KEPT


def test_what_was_spent_outside_of_any_command_is_written_soon(
    make_workbench: Callable[..., Workbench], tmp_path: Path
) -> None:
    journal, _ = Journal.open(tmp_path)
    workbench = make_workbench(namespace=partial(Namespace, journal=journal))
    ledger = workbench.dispatcher.namespace(SESSION).ledger
    ledger.settle(ledger.reserve(Estimate(1, 0.0)), "offline/echo", {"total_tokens": 7}, 0.0)
    wait_for(lambda: '"spent"' in journal.path.read_text(), deadline=3, what="the spending in the journal")
