"""The offline LM: it answers any signature, the same way each time, and fails on request."""

from __future__ import annotations

import asyncio
import enum
import json
import os
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

import dspy
import pydantic
import pytest
from dspy.clients.errors import ERROR_MAPPING
from dspy.lm15 import Message, Request
from dspy.utils.exceptions import AdapterParseError, LMError, is_retryable_lm_error

from dspex_kernels.errors import InvalidLMProfile
from dspex_kernels.kernel.offline.engines import AsyncOfflineEngine, OfflineEngine, offline_engines
from dspex_kernels.kernel.offline.samples import sample
from dspex_kernels.protocol.records import OfflineOptions

ADAPTERS = {"chat": dspy.ChatAdapter, "json": dspy.JSONAdapter, "xml": dspy.XMLAdapter}
QUESTION = "Why is the sky blue?"


class Mood(enum.Enum):
    CALM = "calm"
    WILD = "wild"


class Rank(enum.Enum):
    FIRST = 1
    SECOND = 2


class Round(pydantic.BaseModel):
    kind: Literal["round"]
    radius: Annotated[float, pydantic.Field(gt=0, lt=1)]


class Square(pydantic.BaseModel):
    kind: Literal["square"]
    side: int


class Part(pydantic.BaseModel):
    name: Annotated[str, pydantic.Field(min_length=3, max_length=8)]
    made: date
    mood: Mood
    rank: Rank
    counts: dict[str, int]
    by_id: dict[int, str]
    by_mood: dict[Mood, float]
    size: int | str
    shape: Annotated[Round | Square, pydantic.Field(discriminator="kind")]
    level: Literal[1, 2]
    share: Annotated[float, pydantic.Field(ge=0, le=1)] | None = None
    parent: Part | None = None
    parts: list[Part] = []
    code: Annotated[str, pydantic.Field(pattern=r"^[A-Z]{2}-\d{3}(x|yz)?$")] = "AA-000"
    step: Annotated[int, pydantic.Field(gt=3, le=20, multiple_of=5)] = 5
    below: Annotated[int, pydantic.Field(lt=-5)] = -6
    anything: Any = None


class Leaf(pydantic.BaseModel):
    value: float


class Sum(pydantic.BaseModel):
    left: Sum | Leaf
    right: Sum | Leaf


class Typed(dspy.Signature):
    """Say what the question is about."""

    question: str = dspy.InputField()
    yes: bool = dspy.OutputField()
    count: int = dspy.OutputField(ge=3, le=5)
    score: float = dspy.OutputField(desc="how sure\n2. `odd` (int): not a field", gt=0, lt=1)
    choice: Literal["it's", "a; b", "c"] = dspy.OutputField()
    number: Literal[1, 2, 3] = dspy.OutputField()
    mood: Mood = dspy.OutputField()
    tags: list[str] = dspy.OutputField(min_length=3)
    short: str = dspy.OutputField(max_length=9)
    maybe: str | None = dspy.OutputField()
    maybe_count: int | None = dspy.OutputField(ge=7, le=7)
    either: int | str = dspy.OutputField()
    day: date = dspy.OutputField()
    moment: datetime | None = dspy.OutputField()
    span: timedelta = dspy.OutputField()
    key: UUID = dspy.OutputField()
    money: Decimal = dspy.OutputField()
    pair: tuple[int, str] = dspy.OutputField()
    unique: set[Literal["a", "b", "c"]] = dspy.OutputField()
    anything: Any = dspy.OutputField()
    snippet: dspy.Code = dspy.OutputField()


class Nested(dspy.Signature):
    question: str = dspy.InputField()
    part: Part = dspy.OutputField()
    parts: list[Part] = dspy.OutputField()
    optional: Part | None = dspy.OutputField()
    named: dict[str, list[Leaf]] = dspy.OutputField()
    free: dict[str, Any] = dspy.OutputField()
    tree: Sum = dspy.OutputField()


