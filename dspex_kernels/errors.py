"""Every exception of dspex_kernels, each with a code that never changes.

The tree::

    DSPexError                       internal_error
    ├─ ProtocolError
    │   ├─ InvalidMessage            invalid_message      the message is not one of ours
    │   ├─ ProtocolMismatch          protocol_mismatch    the two sides speak different versions
    │   ├─ UnknownCommand            unknown_command
    │   ├─ InvalidArguments          invalid_arguments    the command's args do not fit its parameters
    │   └─ TooLarge                  too_large            a message, input, output or result is over its limit
    ├─ ProgramError
    │   ├─ ProgramNotFound           program_not_found
    │   ├─ ProgramExists             program_exists
    │   ├─ ProgramLimitReached       program_limit
    │   ├─ VersionConflict           version_conflict
    │   ├─ InvalidSignature          invalid_signature
    │   ├─ InvalidType               invalid_type
    │   ├─ MissingInput              missing_input
    │   ├─ InvalidInput              invalid_input
    │   ├─ UnknownModule             unknown_module
    │   ├─ ModuleNotAvailable        module_not_available
    │   ├─ InvalidModule             invalid_module
    │   ├─ ToolNotFound              tool_not_found
    │   ├─ ToolChanged               tool_changed
    │   ├─ RewardNotFound            reward_not_found
    │   ├─ InvalidRecord             invalid_record
    │   ├─ NotPortable               not_portable
    │   └─ ProgramFailed             program_failed       the user's own code or data failed
    ├─ LMFailure
    │   ├─ LMNotConfigured           lm_not_configured
    │   ├─ LMCredentialsRequired     lm_credentials_required
    │   ├─ InvalidLMProfile          invalid_lm_profile
    │   ├─ PolicyDenied              policy_denied
    │   ├─ BudgetExceeded            budget_exceeded
    │   ├─ BudgetUnpriced            budget_unpriced
    │   ├─ ProviderUnavailable       provider_unavailable it failed too often of late: nothing is sent there
    │   └─ ProviderFailure           (DSPy's own code: rate_limit, auth, server, transport, …)
    ├─ CallError
    │   ├─ CommandTimeout            timeout
    │   ├─ CommandCancelled          cancelled
    │   ├─ CommandInterrupted        interrupted
    │   ├─ DuplicateRequest          duplicate_request
    │   ├─ PoolSaturated             pool_saturated       too many calls wait for the pool's kernels
    │   └─ ResultNotFound            result_not_found     no such call is remembered
    ├─ SessionError
    │   ├─ SessionNotFound           session_not_found
    │   ├─ SessionExists             session_exists
    │   ├─ SessionNotReady           session_status
    │   ├─ SessionMismatch           session_mismatch
    │   ├─ SessionLimitReached       session_limit
    │   └─ InvalidSession            invalid_session
    ├─ KernelError
    │   ├─ KernelStartFailed         kernel_start_failed
    │   ├─ KernelDied                kernel_died
    │   ├─ KernelOutOfMemory         kernel_out_of_memory it may allocate no more: its limit is reached
    │   └─ NotADSPexKernel           not_a_dspex_kernel
    ├─ ServiceClosed                 service_closed
    ├─ StoreError                    store_error
    └─ DependencyMissing             dependency_missing

    CallStopped (a BaseException)    carries a DSPexError past DSPy's own ``except Exception``

A code is part of the wire contract: it is never reused for another meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self


class DSPexError(Exception):
    """An error with a stable code.

    Args:
        message: One line that names the thing, the number and the remedy.
        details: JSON-able facts for programs; None means none.
        retry_after: Seconds after which trying again is worth it; None when unknown.
    """

    code: str = "internal_error"
    http_status: int = 500
    retryable: bool = False
    status: str = "error"
    """The reply's ``status``: "error", or "aborted" for what was ended on request."""

    def __init__(
        self, message: str, *, details: dict[str, Any] | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details = dict(details or {})
        self.retry_after = retry_after

    def to_dict(self) -> dict[str, Any]:
        """The ``error`` of a reply: ``code``, ``message``, ``retryable``, ``details``."""
        data = {
            "code": self.code,
            "message": self.message,
            "retryable": self.retryable,
            "details": dict(self.details),
        }
        if self.retry_after is not None:
            data["retry_after"] = self.retry_after
        return data

    @classmethod
    def _subclasses(cls) -> Iterator[type[DSPexError]]:
        yield cls
        for child in cls.__subclasses__():
            yield from child._subclasses()


class ProtocolError(DSPexError):
    http_status = 400


class InvalidMessage(ProtocolError):
    code = "invalid_message"


class ProtocolMismatch(ProtocolError):
    code = "protocol_mismatch"
    http_status = 409


class UnknownCommand(ProtocolError):
    code = "unknown_command"
    http_status = 404


class InvalidArguments(ProtocolError):
    code = "invalid_arguments"


class TooLarge(ProtocolError):
    code = "too_large"
    http_status = 413


class ProgramError(DSPexError):
    http_status = 422


class ProgramNotFound(ProgramError):
    code = "program_not_found"
    http_status = 404


class ProgramExists(ProgramError):
    code = "program_exists"
    http_status = 409


class ProgramLimitReached(ProgramError):
    code = "program_limit"
    http_status = 429


class VersionConflict(ProgramError):
    code = "version_conflict"
    http_status = 409


class InvalidSignature(ProgramError):
    code = "invalid_signature"


class InvalidType(ProgramError):
    code = "invalid_type"


class MissingInput(ProgramError):
    code = "missing_input"


class InvalidInput(ProgramError):
    code = "invalid_input"


class UnknownModule(ProgramError):
    code = "unknown_module"
    http_status = 404


class ModuleNotAvailable(ProgramError):
    code = "module_not_available"
    http_status = 501


class InvalidModule(ProgramError):
    code = "invalid_module"


class ToolNotFound(ProgramError):
    code = "tool_not_found"
    http_status = 404


class ToolChanged(ProgramError):
    code = "tool_changed"
    http_status = 409


class RewardNotFound(ProgramError):
    code = "reward_not_found"
    http_status = 404


class InvalidRecord(ProgramError):
    code = "invalid_record"


class NotPortable(ProgramError):
    code = "not_portable"
    http_status = 409


class ProgramFailed(ProgramError):
    """The user's own code or data failed: data to us, not an error of ours.

    Args:
        message: One line.
        ename: The exception's class name.
        evalue: Its text.
        traceback: The user's frames, one string a line group; may be empty.
        details: More facts; None means none.
    """

    code = "program_failed"

    def __init__(
        self,
        message: str,
        *,
        ename: str = "",
        evalue: str = "",
        traceback: list[str] | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message, details=details)
        self.ename = ename or type(self).__name__
        self.evalue = evalue or message
        self.traceback = list(traceback or [])


class LMFailure(DSPexError):
    http_status = 502


class LMNotConfigured(LMFailure):
    code = "lm_not_configured"
    http_status = 409


class LMCredentialsRequired(LMFailure):
    code = "lm_credentials_required"
    http_status = 409


class InvalidLMProfile(LMFailure):
    code = "invalid_lm_profile"
    http_status = 422


class PolicyDenied(LMFailure):
    code = "policy_denied"
    http_status = 403


class BudgetExceeded(LMFailure):
    code = "budget_exceeded"
    http_status = 402


class BudgetUnpriced(LMFailure):
    code = "budget_unpriced"
    http_status = 422


class ProviderUnavailable(LMFailure):
    code = "provider_unavailable"
    http_status = 503
    retryable = True


class ProviderFailure(LMFailure):
    """A failure at the model's provider, under DSPy's own code.

    DSPy's codes pass through as they are (``rate_limit``, ``auth``, ``server``, ``transport``,
    ``adapter_parse_error``, …: ``dspy.utils.exceptions``), so ``code`` belongs to the instance.

    Args:
        message: One line.
        code: DSPy's code.
        retryable: Whether DSPy classes it as transient.
        details: ``model``, ``provider``, ``provider_code``, ``status``, ``request_id`` where known.
        retry_after: Seconds the provider asked for; None when it did not.
    """

    code = "provider"

    def __init__(
        self,
        message: str,
        *,
        code: str = "provider",
        retryable: bool = False,
        details: dict[str, Any] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, details=details, retry_after=retry_after)
        self.code = code  # DSPy names it, not the class
        self.retryable = retryable


class CallError(DSPexError):
    http_status = 504


class CommandTimeout(CallError):
    code = "timeout"


class CommandCancelled(CallError):
    code = "cancelled"
    http_status = 499
    status = "aborted"


class CommandInterrupted(CallError):
    code = "interrupted"
    http_status = 499
    status = "aborted"


class DuplicateRequest(CallError):
    code = "duplicate_request"
    http_status = 409


class PoolSaturated(CallError):
    code = "pool_saturated"
    http_status = 503
    retryable = True


class ResultNotFound(CallError):
    code = "result_not_found"
    http_status = 404


class SessionError(DSPexError):
    http_status = 409


class SessionNotFound(SessionError):
    code = "session_not_found"
    http_status = 404


class SessionExists(SessionError):
    code = "session_exists"


class SessionNotReady(SessionError):
    code = "session_status"


class SessionMismatch(SessionError):
    code = "session_mismatch"


class SessionLimitReached(SessionError):
    code = "session_limit"
    http_status = 429


class InvalidSession(SessionError):
    code = "invalid_session"
    http_status = 422


class KernelError(DSPexError):
    http_status = 502


class KernelStartFailed(KernelError):
    code = "kernel_start_failed"


class KernelDied(KernelError):
    code = "kernel_died"

    def __init__(
        self,
        message: str,
        *,
        retryable: bool = False,
        details: dict[str, Any] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, details=details, retry_after=retry_after)
        # Only a command that changes nothing and reaches no LM may be sent again.
        self.retryable = retryable  # belongs to the call that was running


class KernelOutOfMemory(KernelError):
    code = "kernel_out_of_memory"
    http_status = 507


class NotADSPexKernel(KernelError):
    code = "not_a_dspex_kernel"
    http_status = 409


class ServiceClosed(DSPexError):
    code = "service_closed"
    http_status = 503


class StoreError(DSPexError):
    code = "store_error"


class DependencyMissing(DSPexError):
    code = "dependency_missing"
    http_status = 501


class CallStopped(BaseException):  # not an error of its own: it carries one
    """Ends a call from inside DSPy, whatever module is running.

    DSPy's modules (BestOfN, Refine, ReAct's tools, Parallel) catch ``Exception`` and go on to the next
    attempt, so a plain exception from the LM gate would be printed and spent. Raised by the gate and by
    cancelled waits; unwrapped where a command or cell ends.
    """

    def __init__(self, error: DSPexError) -> None:
        super().__init__(error.message)
        self.error = error

    def __reduce__(self) -> tuple[type[Self], tuple[DSPexError]]:
        return type(self), (self.error,)


def by_code() -> dict[str, type[DSPexError]]:
    """Every code of ours with its class, the base classes left out."""
    return {cls.code: cls for cls in DSPexError._subclasses() if "code" in vars(cls)}


def from_dict(data: dict[str, Any]) -> DSPexError:
    """The exception that a reply's ``error`` tells of.

    Args:
        data: ``code``, ``message``, ``retryable``, ``details``, perhaps ``retry_after``; a code that
            is not ours is one of DSPy's and becomes a ProviderFailure.
    """
    code = str(data.get("code", "internal_error"))
    message = str(data.get("message", code))
    details = dict(data.get("details") or {})
    retry_after = data.get("retry_after")
    retryable = bool(data.get("retryable", False))
    cls = by_code().get(code)
    # DSPy's LMTimeoutError shares our code "timeout"; its details say that a provider was asked.
    if cls is None or cls is ProviderFailure or "dspy_error" in details:
        return ProviderFailure(message, code=code, retryable=retryable, details=details, retry_after=retry_after)
    if cls is ProgramFailed:
        return ProgramFailed(
            message,
            ename=str(data.get("ename", "")),
            evalue=str(data.get("evalue", "")),
            traceback=list(data.get("traceback") or []),
            details=details,
        )
    if cls is KernelDied:
        return KernelDied(message, retryable=retryable, details=details, retry_after=retry_after)
    return cls(message, details=details, retry_after=retry_after)
