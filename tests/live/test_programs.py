"""Programs in a real kernel: versions, tools, limits, and what belongs to one notebook only."""

from __future__ import annotations

from typing import Any

from dspex_kernels.protocol.limits import MAX_PROGRAMS
from tests.live.kernels import LiveKernel

QA = {"id": "qa", "signature": "question -> answer"}


def _ask(program: str, **more: Any) -> dict[str, Any]:
    return {"id": program, "inputs": {"question": "?"}, **more}


def test_each_change_is_a_version_and_old_ones_still_run(offline: LiveKernel) -> None:
    offline.result("create_program", QA)
    second = offline.result(
        "create_program", {"id": "qa", "signature": "question -> reply", "replace": True, "if_version": 1}
    )
    assert second["version"] == 2
    assert set(offline.result("execute_program", _ask("qa"))["outputs"]) == {"reply"}
    assert set(offline.result("execute_program", _ask("qa", version=1))["outputs"]) == {"answer"}
    assert offline.result("get_program", {"id": "qa"})["versions"] == [1, 2]


def test_if_version_guards_writes_without_replace(offline: LiveKernel) -> None:
    assert offline.result("create_program", {**QA, "if_version": 0})["version"] == 1
    assert offline.error("create_program", {**QA, "if_version": 0})["code"] == "version_conflict"
    assert offline.result("create_program", {**QA, "if_version": 1})["version"] == 2
    assert offline.error("delete_program", {"id": "qa", "if_version": 1})["code"] == "version_conflict"
    offline.result("delete_program", {"id": "qa", "if_version": 2})


def test_a_deleted_program_starts_again_at_version_one(offline: LiveKernel) -> None:
    offline.result("create_program", QA)
    offline.result("delete_program", {"id": "qa"})
    assert offline.error("get_program", {"id": "qa"})["code"] == "program_not_found"
    assert offline.result("create_program", QA)["version"] == 1


def test_typed_and_nested_programs_run_from_data(offline: LiveKernel) -> None:
    outputs = [
        {"name": "count", "type": "int"},
        {"name": "mood", "type": "Literal['good', 'bad']"},
        {"name": "tags", "type": "list[str]"},
        {"name": "place", "type": {"type": "object", "title": "Place", "properties": {
            "name": {"type": "string"}, "height": {"type": "number"},
        }, "required": ["name", "height"]}},
    ]  # fmt: skip
    signature = {"inputs": [{"name": "question"}], "outputs": outputs, "instructions": "Say something."}
    for adapter in ("chat", "json"):
        offline.result("create_program", {"id": adapter, "signature": signature, "adapter": adapter})
        result = offline.result("execute_program", _ask(adapter))["outputs"]
        assert isinstance(result["count"], int)
        assert result["mood"] in {"good", "bad"}
        assert all(isinstance(tag, str) for tag in result["tags"])
        assert set(result["place"]) == {"name", "height"}


def test_a_notebooks_function_is_a_tool_of_its_kernel_only(offline: LiveKernel) -> None:
    offline.run("def weigh(thing: str) -> float:\n    'Weighs.'\n    return 2.5\n%dspex add weigh")
    offline.result(
        "create_program", {"id": "agent", "signature": "question -> answer", "module": "ReAct", "tools": ["weigh"]}
    )
    trajectory = offline.result("execute_program", _ask("agent"))["outputs"]["trajectory"]
    assert trajectory["observation_0"] == 2.5
    error = offline.error("export_program", {"id": "agent"})
    assert error["code"] == "not_portable"
    assert "weigh" in error["message"]


def test_a_tool_that_changed_is_not_used_in_silence(offline: LiveKernel) -> None:
    offline.run("def weigh(thing: str) -> float:\n    'Weighs.'\n    return 2.5\n%dspex add weigh")
    offline.result(
        "create_program", {"id": "agent", "signature": "question -> answer", "module": "ReAct", "tools": ["weigh"]}
    )
    offline.run("def weigh(thing: str, unit: str) -> float:\n    'Weighs.'\n    return 2.5\n%dspex add weigh")
    # Another version of the program asks for the tool anew; the old one is built again from its record.
    error = offline.error("execute_program", _ask("agent"))
    assert error["code"] == "tool_changed"


