"""Sessions move into a pooled kernel and out of it; its service alone asks for that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspex_kernels.kernel.calls import Call
from dspex_kernels.kernel.namespaces import Namespace
from dspex_kernels.protocol.commands import (
    AdoptSessionArgs,
    AdoptSessionResult,
    CloseSessionResult,
    CollectSpentResult,
    NoArgs,
    OpenSessionArgs,
    OpenSessionResult,
)

if TYPE_CHECKING:
    from dspex_kernels.kernel.dispatch import Dispatcher


def open_session(dispatcher: Dispatcher, _namespace: Namespace | None, args: OpenSessionArgs) -> OpenSessionResult:
    """Make a session's namespace from what the store holds; programs are built when they are used."""
    dispatcher.open(args)
    return OpenSessionResult()


def adopt_session(
    dispatcher: Dispatcher, _namespace: Namespace | None, args: AdoptSessionArgs
) -> AdoptSessionResult:
    """Make this spare kernel a session's own, with what its journal holds."""
    dispatcher.adopt(args)
    return AdoptSessionResult()


async def close_session(dispatcher: Dispatcher, call: Call, _args: NoArgs) -> CloseSessionResult:
    """Stop what runs in a session's namespace, and drop it."""
    await dispatcher.drop(call)
    return CloseSessionResult(spent=call.namespace.spent())


def collect_spent(dispatcher: Dispatcher, _namespace: Namespace | None, _args: NoArgs) -> CollectSpentResult:
    """What sessions have spent whose calls still run: the reply of a call tells its session's totals itself."""
    return CollectSpentResult(spent=dispatcher.untold_spent())
