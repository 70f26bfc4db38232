"""Every request to a provider passes the gate: seen from the wire, where a real HTTP server counts them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from dspex_kernels.config import LMPolicy
from tests.live.kernels import LiveKernel
from tests.lm_server import Answer, EchoKeyInError, Hang, Hold, Junk, LMServer, Sequence, Status
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
    # A server may be given the port of an earlier test's, whose answers are remembered under it.
    kernel.run("import dspy; dspy.cache.reset_memory_cache()")
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


def _sockets(kernel: LiveKernel, server: LMServer) -> int:
    connections = psutil.Process(kernel.pid).net_connections(kind="tcp")
    return len([c for c in connections if c.raddr and c.raddr.port == server.port])


def test_clients_of_an_lm_are_closed_when_another_takes_its_place(wired: LiveKernel, lm_server: LMServer) -> None:
    wired.result("execute_program", _ask("Predict"))
    wired.run("dspy.Predict('question -> answer')(question='from a cell')")
    wired.run("await dspy.Predict('question -> answer').acall(question='from a cell, awaited')")
    assert _sockets(wired, lm_server) == 3
    wired.result("configure", {"lm": "offline/echo"})
    wait_for(lambda: _sockets(wired, lm_server) == 0, what="the old LM's sockets to be closed")


@pytest.mark.parametrize("program", MODULES)
def test_a_call_goes_on_with_the_lm_it_began_with(
    wired: LiveKernel, lm_server: LMServer, make_lm_server: Callable[[], LMServer], program: str
) -> None:
    other = make_lm_server()
    hold = Hold()
    lm_server.behaviour = hold
    call = wired.send("execute_program", _ask(program))
    lm_server.wait_for_request()
    _configure(wired, other)
    hold.release()
    assert wired.reply(call)["status"] == "ok"
    assert other.requests == []
    wait_for(lambda: _sockets(wired, lm_server) == 0, what="the old LM's sockets to be closed after the call")


BLOCKING = """
class Blocking(dspy.Module):
    def __init__(self):
        super().__init__()
        self.predict = dspy.Predict("question -> answer")

    async def aforward(self, question):
        if question == "one":
            return self.predict(question=question)
        pairs = [(self.predict, dspy.Example(question=f"{question} {n}").with_inputs("question")) for n in range(3)]
        return dspy.Parallel(num_threads=3, disable_progress_bar=True)(pairs)[0]