def test_a_module_of_the_notebook_runs_but_does_not_travel(offline: LiveKernel) -> None:
    offline.run(
        "import dspy\n"
        "class Twice(dspy.Module):\n"
        "    def __init__(self):\n"
        "        self.first = dspy.Predict('question -> draft')\n"
        "        self.second = dspy.Predict('draft -> answer')\n"
        "    async def aforward(self, question):\n"
        "        draft = await self.first.acall(question=question)\n"
        "        return await self.second.acall(draft=draft.draft)\n"
        "twice = Twice()\n%dspex add twice"
    )
    result = offline.result("execute_program", _ask("twice"))
    assert result["lm_calls"] == 2
    assert offline.error("export_program", {"id": "twice"})["code"] == "not_portable"


def test_what_the_users_code_raises_is_told_with_its_own_frames(offline: LiveKernel) -> None:
    offline.run(
        "import dspy\n"
        "class Broken(dspy.Module):\n"
        "    def forward(self, question):\n"
        "        raise RuntimeError('the boiler is cold')\n"
        "broken = Broken()\n%dspex add broken"
    )
    answer = offline.ask("execute_program", _ask("broken"))
    assert answer["error"]["code"] == "program_failed"
    assert (answer["ename"], answer["evalue"]) == ("RuntimeError", "the boiler is cold")
    assert any("forward" in line for line in answer["traceback"])
    assert not any("dspex_kernels" in line for line in answer["traceback"])


def test_a_request_id_in_use_is_refused(offline: LiveKernel) -> None:
    offline.result("configure", {"lm": {"model": "offline/slow", "cache": False, "offline": {"latency_s": 30}}})
    offline.result("create_program", QA)
    call = offline.send("execute_program", _ask("qa"), request_id="mine")
    offline.wait_for_state(call, "busy")
    assert offline.error("execute_program", _ask("qa"), request_id="mine")["code"] == "duplicate_request"
    offline.result("cancel", {"request_id": "mine"}, control=True)
    assert offline.reply(call)["status"] == "aborted"


def test_a_session_holds_so_many_programs_and_no_more(offline: LiveKernel) -> None:
    calls = [offline.send("create_program", {**QA, "id": f"p{n}"}) for n in range(MAX_PROGRAMS)]
    for call in calls:
        assert offline.reply(call, deadline=60)["status"] == "ok"
    assert offline.error("create_program", {**QA, "id": "one-more"})["code"] == "program_limit"
    assert offline.result("list_programs")["count"] == MAX_PROGRAMS


def test_best_of_n_keeps_trying_in_later_calls(offline: LiveKernel) -> None:
    """DSPy counts a module's failures down on the module itself: after some calls it would not try again."""
    args = {
        "module": {"module": "Predict", "signature": "question -> answer"},
        "N": 2,
        "reward": {"name": "contains", "args": {"field": "answer", "text": "offline"}},
        "threshold": 1.0,
    }
    failures = [failure for _ in range(4) for failure in ("server", None)]
    lm = {"model": "offline/echo", "cache": False, "max_retries": 0, "offline": {"failures": failures}}
    offline.result("configure", {"lm": lm})
    offline.result("create_program", {"id": "best", "module": "BestOfN", "module_args": args})
    for _ in range(4):
        assert "offline" in offline.result("execute_program", _ask("best"))["outputs"]["answer"]


def test_when_all_attempts_fail_the_last_reason_is_told(offline: LiveKernel) -> None:
    args = {
        "module": {"module": "Predict", "signature": "question -> answer"},
        "N": 2,
        "reward": {"name": "one_word", "args": {"field": "answer"}},
        "threshold": 1.0,
    }
    lm = {"model": "offline/echo", "max_retries": 0, "offline": {"failures": ["billing", "billing"]}}
    offline.result("configure", {"lm": lm})
    offline.result("create_program", {"id": "best", "module": "BestOfN", "module_args": args})
    assert offline.error("execute_program", _ask("best"))["code"] == "billing"


def test_a_sessions_history_and_inspect_history_of_dspy_are_its_own(offline: LiveKernel) -> None:
    offline.result("create_program", QA)
    offline.result("execute_program", {"id": "qa", "inputs": {"question": "remember me"}})
    entries = offline.result("inspect_history", {"n": 5})["entries"]
    assert "remember me" in str(entries[-1]["messages"])
    cell = offline.execute("import dspy; dspy.inspect_history()")
    offline.reply(cell)
    offline.wait_for_state(cell, "idle")
    assert "remember me" in offline.output(cell)
