"""The LM gate: the one place in a kernel through which every request to a provider passes.

DSPy sends from two functions of ``dspy.clients.execution``; both ask ``_engine`` which backend to use, and both ask
``PreparedCall.key`` under which key an answer is cached. ``install`` puts the gate into these two seams, so that it
sees each attempt of every LM, whoever made it: the session's own, the copies that BestOfN and Refine make, one
that a pipeline or a notebook cell builds for itself. A subclass of ``dspy.LM`` or an engine object of ours would
miss the last kind.

Before each attempt the gate checks the call's cancel and deadline and reserves its budget; after it, it counts
tokens and cost from the response. It retries by itself, so LMs of sessions are built with ``num_retries=0``:
DSPy's own loop sleeps uncapped, in threads that nobody can stop. Synchronous calls (in a cell, in modules without
an async path) send on the command loop too and wait: only an asyncio request can be cancelled so that its
socket closes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import json
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dspy
from dspy._vendor.lm15.result import StreamAccumulator
from dspy.clients import execution
from dspy.clients._litellm import get_litellm
from dspy.clients.call_result import usage_dict
from dspy.clients.costs import estimate_cost
from dspy.clients.engines.litellm_engine import AsyncLiteLLMEngine
from dspy.clients.errors import wrap_error
from dspy.clients.model_metadata import model_info, rate

from dspex_kernels import errors
from dspex_kernels.errors import CallStopped
from dspex_kernels.kernel.calls import SETTING, Call
from dspex_kernels.kernel.ledger import Estimate
from dspex_kernels.kernel.secrecy import scrub_exception

log = logging.getLogger(__name__)

MAX_RETRY_AFTER = 30.0
"""Longest wait that a provider's ``retry-after`` is honoured with, in seconds."""
MAX_BACKOFF = 8.0
"""Longest wait between attempts without such a hint, in seconds."""

# Fingerprints of keys in cache keys: of no use outside this process.
_SALT = secrets.token_bytes(16)


def current_call() -> Call | None:
    """The call that the running code belongs to; None outside any session."""
    call: Call | None = dspy.settings.get(SETTING)
    return call


def install(loop: asyncio.AbstractEventLoop) -> None:
    """Put the gate into DSPy. Called once, at the kernel's start.

    Args:
        loop: The command loop, on which synchronous calls send too.

    Raises:
        DependencyMissing: This DSPy has no such seams.
    """
    if not (hasattr(execution, "_engine") and hasattr(execution.PreparedCall, "key")):
        raise errors.DependencyMissing(
            f"dspy {dspy.__version__} has no place for the LM gate: install dspy >=3.4.1,<3.5"
        )
    select, key = execution._engine, execution.PreparedCall.key

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
        if asynchronous:
            backend, request, provider = select(lm, prepared, True)
            return _AsyncGate(backend, _Passage(call, lm, provider)), request, provider
        if _runs_on(loop) or not _has_async_twin(lm, prepared):
            backend, request, provider = select(lm, prepared, False)
            return _DirectGate(backend, _Passage(call, lm, provider)), request, provider
        backend, request, provider = _on_loop(loop, call, _select_there(select, lm, prepared))
        gate = _AsyncGate(backend, _Passage(call, lm, provider))
        return _BridgedGate(gate, loop, call), request, provider

    def salted_key(self: Any, lm: Any, asynchronous: bool) -> dict[str, Any]:
        plain: dict[str, Any] = key(self, lm, asynchronous)
        return {**plain, "dspex": cache_salt(lm)}

    execution._engine = gated_engine
    execution.PreparedCall.key = salted_key


def cache_salt(lm: Any) -> str:
    """What an answer's cache key must say besides the prompt: whose, and from which endpoint with which key.

    DSPy's key holds neither, so one tenant was given another's answer (dspy pull 10006).
    """
    call = current_call()
    owner = call.namespace.session_id if call is not None else ""
    parts = [owner, *(str(lm.kwargs.get(name) or "") for name in ("api_base", "base_url", "api_key"))]
    return hashlib.blake2b(json.dumps(parts).encode(), key=_SALT, digest_size=16).hexdigest()


