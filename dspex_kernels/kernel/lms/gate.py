"""The LM gate: the one place in a kernel through which every request to a provider passes.

DSPy sends from two functions of ``dspy.clients.execution``; both ask ``_engine`` which backend to use, and both ask
``PreparedCall.key`` under which key an answer is cached. ``install`` puts the gate into these two seams, so that it
sees each attempt of every LM, whoever made it: the session's own, the copies that BestOfN and Refine make, one
that a pipeline or a notebook cell builds for itself. A subclass of ``dspy.LM`` or an engine object of ours would
miss the last kind.

The gate checks the policy for each LM, and before each attempt the call's cancel and deadline, reserves its budget,
and lets it wait for its endpoint's limits; after it, it counts tokens and cost from the response. It retries by
itself, so LMs of sessions are built with ``num_retries=0``: DSPy's own loop sleeps uncapped, in threads that nobody
can stop.

Synchronous calls (in a cell, in modules without an async path) are sent on a loop of the gate's own and waited
for: only an asyncio request can be cancelled so that its socket closes. No program runs on that loop. On the
command loop such a request could wait for itself: an async module may block the loop until threads that it started
(``dspy.Parallel``) have their answers.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import json
import random
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import dspy
from dspy._vendor.lm15.result import StreamAccumulator
from dspy.clients import execution
from dspy.clients._litellm import get_litellm
from dspy.clients.call_result import usage_dict
from dspy.clients.costs import estimate_cost
from dspy.clients.engines.lifecycle import aclosing_stream, closing_stream
from dspy.clients.engines.litellm_engine import AsyncLiteLLMEngine
from dspy.clients.errors import wrap_error
from dspy.clients.model_metadata import apreload, model_info, rate

from dspex_kernels import errors, logs, tracing
from dspex_kernels.config import LMPolicy, ProviderLimits
from dspex_kernels.errors import CallStopped
from dspex_kernels.kernel.calls import SETTING, Call
from dspex_kernels.kernel.ledger import Estimate
from dspex_kernels.kernel.lms.endpoints import Admission, Endpoint, Endpoints, Pause
from dspex_kernels.kernel.lms.shared import MAX_RETRY_AFTER
from dspex_kernels.kernel.secrecy import environment_keys, scrub, scrub_exception

log = logs.get_logger(__name__)

MAX_BACKOFF = 8.0
"""Longest wait between attempts without such a hint, in seconds."""

PATIENCE = 10.0
"""Seconds: that a provider did not answer within a shorter timeout of the LM's own says nothing of the provider."""
LOOK = 0.1
"""Seconds between two looks of a waiting thread whether its call was stopped."""

MAX_SENDING = 32
"""Threads in which DSPy prepares the requests of synchronous callers."""

# Fingerprints of keys in cache keys: of no use outside this process. ``install`` draws it anew, after a fork.
_salt = secrets.token_bytes(16)


def current_call() -> Call | None:
    """The call that the running code belongs to; None outside any session."""
    call: Call | None = dspy.settings.get(SETTING)
    return call


class _Sender(threading.Thread):
    """The thread whose loop sends what synchronous callers wait for."""

    # debugpy suspends every thread that is not marked: a breakpoint in a cell would stop the requests.
    pydev_do_not_trace = True
    is_pydev_daemon_thread = True

    def __init__(self) -> None:
        super().__init__(name="dspex-lm-requests", daemon=True)
        self.loop = asyncio.new_event_loop()
        # DSPy hops through the default executor in each request.
        self.loop.set_default_executor(ThreadPoolExecutor(MAX_SENDING, thread_name_prefix="dspex-lm-request"))

    def run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()