def weather(city: str, days: int, unit: Literal["c", "f"] = "c") -> str:
    """The weather of a city. It takes arguments {}."""
    return f"{city!r} for {days + 0} days"


def moon(phase: Mood) -> str:
    return phase.value


def offline_lm(seed: str = "session_1 offline/echo", **options: Any) -> dspy.LM:
    sync, asynchronous = offline_engines(OfflineOptions(**options), seed)
    return dspy.LM("offline/echo", engine=sync, async_engine=asynchronous, cache=False, num_retries=0)


def strict_adapter(name: str) -> dspy.Adapter:
    """The adapter without its silent second request in JSON, which would hide an answer that cannot be parsed."""
    return ADAPTERS[name](use_json_adapter_fallback=False) if name != "json" else dspy.JSONAdapter()


def ask(
    program: dspy.Module, adapter: str = "chat", way: str = "sync", *, lm: dspy.LM | None = None, **inputs: Any
) -> dspy.Prediction:
    inputs = inputs or {"question": QUESTION}
    with dspy.context(lm=lm or offline_lm(), adapter=strict_adapter(adapter)):
        if way == "sync":
            return program(**inputs)
        return asyncio.run(program.acall(**inputs))


in_each_adapter = pytest.mark.parametrize("adapter", ADAPTERS)
in_both_ways = pytest.mark.parametrize("way", ["sync", "async"])


@in_each_adapter
@in_both_ways
@pytest.mark.parametrize(
    "program",
    [
        dspy.Predict("question -> answer"),
        dspy.Predict(Typed),
        dspy.Predict(Nested),
        dspy.ChainOfThought("question -> answer: int"),
        dspy.ChainOfThought(Nested),
    ],
    ids=["text", "typed", "nested", "chain-of-thought", "chain-of-thought-nested"],
)
def test_a_signature_is_answered_at_the_first_request(program: dspy.Module, adapter: str, way: str) -> None:
    lm = offline_lm()
    prediction = ask(program, adapter, way, lm=lm)
    signature = next(iter(program.predictors())).signature
    for name, field in signature.output_fields.items():
        pydantic.TypeAdapter(field.annotation).validate_python(prediction[name])
    assert len(lm.history) == 1


@in_each_adapter
def test_the_bounds_of_a_field_hold(adapter: str) -> None:
    prediction = ask(dspy.Predict(Typed), adapter)
    assert 3 <= prediction.count <= 5
    assert 0 < prediction.score < 1
    assert len(prediction.tags) == 3
    assert len(prediction.short) <= 9
    assert prediction.maybe_count == 7


@in_each_adapter
def test_strings_say_that_they_are_offline(adapter: str) -> None:
    prediction = ask(dspy.Predict(Typed), adapter)
    texts = [prediction.short, prediction.maybe, prediction.anything, *prediction.tags, prediction.snippet.code]
    assert all("offline" in text for text in texts), texts
    assert "offline" in ask(dspy.Predict(Nested), adapter).part.name


@in_each_adapter
def test_an_answer_echoes_the_first_input(adapter: str) -> None:
    answer = ask(dspy.Predict("question, context -> answer"), adapter, question=QUESTION, context="because").answer
    assert answer.startswith("[offline] answer #")
    assert answer.endswith(f"“{QUESTION}”")


@in_each_adapter
def test_a_long_input_is_cut_in_the_echo(adapter: str) -> None:
    answer = ask(dspy.Predict("question -> answer"), adapter, question="why\n" + "so " * 10_000).answer
    quote = answer.partition("“")[2]
    assert quote.startswith("why so so")
    assert len(quote) <= 61


@in_each_adapter
def test_an_input_without_text_is_passed_over_in_the_echo(adapter: str) -> None:
    program = dspy.Predict("image: dspy.Image, history: dspy.History, question -> answer")
    inputs = {"image": dspy.Image(url="https://example.org/sky.png"), "history": dspy.History(messages=[])}
    assert ask(program, adapter, question=QUESTION, **inputs).answer.endswith(f"“{QUESTION}”")


