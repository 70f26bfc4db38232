"""Modules from data: what is asked for is what DSPy gets, and what does not fit is named."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM

from dspex_kernels import errors
from dspex_kernels.kernel.programs.live import LiveProgram, new_program
from dspex_kernels.kernel.programs.modules import named_predictors
from dspex_kernels.kernel.programs.rewards import build_reward, reward_source
from dspex_kernels.kernel.programs.tools import Toolbox
from dspex_kernels.protocol.commands import CreateProgramArgs
from tests.kernel.programs.test_tools import look_up, plugin

__all__ = ["plugin"]  # a fixture


@pytest.fixture
def toolbox() -> Iterator[Toolbox]:
    with ThreadPoolExecutor(2) as executor:
        toolbox = Toolbox(executor)
        toolbox.add(look_up)
        yield toolbox


def build(toolbox: Toolbox, **args: Any) -> LiveProgram:
    return new_program(CreateProgramArgs(program_id="p", **args), 1, toolbox, "")


def attempts(of: str = "BestOfN", **changes: Any) -> dict[str, Any]:
    args = {
        "module": {"module": "ChainOfThought", "signature": "question -> answer"},
        "N": 3,
        "reward": {"name": "one_word", "args": {"field": "answer"}},
    }
    return {"module": of, "module_args": {**args, **changes}}


@pytest.mark.parametrize(
    ("args", "configs"),
    [
        ({"signature": "q -> a"}, {"self": {"temperature": 0.4}}),
        ({"signature": "q -> a", "module": "ChainOfThought"}, {"predict": {"temperature": 0.4}}),
        (
            {"signature": "q -> a", "module": "ReAct", "tools": ["look_up"]},
            {"react": {"temperature": 0.4}, "extract.predict": {"temperature": 0.4}},
        ),
        ({"signature": "q -> a", "module": "MultiChainComparison"}, {"predict": {"temperature": 0.4}}),
        (
            {"signature": "q -> a", "module": "MultiChainComparison", "module_args": {"temperature": 0.1}},
            {"predict": {"temperature": 0.1}},
        ),
        (attempts(), {"module.predict": {"temperature": 0.4}}),
        (
            attempts("Refine") | {"config": {"temperature": 0.4, "top_p": 0.5}},
            {"module.predict": {"temperature": 0.4, "top_p": 0.5}},
        ),
    ],
)
def test_config_reaches_every_predictor(args: dict[str, Any], configs: dict[str, Any], toolbox: Toolbox) -> None:
    program = build(toolbox, **{"config": {"temperature": 0.4}, **args})
    assert {name: predictor.config for name, predictor in named_predictors(program.module)} == configs


def test_a_nested_modules_own_config_comes_first(toolbox: Toolbox) -> None:
    args = attempts(module={"signature": "question -> answer", "config": {"temperature": 0.9}})
    program = build(toolbox, **args, config={"temperature": 0.4, "seed": 1})
    assert program.module.module.config == {"temperature": 0.9, "seed": 1}


def test_react_gets_its_tools_and_bound(toolbox: Toolbox) -> None:
    args = {"signature": "q -> a", "module": "ReAct", "tools": ["look_up"], "module_args": {"max_iters": 4}}
    module = build(toolbox, **args).module
    assert module.max_iters == 4
    assert list(module.tools) == ["look_up", "finish"]


def test_building_a_comparison_warns_of_nothing(toolbox: Toolbox) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build(toolbox, module="MultiChainComparison", signature="q -> a")
    assert caught == []


def test_best_of_n_answers_with_the_best_attempt(toolbox: Toolbox) -> None:
    program = build(toolbox, **attempts())
    answers = [{"reasoning": "r", "answer": text} for text in ("two words", "word", "not asked")]
    with dspy.context(lm=DummyLM(answers)):
        prediction = program.module(**program.check_inputs({"question": "q"}))
    assert program.outputs(prediction) == {"reasoning": "r", "answer": "word"}


def test_refine_shows_the_model_what_the_reward_wants(toolbox: Toolbox) -> None:
    reward = {"name": "contains", "args": {"field": "answer", "text": "forty-two"}}
    module = build(toolbox, **attempts("Refine", reward=reward)).module
    assert "class Contains" in module.reward_fn_code
    assert "forty-two" in module.reward_fn_code


def test_modules_nest(toolbox: Toolbox) -> None:
    inner = {**attempts("Refine"), "config": {"seed": 1}}
    program = build(toolbox, **attempts(module=inner))
    assert type(program.module.module.module) is dspy.ChainOfThought
    assert program.summary().signature == "question -> answer"
    assert program.check_inputs({"question": "q"}) == {"question": "q"}


def test_nesting_is_bounded(toolbox: Toolbox) -> None:
    args = attempts()
    for _ in range(4):
        args = attempts(module=args)
    with pytest.raises(errors.InvalidModule, match="more than 5 deep"):
        build(toolbox, **args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "Predict needs a signature"),
        ({"signature": "q -> a", "module_args": {"k": 1}}, "Predict: module_args.k: Extra inputs"),
        ({"signature": "q -> a", "tools": ["look_up"]}, "Predict takes no tools"),
        ({"signature": "q -> a", "module": "ReAct", "module_args": {"max_iters": 201}}, "max_iters"),
        ({"signature": "q -> a", "module": "ReAct", "tools": ["look_up", "look_up"]}, "given twice: look_up"),
        ({"signature": "q -> a", "module": "MultiChainComparison", "module_args": {"M": 51}}, "module_args.M"),
        ({**attempts(), "signature": "q -> a"}, "BestOfN takes no signature"),
        (attempts(N=101), "BestOfN: module_args.N"),
        (attempts(N=0), "module_args.N"),
        (attempts(fail_count=0), "module_args.fail_count"),
        (attempts(threshold=float("nan")), "module_args.threshold"),
        (attempts(module={"signature": "question -> answer", "lm": "x"}), "module.lm"),
        (attempts(reward={"name": "one_word", "args": {"field": "title"}}), "'title', which is not an output"),
        (attempts(reward={"name": "one_word", "args": {}}), "reward 'one_word': field: Field required"),
        (attempts(reward={"name": "regex", "args": {"field": "answer", "pattern": "("}}), "not a pattern"),
        (attempts(reward={"name": "regex", "args": {"field": "answer", "pattern": "a" * 1001}}), "pattern"),
    ],
)
def test_what_does_not_fit_is_named(args: dict[str, Any], message: str, toolbox: Toolbox) -> None:
    with pytest.raises(errors.InvalidModule, match=message):
        build(toolbox, **args)


def test_unknown_modules_tools_and_rewards_list_those_there_are(plugin: None, toolbox: Toolbox) -> None:
    with pytest.raises(errors.UnknownModule, match=r"'Predicate': there are Predict, .*Refine, agent"):
        build(toolbox, module="Predicate", signature="q -> a")
    with pytest.raises(errors.ModuleNotAvailable, match=r"'RLM' comes later: there are Predict"):
        build(toolbox, module="RLM", signature="q -> a")
    with pytest.raises(errors.ToolNotFound, match=r"there are .*look_up"):
        build(toolbox, module="ReAct", signature="q -> a", tools=["x"])
    with pytest.raises(errors.RewardNotFound, match="'best': there are contains, field_equals, fixed"):
        build(toolbox, **attempts(reward={"name": "best"}))


# Pipelines of plugins


def test_a_plugins_pipeline_is_built_from_its_args(plugin: None, toolbox: Toolbox) -> None:
    program = build(toolbox, module="two_steps", module_args={"steps": 3}, config={"seed": 1})
    assert [p.config for _, p in named_predictors(program.module)] == [{"seed": 1}] * 3
    assert program.check_inputs({"question": "q"}) == {"question": "q"}
    with pytest.raises(errors.MissingInput, match="question"):
        program.check_inputs({})


def test_a_plugins_pipeline_gets_the_signature_and_tools_it_asks_for(plugin: None, toolbox: Toolbox) -> None:
    program = build(toolbox, module="agent", signature="q -> a", tools=["look_up"])
    assert list(program.module.tools) == ["look_up", "finish"]
    assert program.has_acall


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"module": "two_steps", "module_args": {"steps": 10}}, "ValueError: too many steps"),
        ({"module": "two_steps", "module_args": {"stages": 1}}, "TypeError"),
        ({"module": "two_steps", "signature": "q -> a"}, "brings its own signature"),
        ({"module": "nothing"}, "gave a int, not a dspy.Module"),
    ],
)
def test_a_pipeline_that_cannot_be_built_says_why(
    args: dict[str, Any], message: str, plugin: None, toolbox: Toolbox
) -> None:
    with pytest.raises(errors.InvalidModule, match=message):
        build(toolbox, **args)


# Rewards


@pytest.mark.parametrize(
    ("name", "args", "good", "bad"),
    [
        ("field_equals", {"value": "blue"}, " blue\n", "red"),
        ("field_equals", {"value": [1, 2]}, [1, 2], [1]),
        ("contains", {"text": "blu"}, "it is blue", "red"),
        ("regex", {"pattern": r"^\d{4}$"}, "2026", "26"),
        ("max_length", {"characters": 3}, "abc", "abcd"),
        ("one_word", {}, " word ", "two words"),
        ("json_valid", {}, '{"a": 1}', "{a"),
        ("in_list", {"values": ["a", "b"]}, "a", "c"),
    ],
)
def test_a_reward_is_one_or_nothing(name: str, args: dict[str, Any], good: Any, bad: Any, toolbox: Toolbox) -> None:
    reward = build_reward({"name": name, "args": {"field": "answer", **args}}, toolbox)
    assert reward({}, dspy.Prediction(answer=good)) == 1.0
    assert reward({}, dspy.Prediction(answer=bad)) == 0.0
    assert "class " in reward_source(reward)


def test_no_pattern_computes_for_ever(toolbox: Toolbox) -> None:
    reward = build_reward({"name": "regex", "args": {"field": "answer", "pattern": "^(a+)+$"}}, toolbox)
    assert reward({}, dspy.Prediction(answer="a" * 5000 + "!")) == 0.0


def test_plugins_rewards_take_args_as_functions_and_as_classes(plugin: None, toolbox: Toolbox) -> None:
    near = build_reward({"name": "near", "args": {"wanted": 2.0}}, toolbox)
    assert near({}, dspy.Prediction(answer="1.5")) == 0.5
    assert "def near" in reward_source(near)
    assert build_reward({"name": "fixed", "args": {"score": 0.25}}, toolbox)({}, None) == 0.25
    for name in ("near", "fixed"):
        with pytest.raises(errors.InvalidModule, match=f"reward '{name}' does not take these args"):
            build_reward({"name": name, "args": {"x": 1}}, toolbox)
    assert build(toolbox, **attempts("Refine", reward={"name": "near"})).module.N == 3


@pytest.mark.parametrize(
    ("module", "signature"),
    [
        ("ChainOfThought", "reasoning -> answer"),
        ("ReAct", "reasoning -> answer"),
        ("ReAct", "module -> answer"),
        ("ReAct", "trajectory -> answer"),
        ("ReAct", "next_tool_name -> answer"),
        ("ReAct", "question -> trajectory"),
        ("ReAct", "question -> base"),
        ("ReAct", "question -> self"),
        ("MultiChainComparison", "rationale -> answer"),
        ("MultiChainComparison", "reasoning_attempt_2 -> answer"),
    ],
)
def test_a_field_that_the_module_takes_for_its_own_is_refused(
    module: str, signature: str, toolbox: Toolbox
) -> None:
    # DSPy loses such an input without a word, or fails when the program is called.
    with pytest.raises(errors.InvalidSignature, match=module):
        build(toolbox, module=module, signature=signature)
    assert build(toolbox, module="Predict", signature=signature)


@pytest.mark.parametrize(
    ("name", "args", "why"),
    [("raises", {}, "ZeroDivisionError: division by zero"), ("no_number", {}, "NaN"), ("near", {}, "could not")],
)
def test_a_reward_that_fails_ends_the_call_and_tells_why(
    plugin: None, toolbox: Toolbox, name: str, args: dict[str, Any], why: str
) -> None:
    """DSPy prints what a reward raises, tries again, and in the end answers nothing."""
    prediction = dspy.Prediction(answer="one")
    with pytest.raises(errors.CallStopped) as caught:
        build_reward({"name": name, "args": args}, toolbox)({}, prediction)
    failure = caught.value.error
    assert isinstance(failure, errors.ProgramFailed)
    assert why in failure.message
    assert f"the reward {name!r} failed" in failure.message


def test_a_built_in_reward_without_its_field_says_so(toolbox: Toolbox) -> None:
    with pytest.raises(errors.CallStopped, match="'one_word' failed: KeyError"):
        build_reward({"name": "one_word", "args": {"field": "title"}}, toolbox)({}, dspy.Prediction(answer="one"))