class _Senders:
    """The process's one sender, from its first synchronous request on: most kernels never make one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sender: _Sender | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._sender is None:
                self._sender = _Sender()
                self._sender.start()
            return self._sender.loop


def install(
    loop: asyncio.AbstractEventLoop, policy: LMPolicy, endpoints: Endpoints | None = None
) -> Callable[[], None]:
    """Put the gate into DSPy. Called once, at the kernel's start.

    Args:
        loop: The command loop: a synchronous request made on it holds up every command, which is logged.
        policy: What an LM may name, whoever built it.
        endpoints: Their quotas and circuits; None is the defaults of ProviderLimits, within this process.

    Returns:
        What takes it out again.

    Raises:
        DependencyMissing: This DSPy has no such seams.
    """
    seams = [(execution, "_engine"), (execution.PreparedCall, "key"), (dspy.LM, "_reap_closed_loops")]
    if not all(hasattr(owner, name) for owner, name in seams):
        raise errors.DependencyMissing(
            f"dspy {dspy.__version__} has no place for the LM gate: install dspy >=3.4.1,<3.5"
        )
    global _salt  # processes that were forked from one must not share it
    _salt = secrets.token_bytes(16)
    select, key = execution._engine, execution.PreparedCall.key
    limited = endpoints if endpoints is not None else Endpoints(ProviderLimits())
    sender = _Senders()

    def gated_engine(lm: Any, prepared: Any, asynchronous: bool) -> tuple[Any, Any, Any]:
        call = current_call()
        if call is None:
            raise CallStopped(
                errors.LMNotConfigured(
                    "a request to a language model outside any session was refused: run it in a command, or "
                    "carry DSPy's settings into your thread with contextvars.copy_context().run"
                )
            )
        call.check()
        _check_policy(policy, lm, prepared)

        def passage(route: _Route) -> _Passage:
            return _Passage(call, lm, route.provider, _endpoint(limited, lm, prepared, route.provider))

        if asynchronous:
            route = _Route(lm, lambda: select(lm, prepared, True))
            return _AsyncGate(route, passage(route)), route.request, route.provider
        if _runs_on(sender.loop) or not _has_async_twin(lm, prepared):
            route = _Route(lm, lambda: select(lm, prepared, False))
            return _DirectGate(route, passage(route)), route.request, route.provider
        if _runs_on(loop):
            log.warning(
                "session %s: an async module calls %s synchronously, and every command waits for it: use acall",
                *(call.namespace.session_id, lm.model),
            )
        route = _on_loop(sender.loop, call, _route_there(lm, lambda: select(lm, prepared, True)))
        gate = _AsyncGate(route, passage(route))
        return _BridgedGate(gate, sender.loop, call), route.request, route.provider

    def salted_key(self: Any, lm: Any, asynchronous: bool) -> dict[str, Any]:
        plain: dict[str, Any] = key(self, lm, asynchronous)
        return {**plain, "dspex": cache_salt(lm, self.legacy)}

    def put_in(engine: Any, keyed: Any) -> None:
        execution._engine, execution.PreparedCall.key = engine, keyed

    put_in(gated_engine, salted_key)
    return lambda: put_in(select, key)


def cache_salt(lm: Any, given: Mapping[str, Any]) -> str:
    """What an answer's cache key must say besides the prompt: whose, and from which endpoint with which key.

    DSPy's key holds neither, so one tenant was given another's answer (dspy pull 10006).

    Args:
        lm: The language model that is asked.
        given: What this one call sets, over the model's own settings.
    """
    call = current_call()
    owner = call.namespace.session_id if call is not None else ""
    used = {**lm.kwargs, **given}
    endpoint = [str(used.get(name) or "") for name in ("api_base", "base_url", "api_key")]
    parts = [owner, *endpoint, getattr(lm, "script", "")]
    return hashlib.blake2b(json.dumps(parts).encode(), key=_salt, digest_size=16).hexdigest()


def _check_policy(policy: LMPolicy, lm: Any, prepared: Any) -> None:
    """Refuse what an LM profile could not have named either: a cell or a pipeline may have built the LM itself."""
    if not prepared.managed or not isinstance(lm._engine_spec, str):
        return  # it has no endpoint that we could know
    api_base, api_key = _connection(lm, prepared)
    try:
        policy.check(model=lm.model, api_base=api_base, api_key_env=None, has_key=bool(api_key))
    except errors.DSPexError as refusal:
        raise CallStopped(refusal) from None


def _connection(lm: Any, prepared: Any) -> tuple[Any, Any]:
    """The ``api_base`` and the ``api_key`` that a call names."""
    used = {**lm.kwargs, **prepared.legacy}
    return used.get("api_base") or used.get("base_url"), used.get("api_key")


def _endpoint(endpoints: Endpoints, lm: Any, prepared: Any, provider: str | None) -> Endpoint | None:
    """Where a call's requests go; None for the offline LM, which has no provider."""
    if getattr(lm, "is_free", False):
        return None
    name = lm.model.split("/", 1)[0] if "/" in lm.model else provider or lm.model
    if not prepared.managed or not isinstance(lm._engine_spec, str):
        return endpoints.endpoint(name)  # where its own engine sends we cannot know
    api_base, api_key = _connection(lm, prepared)
    # A key may be an object that makes one for each request: those of one provider count as one.
    return endpoints.endpoint(name, api_base=api_base, api_key=api_key if isinstance(api_key, str) else None)


