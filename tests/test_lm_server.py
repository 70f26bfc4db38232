"""The LM server is a provider to the real ``dspy.LM``: its answers, its faults and what it records."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from typing import Any, Literal

import dspy
import pydantic
import pytest
from dspy.utils.exceptions import AdapterParseError, LMAuthError, LMRateLimitError, LMServerError, LMTransportError

from tests.lm_server import (
    Answer,
    Disconnect,
    EchoKeyInError,
    Hang,
    Hold,
    Junk,
    LMServer,
    NotJSON,
    Sequence,
    Slow,
    Status,
    canary,
)
from tests.waiting import wait_until

KEY = "sk-of-alice"
ADAPTERS = {"chat": dspy.ChatAdapter, "json": dspy.JSONAdapter}


@pytest.fixture(autouse=True)
def _keeps_answers_in_memory() -> None:
    """DSPy's disk cache opens databases in every thread and closes none."""
    dspy.configure_cache(enable_disk_cache=False)


def lm_of(server: LMServer, api_key: str = KEY, **kwargs: Any) -> dspy.LM:
    options = {"cache": False, "num_retries": 0} | kwargs
    return dspy.LM("openai/canary-model", api_base=server.api_base, api_key=api_key, **options)


def ask(server: LMServer, question: str = "Why is the sky blue?", **kwargs: Any) -> dspy.Prediction:
    lm = lm_of(server, **kwargs)
    try:
        with dspy.context(lm=lm, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
            return dspy.Predict("question -> answer")(question=question)
    finally:
        lm.close()


class Place(pydantic.BaseModel):
    name: str
    population: int = pydantic.Field(ge=10, le=20)
    kind: Literal["city", "village"]
    parts: list[Place] = []


class Typed(dspy.Signature):
    """Answer in types."""

    question: str = dspy.InputField()
    count: int = dspy.OutputField()
    share: float = dspy.OutputField()
    true: bool = dspy.OutputField()
    words: list[str] = dspy.OutputField()
    mood: Literal["glad", "sad"] = dspy.OutputField()
    place: Place = dspy.OutputField()
    table: dict[str, int] = dspy.OutputField()
    note: str | None = dspy.OutputField()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("module", [dspy.Predict, dspy.ChainOfThought])
def test_every_text_field_carries_the_canary_and_the_question(lm_server, adapter, module):
    lm = lm_of(lm_server)
    question = "Why-is-the-sky-blue-and-not-green-and-never-red?"
    with dspy.context(lm=lm, adapter=ADAPTERS[adapter]()):
        prediction = module("question -> answer, reason")(question=question)
    lm.close()
    for text in prediction.toDict().values():
        assert canary(KEY) in text
        assert question[:40] in text
        assert question[:41] not in text


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_typed_fields_are_answered_in_their_types(lm_server, adapter):
    lm = lm_of(lm_server)
    with dspy.context(lm=lm, adapter=ADAPTERS[adapter]()):
        prediction = dspy.Predict(Typed)(question="How many?")
    lm.close()
    assert len(lm_server.requests) == 1, "a second request is DSPy's fallback: the first answer was not parsed"
    assert isinstance(prediction.count, int)
    assert isinstance(prediction.share, float)
    assert isinstance(prediction.true, bool)
    assert prediction.mood in ("glad", "sad")
    assert 10 <= prediction.place.population <= 20
    assert canary(KEY) in prediction.place.name
    assert all(canary(KEY) in word for word in prediction.words)
    assert prediction.table


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_react_calls_its_tool_once_and_finishes(lm_server, adapter):
    cities = []

    def weather(city: str, days: int) -> str:
        """Tell the weather."""
        cities.append((city, days))
        return "rain"

    lm = lm_of(lm_server)
    with dspy.context(lm=lm, adapter=ADAPTERS[adapter]()):
        prediction = dspy.ReAct("question -> answer", tools=[weather])(question="Rain in Ulm?")
    lm.close()
    assert [prediction.trajectory[f"tool_name_{i}"] for i in range(2)] == ["weather", "finish"]
    assert len(cities) == 1
    assert canary(KEY) in cities[0][0]
    assert isinstance(cities[0][1], int)
    assert canary(KEY) in prediction.answer


def test_async_calls_are_answered(lm_server):
    async def main() -> dspy.Prediction:
        lm = lm_of(lm_server)
        try:
            with dspy.context(lm=lm):
                return await dspy.Predict("question -> answer").acall(question="Why?")
        finally:
            await lm.aclose()

    assert canary(KEY) in asyncio.run(main()).answer


def test_streamed_tokens_join_to_the_answer(lm_server):
    async def main() -> tuple[list[str], dspy.Prediction]:
        lm = lm_of(lm_server)
        tokens: list[str] = []
        with dspy.context(lm=lm):
            program = dspy.Predict("question -> answer")
            listener = dspy.streaming.StreamListener(signature_field_name="answer")
            stream = dspy.streamify(program, stream_listeners=[listener], is_async_program=True)
            async for part in stream(question="Why is the sky blue?"):
                if isinstance(part, dspy.streaming.StreamResponse):
                    tokens.append(part.chunk)
                elif isinstance(part, dspy.Prediction):
                    prediction = part
        await lm.aclose()
        return tokens, prediction

    tokens, prediction = asyncio.run(main())
    assert len(tokens) > 1
    assert "".join(tokens) == prediction.answer
    assert lm_server.requests[0].body["stream"] is True


def test_equal_questions_get_equal_answers_and_usage(lm_server):
    usages = []
    for _ in range(2):
        lm = lm_of(lm_server)
        with dspy.context(lm=lm, track_usage=True):
            usages.append(dspy.Predict("question -> answer")(question="Why?").get_lm_usage())
        lm.close()
    assert usages[0] == usages[1]
    (usage,) = usages[0].values()
    assert usage["prompt_tokens"] > 0
    assert usage["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (Status(503), LMServerError),
        (Status(429, retry_after=7), LMRateLimitError),
        (EchoKeyInError(), LMAuthError),
        (Disconnect(), LMTransportError),
        (Hang(), LMTransportError),
        (Junk("no field at all"), AdapterParseError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_each_fault_reaches_dspy_as_its_error(lm_server, behaviour, error):
    lm_server.behaviour = behaviour
    with pytest.raises(error) as caught:
        ask(lm_server, timeout=0.3)
    has_left = lm_server.requests[0].disconnected_at is not None
    if isinstance(behaviour, Hang):
        lm_server.wait_for_disconnect(1)
    else:
        assert not has_left, "the server was done first"
    if isinstance(behaviour, Status):
        assert caught.value.retry_after == behaviour.retry_after


def test_an_answer_that_is_no_json_is_a_providers_error(lm_server):
    lm_server.behaviour = NotJSON()
    with pytest.raises(dspy.utils.exceptions.LMProviderError):
        ask(lm_server)


def test_the_401_repeats_the_key_in_clear(lm_server):
    lm_server.behaviour = EchoKeyInError()
    status, body = post(lm_server, KEY)
    assert status == 401
    assert KEY in body["error"]["message"]


def test_a_sequence_is_used_up_in_order_and_its_last_stays(lm_server):
    lm_server.behaviour = Sequence([Status(503), Status(429), Answer()])
    assert [post(lm_server, KEY)[0] for _ in range(4)] == [503, 429, 200, 200]


def test_a_behaviour_may_belong_to_one_key_or_to_some_requests(lm_server):
    lm_server.behave(Status(429), api_key="sk-of-bob")
    lm_server.behave(Status(503), when=lambda request: "fail" in request.prompt)
    assert post(lm_server, KEY)[0] == 200
    assert post(lm_server, "sk-of-bob")[0] == 429
    assert post(lm_server, KEY, "please fail")[0] == 503


def test_given_fields_replace_the_sampled_ones(lm_server):
    lm_server.behaviour = Answer({"answer": "42", "not_asked_for": 1})
    assert ask(lm_server).answer == "42"


def test_a_slow_answer_comes_after_its_time(lm_server):
    lm_server.behaviour = Slow(0.2)
    started = time.monotonic()
    assert canary(KEY) in ask(lm_server).answer
    assert time.monotonic() - started >= 0.2


def test_a_record_tells_who_asked_what_and_when(lm_server):
    before = time.monotonic()
    ask(lm_server, "Why?")
    request = lm_server.wait_for_request(1, deadline=1)
    assert request.api_key == KEY
    assert request.body["model"] == "canary-model"
    assert "Why?" in request.prompt
    assert "content-type" in request.headers
    assert request.peer_port > 0
    assert request.disconnected_at is None
    assert before < request.arrived_at <= request.answered_at < time.monotonic()


def test_a_request_without_a_key_is_refused(lm_server):
    assert post(lm_server, "")[0] == 401


def test_waiting_for_a_request_that_never_comes_says_how_many_came(lm_server):
    with pytest.raises(AssertionError, match="request 1; 0 came"):
        lm_server.wait_for_request(1, deadline=0.05)


@pytest.mark.parametrize("behaviour", [Hang(), Hang(after_events=2)], ids=["silent", "in mid-stream"])
def test_a_cancelled_call_is_recorded_as_a_disconnect(lm_server, behaviour):
    lm_server.behaviour = behaviour

    async def main() -> None:
        lm = lm_of(lm_server)
        with dspy.context(lm=lm):
            program = dspy.Predict("question -> answer")
            call = asyncio.ensure_future(program.acall(question="Why?"))
            await wait_until(lambda: lm_server.requests, what="the request")
            cancelled_at = time.monotonic()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await wait_until(lambda: lm_server.requests[0].disconnected_at, what="the disconnect")
        await lm.aclose()
        assert lm_server.requests[0].disconnected_at - cancelled_at < 0.5

    asyncio.run(main())
    assert lm_server.wait_for_disconnect(1, deadline=0.1).answered_at is None


def test_five_hundred_clients_are_served_at_once(lm_server):
    lm_server.behaviour = hold = Hold()

    async def one(number: int) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", lm_server.port)
        writer.write(raw_request(f"sk-{number}"))
        answer = (await reader.read(65536)).decode()
        writer.close()
        await writer.wait_closed()
        return answer

    async def main() -> list[str]:
        calls = [asyncio.ensure_future(one(number)) for number in range(500)]
        await wait_until(lambda: len(lm_server.requests) == 500, what="500 requests at once", deadline=30)
        hold.release()
        return await asyncio.gather(*calls)

    answers = asyncio.run(main())
    assert all(canary(f"sk-{number}") in answer for number, answer in enumerate(answers))


def test_a_connection_is_kept_for_the_next_request(lm_server):
    lm = lm_of(lm_server)
    with dspy.context(lm=lm):
        for number in range(5):
            dspy.Predict("question -> answer")(question=f"Question {number}?")
    lm.close()
    assert len({request.peer_port for request in lm_server.requests}) == 1


@pytest.mark.parametrize("time", ["first", "second"])
def test_a_remembered_answer_needs_no_request_and_is_forgotten_after_the_test(lm_server, time):
    assert ask(lm_server, cache=True).answer == ask(lm_server, cache=True).answer
    assert len(lm_server.requests) == 1, time


def test_the_model_is_listed(lm_server):
    connection = http.client.HTTPConnection("127.0.0.1", lm_server.port)
    connection.request("GET", "/v1/models")
    assert json.load(connection.getresponse())["data"][0]["id"] == "canary-model"
    connection.close()


def test_closing_drops_hanging_clients_and_ends_the_thread():
    with LMServer() as server:
        server.behaviour = Hang()
        errors: list[Exception] = []

        def call() -> None:
            try:
                ask(server)
            except LMTransportError as error:
                errors.append(error)

        caller = threading.Thread(target=call)
        caller.start()
        server.wait_for_request(1)
    caller.join(timeout=5)
    assert len(errors) == 1
    assert not any(thread.name == f"lm-server-{server.port}" for thread in threading.enumerate())
    with pytest.raises(ConnectionRefusedError):
        post(server, KEY)


def raw_body(text: str) -> bytes:
    return json.dumps({"model": "canary-model", "messages": [{"role": "user", "content": text}]}).encode()


def raw_request(api_key: str) -> bytes:
    body = raw_body("Why?")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api_key}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def post(server: LMServer, api_key: str, text: str = "Why?") -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        connection.request("POST", "/v1/chat/completions", raw_body(text), headers)
        response = connection.getresponse()
        return response.status, json.load(response)
    finally:
        connection.close()
