"""A program record builds the same program in another kernel: the provider is sent the same bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from tests.live.kernels import LiveKernel, plugin_path
from tests.lm_server import LMServer

QUESTION = "what is in the box?"
NESTED = {
    "type": "object",
    "title": "Box",
    "properties": {
        "label": {"type": "string"},
        "things": {"type": "array", "items": {"type": "object", "title": "Thing", "properties": {
            "name": {"type": "string"}, "weight": {"type": "number", "minimum": 0},
        }, "required": ["name", "weight"]}},
    },
    "required": ["label", "things"],
}  # fmt: skip
BOX = {"label": "red", "things": [{"name": "stone", "weight": 1.5}, {"name": "feather", "weight": 0.001}]}
SIGNATURE = {
    "inputs": [
        {"name": "question", "type": "str"},
        {"name": "box", "type": NESTED, "description": "what to look at"},
    ],
    "outputs": [{"name": "answer", "type": "str", "description": "short"}],
    "instructions": "Look into the box.\nAnswer shortly.",
}
INNER = {"module": "ChainOfThought", "signature": SIGNATURE}
REWARD = {"name": "contains", "args": {"field": "answer", "text": "nowhere to be found"}}
PROGRAMS: dict[str, dict[str, Any]] = {
    "Predict": {"signature": SIGNATURE, "config": {"temperature": 0.3, "max_tokens": 200}},
    "ChainOfThought": {"signature": SIGNATURE, "module": "ChainOfThought"},
    "ReAct": {
        "signature": SIGNATURE, "module": "ReAct", "tools": ["look_up"], "module_args": {"max_iters": 3},
    },
    "MultiChainComparison": {"signature": SIGNATURE, "module": "MultiChainComparison", "module_args": {"M": 2}},
    "BestOfN": {
        "module": "BestOfN",
        "module_args": {"module": INNER, "N": 2, "reward": REWARD, "threshold": 1.0},
    },
    "Refine": {
        "module": "Refine",
        "module_args": {"module": INNER, "N": 2, "reward": REWARD, "threshold": 1.0},
    },
    "pipeline": {"module": "snoop"},
}  # fmt: skip


def _inputs(name: str) -> dict[str, Any]:
    inputs: dict[str, Any] = {"question": QUESTION}
    if name != "pipeline":
        inputs["box"] = BOX
    if name == "MultiChainComparison":
        inputs["completions"] = [{"reasoning": f"look {n}", "answer": f"a {n}"} for n in range(2)]
    return inputs


def _taught(record: dict[str, Any]) -> dict[str, Any]:
    """The record with demos in each of its predictors, nested values among them."""
    record = copy.deepcopy(record)
    for predictor in record["state"].values():
        demo = {
            "question": "what was in it?", "box": BOX, "trajectory": "looked", "answer": "a spoon",
            "reasoning": "I looked.", "next_thought": "a spoon?", "next_tool_name": "finish", "next_tool_args": {},
        }  # fmt: skip
        predictor["demos"] = [{**demo, "augmented": True}, {**demo, "answer": "a fork"}]
    return record


@pytest.fixture(scope="module")
def two_kernels() -> Iterator[tuple[LiveKernel, LiveKernel]]:
    env = {"PYTHONPATH": plugin_path()}
    with LiveKernel(env=env) as one, LiveKernel(env=env) as other:
        yield one, other


@pytest.mark.parametrize("adapter", ["chat", "json"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_requests_before_export_and_after_import_are_equal(
    two_kernels: tuple[LiveKernel, LiveKernel], lm_server: LMServer, name: str, adapter: str
) -> None:
    one, other = two_kernels
    lm = {"model": "openai/canary-model", "api_base": lm_server.api_base, "api_key": "sk-records", "cache": False}
    for kernel in (one, other):
        kernel.result("reset")
        kernel.result("configure", {"lm": lm})
    one.result("create_program", {"id": "p", "adapter": adapter, **PROGRAMS[name]})
    fresh = one.result("export_program", {"id": "p"})["record"]
    assert fresh["state"], "a program has at least one predictor"
    one.result("import_program", {"record": _taught(fresh), "replace": True})

    one.result("execute_program", {"id": "p", "inputs": _inputs(name)})
    before = [request.body for request in lm_server.requests]
    record = one.result("export_program", {"id": "p"})["record"]
    other.result("import_program", {"record": record})
    other.result("execute_program", {"id": "p", "inputs": _inputs(name)})
    after = [request.body for request in lm_server.requests][len(before) :]

    assert before == after != []
    assert all("a spoon" in str(body) for body in before if _own(body))
    again = other.result("export_program", {"id": "p"})["record"]
    volatile = {"version", "created_at"}
    assert {k: v for k, v in again.items() if k not in volatile} == {
        k: v for k, v in record.items() if k not in volatile
    }


def _own(body: dict[str, Any]) -> bool:
    # Refine asks an LM for advice with a signature of DSPy's own, which has no demos.
    return "assign blame" not in str(body)


def test_a_record_holds_no_key_and_no_endpoint(
    two_kernels: tuple[LiveKernel, LiveKernel], lm_server: LMServer
) -> None:
    kernel, _ = two_kernels
    lm = {"model": "openai/canary-model", "api_base": lm_server.api_base, "api_key": "sk-records-0123456789"}
    kernel.result("reset")
    kernel.result("configure", {"lm": lm})
    kernel.result("create_program", {"id": "p", "signature": "question -> answer"})
    kernel.result("execute_program", {"id": "p", "inputs": {"question": "?"}})
    record = str(kernel.result("export_program", {"id": "p"}))
    assert "sk-records" not in record
    assert lm_server.api_base not in record
