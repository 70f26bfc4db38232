"""Spans of calls, commands and LM requests, where the process uses OpenTelemetry.

A call's span (``dspex.call``) is the service's; its ``traceparent`` travels in the request, and the kernel's span
of the command (``dspex.command``) continues it; each attempt at a provider is a span below that
(``dspex.lm_request``). A caller that has a span open is above them all.

Where the spans go is the process's own affair: whoever sets a tracer provider (``opentelemetry-instrument``, a line
of an application, a cell of a notebook) has imported OpenTelemetry for it. Until somebody has, there are no spans,
nothing of it is loaded, and all this costs a look into ``sys.modules``. A kernel inherits its service's variables,
and so an agent that they name; nothing else is told to it.

What people ask and what is answered is not in the spans, unless ``DSPEX_TRACE_CONTENT`` says so.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType, TracebackType
from typing import Any, Self

from dspex_kernels.errors import CallStopped, CommandCancelled, DSPexError

ENV_TRACE_CONTENT = "DSPEX_TRACE_CONTENT"
"""``1`` has spans hold prompts, inputs and outputs."""

MAX_CONTENT = 8192
"""Characters of one content in a span; the rest is cut."""

_API_MODULE = "opentelemetry.trace"

log = logging.getLogger(__name__)  # not of ``logs``, which stands in the same layer


class Span:
    """A span that nobody records: what it is told is dropped. Ended by leaving the ``with`` block, and only so."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def tell(self, name: str, value: str | int | float | bool | None) -> None:
        """Note a fact; None is not noted. Never what people asked or were answered."""

    def tell_content(self, name: str, make: Callable[[], str]) -> None:
        """Note what people asked or were answered, if that is wanted.

        Args:
            name: The attribute's name.
            make: Makes its text, without secrets; called only if it is wanted.
        """

    def tell_outcome(self, outcome: str) -> None:
        """Note how it ended: "ok", or an error's code. Without it, the exception that leaves the block says it."""


NO_SPAN = Span()
"""Stands where nothing is recorded."""


def of_call(command: str, *, session_id: str, backend: str, request_id: str | None) -> Span:
    """The span of a call at the service, ``dspex.call``; open it before anything of the call is done.

    Args:
        command: Which command.
        session_id: Of which session.
        backend: Where it lives.
        request_id: The call's name; None is none.
    """
    trace = _api()
    if trace is None:
        return NO_SPAN
    told = {"command": command, "session_id": session_id, "backend": backend, "request_id": request_id}
    facts = {f"dspex.{name}": told[name] for name in told}
    return _recorded(lambda: _Recorded(trace, "dspex.call", trace.SpanKind.CLIENT, facts))


def of_command(
    command: str, *, session_id: str, kernel_id: str, request_id: str | None, traceparent: str | None
) -> Span:
    """The span of a command in a kernel, ``dspex.command``.

    Args:
        command: Which command.
        session_id: Of which session.
        kernel_id: In which kernel.
        request_id: The call's name.
        traceparent: The request's, which it continues; None, or one that cannot be read, continues none.
    """
    trace = _api()
    if trace is None:
        return NO_SPAN
    told = {"command": command, "session_id": session_id, "kernel_id": kernel_id, "request_id": request_id}
    facts = {f"dspex.{name}": told[name] for name in told}

    def record() -> _Recorded:
        above = _propagator().extract({"traceparent": traceparent}) if traceparent else None
        return _Recorded(trace, "dspex.command", trace.SpanKind.SERVER, facts, above=above)

    return _recorded(record)


