"""Every request to a provider passes the gate: seen from the wire, where a real HTTP server counts them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.live.kernels import LiveKernel
from tests.lm_server import EchoKeyInError, Hang, Junk, LMServer, Sequence, Status
from tests.waiting import wait_for

KEY = "sk-test-0123456789abcdef"
CANCEL = 0.1  # seconds after a cancel in which a request may still arrive: the bound
MODULES: dict[str, dict[str, Any]] = {
    "Predict": {"signature": "question -> answer"},
    "ReAct": {"signature": "question -> answer", "module": "ReAct", "tools": ["look_up"]},
    "BestOfN": {
        "module": "BestOfN",
        "module_args": {
            "module": {"module": "Predict", "signature": "question -> answer"},
            "N": 5,
            "reward": {"name": "field_equals", "args": {"field": "answer", "value": "never"}},
            "threshold": 1.0,
        },
    },
}


def _configure(kernel: LiveKernel, server: LMServer, *, key: str = KEY, **profile: Any) -> None:
    lm = {"model": "openai/canary-model", "api_base": server.api_base, "api_key": key, **profile}
    kernel.result("configure", {"lm": lm})


@pytest.fixture
def wired(kernel: LiveKernel, lm_server: LMServer) -> LiveKernel:
    """The module's kernel, reset, with an LM at a real server and one program of each module."""
    kernel.result("reset")
    kernel.run(
        "def look_up(subject: str) -> str:\n    'Looks a subject up.'\n    return 'nothing'\n%dspex add look_up"
    )
    _configure(kernel, lm_server)
    for name, args in MODULES.items():
        kernel.result("create_program", {"id": name, **args})
    return kernel


class Counts:
    """What the session's statistics say since the test began."""

    def __init__(self, kernel: LiveKernel) -> None:
        self._kernel = kernel
        self._before = self._now()

    def _now(self) -> dict[str, int]:
        stats = self._kernel.result("get_stats", control=True)
        failed = sum(model["failed_calls"] for model in stats["lm"].values())
        return {
            "lm_calls": stats["lm_calls"],
            "failed_calls": failed,
            "total_tokens": stats["total_tokens"],
            "cache_hits": stats["cache_hits"],
        }

    def __getitem__(self, name: str) -> int:
        return self._now()[name] - self._before[name]

    def allow(self, more: int, what: str = "lm_calls", counted: str = "lm_calls") -> None:
        """Set the session's budget to what is spent and ``more``."""
        self._kernel.result("configure", {"budget": {what: self._now()[counted] + more}})


@pytest.fixture
def counts(wired: LiveKernel) -> Counts:
    return Counts(wired)


def _ask(program: str, question: str = "why?") -> dict[str, Any]:
    return {"id": program, "inputs": {"question": question}}


@pytest.mark.parametrize("program", MODULES)
@pytest.mark.parametrize("behaviour", [Status(503), Hang()], ids=["503", "hangs"])
def test_after_a_cancel_no_request_arrives(
    wired: LiveKernel, lm_server: LMServer, program: str, behaviour: Any
) -> None:
    lm_server.behaviour = behaviour
    call = wired.send("execute_program", _ask(program), request_id=f"cancel-{program}")
    lm_server.wait_for_request()
    cancelled_at = time.monotonic()
    wired.result("cancel", {"request_id": f"cancel-{program}"}, control=True)
    answer = wired.reply(call)
    assert (answer["status"], answer["error"]["code"]) == ("aborted", "cancelled")
    if isinstance(behaviour, Hang):
        lm_server.wait_for_disconnect()
    # Longer than the first pause between two attempts (0.25 to 0.5 s), within which DSPy's own loop would send.
    quiet_until = cancelled_at + 1.5
    wait_for(lambda: time.monotonic() > quiet_until, what="the time in which an attempt would come")
    late = [r.arrived_at - cancelled_at for r in lm_server.requests if r.arrived_at > cancelled_at + CANCEL]
    assert late == []


