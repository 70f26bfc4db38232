"""A notebook's own features beside running commands: input, subshells, and a report that silent work goes on."""

from __future__ import annotations

import pytest

from tests.live.kernels import LiveKernel
from tests.waiting import wait_for

ASK = {"id": "qa", "inputs": {"question": "?"}}


def _slow_program(kernel: LiveKernel, seconds: float) -> None:
    kernel.result("configure", {"lm": {"model": "offline/slow", "cache": False, "offline": {"latency_s": seconds}}})
    kernel.result("create_program", {"id": "qa", "signature": "question -> answer"})


def test_a_cell_that_waits_for_input_holds_up_no_command(offline: LiveKernel) -> None:
    _slow_program(offline, 0.1)
    cell = offline.execute("answer = input('name? ')", allow_stdin=True)
    request = offline.client.get_stdin_msg(timeout=10)
    assert request["content"]["prompt"] == "name? "
    assert offline.result("execute_program", ASK)["status"] == "executed"
    offline.client.input("Ada")
    assert offline.reply(cell)["status"] == "ok"
    shown = offline.execute("print(answer)")
    offline.reply(shown)
    offline.wait_for_state(shown, "idle")
    assert offline.output(shown) == "Ada\n"


def test_a_subshell_runs_beside_a_cell_and_a_command(offline: LiveKernel) -> None:
    _slow_program(offline, 1.0)
    created = offline.send_raw({}, msg_type="create_subshell_request", control=True)
    subshell_id = offline.reply(created)["subshell_id"]
    call = offline.send("execute_program", ASK)
    cell = offline.execute("print('on'); import time; time.sleep(30)")
    wait_for(lambda: offline.output(cell), what="the cell's first output")
    message = offline.client.session.msg("execute_request", {"code": "%dspex list", "silent": False})
    message["header"]["subshell_id"] = subshell_id
    offline.client.shell_channel.send(message)
    assert offline.reply(message["header"]["msg_id"])["status"] == "ok"
    assert offline.reply(call)["status"] == "ok"
    assert cell not in offline.replies
    offline.interrupt()
    offline.reply(cell)
    deleted = offline.send_raw({"subshell_id": subshell_id}, msg_type="delete_subshell_request", control=True)
    assert offline.reply(deleted)["status"] == "ok"


@pytest.mark.parametrize("kind", ["command", "blocking module"])
def test_silent_long_work_reports_that_it_goes_on(kind: str) -> None:
    with LiveKernel(arguments=["--DSPexKernelApp.heartbeat_interval=0.2"]) as kernel:
        if kind == "command":
            _slow_program(kernel, 2.0)
        else:
            kernel.result("configure", {"lm": "offline/echo"})
            kernel.run(
                "import dspy, time\n"
                "class Slow(dspy.Module):\n"
                "    def forward(self, question):\n"
                "        time.sleep(2); return dspy.Prediction(answer='done')\n"
                "qa = Slow()\n%dspex add qa"
            )
        call = kernel.send("execute_program", ASK)
        events = wait_for(lambda: kernel.of(call, "dspex_event"), deadline=10, what="a heartbeat")
        assert [event["content"]["event"] for event in events] == ["heartbeat"] * len(events)
        assert kernel.reply(call)["status"] == "ok"