def of_lm_request(model: str, *, provider: str | None, attempt: int, call: Span = NO_SPAN) -> Span:
    """The span of one attempt at a provider, ``dspex.lm_request``, under OpenTelemetry's names for such.

    It is not the current span of the code in its block: that may be a generator, which its reader's context runs.

    Args:
        model: The model string.
        provider: The provider's name; None is not known.
        attempt: 1 is the first.
        call: The command's span: DSPy's own threads do not get the context that has it.
    """
    trace = _api()
    if trace is None:
        return NO_SPAN
    facts = {"gen_ai.request.model": model, "gen_ai.provider.name": provider, "dspex.attempt": attempt}

    def record() -> _Recorded:
        above = None
        if isinstance(call, _Recorded) and not trace.get_current_span().get_span_context().is_valid:
            above = trace.set_span_in_context(call.span)
        return _Recorded(trace, "dspex.lm_request", trace.SpanKind.CLIENT, facts, above=above, current=False)

    return _recorded(record)


def traceparent() -> str | None:
    """The current span as a request carries it (W3C Trace Context); None where there is none.

    A span that has ended is none: it is still the current one of a task that outlived it.
    """
    trace = _api()
    if trace is None:
        return None
    span = trace.get_current_span()
    if not (span.is_recording() or isinstance(span, trace.NonRecordingSpan)):
        return None
    carrier: dict[str, str] = {}
    _propagator().inject(carrier)
    return carrier.get("traceparent")


class _Recorded(Span):
    """A span of OpenTelemetry.

    Args:
        trace: OpenTelemetry's interface.
        name: The span's name.
        kind: Its ``SpanKind``.
        facts: Its first attributes; None among them is not noted.
        above: The context that holds its parent; None is the current one.
        current: Whether it is the current span of the code in its block.
    """

    __slots__ = ("_current", "_open", "_outcome", "_trace", "span")

    def __init__(
        self,
        trace: ModuleType,
        name: str,
        kind: Any,
        facts: dict[str, Any],
        *,
        above: Any = None,
        current: bool = True,
    ) -> None:
        known = {fact: value for fact, value in facts.items() if value is not None}
        self.span = trace.get_tracer("dspex_kernels").start_span(name, context=above, kind=kind, attributes=known)
        self._trace = trace
        self._current = current
        self._open: AbstractContextManager[Any] | None = None
        self._outcome = ""

    def __enter__(self) -> Self:
        if self._current:
            # Without exceptions: their texts hold what people asked.
            self._open = self._trace.use_span(
                self.span, end_on_exit=False, record_exception=False, set_status_on_exception=False
            )
            self._open.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._outcome:
            self.tell_outcome("ok" if failure is None else _name_of(failure))
        if self._open is not None:
            self._open.__exit__(None, None, None)
        try:
            self.span.end()
        except Exception:  # the process's own span processor: it must not cost an answer
            log.warning("a span did not end", exc_info=True)

    def tell(self, name: str, value: str | int | float | bool | None) -> None:
        if value is not None:
            self.span.set_attribute(name, value)

    def tell_content(self, name: str, make: Callable[[], str]) -> None:
        if self.span.is_recording() and os.environ.get(ENV_TRACE_CONTENT, "").lower() in ("1", "true", "yes"):
            self.span.set_attribute(name, make()[:MAX_CONTENT])

    def tell_outcome(self, outcome: str) -> None:
        self._outcome = outcome
        self.tell("dspex.outcome", outcome)
        if outcome != "ok":
            self.tell("error.type", outcome)
            self.span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, outcome))


def _recorded(record: Callable[[], _Recorded]) -> Span:
    """A span that is recorded; nothing where the process's sampler or span processor fails: the call goes on."""
    try:
        return record()
    except Exception:
        log.warning("a span did not begin: nothing is recorded", exc_info=True)
        return NO_SPAN


def _api() -> ModuleType | None:
    """OpenTelemetry's interface, if somebody in this process uses it."""
    if _API_MODULE not in sys.modules:
        return None
    from opentelemetry import trace  # by import, which waits where another thread is still at it

    return trace


def _propagator() -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()


def _name_of(failure: BaseException) -> str:
    """What a failure is called in a span: a code, or a class; never its text."""
    error = failure.error if isinstance(failure, CallStopped) else failure
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):  # nobody waits for it any more
        return CommandCancelled.code
    return error.code if isinstance(error, DSPexError) else type(error).__name__