def test_each_endpoint_and_key_gets_its_own_request(
    wired: LiveKernel, lm_server: LMServer, make_lm_server: Callable[[], LMServer], counts: Counts
) -> None:
    other = make_lm_server()
    answers = []
    for server, key in ((lm_server, KEY), (other, KEY), (other, "sk-another-key-000000")):
        _configure(wired, server, key=key)
        answers.append(wired.result("execute_program", _ask("Predict"))["outputs"]["answer"])
        answers.append(wired.result("execute_program", _ask("Predict"))["outputs"]["answer"])
    assert (len(lm_server.requests), len(other.requests)) == (1, 2)
    assert answers[0] == answers[1]
    assert answers[4] == answers[5] != answers[2]
    assert counts["cache_hits"] == 3


def test_the_gate_retries_what_may_be_repeated_and_counts_each_attempt(
    wired: LiveKernel, lm_server: LMServer, counts: Counts
) -> None:
    lm_server.behaviour = Sequence([Status(503), Status(429, retry_after=0.05), lm_server.behaviour])
    result = wired.result("execute_program", _ask("Predict"))
    assert result["lm_calls"] == len(lm_server.requests) == 3
    assert (counts["lm_calls"], counts["failed_calls"]) == (3, 2)


def test_what_may_not_be_repeated_is_sent_once(wired: LiveKernel, lm_server: LMServer) -> None:
    lm_server.behaviour = Status(401)
    assert wired.error("execute_program", _ask("Predict"))["code"] == "auth"
    assert len(lm_server.requests) == 1


def test_a_call_of_many_requests_is_counted_whole(wired: LiveKernel, lm_server: LMServer, counts: Counts) -> None:
    result = wired.result("execute_program", _ask("BestOfN"))
    assert result["lm_calls"] == len(lm_server.requests) == 5
    assert counts["lm_calls"] == 5
    assert counts["total_tokens"] == sum(u["total_tokens"] for u in result["usage"].values()) > 0


def test_dspys_second_call_on_an_unreadable_answer_is_seen_and_can_be_switched_off(
    wired: LiveKernel, lm_server: LMServer, counts: Counts
) -> None:
    lm_server.behaviour = Junk("no field of yours")
    error = wired.error("execute_program", _ask("Predict"))
    assert error["code"] == "adapter_parse_error"
    assert counts["lm_calls"] == len(lm_server.requests) == 2
    _configure(wired, lm_server, json_fallback=False)
    wired.error("execute_program", _ask("Predict", "and now?"))
    assert len(lm_server.requests) == 3


def test_a_budget_on_calls_stops_before_the_request(wired: LiveKernel, lm_server: LMServer, counts: Counts) -> None:
    counts.allow(2)
    error = wired.error("execute_program", _ask("BestOfN"))
    assert error["code"] == "budget_exceeded"
    assert len(lm_server.requests) == 2


def test_concurrent_calls_cannot_pass_a_budget_together(
    wired: LiveKernel, lm_server: LMServer, counts: Counts
) -> None:
    counts.allow(5)
    calls = [wired.send("execute_program", _ask("Predict", f"question {n}")) for n in range(20)]
    answers = [wired.reply(call) for call in calls]
    assert sum(a["status"] == "ok" for a in answers) == len(lm_server.requests) == 5
    assert {a["error"]["code"] for a in answers if a["status"] != "ok"} == {"budget_exceeded"}


def test_a_budget_of_one_call_leaves_the_sessions_alone(wired: LiveKernel, lm_server: LMServer) -> None:
    args = {**_ask("BestOfN"), "budget": {"lm_calls": 1}}
    assert wired.error("execute_program", args)["code"] == "budget_exceeded"
    wired.result("execute_program", _ask("Predict"))


