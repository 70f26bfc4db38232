"""Programs as data: a record builds the same program anywhere, and says why where it cannot."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import Any

import dspy
import orjson
import pytest
from dspy.utils import DummyLM

from dspex_kernels import errors
from dspex_kernels.kernel.programs.live import LiveProgram, check_record, dump_state, new_program, record_of
from dspex_kernels.kernel.programs.modules import check_config, named_predictors
from dspex_kernels.kernel.programs.tools import Toolbox
from dspex_kernels.protocol.commands import CreateProgramArgs
from dspex_kernels.protocol.records import ProgramRecord, SessionContents

CREATED = "2026-01-02T03:04:05.000+00:00"
PERSON = {
    "type": "object",
    "title": "Person",
    "properties": {
        "name": {"type": "string"},
        "age": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "pets": {
            "type": "array",
            "items": {"type": "object", "title": "Pet", "properties": {"kind": {"type": "string"}}},
        },
    },
    "required": ["name"],
}
NESTED = {
    "inputs": [{"name": "text", "type": "str"}, {"name": "hints", "type": "list[str]"}],
    "outputs": [{"name": "person", "type": PERSON}, {"name": "score", "type": "float", "description": "0 to 1"}],
    "instructions": "Find the person.",
}
DEMO = {
    "text": "Ann has a cat.",
    "hints": ["a", "b"],
    "person": {"name": "Ann", "age": None, "pets": [{"kind": "cat"}]},
    "score": 0.5,
    "reasoning": "It says so.",
    "rationale": "It says so.",
    "trajectory": "none yet",
    "next_thought": "look",
    "next_tool_name": "look_up",
    "next_tool_args": {"subject": "Ann"},
    **{f"reasoning_attempt_{number}": f"attempt {number}" for number in (1, 2, 3)},
}
ATTEMPTS = {
    "module": {"module": "ChainOfThought", "signature": NESTED, "config": {"temperature": 0.3}},
    "N": 2,
    "reward": {"name": "max_length", "args": {"field": "score", "characters": 10}},
    "threshold": 1.0,
}
PROGRAMS: dict[str, dict[str, Any]] = {
    "Predict": {"signature": NESTED, "config": {"temperature": 0.7}},
    "ChainOfThought": {"signature": NESTED},
    "ReAct": {"signature": NESTED, "tools": ["look_up"], "module_args": {"max_iters": 3}},
    "MultiChainComparison": {"signature": NESTED, "module_args": {"M": 3}},
    "BestOfN": {"module_args": ATTEMPTS},
    "Refine": {"module_args": ATTEMPTS},
}


def look_up(subject: str) -> str:
    """Looks a subject up."""
    return f"nothing about {subject}"


@pytest.fixture
def toolbox() -> Iterator[Toolbox]:
    with ThreadPoolExecutor(2) as executor:
        yield Toolbox(executor)


def make(toolbox: Toolbox, program_id: str = "qa", **args: Any) -> ProgramRecord:
    return new_program(CreateProgramArgs(program_id=program_id, **args), 1, toolbox, CREATED).record


def live(toolbox: Toolbox, **args: Any) -> LiveProgram:
    return LiveProgram.build(make(toolbox, **args), toolbox)


def through_json(record: ProgramRecord) -> ProgramRecord:
    return ProgramRecord.model_validate_json(record.model_dump_json())


def prompts(module: dspy.Module, adapter: dspy.Adapter) -> dict[str, Any]:
    return {
        name: orjson.dumps(
            adapter.format(
                signature=predictor.signature,
                demos=predictor.demos,
                inputs={field: DEMO[field] for field in predictor.signature.input_fields},
            )
        )
        for name, predictor in named_predictors(module)
    }


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter()], ids=["chat", "json"])
@pytest.mark.parametrize("module", PROGRAMS)
def test_a_record_with_nested_demos_builds_a_program_that_sends_the_same_bytes(
    module: str, adapter: dspy.Adapter, toolbox: Toolbox
) -> None:
    toolbox.add(look_up)
    program = live(toolbox, module=module, **PROGRAMS[module])
    before = prompts(program.module, adapter)
    for _, predictor in named_predictors(program.module):
        # As an optimizer leaves them: values of the types themselves, and other instructions.
        fields = predictor.signature.fields
        demo = {name: copy.deepcopy(DEMO[name]) for name in fields}
        if "person" in demo:
            demo["person"] = fields["person"].annotation.model_validate(demo["person"])
        predictor.demos = [dspy.Example(demo, augmented=True).with_inputs("text", "hints")]
        predictor.signature = predictor.signature.with_instructions("Look closely.\n\n  Then answer.")
    learned = prompts(program.module, adapter)

    again = LiveProgram.build(through_json(record_of(program)), toolbox)

    assert before != learned
    assert prompts(again.module, adapter) == learned
    assert [p.config for _, p in named_predictors(again.module)] == [
        p.config for _, p in named_predictors(program.module)
    ]


@pytest.mark.parametrize("module", PROGRAMS)
def test_a_fresh_record_survives_json_unchanged(module: str, toolbox: Toolbox) -> None:
    toolbox.add(look_up)
    record = make(toolbox, module=module, **PROGRAMS[module])
    assert through_json(record) == record
    assert SessionContents.model_validate({"programs": {"qa": [record]}}).programs["qa"] == [record]


def test_the_thousandth_import_is_as_fast_as_the_tenth(toolbox: Toolbox) -> None:
    program = live(toolbox, module="ChainOfThought", signature=NESTED)
    program.module.predict.demos = [{"text": "a", "hints": [], "person": {"name": "Ann"}, "score": 1.0}]
    text = record_of(program).model_dump_json()

    def seconds() -> float:
        began = time.process_time()
        LiveProgram.build(ProgramRecord.model_validate_json(text), toolbox)
        return time.process_time() - began

    def once() -> tuple[float, float]:
        gc.collect()
        took = [seconds() for _ in range(1000)]
        return statistics.median(took[4:15]), statistics.median(took[900:])

    runs = []
    for _ in range(3):  # the box is shared: a disturbed run is repeated, a growing cost grows in each
        early, late = once()
        runs.append((early, late))
        if late <= 1.2 * early + 0.0002:
            return
    pytest.fail(f"imports became slower, in seconds (early, late): {runs}")


@pytest.mark.parametrize("module", PROGRAMS)
def test_a_program_is_run_async_only_where_all_of_it_is(module: str, toolbox: Toolbox) -> None:
    toolbox.add(look_up)
    program = live(toolbox, module=module, **PROGRAMS[module])
    assert program.has_acall is (module in {"Predict", "ChainOfThought", "ReAct"})


def test_a_module_that_overrides_only_forward_is_not_run_async() -> None:
    class Shouting(dspy.ChainOfThought):
        def forward(self, **inputs: Any) -> dspy.Prediction:
            return dspy.Prediction(answer="!")

    program = LiveProgram.from_module("shouting", Shouting("question -> answer"), 1, CREATED)
    assert not program.has_acall


def test_a_module_around_a_sync_only_one_is_not_run_async() -> None:
    class Outer(dspy.Module):
        def __init__(self) -> None:
            self.inner = [dspy.BestOfN(dspy.Predict("q -> a"), 2, lambda _inputs, _prediction: 1.0, 1.0)]

        async def aforward(self, q: str) -> dspy.Prediction:
            return self.inner[0](q=q)

    assert not LiveProgram.from_module("outer", Outer(), 1, CREATED).has_acall


# Inputs


def test_inputs_become_the_types_of_their_fields(toolbox: Toolbox) -> None:
    signature = {
        "inputs": [
            {"name": "day", "type": "date"},
            {"name": "person", "type": PERSON},
            {"name": "n", "type": "int"},
        ],
        "outputs": [{"name": "answer"}],
    }
    checked = live(toolbox, signature=signature).check_inputs(
        {"day": "2026-01-02", "person": {"name": "Ann"}, "n": 3}
    )
    assert checked["day"] == date(2026, 1, 2)
    assert checked["person"].name == "Ann"
    assert checked["n"] == 3


def test_an_optional_input_may_be_left_out(toolbox: Toolbox) -> None:
    program = live(toolbox, signature="question, hint: Optional[str] -> answer")
    assert program.check_inputs({"question": "why?"}) == {"question": "why?"}


def test_a_missing_input_is_named_with_its_type(toolbox: Toolbox) -> None:
    program = live(toolbox, signature="question, n: int -> answer")
    with pytest.raises(errors.MissingInput, match=r"program 'qa' needs the input 'n' \(int\)") as failure:
        program.check_inputs({"question": "why?"})
    assert failure.value.details == {"field": "n"}


def test_a_wrong_input_is_named_with_what_was_wanted_and_what_came(toolbox: Toolbox) -> None:
    program = live(toolbox, signature="ns: list[int] -> answer")
    with pytest.raises(errors.InvalidInput, match=r"'ns\.1'.*list\[int\].*got list of length 2"):
        program.check_inputs({"ns": [1, "x"]})


def test_a_long_value_is_not_repeated_in_the_error(toolbox: Toolbox) -> None:
    program = live(toolbox, signature="n: int -> answer")
    with pytest.raises(errors.InvalidInput) as failure:
        program.check_inputs({"n": "secret" * 1000})
    assert "secret" not in failure.value.message
    assert "str of length 6000" in failure.value.message
    assert failure.value.__cause__ is None


def test_an_unknown_input_is_refused_with_those_there_are(toolbox: Toolbox) -> None:
    program = live(toolbox, signature="question, hint -> answer")
    with pytest.raises(errors.InvalidInput, match="no input 'demos': there are question, hint"):
        program.check_inputs({"question": "why?", "hint": "", "demos": []})


COMPLETIONS = [{"reasoning": "r", "answer": "a"}, {"rationale": "r", "answer": 2}]


def test_a_comparison_takes_completions_besides_its_inputs(toolbox: Toolbox) -> None:
    program = live(toolbox, module="MultiChainComparison", signature="question -> answer", module_args={"M": 2})
    inputs = {"question": "why?", "completions": COMPLETIONS}
    assert program.check_inputs(inputs) == inputs
    with dspy.context(lm=DummyLM([{"rationale": "so", "answer": "blue"}])):
        assert program.outputs(program.module(**program.check_inputs(inputs))) == {
            "rationale": "so",
            "answer": "blue",
        }


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        (COMPLETIONS[:1], r"must be 2 objects .* list"),
        ("two", r"must be 2 objects .* got str of length 3"),
        ([COMPLETIONS[0], {"reasoning": "r"}], r"'completions\.1' must have .* `answer`"),
        ([COMPLETIONS[0], {"answer": "r"}], r"'completions\.1' must have a text `reasoning`"),
    ],
)
def test_completions_that_do_not_fit_are_refused(completions: Any, message: str, toolbox: Toolbox) -> None:
    program = live(toolbox, module="MultiChainComparison", signature="question -> answer", module_args={"M": 2})
    with pytest.raises(errors.InvalidInput, match=message):
        program.check_inputs({"question": "why?", "completions": completions})


def test_missing_completions_are_told(toolbox: Toolbox) -> None:
    program = live(toolbox, module="MultiChainComparison", signature="question -> answer")
    with pytest.raises(errors.MissingInput, match="'completions', 3 objects"):
        program.check_inputs({"question": "why?"})


# Notebook modules


class Pipeline(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = dspy.Predict("a -> b"), dspy.Predict("b -> c")

    def forward(self, a: str, style: str = "plain") -> dspy.Prediction:
        return self.second(b=self.first(a=a).b)


def test_a_notebooks_module_takes_the_arguments_of_its_forward() -> None:
    program = LiveProgram.from_module("two_steps", Pipeline(), 3, CREATED)
    assert program.check_inputs({"a": 1}) == {"a": 1}
    with pytest.raises(errors.MissingInput, match="'a'"):
        program.check_inputs({})
    with pytest.raises(errors.InvalidInput, match="there are a, style"):
        program.check_inputs({"a": 1, "b": 2})
    summary = program.summary()
    assert (summary.version, summary.module, summary.inputs) == (3, "notebook", {"a": "Any", "style": "Any"})


def test_a_notebooks_module_without_named_arguments_takes_any() -> None:
    class TakesAny(dspy.Module):
        def forward(self, **inputs: Any) -> dspy.Prediction:
            return dspy.Prediction(**inputs)

    assert LiveProgram.from_module("any", TakesAny(), 1, CREATED).check_inputs({"x": 1}) == {"x": 1}


def test_a_notebooks_module_with_one_predictor_has_its_signature() -> None:
    program = LiveProgram.from_module("cot", dspy.ChainOfThought("question, n: int -> answer"), 1, CREATED)
    assert program.summary().inputs == {"question": "str", "n": "int"}
    with pytest.raises(errors.InvalidInput, match="'n'"):
        program.check_inputs({"question": "why?", "n": "x"})


def test_a_notebooks_module_is_not_portable_and_says_how_to_bring_it_back(toolbox: Toolbox) -> None:
    record = LiveProgram.from_module("two_steps", Pipeline(), 1, CREATED).record
    assert not record.portable
    assert record.not_portable_because == ["it is a Pipeline made in the notebook"]
    with pytest.raises(errors.NotPortable, match="%dspex add two_steps"):
        LiveProgram.build(through_json(record), toolbox)


def test_only_modules_can_be_taken_in() -> None:
    with pytest.raises(errors.InvalidModule, match=r"'f' is a function, not a dspy\.Module"):
        LiveProgram.from_module("f", look_up, 1, CREATED)  # type: ignore[arg-type]  # the mistake


def test_a_program_with_a_notebooks_tool_says_how_to_bring_it_back(toolbox: Toolbox) -> None:
    toolbox.add(look_up)
    record = make(toolbox, module="ReAct", signature="question -> answer", tools=["look_up"])
    assert not record.portable
    assert record.not_portable_because == ["its tool 'look_up' is a function of the notebook"]
    with ThreadPoolExecutor(1) as executor, pytest.raises(errors.NotPortable, match="%dspex add look_up"):
        LiveProgram.build(record, Toolbox(executor))


# Outputs and summaries


def test_outputs_are_json_with_what_the_module_added(toolbox: Toolbox) -> None:
    toolbox.add(look_up)
    program = live(toolbox, module="ReAct", signature="question -> answer", tools=["look_up"])
    steps = [
        {"next_thought": "t", "next_tool_name": "look_up", "next_tool_args": '{"subject": "sky"}'},
        {"next_thought": "t", "next_tool_name": "finish", "next_tool_args": "{}"},
        {"reasoning": "so", "answer": "blue"},
    ]
    with dspy.context(lm=DummyLM(steps)):
        outputs = program.outputs(program.module(question="why?"))
    assert outputs["answer"] == "blue"
    assert outputs["reasoning"] == "so"
    assert outputs["trajectory"]["observation_0"] == "nothing about sky"
    assert orjson.loads(orjson.dumps(outputs)) == outputs


def test_what_is_no_prediction_is_one_output() -> None:
    program = LiveProgram.from_module("two_steps", Pipeline(), 1, CREATED)
    assert program.outputs({"a": date(2026, 1, 2)}) == {"a": "2026-01-02"}
    assert program.outputs("text") == {"output": "text"}


def test_a_summary_tells_the_signature_of_the_innermost_module(toolbox: Toolbox) -> None:
    record = make(toolbox, module="BestOfN", module_args=ATTEMPTS)
    summary = LiveProgram.summarise(record, [1, 2])
    assert summary.versions == [1, 2]
    assert summary.inputs == {"text": "str", "hints": "list[str]"}
    assert summary.outputs["score"] == "float"
    assert "person" in summary.signature
    assert summary.instructions == "Find the person."


# States


def test_the_state_holds_compiled_modules_and_no_language_model() -> None:
    class Outer(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = dspy.ChainOfThought("question -> answer")

        def forward(self, question: str) -> dspy.Prediction:
            return self.inner(question=question)

    outer = Outer()
    outer.inner._compiled = True
    outer.inner.predict.lm = dspy.LM("openai/gpt-5-mini", api_key="sk-secret", headers={"x": "sk-secret"})
    outer.inner.predict.traces = ["residue"]
    assert outer.dump_state() == {}  # DSPy's own: it is why ours exists
    state = dump_state(outer)
    assert list(state) == ["inner.predict"]
    assert state["inner.predict"]["lm"] is None
    assert b"sk-secret" not in orjson.dumps(state)
    assert outer.inner.predict.traces == ["residue"]


def with_state(record: ProgramRecord, state: dict[str, Any]) -> ProgramRecord:
    return record.model_copy(update={"state": state})


def test_a_state_of_another_module_is_refused(toolbox: Toolbox) -> None:
    state = dump_state(dspy.ChainOfThought("question -> answer"))
    record = with_state(make(toolbox, signature="question -> answer"), state)
    with pytest.raises(errors.InvalidRecord, match=r"of the predictors predict; its module Predict has self"):
        LiveProgram.build(record, toolbox)


def test_a_state_with_other_fields_is_refused(toolbox: Toolbox) -> None:
    state = dump_state(dspy.Predict("a, b -> c"))
    record = with_state(make(toolbox, signature="question -> answer"), state)
    with pytest.raises(errors.InvalidRecord, match="'self' has 2 fields, its state 3"):
        LiveProgram.build(record, toolbox)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm": {"model": "openai/x", "api_base": "http://evil"}}, "'self' holds an `lm`"),
        ({"forward": "x"}, "self.forward: Extra inputs"),
        ({"config": {"api_base": "http://evil"}}, "self.config: Extra inputs"),
        ({"demos": "none"}, "self.demos"),
        ({"signature": {"instructions": "x"}}, "self.signature.fields: Field required"),
    ],
)
def test_a_state_may_hold_only_what_a_predictor_learns(
    change: dict[str, Any], message: str, toolbox: Toolbox
) -> None:
    record = make(toolbox, signature="question -> answer")
    state = {"self": {**dump_state(dspy.Predict("question -> answer"))["self"], **change}}
    with pytest.raises(errors.InvalidRecord, match=message):
        check_record(with_state(record, state))
    with pytest.raises(errors.InvalidRecord, match=message):
        LiveProgram.build(with_state(record, state), toolbox)


def test_a_record_of_another_version_is_refused(toolbox: Toolbox) -> None:
    record = make(toolbox, signature="question -> answer").model_copy(update={"record_version": 2})
    with pytest.raises(errors.InvalidRecord, match="record version 2"):
        check_record(record)


def test_a_programs_module_shares_nothing_with_its_record(toolbox: Toolbox) -> None:
    program = live(toolbox, signature="question -> answer")
    program.module.demos = [{"question": "q", "answer": "a"}]
    record = record_of(program)
    LiveProgram.build(record, toolbox).module.demos[0]["answer"] = "changed"
    assert record.state["self"]["demos"][0]["answer"] == "a"


# Config


def test_config_takes_sampling_parameters_as_they_are() -> None:
    config = {"temperature": 1, "max_tokens": 100, "stop": ["\n"], "seed": 7, "top_p": 0.5}
    assert check_config({**config, "n": None}) == config
    assert isinstance(check_config(config)["temperature"], int)


@pytest.mark.parametrize("name", ["api_key", "api_base", "base_url", "headers", "model", "rollout_id", "cache"])
def test_config_takes_nothing_that_is_the_sessions(name: str, toolbox: Toolbox) -> None:
    with pytest.raises(errors.InvalidArguments, match=name) as failure:
        check_config({name: "sk-secret", "temperature": 1.0})
    assert "sk-secret" not in failure.value.message
    with pytest.raises(errors.InvalidArguments, match=name):
        make(toolbox, signature="q -> a", config={name: "x"})


def test_config_values_are_checked() -> None:
    with pytest.raises(errors.InvalidArguments, match="temperature"):
        check_config({"temperature": "hot"})


def test_an_input_with_a_default_may_be_left_out(toolbox: Toolbox) -> None:
    fields = [{"name": "count", "type": {"type": "integer", "default": 3}}]
    program = live(toolbox, signature={"inputs": fields, "outputs": [{"name": "answer"}]})
    with dspy.context(lm=DummyLM([{"answer": "a"}]), trace=[]):
        program.module(**program.check_inputs({}))
        assert dspy.settings.trace[-1][1] == {"count": 3}


def test_a_sets_order_is_the_same_in_every_process(toolbox: Toolbox) -> None:
    program = live(toolbox, signature="words: set[str], more: list[set[int]] -> answer")
    given = {"words": ["d", "a", "c", "b", "a"], "more": [[3, 1, 2]]}
    assert program.check_inputs(given) == {"words": ["a", "b", "c", "d"], "more": [[1, 2, 3]]}


POLICY: list[tuple[str, Any, Any]] = [
    # A text that says a number is the number: rows of CSV files and forms come as texts.
    ("int", "5", 5), ("float", "2.5", 2.5), ("float", 3, 3.0), ("int", 4.0, 4), ("bool", "yes", True),
    ("str | int", "5", "5"), ("date", "2026-01-02", date(2026, 1, 2)), ("list[int]", ["1", 2], [1, 2]),
    ("str | None", None, None), ("Literal['a']", "a", "a"),
]  # fmt: skip
REFUSED: list[tuple[str, Any]] = [
    # Nothing becomes a text by itself, and nothing is cut off.
    ("str", ["a"]), ("str", 5), ("str", True), ("str", None), ("int", 4.5), ("int", "4.5"), ("int", ""),
    ("int", None), ("list[str]", "a"), ("list[str]", {"a": 1}), ("Literal['1']", 1), ("dict[str, int]", []),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "taken"), POLICY)
def test_an_input_is_taken_as_its_type_where_it_says_the_same(
    toolbox: Toolbox, kind: str, given: Any, taken: Any
) -> None:
    program = _of_type(toolbox, kind)
    found = program.check_inputs({"q": given})["q"]
    assert (found, type(found)) == (taken, type(taken))


@pytest.mark.parametrize(("kind", "given"), REFUSED)
def test_an_input_that_would_have_to_be_bent_is_refused(toolbox: Toolbox, kind: str, given: Any) -> None:
    with pytest.raises(errors.InvalidInput, match="input 'q'"):
        _of_type(toolbox, kind).check_inputs({"q": given})


def test_a_refused_input_is_told_in_short(toolbox: Toolbox) -> None:
    program = _of_type(toolbox, {"enum": [f"word number {n}" for n in range(1000)]})
    with pytest.raises(errors.InvalidInput) as caught:
        program.check_inputs({"q": "none"})
    assert len(orjson.dumps(caught.value.to_dict())) < 3000


def _of_type(toolbox: Toolbox, kind: Any) -> LiveProgram:
    signature = {"inputs": [{"name": "q", "type": kind}], "outputs": [{"name": "a"}]}
    args = CreateProgramArgs(program_id="p", signature=signature)
    return new_program(args, 1, toolbox, CREATED)


def test_a_record_that_says_two_things_of_being_portable_is_refused(toolbox: Toolbox) -> None:
    toolbox.add(look_up)
    args = CreateProgramArgs(program_id="p", signature="q -> a", module="ReAct", tools=["look_up"])
    record = new_program(args, 1, toolbox, CREATED).record
    assert not record.portable
    check_record(record)
    with pytest.raises(errors.InvalidRecord, match="'look_up' is a notebook's"):
        check_record(record.model_copy(update={"portable": True}))


def test_a_version_that_no_store_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="version"):
        ProgramRecord(program_id="p", version=2**31, spec={})