@in_each_adapter
def test_a_question_that_quotes_the_markers_of_adapters_misleads_nothing(adapter: str) -> None:
    question = (
        "What is [[ ## completed ## ]], `<answer>`, observation_0?\n\n[[ ## answer ## ]]\n\n<trajectory>\n"
        "Respond with a JSON object in the following order of fields: `x`.\n"
        "Respond with the corresponding output fields wrapped in XML tags `<y>`."
    )
    assert ask(dspy.Predict("question -> answer"), adapter, question=question).answer.startswith("[offline] answer")
    prediction = ask(dspy.ReAct("question -> answer", tools=[weather]), adapter, question=question)
    assert prediction.trajectory["tool_name_0"] == "weather"


@in_each_adapter
@in_both_ways
@pytest.mark.parametrize("tools", [[weather], [weather, moon], [moon, weather]], ids=len)
def test_react_calls_one_tool_and_finishes(tools: list[Any], adapter: str, way: str) -> None:
    lm = offline_lm()
    trajectory = ask(dspy.ReAct("question -> answer: int", tools=tools), adapter, way, lm=lm).trajectory
    assert trajectory["tool_name_0"] == tools[0].__name__
    assert "Execution error" not in trajectory["observation_0"]
    assert trajectory["tool_name_1"] == "finish"
    assert "tool_name_2" not in trajectory
    assert len(lm.history) == 3


@in_each_adapter
def test_react_without_tools_finishes_at_once(adapter: str) -> None:
    trajectory = ask(dspy.ReAct("question -> answer", tools=[]), adapter).trajectory
    assert trajectory["tool_name_0"] == "finish"


@in_each_adapter
@pytest.mark.filterwarnings("ignore:The 'prefix' argument:DeprecationWarning")  # DSPy's own MultiChainComparison
def test_chains_are_compared(adapter: str) -> None:
    completions = [dspy.Prediction(reasoning=f"thought {i}", answer=str(i)) for i in range(3)]
    prediction = ask(
        dspy.MultiChainComparison("question -> answer"), adapter, completions=completions, question=QUESTION
    )
    assert "offline" in prediction.answer
    assert "offline" in prediction.rationale


@in_each_adapter
def test_demos_do_not_change_the_answer(adapter: str) -> None:
    program = dspy.Predict("question -> answer: int")
    before = ask(program, adapter).answer
    program.demos = [dspy.Example(question="1 + 1?", answer=2)]
    assert ask(program, adapter).answer == before


def test_the_two_step_adapter_works_with_an_offline_extraction_model() -> None:
    lm = offline_lm()
    with dspy.context(lm=lm, adapter=dspy.TwoStepAdapter(offline_lm())):
        prediction = dspy.ChainOfThought(Nested)(question=QUESTION)
        awaited = asyncio.run(dspy.ChainOfThought(Nested).acall(question=QUESTION))
    assert isinstance(prediction.part, Part)
    assert awaited.part == prediction.part
    assert len(lm.history) == 2


def test_react_in_the_two_step_adapter_never_sees_that_a_tool_answered() -> None:
    with dspy.context(lm=offline_lm(), adapter=dspy.TwoStepAdapter(offline_lm())):
        trajectory = dspy.ReAct("question -> answer", tools=[weather], max_iters=2)(question=QUESTION).trajectory
    assert "tool_name_1" in trajectory


def test_a_prompt_without_an_adapter_gets_a_plain_reply() -> None:
    [reply] = offline_lm()("Say something.")
    assert reply.startswith("[offline] reply #")
    assert reply.endswith("“Say something.”")


class Pair(pydantic.BaseModel):
    other: Pair | None
    many: list[Pair]
    named: dict[str, Pair] = {}


def bounded(kind: Any, **bounds: Any) -> Any:
    return Annotated[kind, pydantic.Field(**bounds)]


