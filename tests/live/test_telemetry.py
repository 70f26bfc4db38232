"""Spans, log lines and figures across a service and its real kernels."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from traitlets.config import Config

from dspex_kernels import SessionService, errors
from dspex_kernels.sessions.happenings import CallEnded
from tests.live.kernels import LiveKernel
from tests.live.test_service import run_cell
from tests.waiting import wait_until

TRACE_TO = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
spans = open({path!r}, "a")
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(
    ConsoleSpanExporter(out=spans, formatter=lambda span: span.to_json(indent=None) + "\\n")
))
trace.set_tracer_provider(provider)
"""
WIDE = """
import logging

class Wide(dspy.Module):
    def __init__(self):
        super().__init__()
        self.signature = dspy.Signature("question -> answer")

    def forward(self, question):
        def one(question):
            logging.getLogger("a_tool").warning("within")
            return dspy.Prediction(answer=question)
        dspy.Parallel(num_threads=2, disable_progress_bar=True)([(one, {"question": str(n)}) for n in range(2)])
        return dspy.Prediction(answer="done")

wide = Wide()
logging.getLogger("a_tool").warning("outside")
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., SessionService]:
    def make(**traits: Any) -> SessionService:
        url = f"sqlite:///{tmp_path / 'store.sqlite'}"
        few = Config({"KernelPool": {"size": 1}})
        return SessionService(data_dir=str(tmp_path), store_url=url, config=few, **traits)

    return make


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(100):
            await work

    asyncio.run(bounded())


def test_one_trace_goes_from_the_caller_through_a_kernel_to_the_lm(make, tmp_path, monkeypatch):
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    path = tmp_path / "spans"

    def by_the_kernel() -> dict[str, Any]:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return {span["name"]: span for span in found}

    async def work() -> None:
        async with make() as service, service.session(lm="offline/echo") as session:
            await session.create_program("qa", "question -> answer")
            await run_cell(await service.get_connection_file(session.session_id), TRACE_TO.format(path=str(path)))
            with trace.get_tracer("an application").start_as_current_span("GET /"):
                await session.program("qa").acall(question="what alice asked")
            await wait_until(lambda: len(by_the_kernel()) == 2, what="the kernel's spans")

    run(work())
    ours = {span.name: span for span in exporter.get_finished_spans()}
    theirs = by_the_kernel()
    assert ours["dspex.call"].parent.span_id == ours["GET /"].context.span_id
    assert int(theirs["dspex.command"]["parent_id"], 16) == ours["dspex.call"].context.span_id
    assert theirs["dspex.lm_request"]["parent_id"] == theirs["dspex.command"]["context"]["span_id"]
    assert theirs["dspex.lm_request"]["attributes"]["gen_ai.usage.output_tokens"] > 0
    assert "alice" not in path.read_text()
    provider.shutdown()


def test_lines_from_dspys_threads_name_their_call_and_a_cells_do_not():
    with LiveKernel() as kernel:
        kernel.result("configure", {"lm": "offline/echo"})
        kernel.run(WIDE)
        kernel.run("%dspex add wide")
        kernel.result("execute_program", {"id": "wide", "inputs": {"question": "?"}}, request_id="mine")
        whose = kernel.ask("ping", control=True)
        kernel.pump()
        printed = "".join(m["content"]["text"] for m in kernel.iopub if m["header"]["msg_type"] == "stream")
    told = f"[session={whose['session_id']} request=mine kernel={whose['kernel_id']}]"
    assert sorted(line for line in printed.splitlines() if line) == ["outside", *[f"within {told}"] * 2]


@pytest.mark.parametrize("backend", ["dedicated", "pooled"])
def test_figures_and_happenings_follow_a_sessions_life(make, backend):
    ended: list[CallEnded] = []

    async def work() -> None:
        async with make() as service:

            async def agrees() -> None:
                scanned = Counter((info.backend, str(info.status)) for info in await service.list_sessions())
                counted = service.figures.sessions()
                flat = Counter({(b, s): n for b, counts in counted.items() for s, n in counts.items() if n})
                assert flat == scanned

            service.listeners.add(
                lambda happening: ended.append(happening) if isinstance(happening, CallEnded) else None
            )
            sessions = [await service.create_session(backend=backend) for _ in range(2)]
            await agrees()
            await sessions[0].create_program("qa", "question -> answer")
            with pytest.raises(errors.ProgramNotFound):
                await sessions[0].get_program("none")
            await sessions[1].destroy()
            await agrees()
            target = {"dedicated": "pooled", "pooled": "dedicated"}[backend]
            await service.migrate_session(sessions[0].session_id, backend=target)
            await agrees()
            await sessions[0].list_programs()
            await agrees()

    run(work())
    assert [(call.command, call.outcome, call.backend) for call in ended] == [
        ("create_program", "ok", backend),
        ("get_program", "program_not_found", backend),
        ("list_programs", "ok", {"dedicated": "pooled", "pooled": "dedicated"}[backend]),
    ]
    assert all(call.kernel_id and call.request_id for call in ended)
