"""The magics in a real kernel: completion over the wire, and what a saved notebook would hold."""

from __future__ import annotations

import json
from typing import Any

from dspex_kernels.kernel.notebook.display import JSON_TYPE
from tests.live.kernels import LiveKernel


def shown(kernel: LiveKernel, code: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A cell's reply, and the contents of its outputs."""
    message_id = kernel.execute(code)
    reply = kernel.reply(message_id)
    kernel.wait_for_state(message_id, "idle")
    kinds = ("execute_result", "display_data", "error", "stream")
    return reply, [message["content"] for kind in kinds for message in kernel.of(message_id, kind)]


def matches(kernel: LiveKernel, code: str) -> list[str]:
    return list(kernel.reply(kernel.client.complete(code))["matches"])


def test_a_program_made_from_outside_completes_after_its_first_letters(offline: LiveKernel) -> None:
    offline.result("create_program", {"program_id": "qa.bot-2", "signature": "question -> answer"})
    assert matches(offline, "%dspex run qa.b") == ["qa.bot-2"]
    assert matches(offline, "answer = %dspex show q") == ["qa.bot-2"]
    assert matches(offline, "%dspex create new --mod") == ["--module"]


def test_a_prediction_is_shown_as_table_and_json(offline: LiveKernel) -> None:
    offline.result("create_program", {"program_id": "qa", "signature": "question -> answer"})
    reply, (output,) = shown(offline, "%dspex run qa question='<script>alert(1)</script>'")
    assert reply["status"] == "ok"
    assert output["data"].keys() == {"text/plain", "text/html", JSON_TYPE}
    assert "<script" not in output["data"]["text/html"]
    assert "<script" in output["data"][JSON_TYPE]["answer"]


def test_an_error_is_one_line_and_fails_the_cell(offline: LiveKernel) -> None:
    reply, (output,) = shown(offline, "%dspex run nobody question=hi")
    assert (reply["status"], reply["ename"]) == ("error", "ProgramNotFound")
    assert len(output["traceback"]) == 1
    assert "program_not_found" in output["traceback"][0]


def test_a_key_from_a_variable_is_in_no_output(offline: LiveKernel) -> None:
    cells = {
        "key = 'sk-' + 'canary' * 3": "ok",
        "%dspex configure lm=openai/x api_base=http://127.0.0.1:9/v1 max_retries=0 api_key=@key": "ok",
        '%dspex create qa "question -> answer"': "ok",
        "%dspex run qa question=hi": "error",
        "%dspex configure temperature=0.5": "error",
        "%dspex configure": "ok",
        "%dspex stats": "ok",
        "%dspex history": "ok",
        "%dspex configure lm={'model':'openai/x','api_kee':key}": "error",
        "bad = {'model': 'openai/x', 'api_kee': key}": "ok",
        "%dspex configure lm=@bad": "error",
    }
    answers = [shown(offline, cell) for cell in cells]
    assert "canarycanary" not in json.dumps(answers)
    assert [reply["status"] for reply, _ in answers] == list(cells.values())