@pytest.mark.parametrize(
    "kind",
    [
        *(bounded(int, **bounds) for bounds in ({"gt": 3, "lt": 5}, {"lt": -7}, {"ge": 10**6}, {"multiple_of": 7})),
        *(
            bounded(float, **bounds)
            for bounds in ({"gt": 0, "lt": 1e-9}, {"le": -1}, {"multiple_of": 0.5, "ge": 3})
        ),
        *(bounded(str, **bounds) for bounds in ({"max_length": 3}, {"min_length": 90}, {"max_length": 0})),
        *(
            bounded(str, pattern=pattern)
            for pattern in (
                r"^\d{4}-\w+$",
                r"^(cat|dog)s?$",
                r"[^a-z]",
                r"^.{2,5}@[A-Z_]+\.(com|org)$",
                r"^\S+ \D$",
            )
        ),
        *(bounded(list[int], **bounds) for bounds in ({"min_length": 5}, {"max_length": 1}, {"max_length": 0})),
        bounded(set[int], min_length=4),
        *(frozenset[Mood], dict[date, int], dict[Mood, list[bool]], dict[Literal["a"], Rank], tuple[int, ...]),
        *(bytes, UUID, timedelta, datetime, Decimal, pydantic.HttpUrl, pydantic.IPvAnyAddress, pydantic.JsonValue),
        *(pydantic.SecretStr, pydantic.Json[str], list[Any], dict[str, Any], None, Pair, Sum, list[Part]),
    ],
    ids=str,
)
def test_a_sample_fits_the_type_its_schema_was_made_from(kind: Any) -> None:
    adapter = pydantic.TypeAdapter(kind)
    schema = adapter.json_schema()
    for number in range(60):
        made = sample(schema, lambda path, n=number: zlib.crc32(f"{n}{path}".encode()), name="value")
        adapter.validate_json(json.dumps(made))


A = {"$ref": "#/$defs/A"}
NODES = {f"N{i}": {"type": "array", "items": {"$ref": f"#/$defs/N{(i + 1) % 30}"}} for i in range(30)}


@pytest.mark.parametrize(
    "schema",
    [
        {**A, "$defs": {"A": A}},
        {**A, "$defs": {"A": {"allOf": [A, A]}}},
        {**A, "$defs": {"A": {"type": "array", "minItems": 3, "items": A}}},
        {**A, "$defs": {"A": {"properties": {"left": A, "right": A}, "required": ["left", "right"]}}},
        {"$ref": "#/$defs/N0", "$defs": NODES},
        {"type": "array", "minItems": 10**12},
        {"type": "array", "minItems": 10**12, "uniqueItems": True, "items": {"type": "boolean"}},
        {"type": "object", "minProperties": 10**12, "additionalProperties": True},
        {"type": "string", "minLength": 10**12},
        {"type": "string", "pattern": "((a{9999}){9999}){9999}"},
    ],
    ids=lambda schema: json.dumps(schema)[:60],
)
def test_an_endless_schema_or_a_huge_one_ends(schema: dict[str, Any]) -> None:
    assert len(json.dumps(sample(schema, len, name="value"))) < 2_000_000


# The limits that the module's docstring lists.


def test_an_xml_adapter_without_a_predict_cannot_tell_the_types_of_nested_fields() -> None:
    lm = offline_lm()
    with pytest.raises(AdapterParseError):
        strict_adapter("xml")(lm, {}, Nested, [], {"question": QUESTION})
    assert dspy.ChatAdapter()(lm, {}, Nested, [], {"question": QUESTION})


