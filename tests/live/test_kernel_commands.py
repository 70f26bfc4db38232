"""Commands and cells side by side in a real kernel: each answered once, none holding up another, states true."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dspex_kernels.kernel.journal import Journal
from tests.live.kernels import LiveKernel
from tests.waiting import wait_for

PROMPT = 0.1  # seconds that one may delay the other: the bound
GRACE = 0.4  # more, for two shared cores


def _program(kernel: LiveKernel, **offline: object) -> None:
    kernel.result("configure", {"lm": {"model": "offline/echo", "cache": False, "offline": offline}})
    kernel.result("create_program", {"id": "qa", "signature": "question -> answer", "replace": True})


def _run(question: str = "?") -> dict[str, object]:
    return {"id": "qa", "inputs": {"question": question}}


def test_a_blocking_cell_delays_no_command(offline: LiveKernel) -> None:
    _program(offline)
    cell = offline.execute("print('on'); import time; time.sleep(5)")
    wait_for(lambda: offline.output(cell), what="the cell's first output")
    began = time.monotonic()
    offline.result("execute_program", _run())
    assert time.monotonic() - began < PROMPT + GRACE
    assert cell not in offline.replies, "the cell must still be running"
    offline.interrupt()
    offline.reply(cell)


def test_a_blocking_command_delays_no_cell(offline: LiveKernel) -> None:
    # A module of the notebook without an async path, which blocks its thread.
    offline.run(
        "import dspy, time\n"
        "class Blocks(dspy.Module):\n"
        "    def forward(self, question):\n"
        "        time.sleep(2); return dspy.Prediction(answer=question)\n"
        "blocks = Blocks()\n%dspex add blocks"
    )
    call = offline.send("execute_program", {"id": "blocks", "inputs": {"question": "?"}})
    offline.wait_for_state(call, "busy")
    began = time.monotonic()
    offline.run("1 + 1")
    assert time.monotonic() - began < PROMPT + GRACE
    assert call not in offline.replies, "the command must still be running"
    assert offline.reply(call)["result"]["outputs"] == {"answer": "?"}


def test_commands_of_one_session_run_side_by_side(offline: LiveKernel) -> None:
    _program(offline, latency_s=0.5)
    began = time.monotonic()
    calls = [offline.send("execute_program", _run(f"question {n}")) for n in range(20)]
    answers = [offline.reply(call) for call in calls]
    assert time.monotonic() - began < 20 * 0.5 / 2
    for number, answer in enumerate(answers):
        assert f"question {number}”" in answer["result"]["outputs"]["answer"]


def test_control_commands_are_answered_while_a_cell_computes_and_are_no_activity(offline: LiveKernel) -> None:
    cell = offline.execute("print('on'); import time; time.sleep(30)")
    wait_for(lambda: offline.output(cell), what="the cell's first output")
    before = offline.result("get_stats", control=True)["last_activity"]
    ping = offline.send("ping", control=True)
    assert offline.reply(ping)["result"]["status"] == "ok"
    offline.interrupt()
    offline.reply(cell)
    offline.wait_for_state(cell, "idle")
    assert offline.of(ping, "status") == []
    assert offline.result("get_stats", control=True)["last_activity"] == before


def test_the_last_state_told_is_busy_while_anything_runs(offline: LiveKernel) -> None:
    _program(offline, latency_s=1.0)
    call = offline.send("execute_program", _run())
    offline.wait_for_state(call, "busy")
    cell = offline.execute("1 + 1")
    offline.reply(cell)
    offline.wait_for_state(cell, "idle")
    wait_for(lambda: len(offline.of(call, "status")) >= 2, what="busy again, in the command's name")
    states = [m["content"]["execution_state"] for m in offline.iopub if m["header"]["msg_type"] == "status"]
    assert states[-1] == "busy"
    offline.reply(call)
    offline.wait_for_state(call, "idle")
    assert [m["content"]["execution_state"] for m in offline.iopub if m["header"]["msg_type"] == "status"][-1] == (
        "idle"
    )


def test_changes_of_one_session_keep_their_order(offline: LiveKernel) -> None:
    calls = [
        offline.send("create_program", {"id": "qa", "signature": f"question -> answer_{n}", "replace": True})
        for n in range(30)
    ]
    assert [offline.reply(call)["result"]["version"] for call in calls] == list(range(1, 31))
    assert "answer_29" in offline.result("get_program", {"id": "qa"})["signature"]


@pytest.mark.parametrize(
    "content", [None, b"[]", b'"text"', b"{not json", {"command": 7}, {"args": {}}, {"command": "ping", "x": 1}]
)
def test_a_malformed_request_is_answered_exactly_once(kernel: LiveKernel, content: object) -> None:
    bad = kernel.send_raw(content)
    answer = kernel.reply(bad)
    assert (answer["status"], answer["error"]["code"]) == ("error", "invalid_message")
    kernel.result("ping", control=True)
    assert len(kernel.replies[bad]) == 1


def test_a_call_ends_at_its_deadline(offline: LiveKernel) -> None:
    _program(offline, latency_s=30)
    error = offline.error("execute_program", _run(), timeout_s=0.2)
    assert error["code"] == "timeout"


def test_what_a_program_prints_goes_to_who_asked(offline: LiveKernel) -> None:
    offline.run(
        "import dspy\n"
        "class Prints(dspy.Module):\n"
        "    def forward(self, question):\n"
        "        print('said', question); return dspy.Prediction(answer=question)\n"
        "prints = Prints()\n%dspex add prints"
    )
    calls = {
        offline.send("execute_program", {"id": "prints", "inputs": {"question": f"q{n}"}}): f"said q{n}\n"
        for n in range(5)
    }
    for call, text in calls.items():
        assert offline.reply(call)["status"] == "ok"
        offline.wait_for_state(call, "idle")
        assert offline.output(call) == text


def test_tokens_are_streamed_as_events_and_the_reply_holds_the_whole_result(offline: LiveKernel) -> None:
    _program(offline)
    call = offline.send("execute_program", _run("stream me"), stream=True)
    answer = offline.reply(call)["result"]["outputs"]["answer"]
    offline.wait_for_state(call, "idle")
    events = [m["content"] for m in offline.of(call, "dspex_event")]
    tokens = [event for event in events if event["event"] == "token"]
    assert "".join(event["text"] for event in tokens if event["field"] == "answer") == answer
    assert len(tokens) > 1
    assert [event["sequence"] for event in events] == list(range(len(events)))


def test_a_stdout_of_the_notebooks_own_does_not_keep_a_command_busy() -> None:
    with LiveKernel() as kernel:
        kernel.run("import sys\nclass Full:\n    def flush(self): raise OSError('full')")
        cell = kernel.execute("kept = sys.stdout; sys.stdout = Full(); print('on', file=kept, flush=True)")
        wait_for(lambda: kernel.output(cell), what="the cell's output")
        call = kernel.send("list_programs")
        assert kernel.reply(call)["status"] == "ok"
        kernel.wait_for_state(call, "idle")


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("DSPEX_LM_POLICY", "{bad", "DSPEX_LM_POLICY"),
        ("DSPEX_SESSION_ID", "../x", "DSPEX_SESSION_ID='../x'"),
        ("DSPEX_GENERATION", "first", "DSPEX_GENERATION='first'"),
        ("DSPEX_SESSION_DIR", "/proc/nowhere", "/proc/nowhere"),
    ],
)
def test_a_kernel_that_cannot_start_says_why_in_one_line_and_leaves_nothing(
    tmp_path: Path, variable: str, value: str, reason: str
) -> None:
    connection = tmp_path / "kernel.json"
    ended = subprocess.run(
        [sys.executable, "-m", "dspex_kernels.kernel", "-f", connection],
        env={**os.environ, variable: value},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert reason in ended.stderr.splitlines()[-1]
    assert not connection.exists()


def _shown(kernel: LiveKernel, expression: str) -> str:
    cell = kernel.execute(f"print({expression})")
    kernel.wait_for_state(cell, "idle")
    return kernel.output(cell).strip()


def test_an_adapter_that_needs_a_language_model_uses_the_one_configured_before_or_after() -> None:
    with LiveKernel() as kernel:
        kernel.result("configure", {"adapter": "two_step"})
        kernel.result("configure", {"lm": "offline/echo"})
        assert _shown(kernel, "dspy.settings.adapter.extraction_model is dspy.settings.lm") == "True"
        kernel.result("configure", {"adapter": "json"})
        kernel.result("configure", {"adapter": "two_step"})
        assert _shown(kernel, "dspy.settings.adapter.extraction_model is dspy.settings.lm") == "True"


def test_what_a_cell_configured_stays_when_only_a_budget_is_given(kernel: LiveKernel) -> None:
    kernel.run("dspy.configure(lm=dspy.LM('openai/cells-own', api_key='x'), adapter=dspy.XMLAdapter())")
    kernel.result("configure", {"budget": {"lm_calls": 1000}})
    shown = _shown(kernel, "getattr(dspy.settings.lm, 'model', None), type(dspy.settings.adapter).__name__")
    kernel.result("reset")
    assert shown == "openai/cells-own XMLAdapter"


def test_a_kernel_removes_what_others_left_long_ago_and_nothing_that_is_in_use(tmp_path: Path) -> None:
    sessions = tmp_path / "dspex" / "kernels"
    for name in ("left", "in_use"):
        journal, _ = Journal.open(sessions / name)
        if name == "left":
            journal.close()
        for path in (*(sessions / name).iterdir(), sessions / name):
            os.utime(path, (0, 0))
    (sessions / "gone meanwhile").symlink_to("nowhere")
    try:
        with LiveKernel(env={"JUPYTER_DATA_DIR": str(tmp_path)}) as kernel:
            assert not (sessions / "left").exists()
            assert (sessions / "in_use").is_dir()
            kernel.result("create_program", {"id": "qa", "signature": "question -> answer"})
            kernel.restart()
            assert kernel.result("list_programs")["count"] == 1, "it keeps its own"
    finally:
        journal.close()
