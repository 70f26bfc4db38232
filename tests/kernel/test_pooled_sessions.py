"""Sessions in a dispatcher that many share: they close whole, within a bound, and leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from dspex_kernels import errors
from dspex_kernels.config import LMPolicy
from dspex_kernels.errors import CallStopped
from dspex_kernels.kernel import handlers
from dspex_kernels.kernel.calls import Call
from dspex_kernels.kernel.dispatch import Ask, CommandThread, Dispatcher, Identity
from dspex_kernels.kernel.ledger import Estimate
from dspex_kernels.kernel.namespaces import Namespace
from dspex_kernels.kernel.shelf import Shelf
from dspex_kernels.kernel.threads import Threads
from dspex_kernels.protocol import limits
from dspex_kernels.protocol.commands import InspectHistoryResult, OpenSessionArgs
from dspex_kernels.protocol.records import Budget, SessionSettings, SettingsChanged
from tests.waiting import wait_for

CREATE = {"command": "create_program", "args": {"program_id": "qa", "signature": "question -> answer"}}
HANDLER = {"command": "inspect_history"}
"""The command whose handler the tests replace."""


class Pool:
    """A dispatcher as in a pooled kernel, and what it answered."""

    def __init__(self) -> None:
        self.threads = Threads(idle_time=0.05)
        self.shelf = Shelf(4)
        self.dispatcher = Dispatcher(
            Identity("kernel", None, allow_code=False),
            open_namespace=self._open,
            thread=CommandThread(),
            threads=self.threads,
            heartbeat_interval=10.0,
        )
        self._number = 0

    def _open(self, session_id: str, opened: OpenSessionArgs | None) -> Namespace:
        assert opened is not None
        lane = self.threads.lane()
        return Namespace(
            session_id,
            lane=lane,
            shelf=self.shelf,
            policy=LMPolicy(),
            executor=lane,
            contents=opened.contents,
            shares_process=True,
            generation=opened.generation,
            created_at=opened.created_at,
        )

    def submit(self, content: dict[str, Any], session_id: str = "s", **more: Any) -> list[dict[str, Any]]:
        """Ask a command; returns the list that its answers come into."""
        answers: list[dict[str, Any]] = []
        self._number += 1
        asked = {"session_id": session_id, "request_id": f"request-{self._number}", **content, **more}
        self.dispatcher.submit(Ask(asked, message_id="", reply=answers.append))
        return answers

    def ask(self, content: dict[str, Any], session_id: str = "s", **more: Any) -> dict[str, Any]:
        answers = self.submit(content, session_id, **more)
        return wait_for(lambda: answers, what="an answer")[0]

    def open(self, session_id: str = "s", **contents: Any) -> None:
        args = {"session_id": session_id, "contents": contents, "generation": 1}
        answer = self.ask({"command": "open_session", "args": {**args, "created_at": "2026-01-01T00:00:00Z"}})
        assert answer["status"] == "ok", answer


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool()
    pool.dispatcher.start()
    pool.open()
    yield pool
    pool.dispatcher.close(errors.KernelDied("the test is over"))


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    def replace(handler: Callable[..., Any]) -> None:
        monkeypatch.setattr(handlers, "HANDLERS", {**handlers.HANDLERS, "inspect_history": handler})

    return replace


class Stubborn:
    """A handler that ignores its cancellation until ``go``."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    async def __call__(self, *_: object) -> Any:
        self.begun.set()
        while not self.go.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue
        return InspectHistoryResult(entries=[], count=0)


def _budget(lm_calls: int) -> SettingsChanged:
    return SettingsChanged(settings=SessionSettings(budget=Budget(lm_calls=lm_calls)))