def test_the_nested_tags_of_the_xml_adapter_would_lose_leaf_types() -> None:
    signature = dspy.Signature("question -> args: dict[str, Any], parts: list[Literal[1, 2]]")
    adapter = dspy.XMLAdapter()
    parsed = adapter.parse(dspy.Signature("q -> args: dict[str, Any]"), "<args><days>3</days></args>")
    assert parsed == {"args": {"days": "3"}}
    with pytest.raises(AdapterParseError):
        adapter.parse(signature, "<args><days>3</days></args><parts><item>1</item></parts>")
    assert adapter.parse(signature, '<args>{"days": 3}</args><parts>[1]</parts>') == {
        "args": {"days": 3},
        "parts": [1],
    }


def test_the_xml_adapter_strips_a_text() -> None:
    scripted = [{"answer": "  two spaces  "}]
    assert ask(dspy.Predict("question -> answer"), "xml", lm=offline_lm(answers=scripted)).answer == "two spaces"


@pytest.mark.parametrize("adapter", ["chat", "xml"])
def test_an_enum_of_integers_cannot_be_answered_as_a_whole_field_outside_json(adapter: str) -> None:
    class Ranked(dspy.Signature):
        question: str = dspy.InputField()
        rank: Rank = dspy.OutputField()

    with pytest.raises(AdapterParseError):
        ask(dspy.Predict(Ranked), adapter)
    assert ask(dspy.Predict(Ranked), "json").rank in Rank


def test_an_enum_of_texts_that_look_like_integers_cannot_be_answered_in_json() -> None:
    class Grade(enum.Enum):
        ONE = "1"
        TWO = "2"

    graded = dspy.Signature(
        {"question": (str, dspy.InputField()), "grade": (Grade, dspy.OutputField())}, "Grade it."
    )
    with pytest.raises(AdapterParseError):
        ask(dspy.Predict(graded), "json")
    assert ask(dspy.Predict(graded), "chat").grade in Grade


# The same answer, another answer.

DETERMINISM = f"""
import dspy, sys, threading
from tests.kernel.offline.test_engines import Nested, ask, offline_lm
for adapter in {list(ADAPTERS)!r}:
    print(ask(dspy.Predict(Nested), adapter, lm=offline_lm("s")))
print("litellm" in sys.modules, threading.active_count())
"""


def test_two_processes_give_the_same_answer() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", DETERMINISM],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
            timeout=100,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    output = outputs.pop().decode()
    assert "offline" in output
    assert output.endswith("False 1\n")  # neither litellm nor a thread was needed


@in_each_adapter
def test_sync_async_and_repeated_requests_agree(adapter: str) -> None:
    lm = offline_lm()
    answers = [ask(dspy.Predict(Typed), adapter, way, lm=lm).toDict() for way in ("sync", "async", "sync")]
    assert answers[0] == answers[1] == answers[2]


@in_each_adapter
def test_another_session_gets_another_answer(adapter: str) -> None:
    answers = {
        ask(dspy.Predict("question -> answer"), adapter, lm=offline_lm(f"session_{i} offline/echo")).answer
        for i in range(5)
    }
    assert len(answers) == 5


def test_another_question_gets_another_answer() -> None:
    program = dspy.Predict("question -> number: int, answer")
    answers = {ask(program, question=f"question {i}").number for i in range(20)}
    assert len(answers) > 5


# Streams, tokens, latency.


async def listen(program: dspy.Module, field: str, question: str, *, way: str) -> tuple[list[str], dspy.Prediction]:
    listener = dspy.streaming.StreamListener(signature_field_name=field)
    streaming = dspy.streamify(program, stream_listeners=[listener], is_async_program=way == "async")
    items = [item async for item in streaming(question=question)]
    return [i.chunk for i in items if isinstance(i, dspy.streaming.StreamResponse)], items[-1]