blocking = Blocking()
%dspex add blocking
"""


@pytest.mark.parametrize("question", ["one", "many"])
def test_an_async_module_that_asks_synchronously_is_answered(
    wired: LiveKernel, lm_server: LMServer, counts: Counts, question: str
) -> None:
    wired.run(BLOCKING)
    lm_server.behaviour = Sequence([Status(503), lm_server.behaviour])
    result = wired.result("execute_program", _ask("blocking", question), timeout_s=15.0)
    assert "answers" in result["outputs"]["answer"]
    assert counts["lm_calls"] == len(lm_server.requests) == {"one": 2, "many": 4}[question]


@pytest.mark.parametrize("question", ["one", "many"])
@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_an_async_module_that_blocks_the_loop_can_be_stopped(
    wired: LiveKernel, lm_server: LMServer, how: str, question: str
) -> None:
    wired.run(BLOCKING)
    lm_server.behaviour = Hang()
    seconds = 1.0 if how == "deadline" else 30.0
    call = wired.send("execute_program", _ask("blocking", question), request_id="blocks", timeout_s=seconds)
    lm_server.wait_for_request()
    if how == "cancel":
        wired.result("cancel", {"request_id": "blocks"}, control=True)
    assert wired.reply(call)["error"]["code"] == {"cancel": "cancelled", "deadline": "timeout"}[how]
    for n in range(len(lm_server.requests)):
        lm_server.wait_for_disconnect(n + 1)


def test_an_interrupted_stream_of_a_cell_closes_its_socket(wired: LiveKernel, lm_server: LMServer) -> None:
    lm_server.behaviour = Hang(after_events=3)
    cell = wired.execute(
        "predict = dspy.Predict('question -> answer')\n"
        "stream = dspy.streamify(predict, stream_listeners=[dspy.streaming.StreamListener('answer')])\n"
        "async for item in stream(question='why?'): print(item)"
    )
    lm_server.wait_for_request()
    wired.interrupt()
    assert wired.reply(cell)["status"] == "error"
    lm_server.wait_for_disconnect()


def test_a_streams_tokens_and_cost_are_counted(wired: LiveKernel, lm_server: LMServer, counts: Counts) -> None:
    _configure(wired, lm_server, model="openai/gpt-4o-mini", cache=False)
    streamed = wired.result("execute_program", _ask("Predict"), stream=True)
    plain = wired.result("execute_program", _ask("Predict"))
    assert streamed["cost"] == plain["cost"] > 0
    (usage,) = plain["usage"].values()
    assert counts["total_tokens"] == 2 * usage["total_tokens"]
    assert counts["lm_calls"] == 2


def test_a_stream_that_breaks_off_is_counted_and_leaves_nothing_reserved(
    wired: LiveKernel, lm_server: LMServer, counts: Counts
) -> None:
    lm_server.behaviour = Hang(after_events=3)
    call = wired.send("execute_program", _ask("Predict"), request_id="stream", stream=True)
    lm_server.wait_for_request()
    wired.result("cancel", {"request_id": "stream"}, control=True)
    assert wired.reply(call)["status"] == "aborted"
    lm_server.wait_for_disconnect()
    assert (counts["lm_calls"], counts["failed_calls"]) == (1, 1)
    lm_server.behaviour = Answer()
    counts.allow(1)
    wired.result("execute_program", _ask("Predict"))


def test_parameters_that_lead_past_the_gate_are_refused(wired: LiveKernel, lm_server: LMServer) -> None:
    forbidden: list[dict[str, Any]] = [
        {"fallbacks": [{"model": "openai/other", "api_base": lm_server.api_base}]},
        {"max_retries": 5},
        {"base_url": lm_server.api_base},
        {"extra_body": {}},
        {"input_cost_per_token": 0},
    ]
    for params in forbidden:
        lm = {"model": "openai/canary-model", "api_base": lm_server.api_base, "api_key": KEY, "params": params}
        error = wired.error("configure", {"lm": lm})
        assert error["code"] == "invalid_lm_profile"
        assert next(iter(params)) in error["message"]


def test_a_copied_program_keeps_its_lms_key(wired: LiveKernel, lm_server: LMServer) -> None:
    wired.run(
        "import copy\n"
        "program = dspy.Predict('question -> answer')\n"
        "program.set_lm(dspy.settings.lm)\n"
        "program.deepcopy()(question='a copy')\n"
        "copy.deepcopy(dspy.settings.lm)('the LM itself, copied')"
    )
    assert [request.api_key for request in lm_server.requests] == [KEY, KEY]


def test_another_script_of_the_offline_lm_gives_its_own_answers(wired: LiveKernel) -> None:
    answers = []
    for answer in ("one", "two"):
        script = {"model": "offline/echo", "offline": {"answers": [{"answer": answer}]}}
        wired.result("configure", {"lm": script})
        answers.append(wired.result("execute_program", _ask("Predict"))["outputs"]["answer"])
    assert answers == ["one", "two"]


def test_a_key_of_the_environment_that_a_provider_echoes_reaches_nobody(lm_server: LMServer) -> None:
    with LiveKernel(env={"OPENAI_API_KEY": KEY}) as kernel:
        kernel.result("configure", {"lm": {"model": "openai/canary-model", "api_base": lm_server.api_base}})
        kernel.result("create_program", {"id": "Predict", **MODULES["Predict"]})
        lm_server.behaviour = EchoKeyInError()
        answer = kernel.ask("execute_program", _ask("Predict"))
        assert answer["error"]["code"] == "auth"
        assert lm_server.requests[0].api_key == KEY
        assert KEY not in str(answer)


def test_requests_that_go_through_litellm_pass_the_gate_and_keep_the_key(
    lm_server: LMServer, tmp_path: Path
) -> None:
    log = tmp_path / "kernel.log"
    environment = {"OPENAI_BASE_URL": lm_server.api_base}
    with LiveKernel(env=environment, output=log.open("wb"), arguments=["--debug"]) as kernel:
        kernel.result("configure", {"lm": {"model": "openai/canary-model", "api_key": KEY}})
        kernel.result("create_program", {"id": "Predict", **MODULES["Predict"]})
        lm_server.behaviour = Sequence([Status(503), Answer()])
        assert kernel.result("execute_program", _ask("Predict"))["lm_calls"] == len(lm_server.requests) == 2
        lm_server.behaviour = EchoKeyInError()
        answer = kernel.ask("execute_program", _ask("Predict", "and the key?"))
        assert answer["error"]["code"] == "auth"
        assert KEY not in str(answer)
        lm_server.behaviour = Hang()
        call = kernel.send("execute_program", _ask("Predict", "and now?"), request_id="litellm")
        lm_server.wait_for_request(4)
        kernel.result("cancel", {"request_id": "litellm"}, control=True)
        assert kernel.reply(call)["status"] == "aborted"
        lm_server.wait_for_disconnect(4)
    assert KEY not in log.read_text(errors="replace")


def test_an_lm_that_a_cell_builds_is_held_to_the_policy(
    lm_server: LMServer, make_lm_server: Callable[[], LMServer]
) -> None:
    other = make_lm_server()
    policy = LMPolicy(
        unrestricted=False, allowed_models=["openai/canary-*"], allowed_hosts=[f"127.0.0.1:{lm_server.port}"]
    )
    with LiveKernel(env={"DSPEX_LM_POLICY": policy.to_json(), "OPENAI_API_KEY": KEY}) as kernel:
        allowed = {"model": "openai/canary-model", "api_base": lm_server.api_base, "api_key": "sk-own-0123456789"}
        for change in ({"api_base": other.api_base}, {"model": "openai/gpt-5"}, {"api_key": None}):
            settings = ", ".join(f"{name}={value!r}" for name, value in {**allowed, **change}.items())
            cell = kernel.reply(kernel.execute(f"dspy.LM({settings})('why?')"))
            assert cell["ename"] == "CallStopped"
            assert "LMPolicy" in cell["evalue"]
        kernel.run(f"dspy.LM({', '.join(f'{name}={value!r}' for name, value in allowed.items())})('why?')")
    assert (len(lm_server.requests), other.requests) == (1, [])