def test_a_closed_session_leaves_no_reference_to_its_namespace(pool: Pool) -> None:
    pool.open("gone", settings={"lm": {"model": "offline/echo"}})
    pool.ask(CREATE, "gone")
    # It fails at the LM gate, which is not installed here, after all has been built.
    assert pool.ask(
        {"command": "execute_program", "args": {"program_id": "qa", "inputs": {"question": "?"}}}, "gone"
    )
    gone = weakref.ref(pool.dispatcher.namespace("gone"))
    assert len(pool.shelf) == 2, "the program and the LM"
    answer = pool.ask({"command": "close_session"}, "gone")
    assert answer["status"] == "ok"
    assert len(pool.shelf) == 0
    wait_for(lambda: not pool.dispatcher.running(), what="the end of the close")
    wait_for(lambda: gc.collect() >= 0 and gone() is None, what="the end of the namespace")


def test_closing_ends_in_time_though_a_program_ignores_its_end_and_answers_every_call(
    pool: Pool, handle: Callable[..., None]
) -> None:
    stubborn = Stubborn()
    handle(stubborn)
    asked = [pool.submit(HANDLER) for _ in range(5)]
    wait_for(stubborn.begun.is_set, what="the programs")
    closing = pool.submit({"command": "close_session"})
    assert wait_for(lambda: closing, deadline=5, what="the close")[0]["status"] == "ok"
    assert [answers[0]["error"]["code"] for answers in asked] == ["cancelled"] * 5
    assert pool.ask({"command": "list_programs"})["error"]["code"] == "session_status"
    assert pool.dispatcher.stuck() == 5
    stubborn.go.set()
    wait_for(lambda: not pool.dispatcher.running(), what="the programs' end")
    assert pool.dispatcher.stuck() == 0
    assert [len(answers) for answers in asked] == [1] * 5


def test_a_call_that_is_admitted_but_not_launched_is_answered_when_its_session_closes(pool: Pool) -> None:
    go = threading.Event()
    pool.dispatcher.loop.call_soon_threadsafe(go.wait)
    closing, created = pool.submit({"command": "close_session"}), pool.submit(CREATE)
    go.set()
    assert wait_for(lambda: closing, what="the close")[0]["status"] == "ok"
    assert wait_for(lambda: created, what="the answer")[0]["error"]["code"] == "cancelled"
    assert [change["change"] for change in created[0]["changes"]] == ["spent"]