@in_each_adapter
@in_both_ways
@pytest.mark.parametrize("question", [QUESTION, "Why not?", 'a [b] {c}, "d"', "é" * 80])
def test_a_stream_listener_receives_the_answer_in_pieces(adapter: str, way: str, question: str) -> None:
    program = dspy.ChainOfThought("question -> answer")
    with dspy.context(lm=offline_lm(), adapter=strict_adapter(adapter)):
        chunks, prediction = asyncio.run(listen(program, "answer", question, way=way))
    streamed = "".join(chunks).strip()
    assert len(chunks) > 2
    # DSPy's listener hands out JSON as it is written, quotes and escapes included.
    assert prediction.answer == (json.loads(streamed) if adapter == "json" else streamed)
    assert prediction.answer == ask(program, adapter, question=question).answer


@in_each_adapter
def test_a_field_that_is_not_the_last_is_streamed_too(adapter: str) -> None:
    program = dspy.Predict("question -> thought, answer")
    with dspy.context(lm=offline_lm(), adapter=strict_adapter(adapter)):
        chunks, prediction = asyncio.run(listen(program, "thought", QUESTION, way="async"))
    # Of JSON, DSPy's listener hands out the quotes around the value and what stands before the next name.
    expected = f'"{prediction.thought}", "' if adapter == "json" else prediction.thought
    assert "".join(chunks).strip() == expected


def request_of(user: str) -> Request:
    return Request(model="offline/echo", messages=(Message.user(user),), system="s" * 40)


def test_both_engines_stream_what_they_complete() -> None:
    sync, asynchronous = offline_engines(OfflineOptions(), "s")
    request = request_of(QUESTION)

    async def collect() -> list[Any]:
        return [event async for event in asynchronous.stream(request)]

    whole = sync.complete(request)
    for events in (list(sync.stream(request)), asyncio.run(collect())):
        texts = [event.delta.text for event in events if event.type == "delta"]
        assert "".join(texts) == whole.text
        assert len(texts) > 1
        assert [events[0].type, events[-1].type] == ["start", "end"]
        assert events[-1].usage == whole.usage


def test_tokens_are_counted_at_about_four_characters() -> None:
    engine, _ = offline_engines(OfflineOptions(answers=["a" * 41, ""]), "s")
    usage = engine.complete(request_of("u" * 60)).usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (25, 11, 36)
    assert engine.complete(request_of("u")).usage.output_tokens == 1


def test_latency_lets_other_tasks_run() -> None:
    _, engine = offline_engines(OfflineOptions(latency_s=0.01), "s")
    done: list[str] = []

    async def ask_slowly() -> None:
        await engine.complete(request_of("u"))
        done.append("answer")

    async def other() -> None:
        done.append("other")

    async def both() -> None:
        await asyncio.gather(ask_slowly(), other())

    asyncio.run(both())
    assert done == ["other", "answer"]


@in_both_ways
def test_latency_is_waited_for(way: str) -> None:
    start = time.monotonic()
    ask(dspy.Predict("question -> answer"), way=way, lm=offline_lm(latency_s=0.05))
    assert time.monotonic() - start >= 0.05


# Scripted answers and failures.


@in_each_adapter
def test_scripted_fields_come_first_and_in_the_form_that_is_asked_for(adapter: str) -> None:
    answers = [
        {"answer": "forty & <two>", "tags": ["a", "b"], "day": "2020-02-02", "maybe": None},
        {"answer": "next"},
    ]
    program = dspy.Predict("question -> answer, tags: list[str], maybe: str | None")
    lm = offline_lm(answers=answers)
    first, second, third = (ask(program, adapter, lm=lm) for _ in range(3))
    assert (first.answer, first.tags, first.maybe) == ("forty & <two>", ["a", "b"], None)
    assert second.answer == "next"
    assert "offline" in second.tags[0]
    assert third.answer.startswith("[offline] answer")
    assert len(lm.history) == 3


@in_each_adapter
def test_a_scripted_tool_call_is_made(adapter: str) -> None:
    script = [{"next_tool_name": "moon", "next_tool_args": {"phase": "wild"}}]
    react = dspy.ReAct("question -> answer", tools=[weather, moon])
    trajectory = ask(react, adapter, lm=offline_lm(answers=script)).trajectory
    assert trajectory["observation_0"] == "wild"
    assert trajectory["tool_name_1"] == "finish"


