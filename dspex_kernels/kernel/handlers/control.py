"""Commands of the control channel: answered in the thread that received them, while everything computes."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from dspex_kernels import errors
from dspex_kernels.kernel.memory import memory_bytes
from dspex_kernels.kernel.namespaces import Namespace
from dspex_kernels.protocol import PROTOCOL_VERSION
from dspex_kernels.protocol.commands import (
    CancelArgs,
    CancelResult,
    Counts,
    InterruptResult,
    NoArgs,
    PingResult,
    StatsResult,
)

if TYPE_CHECKING:
    from dspex_kernels.kernel.dispatch import Dispatcher


def get_stats(dispatcher: Dispatcher, namespace: Namespace, _args: NoArgs) -> StatsResult:
    """The session's own figures."""
    ledger = namespace.ledger
    models = ledger.by_model()
    return StatsResult(
        session_id=namespace.session_id,
        programs=len(namespace.contents.programs),
        executions=namespace.executions,
        commands=Counts(**namespace.outcomes, running=dispatcher.running(namespace)),
        lm=models,
        lm_calls=ledger.lm_calls(),
        cache_hits=ledger.cache_hits,
        total_tokens=sum(model.total_tokens for model in models.values()),
        cost=ledger.cost(),
        budget=ledger.budget,
        kernel_memory_bytes=memory_bytes(),
        created_at=namespace.created_at.isoformat(),
        last_activity=namespace.last_activity.isoformat(),
    )


def cancel(dispatcher: Dispatcher, namespace: Namespace, args: CancelArgs) -> CancelResult:
    """Stop a running call of the session."""
    reason = errors.CommandCancelled(
        f"request {args.request_id!r} was cancelled", details={"request_id": args.request_id}
    )
    return CancelResult(cancelled=dispatcher.cancel(namespace, args.request_id, reason))


def interrupt(dispatcher: Dispatcher, namespace: Namespace, _args: NoArgs) -> InterruptResult:
    """Stop the session's commands, as Ctrl-C stops those of a kernel of its own."""
    return InterruptResult(interrupted=dispatcher.interrupt(namespace))


def ping(dispatcher: Dispatcher, _namespace: Namespace | None, _args: NoArgs) -> PingResult:
    """The kernel's health."""
    return PingResult(
        kernel_id=dispatcher.identity.kernel_id,
        pid=os.getpid(),
        protocol_version=PROTOCOL_VERSION,
        sessions=dispatcher.sessions(),
        running=dispatcher.running(),
        uptime_s=time.monotonic() - dispatcher.started_at,
        memory_bytes=memory_bytes(),
        stuck=dispatcher.stuck(),
        lag_s=dispatcher.lag(),
        calls=dispatcher.answered,
        last_activity=dispatcher.last_activity.isoformat() if dispatcher.last_activity is not None else None,
        busy=dispatcher.is_busy,
        clients=dispatcher.clients(),
    )