def _runs_on(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def _has_async_twin(lm: Any, prepared: Any) -> bool:
    if not prepared.managed or dspy.settings.send_stream is not None:
        return False
    return isinstance(lm._engine_spec, str) or lm._async_engine_spec is not None


async def _route_there(lm: Any, select: Callable[[], tuple[Any, Any, Any]]) -> _Route:
    return _Route(lm, select)


def _on_loop(loop: asyncio.AbstractEventLoop, call: Call, work: Coroutine[Any, Any, Any]) -> Any:
    """Run ``work`` on another loop for a synchronous caller, and wait for it, at most to the call's deadline."""
    # The context (DSPy's settings) goes along: call_soon_threadsafe copies the caller's.
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        # The call's own timer does not run where the caller blocks the command loop.
        return future.result(None if call.deadline is None else max(0.0, call.deadline - time.monotonic()))
    except concurrent.futures.CancelledError:
        call.check()
        raise CallStopped(errors.CommandCancelled("the request to the provider was cancelled")) from None
    except BaseException:
        # The deadline, or Ctrl-C in a cell's wait: the request must not go on without its caller.
        if future.cancel():
            call.check()
        raise


class _Route:
    """The backend that DSPy selects for a call, selected again where its connections were closed meanwhile."""

    def __init__(self, lm: Any, select: Callable[[], tuple[Any, Any, Any]]) -> None:
        self._select = select
        # Copies of a session's LM share them; LMs that a cell or a pipeline made have none.
        self._connections: Connections | None = getattr(lm, "connections", None)
        self._closed = self._connections.closed if self._connections is not None else 0
        self._backend, self.request, self.provider = select()

    @contextmanager
    def backend(self) -> Iterator[Any]:
        """The backend, whose connections stay open meanwhile."""
        if self._connections is None:
            yield self._backend
            return
        with self._connections.in_use() as closed:
            if closed != self._closed:
                self._backend, _, _ = self._select()
                self._closed = closed
            yield self._backend


class Connections:
    """How many requests use an LM's connections. Thread-safe.

    A call goes on with the LM that it began with, though the session has been given another: connections of an LM
    that was replaced close when the last request on them ends, and again after each later one.

    Args:
        close: Closes them; called under no lock.
    """

    def __init__(self, close: Callable[[], None]) -> None:
        self.closed = 0
        self._close = close
        self._lock = threading.Lock()
        self._requests = 0
        self._retired = False

    @contextmanager
    def in_use(self) -> Iterator[int]:
        """Keep them open; yields how often they were closed before."""
        with self._lock:
            self._requests += 1
            closed = self.closed
        try:
            yield closed
        finally:
            with self._lock:
                self._requests -= 1
            self._close_when_idle()

    def retire(self) -> None:
        """Close them now, or when the last request ends."""
        self._retired = True
        self._close_when_idle()

    def _close_when_idle(self) -> None:
        with self._lock:
            if not self._retired or self._requests:
                return
            self.closed += 1
        self._close()


class _Attempt:
    """One attempt, and how it went.

    Args:
        admission: To its endpoint; None for the offline LM.
    """

    def __init__(self, admission: Admission | None) -> None:
        self.admission = admission
        self.sent_at: float | None = None
        self.bill: tuple[dict[str, Any], float | None] | None = None

    def answered(self, usage: dict[str, Any], cost: float | None) -> None:
        """Its response came, and used so much."""
        self.bill = usage, cost
        if self.admission is not None:
            total = usage.get("total_tokens")
            self.admission.answered(total if isinstance(total, int) else None)


class _Passage:
    """One request's way through the gate: its attempts, its reservations, its counts."""

    def __init__(self, call: Call, lm: Any, provider: str | None, endpoint: Endpoint | None) -> None:
        self.call = call
        self.lm = lm
        self.provider = provider
        self._attempts = 0
        self.endpoint = endpoint
        # DSPy's own loop retries LMs that were not built by a session.
        self.retries: int = getattr(lm, "max_retries", 0)

    async def send(self, request: Any, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """Attempt until it succeeds, may not be repeated, or the call is stopped."""
        await apreload()
        number = 0
        while True:
            try:
                return await self._attempt(request, attempt)
            except Exception as failure:
                delay = self._delay(failure, number)
                if delay is None:
                    raise
                log.debug("attempt %d at %s failed, again in %.2f s", number + 1, self.lm.model, delay)
            number += 1
            await self._pause(delay)

    async def _pause(self, seconds: float, turn: concurrent.futures.Future[None] | None = None) -> None:
        me = asyncio.current_task()
        assert me is not None
        try:
            with self.call.requesting(me):
                if turn is None:
                    await asyncio.sleep(seconds)
                else:
                    await asyncio.wait({asyncio.wrap_future(turn)}, timeout=seconds)
        except asyncio.CancelledError:
            self.call.check()
            raise

    async def _attempt(self, request: Any, attempt: Callable[[], Awaitable[Any]]) -> Any:
        with self.admitted(request) as admitted:
            await self.clear(admitted)
            task = asyncio.ensure_future(attempt())
            try:
                with self.call.requesting(task):
                    response = await task
            except asyncio.CancelledError:
                await _end(task)
                self.call.check()
                raise
            admitted.answered(*self.bill(request, response))
        return response

    async def clear(self, attempt: _Attempt) -> None:
        """Wait until the endpoint's limits let the attempt through.

        Raises:
            CallStopped: The call was stopped, or they do not let it through.
        """
        with closing(self._clearing(attempt)) as pauses:
            for pause in pauses:
                await self._pause(*pause)

    def clear_here(self, attempt: _Attempt) -> None:
        """``clear`` in the caller's own thread."""
        with closing(self._clearing(attempt)) as pauses:
            for pause in pauses:
                until = time.monotonic() + pause.seconds
                while not (pause.turn and pause.turn.done()) and (left := until - time.monotonic()) > 0:
                    time.sleep(min(left, LOOK))
                    self.call.check()

    def _clearing(self, attempt: _Attempt) -> Generator[Pause, None, None]:
        try:
            if attempt.admission is not None:
                yield from attempt.admission.steps()
        except (errors.ProviderUnavailable, errors.ProviderFailure) as refusal:
            raise CallStopped(refusal) from None
        attempt.sent_at = time.monotonic()

    @contextmanager
    def admitted(self, request: Any) -> Iterator[_Attempt]:
        """One attempt: reserved before it, counted after it, however it ends.

        Raises:
            CallStopped: The call was stopped or its deadline passed, or a budget is used up.
        """
        estimate = self._admit(request)
        endpoint = self.endpoint
        admission = endpoint.admission(estimate.tokens, self.call.deadline) if endpoint is not None else None
        attempt = _Attempt(admission)
        self._attempts += 1
        try:
            with tracing.of_lm_request(
                self.lm.model, provider=self.provider, attempt=self._attempts, call=self.call.span
            ) as span:
                span.tell_content(
                    "gen_ai.input.messages", lambda: scrub(_prompt(request), self.call.namespace.secrets)
                )
                yield attempt
                usage, _ = attempt.bill or ({}, None)
                span.tell("gen_ai.usage.input_tokens", usage.get("prompt_tokens"))
                span.tell("gen_ai.usage.output_tokens", usage.get("completion_tokens"))
        except BaseException as failure:
            self._note(failure)
            if admission is not None and attempt.bill is None:
                self._tell(admission, attempt, failure)
            raise
        finally:
            usage, cost = attempt.bill or ({}, None)
            for ledger in (self.call.namespace.ledger, self.call.ledger):
                if attempt.sent_at is None:
                    ledger.release(estimate)
                else:
                    ledger.settle(estimate, self.lm.model, usage, cost, failed=attempt.bill is None)

    def _tell(self, admission: Admission, attempt: _Attempt, failure: BaseException) -> None:
        """Tell the endpoint's circuit how an attempt failed."""
        if attempt.sent_at is None or not isinstance(failure, Exception):
            admission.given_up()
            return
        known = wrap_error(failure, model=self.lm.model, provider=self.provider)
        match known:
            case dspy.LMTransportError() | dspy.LMTimeoutError() if self._is_impatient(attempt.sent_at):
                admission.given_up()
            case dspy.LMTransportError() | dspy.LMTimeoutError() | dspy.LMServerError():
                admission.failed(known.code)
            case dspy.LMProviderError():
                admission.answered(None)
                hint = _hint(known) if isinstance(known, dspy.LMRateLimitError) else None
                if hint is not None and self.endpoint is not None:
                    self.endpoint.hold(hint)
            case _:
                admission.given_up()

    def _is_impatient(self, sent_at: float) -> bool:
        # A session with a tiny timeout of its own would shut the endpoint for all.
        timeout = self.lm.kwargs.get("timeout")
        return isinstance(timeout, int | float) and timeout <= time.monotonic() - sent_at < PATIENCE

    def _admit(self, request: Any) -> Estimate:
        self.call.check()
        estimate = self._estimate(request)
        session = self.call.namespace.ledger
        try:
            session.reserve(estimate)
            try:
                self.call.ledger.reserve(estimate)
            except errors.DSPexError:
                session.release(estimate)
                raise
        except (errors.BudgetExceeded, errors.BudgetUnpriced) as refusal:
            if self.call.request_id is not None:
                self.call.stop(refusal)
            raise CallStopped(refusal) from None
        return estimate

    def _note(self, failure: BaseException) -> None:
        if isinstance(failure, Exception):
            # Here and not where replies leave: modules print failures, and feed them to the model.
            own = {str(self.lm.kwargs.get("api_key") or "")}
            scrub_exception(failure, self.call.namespace.secrets | own | environment_keys())
            self.call.last_provider_error = failure

    def bill(self, request: Any, response: Any) -> tuple[dict[str, Any], float | None]:
        """What a response used, and its price in USD; None when that is unknown."""
        if hasattr(response, "outputs"):  # a CallResult, from LiteLLM or an LM of the old kind
            return dict(response.usage or {}), response.cost
        usage = usage_dict(response, self.provider)
        if getattr(self.lm, "is_free", False):
            return usage, 0.0
        cost, _ = estimate_cost(response, provider=self.provider, requested_model=request.model, request=request)
        return usage, cost

    def _estimate(self, request: Any) -> Estimate:
        prompt = _length(request) // 4
        answer = _answer_limit(request)
        if getattr(self.lm, "is_free", False):
            return Estimate(prompt + answer, 0.0)
        info = model_info(self.provider, self.lm.model.split("/", 1)[-1]) if self.provider else None
        per_prompt, per_answer = (rate(info or {}, f"{side}_cost_per_token") for side in ("input", "output"))
        usd = None if per_prompt is None else prompt * per_prompt + answer * (per_answer or 0.0)
        return Estimate(prompt + answer, usd)

    def _delay(self, failure: Exception, number: int) -> float | None:
        """Seconds until the next attempt; None when there is to be none."""
        known = wrap_error(failure, model=self.lm.model, provider=self.provider)
        if number >= self.retries or not dspy.is_retryable_lm_error(known):
            return None
        if self.endpoint is not None and self.endpoint.refusal() is not None:
            return None
        delay = _hint(known)
        if delay is None:
            # Half fixed, half random: callers that failed together do not come back together.
            delay = min(0.5 * 2**number, MAX_BACKOFF) * (0.5 + random.random() / 2)  # noqa: S311  # not a secret
        deadline = self.call.deadline
        remaining = None if deadline is None else deadline - time.monotonic()
        # An answer now, with the provider's reason, is worth more than a timeout later.
        return None if remaining is not None and delay >= remaining else delay


class _AsyncGate:
    """A backend behind the gate, for DSPy's async path."""

    def __init__(self, route: _Route, passage: _Passage) -> None:
        self._route = route
        self._passage = passage

    async def complete(self, request: Any) -> Any:
        with self._route.backend() as backend:
            return await self._passage.send(request, lambda: backend.complete(request))

    async def complete_legacy(self, lm: Any, legacy: dict[str, Any], **context: Any) -> Any:
        with self._route.backend() as backend:
            if isinstance(backend, AsyncLiteLLMEngine):
                # Its first use imports litellm: seconds that must not be spent on the loop.
                await asyncio.to_thread(get_litellm, feature="the LM gate")
            return await self._passage.send(legacy, lambda: backend.complete_legacy(lm, dict(legacy), **context))

    async def stream(self, request: Any) -> AsyncIterator[Any]:
        # Not repeated: what was shown to a reader cannot be taken back.
        await apreload()
        reading = asyncio.current_task()
        assert reading is not None
        answer = StreamAccumulator(request)
        with self._route.backend() as backend, self._passage.admitted(request) as attempt:
            await self._passage.clear(attempt)
            with self._passage.call.requesting(reading):
                async with aclosing_stream(backend.stream(request)) as events:
                    async for event in events:
                        answer.push(event)
                        if event.type == "end":
                            attempt.answered(*self._passage.bill(request, answer.response()))
                        yield event


class _BridgedGate:
    """The gate for a synchronous caller: the request is sent on the sender's loop."""

    def __init__(self, gate: _AsyncGate, loop: asyncio.AbstractEventLoop, call: Call) -> None:
        self._gate = gate
        self._loop = loop
        self._call = call

    def complete(self, request: Any) -> Any:
        return _on_loop(self._loop, self._call, self._gate.complete(request))

    def complete_legacy(self, lm: Any, legacy: dict[str, Any], **context: Any) -> Any:
        return _on_loop(self._loop, self._call, self._gate.complete_legacy(lm, legacy, **context))


class _DirectGate:
    """The gate for what can only send synchronously, in the caller's own thread: one attempt, not cancellable."""

    def __init__(self, route: _Route, passage: _Passage) -> None:
        self._route = route
        self._passage = passage

    def complete(self, request: Any) -> Any:
        return self._send(request, lambda backend: backend.complete(request))

    def complete_legacy(self, lm: Any, legacy: dict[str, Any], **context: Any) -> Any:
        return self._send(legacy, lambda backend: backend.complete_legacy(lm, dict(legacy), **context))

    def _send(self, request: Any, attempt: Callable[[Any], Any]) -> Any:
        with self._route.backend() as backend, self._passage.admitted(request) as admitted:
            self._passage.clear_here(admitted)
            response = attempt(backend)
            admitted.answered(*self._passage.bill(request, response))
        return response

    def stream(self, request: Any) -> Iterator[Any]:
        answer = StreamAccumulator(request)
        with self._route.backend() as backend, self._passage.admitted(request) as attempt:
            self._passage.clear_here(attempt)
            with closing_stream(backend.stream(request)) as events:
                for event in events:
                    # Between two events it can be stopped, which closes the socket.
                    self._passage.call.check()
                    answer.push(event)
                    if event.type == "end":
                        attempt.answered(*self._passage.bill(request, answer.response()))
                    yield event


async def _end(task: asyncio.Task[Any]) -> None:
    """Wait, shortly, until a cancelled request has closed its socket."""
    await asyncio.wait({task}, timeout=1.0)
    if task.done() and not task.cancelled():
        task.exception()  # read, or asyncio logs it as never retrieved, with what it may hold


def _hint(failure: Any) -> float | None:
    """Seconds that the provider asked to wait, within reason; None when it did not."""
    hint = getattr(failure, "retry_after", None)
    return min(float(hint), MAX_RETRY_AFTER) if isinstance(hint, int | float) and hint >= 0 else None


def _prompt(request: Any) -> str:
    """A prompt as text."""
    if isinstance(request, dict):
        return json.dumps(request.get("messages") or request.get("prompt"), default=str)
    return "\n".join(part.text for message in request.messages for part in message.parts if hasattr(part, "text"))


def _length(request: Any) -> int:
    """Characters of a prompt, about: what the estimate of its tokens stands on."""
    if isinstance(request, dict):
        return len(str(request.get("messages") or request.get("prompt") or ""))
    texts = (len(part.text) for message in request.messages for part in message.parts if hasattr(part, "text"))
    return sum(texts) + len(str(request.system or ""))


def _answer_limit(request: Any) -> int:
    """Tokens to which a request limits its answers; 0 where it does not."""
    if not isinstance(request, dict):
        return int(request.config.max_tokens or 0)
    limit = request.get("max_tokens") or request.get("max_completion_tokens") or 0
    return int(limit) * int(request.get("n") or 1)