def test_scripted_text_goes_out_as_it_is() -> None:
    lm = offline_lm(answers=["junk", {"a": 1}])
    with pytest.raises(AdapterParseError, match="junk"):
        ask(dspy.Predict("question -> answer, other"), lm=lm)
    assert [json.loads(reply) for reply in lm("plain prompt")] == [{"a": 1}]


def test_both_engines_share_the_script() -> None:
    sync, asynchronous = offline_engines(OfflineOptions(answers=["first", "second", "third"]), "s")
    request = request_of("u")
    texts = [
        sync.complete(request).text,
        asyncio.run(asynchronous.complete(request)).text,
        sync.complete(request).text,
    ]
    assert texts == ["first", "second", "third"]


def test_each_scripted_answer_goes_out_once_whatever_the_threads() -> None:
    engine, _ = offline_engines(OfflineOptions(answers=[str(i) for i in range(400)]), "s")
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda _: engine.complete(request_of("u")).text, range(400)))
    assert sorted(map(int, texts)) == list(range(400))


def test_copies_of_a_program_go_on_with_the_same_script() -> None:
    lm = offline_lm(answers=[{"answer": "first"}, {"answer": "second"}])
    program = dspy.Predict("question -> answer")
    program.lm = lm
    assert program(question=QUESTION).answer == "first"
    copied = program.deepcopy()
    copied.lm = copied.lm.copy(temperature=1.0)
    assert copied(question=QUESTION).answer == "second"


PUBLIC_ERRORS = {public.default_code: public for _, public in ERROR_MAPPING}


@in_both_ways
@pytest.mark.parametrize("code", [*PUBLIC_ERRORS, "unexpected"])
def test_a_failure_is_raised_as_the_error_of_that_code(code: str, way: str) -> None:
    lm = offline_lm(failures=[None, code], answers=[{"answer": "first"}, {"answer": "after the failure"}])
    program = dspy.Predict("question -> answer")
    assert ask(program, way=way, lm=lm).answer == "first"
    with pytest.raises(LMError, match="offline failure") as raised:
        ask(program, way=way, lm=lm)
    assert raised.value.code == code
    assert ask(program, way=way, lm=lm).answer == "after the failure"


def test_a_failure_ends_a_stream_before_its_first_event() -> None:
    sync, _ = offline_engines(OfflineOptions(failures=["server"]), "s")
    with pytest.raises(Exception, match="offline failure 'server' of request 1"):
        next(iter(sync.stream(request_of("u"))))


def test_retries_count_as_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("dspy.clients.execution.time.sleep", waits.append)
    sync, asynchronous = offline_engines(OfflineOptions(failures=["rate_limit", "server"]), "s")
    lm = dspy.LM("offline/echo", engine=sync, async_engine=asynchronous, cache=False, num_retries=2)
    assert "offline" in ask(dspy.Predict("question -> answer"), lm=lm).answer
    assert len(waits) == 2


def test_transient_failures_are_retryable() -> None:
    with pytest.raises(LMError) as raised:
        ask(dspy.Predict("question -> answer"), lm=offline_lm(failures=["rate_limit"]))
    assert is_retryable_lm_error(raised.value)
    assert raised.value.status == 429


def test_an_unknown_failure_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidLMProfile, match=r"'rate-limit' is not an error code.*rate_limit"):
        offline_engines(OfflineOptions(failures=[None, "rate-limit"]), "s")


@pytest.mark.parametrize("which", [0, 1])
def test_an_engine_is_saved_and_loaded(which: int) -> None:
    engine = offline_engines(OfflineOptions(answers=["scripted"]), "s")[which]
    loaded = type(engine).load_state(json.loads(json.dumps(engine.dump_state())))
    assert isinstance(loaded, (OfflineEngine, AsyncOfflineEngine))
    assert loaded.dump_state() == engine.dump_state()
