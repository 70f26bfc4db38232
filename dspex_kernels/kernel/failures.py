"""Exceptions become errors with a code: what a person or program can act on, without secrets."""

from __future__ import annotations

import asyncio
import resource
import traceback
from pathlib import Path

import dspy

from dspex_kernels import errors
from dspex_kernels.kernel.calls import Call
from dspex_kernels.protocol.limits import MAX_TRACEBACK_LINES

REMEDIES = {
    "adapter_parse_error": "try adapter json, or a model that follows formats",
    "auth": "the provider refused the key: configure api_key or api_key_env",
    "billing": "the provider account has no credit or quota left",
    "context_window_exceeded": "shorten the inputs or choose a model with a longer context",
    "invalid_request": "the provider refused the request: check model and parameters",
    "not_configured": "no key: configure api_key or api_key_env",
    "provider": "the provider's answer was not understood: check api_base",
    "rate_limit": "the provider limits the rate: try again later or lower the concurrency",
    "server": "the provider failed: try again later",
    "timeout": "the provider did not answer in time: try again or raise timeout_s",
    "transport": "the provider could not be reached: check api_base and the network",
    "unsupported_model": "the provider does not know the model: check its name",
}
"""By DSPy's error code."""

MAX_CAUSES = 10
"""Causes that are looked at behind an exception."""
MAX_MESSAGE = 2000
"""Characters of a provider's or program's message that are passed on."""


def explain(failure: BaseException, call: Call) -> errors.DSPexError:
    """The error that a call's exception is answered with."""
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if limit != resource.RLIM_INFINITY and _is_for_memory(failure):
        return errors.KernelOutOfMemory(
            f"{call.command} needs more memory than its kernel may allocate, {limit / 2**20:,.0f} MiB: give it "
            "less to do, restart the kernel, or raise ForkServerProvisioner.memory_limit",
            details={"memory_limit": limit},
        )
    match failure:
        case errors.CallStopped(error=error):
            return error
        case errors.DSPexError():
            return failure
        case asyncio.CancelledError():
            return call.stopped or errors.CommandCancelled(f"{call.command} was cancelled")
        case dspy.DSPyError():
            return _provider_failure(failure, call)
        case ImportError():
            return errors.DependencyMissing(
                f"{failure}: install it where the kernel runs", details={"name": failure.name or ""}
            )
    return _program_failed(failure)


def _is_for_memory(failure: BaseException | None) -> bool:
    """Whether memory was what was missing: DSPy wraps what a language model's call raises."""
    for _ in range(MAX_CAUSES):
        if failure is None or isinstance(failure, MemoryError):
            break
        failure = failure.__cause__
    return isinstance(failure, MemoryError)


def _provider_failure(failure: dspy.DSPyError, call: Call) -> errors.ProviderFailure:
    code = failure.code or "provider"
    known = ("model", "provider", "provider_code", "status", "request_id")
    details = {name: value for name in known if (value := getattr(failure, name, None)) is not None}
    text = failure.message or _text(failure)
    first, *rest = text.strip().splitlines() or [code]
    if rest:  # advice in DSPy's own terms
        details["message"] = _cut(text)
    if response := getattr(failure, "lm_response", None):
        details["lm_response"] = _cut(str(response))
    profile = call.namespace.contents.settings.lm
    model = details.get("model") or (profile.model if profile is not None else "the language model")
    remedy = REMEDIES.get(code)
    return errors.ProviderFailure(
        f"{model}: {_cut(first.strip())}" + (f" ({remedy})" if remedy else ""),
        code=code,
        retryable=dspy.is_retryable_lm_error(failure),
        details={**details, "dspy_error": type(failure).__name__},
        retry_after=failure.retry_after,
    )


def _program_failed(failure: BaseException) -> errors.ProgramFailed:
    text = _cut(_text(failure))
    return errors.ProgramFailed(
        f"the program failed: {type(failure).__name__}: {' '.join(text.split())}",
        ename=type(failure).__name__,
        evalue=text,
        traceback=_frames(failure),
    )


def _frames(failure: BaseException) -> list[str]:
    """The traceback, without the frames of DSPy and of ours: what the user wrote."""
    ours = (str(Path(__file__).parent), str(Path(dspy.__file__).parent))
    frames = traceback.extract_tb(failure.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(ours)] or frames[-1:]
    lines = [line.rstrip("\n") for line in traceback.format_list(own)]
    if len(lines) > MAX_TRACEBACK_LINES:
        half = MAX_TRACEBACK_LINES // 2
        lines = [*lines[:half], f"  … {len(lines) - 2 * half} more frames …", *lines[-half:]]
    return ["Traceback (most recent call last):", *lines, f"{type(failure).__name__}: {_cut(_text(failure))}"]


def _text(failure: BaseException) -> str:
    try:
        return str(failure)
    except Exception as worse:  # noqa: BLE001  # user code, whose failure must be answered all the same
        return f"(its text failed: {type(worse).__name__})"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}… ({len(text):,} characters)"
