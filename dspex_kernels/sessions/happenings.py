"""What happens in a service, told to whoever attaches: its figures, metrics, an administrator's own audit.

Not the events of the protocol (``dspex_event``), by which a kernel reports on one call to its caller. A happening
tells what has come to pass, and carries ids, names and times: never what people asked or were answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from logging import Logger, LoggerAdapter
from typing import Any, Literal

from dspex_kernels import errors
from dspex_kernels.protocol.commands import COMMANDS

OK = "ok"
"""The outcome of a call that did what was asked."""
OTHER = "other"
"""Stands for every name that is not known, where names are counted: their number must have a bound."""

DSPY_CODES = frozenset(
    {
        *("adapter_parse_error", "auth", "billing", "collection_limit", "configuration"),
        *("context_window_exceeded", "invalid_request", "lm_error", "lock_timeout", "not_configured", "provider"),
        *("rate_limit", "server", "stream_assembly", "timeout", "transport", "unexpected", "unsupported_feature"),
        "unsupported_model",
    }
)
"""DSPy's own codes, which a ProviderFailure passes on; the service does not load DSPy to ask it."""

OUTCOMES = frozenset({OK, *errors.by_code(), *DSPY_CODES})
"""Every outcome that is known by its name."""

RecycleReason = Literal["age", "calls", "memory", "resize", "sick"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """Something that came to pass.

    Attributes:
        backend: Where: ``dedicated`` or ``pooled``.
    """

    backend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OfSession(Happening):
    """Something that came to pass with a session.

    Attributes:
        session_id: Which.
        owner: Whose; "" is nobody in particular.
    """

    session_id: str
    owner: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionCreated(OfSession):
    """A new session is written down. Told by ``Lifetimes.begin``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRestored(OfSession):
    """A session that had lost its place has another. Told by ``Places`` when it is ready, from generation 2 on.

    Attributes:
        generation: How often it has been given a place.
        duration_s: Seconds that it took.
    """

    generation: int
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionHibernated(OfSession):
    """A session has no place any more, and is kept. Told where it becomes ``hibernated``.

    Attributes:
        why: One line.
    """

    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionDestroyed(OfSession):
    """A session is gone for good. Told by ``Lifetimes.end``, also of one that did not come to be after all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionMigrated(OfSession):
    """A session lives elsewhere now; ``backend`` is where. Told by ``SessionService.migrate_session``.

    Attributes:
        previous: The backend where it lived before.
    """

    previous: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionFailed(OfSession):
    """A session could not be given a place. Told where it becomes ``failed``.

    Attributes:
        why: One line.
    """

    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallEnded(OfSession):
    """A call was answered, or its caller left. Told by ``watch.watched``, once for each that a session took in.

    Attributes:
        command: Which command.
        outcome: "ok", or an error's code (``outcome_of``).
        duration_s: Seconds from its coming in to its answer, all waiting included.
        queue_wait_s: Seconds of these in which it waited for its turn in the pool; 0 elsewhere.
        kernel_id: Which kernel was asked; None where none was.
        request_id: The call's name; None where it has none.
    """

    command: str
    outcome: str
    duration_s: float
    queue_wait_s: float = 0.0
    kernel_id: str | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyLate(Happening):
    """A kernel answered a call whose caller had left, or been answered. Told by who reads the kernel's replies.

    The call has ended by then, with a ``CallEnded`` of its own; whose it was may not be known any more.

    Attributes:
        kernel_id: Which kernel.
    """

    kernel_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSaturated(OfSession):
    """A call was refused, for too many waited. Told by ``watch.watched``, beside its ``CallEnded``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelStarted(Happening):
    """A kernel answers. Told by its backend.

    Attributes:
        kernel_id: Which.
        duration_s: Seconds from its launch to its first answer.
    """

    kernel_id: str
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelDied(Happening):
    """A kernel's process ended, and nobody had asked for it. Told by its backend.

    Attributes:
        kernel_id: Which.
        how: "was killed by SIGKILL", "exited with code 1".
    """

    kernel_id: str
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRecycled(Happening):
    """A kernel of the pool was retired; its sessions go elsewhere. Told by the pooled backend.

    Attributes:
        kernel_id: Which.
        reason: What was due.
    """

    kernel_id: str
    reason: RecycleReason


Listener = Callable[[Happening], None]
"""Called on the event loop with each happening: it must not block. What it raises is logged, and that is all."""


class Listeners:
    """Who is told what happens, in the order of their coming.

    Args:
        log: Is told of listeners that fail.
    """

    def __init__(self, log: Logger | LoggerAdapter[Any]) -> None:
        self._log = log
        self._listeners: tuple[Listener, ...] = ()

    def add(self, listener: Listener) -> None:
        """Tell a listener from now on; once, however often it is added."""
        if listener not in self._listeners:
            self._listeners += (listener,)

    def remove(self, listener: Listener) -> None:
        """Tell a listener no more; one that was not told is no error."""
        self._listeners = tuple(other for other in self._listeners if other != listener)

    def tell(self, happening: Happening) -> None:
        """Tell all of them. This never raises."""
        for listener in self._listeners:
            try:
                listener(happening)
            except Exception:  # noqa: BLE001  # somebody else's code: no call and no other listener shall suffer from it
                self._log.exception("a listener failed at %s: %r", type(happening).__name__, listener)


def outcome_of(failure: BaseException | None) -> str:
    """The outcome of a call that ended so: "ok", an error's code, ``cancelled`` where its caller left."""
    match failure:
        case None:
            return OK
        case errors.DSPexError():
            return failure.code
        case asyncio.CancelledError():
            return errors.CommandCancelled.code
    return errors.DSPexError.code


def known_command(command: str) -> str:
    """A command's name, if the table has it; else "other"."""
    return command if command in COMMANDS else OTHER


def known_outcome(outcome: str) -> str:
    """An outcome, if it is known; else "other": a provider's code may be anything."""
    return outcome if outcome in OUTCOMES else OTHER