def test_a_session_with_as_many_commands_as_it_may_have_can_be_closed(
    pool: Pool, handle: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_RUNNING_COMMANDS", 3)

    async def wait(*_: object) -> None:
        await asyncio.Event().wait()

    handle(wait)
    asked = [pool.submit(HANDLER) for _ in range(3)]
    assert pool.ask(HANDLER)["error"]["code"] == "too_large"
    assert pool.ask({"command": "close_session"})["status"] == "ok"
    assert [answers[0]["status"] for answers in asked] == ["aborted"] * 3


def test_a_session_that_is_opened_again_replaces_what_was_there_and_its_calls_end(
    pool: Pool, handle: Callable[..., None]
) -> None:
    async def wait(*_: object) -> None:
        await asyncio.Event().wait()

    handle(wait)
    pool.ask(CREATE)
    left = pool.submit(HANDLER)
    pool.open("s", settings={"budget": {"lm_calls": 9}})
    assert wait_for(lambda: left, what="the answer")[0]["error"]["code"] == "cancelled"
    assert pool.ask({"command": "list_programs"})["result"]["count"] == 0
    assert pool.ask({"command": "get_stats"})["result"]["budget"]["lm_calls"] == 9
    assert len(pool.shelf) == 0


def test_what_a_replaced_namespace_spends_is_not_told_as_its_sessions(
    pool: Pool, handle: Callable[..., None]
) -> None:
    stubborn = Stubborn()
    handle(stubborn)
    replaced = pool.dispatcher.namespace("s")
    pool.submit(HANDLER)
    wait_for(stubborn.begun.is_set, what="the call")
    pool.open()
    replaced.ledger.settle(replaced.ledger.reserve(Estimate(1, 0.0)), "offline/echo", {"total_tokens": 7}, 0.0)
    told = pool.ask({"command": "collect_spent"})["result"]
    stubborn.go.set()
    assert told == {"spent": {}}
    wait_for(lambda: not pool.dispatcher.running(), what="its end")


@pytest.mark.parametrize("answers", ["in time", "late"])
def test_what_a_call_changed_travels_with_its_aborted_reply_and_it_changes_nothing_afterwards(
    pool: Pool, handle: Callable[..., None], answers: str
) -> None:
    stubborn, refused = Stubborn(), threading.Event()

    async def change_twice(_dispatcher: Dispatcher, call: Call, _args: object) -> Any:
        await call.namespace.commit(call, _budget(1))
        if answers == "late":
            await stubborn()
        else:
            stubborn.begun.set()
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        try:
            await call.namespace.commit(call, _budget(2))
        except CallStopped:
            refused.set()
            raise

    handle(change_twice)
    told = pool.submit(HANDLER, request_id="twice")
    wait_for(stubborn.begun.is_set, what="the first change")
    assert pool.ask({"command": "cancel", "args": {"request_id": "twice"}})["result"]["cancelled"]
    wait_for(lambda: told, what="the answer")
    stubborn.go.set()
    wait_for(refused.is_set, what="the second change")
    wait_for(lambda: not pool.dispatcher.running(), what="the end")
    assert len(told) == 1
    assert told[0]["status"] == "aborted"
    assert [change["change"] for change in told[0]["changes"]] == ["settings_changed", "spent"]
    assert told[0]["changes"][0]["settings"]["budget"]["lm_calls"] == 1
    assert pool.dispatcher.namespace("s").contents.settings.budget.lm_calls == 1


def test_closing_is_no_activity_and_no_statistics(pool: Pool) -> None:
    assert pool.ask({"command": "list_programs"})["status"] == "ok"
    wait_for(lambda: not pool.dispatcher.running(), what="its end")
    active = pool.dispatcher.last_activity
    answer = pool.ask({"command": "close_session"})
    assert answer["result"]["spent"]["ok"] == 1
    assert answer["changes"] == [], "the reply before it has told"
    assert pool.dispatcher.last_activity == active
    assert pool.dispatcher.answered == 1


def test_programs_beyond_the_processes_limit_are_built_again(pool: Pool) -> None:
    sessions = [f"session-{number}" for number in range(10)]
    for session in sessions:
        pool.open(session)
        pool.ask(CREATE, session)
    assert len(pool.shelf) == 4
    export = {"command": "export_program", "args": {"program_id": "qa"}}
    records = [pool.ask(export, session)["result"]["record"] for session in sessions]
    assert len({str(record["spec"]) for record in records}) == 1
    assert len(pool.shelf) == 4


def test_the_class_of_a_programs_signature_goes_with_it(pool: Pool) -> None:
    pool.ask(CREATE)
    namespace = pool.dispatcher.namespace("s")
    signature = weakref.ref(namespace.live(namespace.record("qa")).module.signature)
    assert isinstance(signature(), type)
    for number in range(5):
        pool.ask({"command": "create_program", "args": {**CREATE["args"], "program_id": f"p{number}"}})
    wait_for(lambda: gc.collect() >= 0 and signature() is None, what="the end of the class")


def test_the_kernels_end_answers_calls_whose_session_is_closing(pool: Pool, handle: Callable[..., None]) -> None:
    stubborn = Stubborn()
    handle(stubborn)
    left = pool.submit(HANDLER)
    wait_for(stubborn.begun.is_set, what="the program")
    closing = pool.submit({"command": "close_session"})
    ended = threading.Thread(target=pool.dispatcher.close, args=(errors.KernelDied("the kernel ends"),))
    ended.start()
    wait_for(lambda: left and closing, what="the answers")
    stubborn.go.set()
    ended.join(10)
    assert not ended.is_alive()
