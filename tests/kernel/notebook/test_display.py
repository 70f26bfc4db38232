"""What DSPy's objects and the magics' answers look like: escaped, bounded, without secrets."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any, Literal

import dspy
import pydantic
import pytest
from IPython.core.formatters import DisplayFormatter

from dspex_kernels.kernel.notebook import display

SCRIPT = "<script>alert('x')</script>"


class Shell:
    """The part of an IPython shell that display needs."""

    def __init__(self) -> None:
        self.display_formatter = DisplayFormatter()


@pytest.fixture
def bundle():
    shell = Shell()
    display.register(shell)

    def of(thing: Any) -> dict[str, Any]:
        data, _ = shell.display_formatter.format(thing)
        json.dumps(data, allow_nan=False)  # as it must travel
        return data

    return of


def test_a_prediction_displays_as_table_json_and_text(bundle):
    prediction = dspy.Prediction(answer="Paris", score=0.5)
    prediction.set_lm_usage({"a/b": {"total_tokens": 12}, "c/d": {}})
    data = bundle(prediction)
    assert data["text/plain"] == repr(prediction)
    assert data[display.JSON_TYPE] == {"answer": "Paris", "score": 0.5}
    assert "Paris" in data["text/html"]
    assert "12 tokens" in data["text/html"]


def test_jupyterlab_is_given_no_json_that_it_would_show_in_place_of_the_table(bundle):
    shown = [dspy.Prediction(a=1), dspy.Predict("q -> a"), display.Table("", [], [[1]], {}), display.Notice("", {})]
    for thing in shown:
        assert bundle(thing).keys() == {"text/plain", "text/html", display.JSON_TYPE}


def test_a_predictions_subclass_displays_the_same(bundle):
    class Judged(dspy.Prediction): ...

    assert "text/html" in bundle(Judged(answer="Paris"))


def test_html_of_a_model_is_escaped_wherever_it_stands(bundle):
    prediction = dspy.Prediction(**{"answer": SCRIPT, SCRIPT: [SCRIPT, {SCRIPT: SCRIPT}], "long": SCRIPT * 200})
    shown = bundle(prediction)["text/html"]
    assert "<script" not in shown
    assert "alert('x')" not in shown
    assert "&lt;script&gt;" in shown


def test_html_of_a_module_is_escaped(bundle):
    module = dspy.Predict(dspy.Signature("q -> a").with_instructions(SCRIPT))
    assert "<script" not in bundle(module)["text/html"]


def test_html_of_tables_and_notices_is_escaped(bundle):
    table = display.Table(SCRIPT, [SCRIPT], [[SCRIPT]], {"x": SCRIPT})
    assert "<script" not in bundle(table)["text/html"]
    assert "<script" not in bundle(display.Notice(SCRIPT))["text/html"]


def test_a_long_value_is_cut_and_its_rest_is_in_a_bounded_tooltip():
    shown = display.html_cell("x" * 100_000)
    assert len(shown) < display.HTML_CELL_CHARS + display.TOOLTIP_CHARS + 200
    assert 'title="' + "x" * 50 in shown


def test_nested_and_odd_values_are_json(bundle):
    class Point(pydantic.BaseModel):
        x: int

    data = bundle(dspy.Prediction(point=Point(x=1), deep={"a": [Point(x=2)]}, nan=math.nan, odd=object))
    assert data[display.JSON_TYPE]["point"] == {"x": 1}
    assert data[display.JSON_TYPE]["deep"] == {"a": [{"x": 2}]}
    assert data[display.JSON_TYPE]["nan"] is None


def test_control_characters_never_reach_a_terminal():
    table = display.Table("", ["a"], [["\x1b[2J\x07one\ntwo"]], {})
    assert "\x1b" not in repr(table)
    assert "one two" in repr(table)


def test_a_module_displays_its_signature_class_and_demos(bundle):
    module = dspy.ChainOfThought("question: str, kind: Literal['a', 'b'] -> answers: list[int]")
    module.predict.demos = [dspy.Example(question="q", kind="a", reasoning="r", answers=[1])]
    data = bundle(module)
    assert data[display.JSON_TYPE]["module"] == "ChainOfThought"
    (predictor,) = data[display.JSON_TYPE]["predictors"]
    assert predictor["signature"] == (
        "question: str, kind: Literal['a', 'b'] -> reasoning: str, answers: list[int]"
    )
    assert predictor["demos"] == 1
    assert "answers: list[int]" in data["text/html"]


def test_a_notebooks_own_module_displays_each_predictor(bundle):
    class Pipeline(dspy.Module):
        def __init__(self):
            super().__init__()
            self.first = dspy.Predict("a -> b")
            self.second = dspy.Predict("b -> c: float")

    shown = bundle(Pipeline())[display.JSON_TYPE]
    assert [p["name"] for p in shown["predictors"]] == ["first", "second"]
    assert shown["predictors"][1]["signature"] == "b: str -> c: float"


def test_a_modules_lm_and_its_key_are_never_shown(bundle):
    module = dspy.Predict("q -> a")
    module.lm = dspy.LM("openai/x", api_key="sk-canary")
    data = bundle(module)
    assert "canary" not in data["text/html"] + json.dumps(data[display.JSON_TYPE])


def test_an_absent_value_and_a_literal_type_read_well():
    assert display.text_cell(None) == "–"
    assert display._type_name(Literal["a"]) == "Literal['a']"
    assert display._type_name(list[dict[str, int]]) == "list[dict[str, int]]"


def test_settings_show_no_secret_by_any_name(bundle):
    lm = {
        "model": "openai/x",
        "api_base": "https://user:canary@host/v1",
        "api_key_env": "MY_KEY",
        "max_tokens": 9,
        "key_given": True,
        "params": {"extra_headers": {"X-Any": "canary"}, "aws_secret_access_key": "canary", "top_p": 0.5},
    }
    data = bundle(display.settings_table({"status": "configured", "settings": {"lm": lm, "budget": {"usd": 1}}}))
    everything = json.dumps(data)
    assert "canary" not in everything
    assert all(told in everything for told in ("MY_KEY", "host/v1", "top_p", "max_tokens"))


def test_every_answer_has_text_html_and_json(bundle):
    usage = {"lm_calls": 2, "failed_calls": 1, "total_tokens": 5, "cost": None}
    stats = {
        "session_id": "s", "programs": 1, "executions": 2, "commands": {"ok": 2, "error": 1}, "lm": {"m": usage},
        "lm_calls": 2, "cache_hits": 1, "total_tokens": 5, "cost": 0.25, "budget": {"usd": 1.0},
        "kernel_memory_bytes": 5 << 20, "created_at": "now", "last_activity": "now",
    }  # fmt: skip
    entry = {
        "timestamp": "now", "model": "m", "messages": [{"role": "user", "content": "ask"}], "outputs": ["told"],
        "usage": {"total_tokens": 3}, "cost": 0.001, "cache_hit": False,
    }  # fmt: skip
    shown = {
        "list": display.programs_table({"programs": [], "count": 0}),
        "stats": display.stats_table(stats),
        "history": display.history_table({"entries": [entry], "count": 1}),
    }
    for answer in shown.values():
        assert {"text/plain", "text/html", display.JSON_TYPE} <= bundle(answer).keys()
    assert "$0.25" in repr(shown["stats"])
    assert "1 failed" in repr(shown["stats"])
    assert "told" in repr(shown["history"])
    assert "no programs yet" in repr(shown["list"])


def test_display_loads_without_dspy():
    package = "dspex_kernels.kernel.notebook"
    code = f"import sys, {package}.display, {package}.magics; print('dspy' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
