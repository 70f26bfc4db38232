"""Spans: one trace from the caller to the provider, without what people asked; nothing where nobody traces."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dspex_kernels import errors, tracing
from dspex_kernels.protocol.messages import parse_request

SECRET = "what alice asked"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], dict[str, ReadableSpan]]]:
    """The ended spans by name, of a tracer provider that this test alone has."""
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)  # the real one is set once for a process
    monkeypatch.delenv(tracing.ENV_TRACE_CONTENT, raising=False)
    yield lambda: {span.name: span for span in exporter.get_finished_spans()}
    provider.shutdown()


def in_another_process(work: Callable[[], Any]) -> Any:
    """Run where no context of ours is known."""
    return contextvars.Context().run(work)


def the_call(**more: Any) -> tracing.Span:
    told = {"session_id": "s", "backend": "pooled", "request_id": "r", **more}
    return tracing.of_call("execute_program", **told)


def the_command(traceparent: str | None) -> tracing.Span:
    return tracing.of_command(
        "execute_program", session_id="s", kernel_id="k", request_id="r", traceparent=traceparent
    )


def test_one_trace_goes_from_the_caller_through_the_request_to_the_provider(spans):
    def kernel(traceparent: str | None) -> None:
        request = parse_request({"command": "ping", "traceparent": traceparent})
        with the_command(request.traceparent), tracing.of_lm_request("openai/m", provider="openai", attempt=1):
            pass

    with trace.get_tracer("an application").start_as_current_span("GET /"), the_call() as call:
        traceparent = tracing.traceparent()
        in_another_process(lambda: kernel(traceparent))
        call.tell("dspex.queue_wait_s", 0.25)
        call.tell("dspex.kernel_id", None)
    done = spans()
    chain = ["GET /", "dspex.call", "dspex.command", "dspex.lm_request"]
    for above, below in itertools.pairwise(chain):
        assert done[below].parent.span_id == done[above].context.span_id, below
    assert len({span.context.trace_id for span in done.values()}) == 1
    assert dict(done["dspex.call"].attributes) == {
        "dspex.command": "execute_program",
        "dspex.session_id": "s",
        "dspex.backend": "pooled",
        "dspex.request_id": "r",
        "dspex.queue_wait_s": 0.25,
        "dspex.outcome": "ok",
    }
    assert dict(done["dspex.lm_request"].attributes) == {
        "gen_ai.request.model": "openai/m",
        "gen_ai.provider.name": "openai",
        "dspex.attempt": 1,
        "dspex.outcome": "ok",
    }
    assert done["dspex.command"].attributes["dspex.kernel_id"] == "k"


@pytest.mark.parametrize("traceparent", [None, "", "no traceparent", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_request_that_continues_no_span_begins_a_trace(spans, traceparent):
    with the_command(traceparent):
        pass
    assert spans()["dspex.command"].parent is None


def test_outside_any_span_a_request_carries_none(spans):
    assert tracing.traceparent() is None


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (errors.ProviderFailure(SECRET, code="rate_limit"), "rate_limit"),
        (errors.CallStopped(errors.BudgetExceeded(SECRET)), "budget_exceeded"),
        (ValueError(SECRET), "ValueError"),
        (asyncio.CancelledError(SECRET), "cancelled"),
    ],
)
def test_a_failure_is_told_by_its_code_and_never_by_its_text(spans, failure, outcome):
    with pytest.raises(type(failure)), the_call():
        raise failure
    span = spans()["dspex.call"]
    assert span.attributes["dspex.outcome"] == span.attributes["error.type"] == outcome
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.events == ()
    assert SECRET not in span.to_json()


def test_an_outcome_that_was_told_stands(spans):
    def work() -> None:
        with the_call() as span:
            span.tell_outcome("internal_error")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert spans()["dspex.call"].attributes["dspex.outcome"] == "internal_error"


@pytest.mark.parametrize(
    ("value", "wanted"), [(None, False), ("0", False), ("", False), ("1", True), ("true", True)]
)
def test_content_is_made_and_noted_only_where_it_is_wanted(spans, monkeypatch, value, wanted):
    if value is not None:
        monkeypatch.setenv(tracing.ENV_TRACE_CONTENT, value)
    made: list[str] = []

    def make() -> str:
        made.append(SECRET)
        return SECRET + "x" * tracing.MAX_CONTENT

    with the_command(None) as span:
        span.tell_content("dspex.inputs", make)
    shown = spans()["dspex.command"].attributes.get("dspex.inputs", "")
    assert (len(made), len(shown)) == ((1, tracing.MAX_CONTENT) if wanted else (0, 0))


def test_in_dspys_threads_an_lm_request_finds_its_command(spans):
    def thread(call: tracing.Span) -> None:
        with tracing.of_lm_request("m", provider=None, attempt=2, call=call):
            pass

    with the_command(None) as command:
        in_another_process(lambda: thread(command))
    done = spans()
    assert done["dspex.lm_request"].parent.span_id == done["dspex.command"].context.span_id


def test_an_lm_request_belongs_to_the_module_that_somebody_traces(spans):
    with (
        the_command(None) as command,
        trace.get_tracer("mlflow").start_as_current_span("Predict"),
        tracing.of_lm_request("m", provider=None, attempt=1, call=command),
    ):
        pass
    done = spans()
    assert done["dspex.lm_request"].parent.span_id == done["Predict"].context.span_id


def test_an_lm_request_in_a_generator_leaves_its_readers_span_alone(spans):
    async def stream() -> Any:
        with tracing.of_lm_request("m", provider=None, attempt=1) as span:
            for token in range(3):
                yield token
            span.tell("gen_ai.usage.output_tokens", 3)

    async def work() -> None:
        with the_call():
            reading = stream()
            before = trace.get_current_span()
            await anext(reading)
            assert trace.get_current_span() is before
            await asyncio.create_task(reading.aclose())  # from another context

    asyncio.run(work())
    done = spans()
    assert done["dspex.lm_request"].attributes["dspex.outcome"] == "cancelled"
    assert done["dspex.lm_request"].parent.span_id == done["dspex.call"].context.span_id


def test_calls_side_by_side_have_spans_of_their_own(spans):
    seen: dict[str, str | None] = {}

    async def call(name: str, turn: asyncio.Barrier) -> None:
        with the_call(session_id=name):
            await turn.wait()
            seen[name] = tracing.traceparent()

    async def work() -> None:
        turn = asyncio.Barrier(3)
        await asyncio.gather(*(call(name, turn) for name in "abc"))

    asyncio.run(work())
    assert len(set(seen.values())) == 3
    assert tracing.traceparent() is None


def test_a_task_that_outlives_its_call_does_not_go_on_with_its_trace(spans):
    seen: list[str | None] = []

    async def work() -> None:
        began, over = asyncio.Event(), asyncio.Event()

        async def lives_on() -> None:
            seen.append(tracing.traceparent())
            began.set()
            await over.wait()
            seen.append(tracing.traceparent())

        with the_call():
            task = asyncio.create_task(lives_on())
            await began.wait()
        over.set()
        await task

    asyncio.run(work())
    during, after = seen
    assert during is not None
    assert after is None


NOBODY_TRACES = """
import sys
if {hidden}:
    sys.modules["opentelemetry"] = None
from dspex_kernels import tracing
with tracing.of_call("ping", session_id="s", backend="pooled", request_id=None) as call:
    call.tell("a", 1)
    call.tell_content("b", lambda: 1 / 0)
    with tracing.of_command("ping", session_id="s", kernel_id="k", request_id=None, traceparent="00-a") as command:
        with tracing.of_lm_request("m", provider="p", attempt=1, call=command) as request:
            assert request is command is call is tracing.NO_SPAN
    assert tracing.traceparent() is None
    call.tell_outcome("ok")
assert not [name for name in sys.modules if name.startswith("opentelemetry.")]
print("well")
"""


@pytest.mark.parametrize("hidden", [True, False])
def test_where_nobody_uses_opentelemetry_nothing_is_loaded_and_nothing_told(hidden):
    code = NOBODY_TRACES.format(hidden=hidden)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr


def test_with_the_api_alone_calls_go_on_and_a_foreign_span_is_passed_on():
    code = """
from opentelemetry import trace
from dspex_kernels import tracing
above = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
with tracing.of_command("ping", session_id="s", kernel_id="k", request_id=None, traceparent=above) as command:
    command.tell("a", 1)
    print(tracing.traceparent() == above)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