def _runs_on(loop: asyncio.AbstractEventLoop) -> bool:
    # A module whose async path calls a synchronous predictor: bridging would wait for itself.
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def _has_async_twin(lm: Any, prepared: Any) -> bool:
    if not prepared.managed or dspy.settings.send_stream is not None:
        return False
    return isinstance(lm._engine_spec, str) or lm._async_engine_spec is not None


async def _select_there(select: Callable[..., tuple[Any, Any, Any]], lm: Any, prepared: Any) -> Any:
    return select(lm, prepared, True)


def _on_loop(loop: asyncio.AbstractEventLoop, call: Call, work: Any) -> Any:
    """Run ``work`` on the command loop for a synchronous caller in another thread, and wait for it."""
    # The context (DSPy's settings) goes along: call_soon_threadsafe copies the caller's.
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result()
    except concurrent.futures.CancelledError:
        call.check()
        raise CallStopped(errors.CommandCancelled("the request to the provider was cancelled")) from None
    except BaseException:
        # Ctrl-C in a cell's wait: the request must not go on without its caller.
        future.cancel()
        raise


class _Passage:
    """One request's way through the gate: its attempts, its reservations, its counts."""

    def __init__(self, call: Call, lm: Any, provider: str | None) -> None:
        self.call = call
        self.lm = lm
        self.provider = provider
        # DSPy's own loop retries LMs that were not built by a session.
        self.retries: int = getattr(lm, "max_retries", 0)

    async def send(self, request: Any, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """Attempt until it succeeds, may not be repeated, or the call is stopped."""
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

    async def _pause(self, seconds: float) -> None:
        me = asyncio.current_task()
        assert me is not None
        try:
            with self.call.requesting(me):
                await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.call.check()
            raise

    async def _attempt(self, request: Any, attempt: Callable[[], Awaitable[Any]]) -> Any:
        estimates = self.admit(request)
        task = asyncio.ensure_future(attempt())
        try:
            with self.call.requesting(task):
                response = await task
        except BaseException as failure:
            self.failed(failure)
            if isinstance(failure, asyncio.CancelledError):
                await _end(task)
                self.call.check()
            raise
        finally:
            self.settle(estimates)
        self.answered(request, response)
        return response

    def admit(self, request: Any) -> Estimate:
        """Check cancel, deadline and budget, and reserve what the request may use.

        Raises:
            CallStopped: The call was stopped or its deadline passed, or a budget is used up.
        """
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

    def settle(self, estimate: Estimate) -> None:
        for ledger in (self.call.namespace.ledger, self.call.ledger):
            ledger.release(estimate)

    def failed(self, failure: BaseException) -> None:
        if isinstance(failure, Exception):
            # Here and not where replies leave: modules print failures, and feed them to the model.
            scrub_exception(failure, {*self.call.namespace.secrets, self.lm.kwargs.get("api_key") or ""})
            self.call.last_provider_error = failure
        for ledger in (self.call.namespace.ledger, self.call.ledger):
            ledger.record(self.lm.model, {}, None, failed=True)

    def answered(self, request: Any, response: Any) -> None:
        usage, cost = self._bill(request, response)
        for ledger in (self.call.namespace.ledger, self.call.ledger):
            ledger.record(self.lm.model, usage, cost)

    def _bill(self, request: Any, response: Any) -> tuple[dict[str, Any], float | None]:
        if hasattr(response, "outputs"):  # a CallResult, from LiteLLM or an LM of the old kind
            return dict(response.usage or {}), response.cost
        usage = usage_dict(response, self.provider)
        if getattr(self.lm, "is_free", False):
            return usage, 0.0
        cost, _ = estimate_cost(response, provider=self.provider, requested_model=request.model, request=request)
        return usage, cost

    def _estimate(self, request: Any) -> Estimate:
        text = _length(request)
        limit = self.lm.kwargs.get("max_tokens") or self.lm.kwargs.get("max_completion_tokens") or 0
        tokens = text // 4 + int(limit)
        if getattr(self.lm, "is_free", False):
            return Estimate(tokens, 0.0)
        info = model_info(self.provider, self.lm.model.split("/", 1)[-1]) if self.provider else None
        prompt, completion = (rate(info or {}, f"{side}_cost_per_token") for side in ("input", "output"))
        usd = None if prompt is None else text // 4 * prompt + int(limit) * (completion or 0.0)
        return Estimate(tokens, usd)

    def _delay(self, failure: Exception, number: int) -> float | None:
        """Seconds until the next attempt; None when there is to be none."""
        known = wrap_error(failure, model=self.lm.model, provider=self.provider)
        if number >= self.retries or not dspy.is_retryable_lm_error(known):
            return None
        hint = getattr(failure, "retry_after", None)
        if isinstance(hint, (int, float)) and hint >= 0:
            delay = min(float(hint), MAX_RETRY_AFTER)
        else:
            # Half fixed, half random: callers that failed together do not come back together.
            delay = min(0.5 * 2**number, MAX_BACKOFF) * (0.5 + random.random() / 2)  # noqa: S311  # not a secret
        deadline = self.call.deadline
        remaining = None if deadline is None else deadline - time.monotonic()
        # An answer now, with the provider's reason, is worth more than a timeout later.
        return None if remaining is not None and delay >= remaining else delay


class _AsyncGate:
    """A backend behind the gate, for DSPy's async path."""

    def __init__(self, backend: Any, passage: _Passage) -> None:
        self._backend = backend
        self._passage = passage

    async def complete(self, request: Any) -> Any:
        return await self._passage.send(request, lambda: self._backend.complete(request))

    async def complete_legacy(self, lm: Any, legacy: dict[str, Any], **context: Any) -> Any:
        if isinstance(self._backend, AsyncLiteLLMEngine):
            # Its first use imports litellm: seconds that must not be spent on the loop.
            await asyncio.to_thread(get_litellm, feature="the LM gate")
        return await self._passage.send(legacy, lambda: self._backend.complete_legacy(lm, dict(legacy), **context))

    async def stream(self, request: Any) -> AsyncIterator[Any]:
        # Not repeated: what was shown to a reader cannot be taken back.
        estimate = self._passage.admit(request)
        reading = asyncio.current_task()
        assert reading is not None
        answer = StreamAccumulator(request)
        try:
            with self._passage.call.requesting(reading):
                async for event in self._backend.stream(request):
                    answer.push(event)
                    yield event
        except BaseException as failure:
            self._passage.failed(failure)
            raise
        finally:
            self._passage.settle(estimate)
        self._passage.answered(request, answer.response())


class _BridgedGate:
    """The gate for a synchronous caller in another thread: the request is sent on the command loop."""

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

    def __init__(self, backend: Any, passage: _Passage) -> None:
        self._backend = backend
        self._passage = passage

    def complete(self, request: Any) -> Any:
        return self._send(request, lambda: self._backend.complete(request))

    def complete_legacy(self, lm: Any, legacy: dict[str, Any], **context: Any) -> Any:
        return self._send(legacy, lambda: self._backend.complete_legacy(lm, dict(legacy), **context))

    def stream(self, request: Any) -> Iterator[Any]:
        answer = StreamAccumulator(request)
        with self._admitted(request):
            for event in self._backend.stream(request):
                answer.push(event)
                yield event
        self._passage.answered(request, answer.response())

    def _send(self, request: Any, attempt: Callable[[], Any]) -> Any:
        with self._admitted(request):
            response = attempt()
        self._passage.answered(request, response)
        return response

    @contextmanager
    def _admitted(self, request: Any) -> Iterator[None]:
        estimate = self._passage.admit(request)
        try:
            yield
        except BaseException as failure:
            self._passage.failed(failure)
            raise
        finally:
            self._passage.settle(estimate)


async def _end(task: asyncio.Task[Any]) -> None:
    """Wait, shortly, until a cancelled request has closed its socket."""
    await asyncio.wait({task}, timeout=1.0)


def _length(request: Any) -> int:
    """Characters of a prompt, about: what the estimate of its tokens stands on."""
    if isinstance(request, dict):
        return len(str(request.get("messages") or request.get("prompt") or ""))
    texts = (len(part.text) for message in request.messages for part in message.parts if hasattr(part, "text"))
    return sum(texts) + len(str(request.system or ""))