def test_a_budget_on_tokens_refuses_a_prompt_that_does_not_fit(
    wired: LiveKernel, lm_server: LMServer, counts: Counts
) -> None:
    counts.allow(10, "tokens", "total_tokens")
    assert wired.error("execute_program", _ask("Predict"))["code"] == "budget_exceeded"
    assert lm_server.requests == []


def test_a_budget_in_dollars_needs_a_price(wired: LiveKernel, lm_server: LMServer) -> None:
    wired.result("configure", {"budget": {"usd": 1.0}})
    assert wired.error("execute_program", _ask("Predict"))["code"] == "budget_unpriced"
    _configure(wired, lm_server, model="openai/gpt-4o-mini")
    result = wired.result("execute_program", _ask("Predict"))
    assert 0 < result["cost"] < 0.01
    wired.result("configure", {"budget": {"usd": result["cost"] / 2}})
    assert wired.error("execute_program", _ask("Predict", "again?"))["code"] == "budget_exceeded"


def test_a_key_that_a_provider_echoes_reaches_nobody(wired: LiveKernel, lm_server: LMServer) -> None:
    lm_server.behaviour = EchoKeyInError()
    for program in MODULES:
        call = wired.send("execute_program", _ask(program))
        answer = wired.reply(call)
        assert answer["error"]["code"] == "auth"
        wired.wait_for_state(call, "idle")
        told = str(answer) + str(wired.iopub) + str(wired.result("inspect_history", {"n": 100}))
        assert KEY not in told


def test_a_cells_own_requests_pass_the_gate_too(wired: LiveKernel, lm_server: LMServer, counts: Counts) -> None:
    wired.run("import dspy; dspy.Predict('question -> answer')(question='from a cell')")
    wired.run(
        f"mine = dspy.LM('openai/canary-model', api_base={lm_server.api_base!r}, api_key={KEY!r})\n"
        "with dspy.context(lm=mine):\n"
        "    await dspy.Predict('question -> answer').acall(question='an LM of the cell')"
    )
    assert counts["lm_calls"] == len(lm_server.requests) == 2
    counts.allow(0)
    cell = wired.reply(wired.execute("dspy.Predict('question -> answer')(question='one more')"))
    assert cell["status"] == "error"
    assert len(lm_server.requests) == 2


def test_an_interrupted_cell_leaves_no_request_behind(wired: LiveKernel, lm_server: LMServer) -> None:
    lm_server.behaviour = Hang()
    cell = wired.execute("import dspy; dspy.Predict('question -> answer')(question='?')")
    lm_server.wait_for_request()
    wired.interrupt()
    assert wired.reply(cell)["ename"] == "KeyboardInterrupt"
    lm_server.wait_for_disconnect()


def test_dspy_configure_in_a_cell_is_the_sessions_setting(
    wired: LiveKernel, lm_server: LMServer, make_lm_server: Callable[[], LMServer]
) -> None:
    other = make_lm_server()
    wired.run(
        f"import dspy; dspy.configure(lm=dspy.LM('openai/canary-model', api_base={other.api_base!r}, "
        f"api_key={KEY!r}), adapter=dspy.JSONAdapter())"
    )
    wired.result("execute_program", _ask("Predict"))
    assert (len(lm_server.requests), len(other.requests)) == (0, 1)
    assert "JSON" in other.requests[0].prompt
    _configure(wired, lm_server)
    wired.result("execute_program", _ask("Predict"))
    assert len(lm_server.requests) == 1


def test_clients_of_an_lm_are_closed_when_another_takes_its_place(wired: LiveKernel, lm_server: LMServer) -> None:
    def sockets() -> int:
        return len([c for c in psutil_connections(wired.pid) if c.raddr and c.raddr.port == lm_server.port])

    wired.result("execute_program", _ask("Predict"))
    assert sockets() == 1
    wired.result("configure", {"lm": "offline/echo"})
    wait_for(lambda: sockets() == 0, what="the old LM's socket to be closed")


def psutil_connections(pid: int) -> Any:
    import psutil

    return psutil.Process(pid).net_connections(kind="tcp")
