"""One call as it is seen from outside: its log lines name it, its span measures it, and its end is told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dspex_kernels import errors, logs, tracing
from dspex_kernels.sessions.happenings import CallEnded, Listeners, PoolSaturated, outcome_of


@dataclass(slots=True)
class Watch:
    """What is learned of a call on its way. One that nobody watches takes it in all the same.

    Attributes:
        named: As log lines name it.
        span: Its span.
        queue_wait_s: Seconds that it waited for its turn, so far.
    """

    named: logs.Named = field(default_factory=logs.Named)
    span: tracing.Span = tracing.NO_SPAN
    queue_wait_s: float = 0.0

    def waited(self, seconds: float) -> None:
        """Note a wait for its turn. Called by a backend, also of a turn that never came."""
        self.queue_wait_s += seconds

    def asked(self, kernel_id: str) -> None:
        """Note which kernel is asked. Called by a backend, before it asks."""
        self.named.kernel_id = kernel_id


@contextmanager
def watched(
    listeners: Listeners, *, session_id: str, owner: str, backend: str, command: str, request_id: str | None
) -> Iterator[Watch]:
    """Watch a call from its coming in to its answer: the whole of it happens in this block.

    Args:
        listeners: Are told of its end.
        session_id: Of which session.
        owner: Whose.
        backend: Where it lives as the call comes in.
        command: Which command.
        request_id: The call's name; None is none.
    """
    began = time.monotonic()
    failure: BaseException | None = None
    with (
        logs.of_call(session_id=session_id, request_id=request_id) as named,
        tracing.of_call(command, session_id=session_id, backend=backend, request_id=request_id) as span,
    ):
        watch = Watch(named, span)
        try:
            yield watch
        except BaseException as raised:
            failure = raised
            raise
        finally:
            outcome = outcome_of(failure)
            span.tell("dspex.kernel_id", named.kernel_id)
            span.tell("dspex.queue_wait_s", watch.queue_wait_s)
            span.tell_outcome(outcome)
            if isinstance(failure, errors.PoolSaturated):
                listeners.tell(PoolSaturated(backend=backend, session_id=session_id, owner=owner))
            listeners.tell(
                CallEnded(
                    backend=backend,
                    session_id=session_id,
                    owner=owner,
                    command=command,
                    outcome=outcome,
                    duration_s=time.monotonic() - began,
                    queue_wait_s=watch.queue_wait_s,
                    kernel_id=named.kernel_id,
                    request_id=request_id,
                )
            )
