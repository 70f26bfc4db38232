"""The contract of a backend: where sessions live, and what the service may ask of that place."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from traitlets import MetaHasTraits
from traitlets.config import LoggingConfigurable

from dspex_kernels.sessions.calls import Call, ReplyListener
from dspex_kernels.sessions.model import BackendName, SessionRecord


@dataclass(frozen=True, slots=True)
class Place:
    """Where a session's namespace is.

    Attributes:
        kernel_id: The kernel's id.
        pid: Its process; None where that is on another machine or unknown.
        generation: How often the session has been given a kernel; 1 is the first.
        connection_file: The kernel's connection file; None where nobody but the service may connect.
    """

    kernel_id: str
    pid: int | None
    generation: int
    connection_file: str | None = None


class PlaceGone(Exception):
    """A session has no place any more, and nothing of the call ran: open one, and ask again."""


LostListener = Callable[[str, Place, str], None]
"""Takes the session's id, the place that is gone, and one line why."""


ChangeListener = Callable[[str, int, list[dict[str, Any]]], None]
"""Takes the session's id, its generation, and changes (``protocol.records.Change`` as JSON) in their order."""


class _BackendMeta(abc.ABCMeta, MetaHasTraits):
    pass


class SessionBackend(LoggingConfigurable, metaclass=_BackendMeta):
    """Gives sessions a place to live, carries their calls there, and tells when the place is lost.

    The service owns ids, owners, limits, states and the store; a backend owns kernels. The service never has
    two of ``open`` and ``close`` running for one session; any number of ``call`` may run beside them.
    """

    name: BackendName
    """As ``SessionService.backend`` and a session's record call it."""

    lost: LostListener | None = None
    """Called by the backend, on the event loop, once for each place that is gone without ``close`` (its kernel
    died, or is emptied). All calls there have been answered by then. Set by the service before ``start()``; it must
    not raise."""

    changed: ChangeListener | None = None
    """Called by a backend whose kernels do not journal, on the event loop, with what a reply says that its call
    changed, before ``call`` returns; also when nobody waits for that reply any more. Set by the service before
    ``start()``; it must not raise."""

    replied: ReplyListener | None = None
    """Called by the backend, on the event loop, with every reply that comes in, also where its caller has left. Set
    by the service before ``start()``; it must not raise."""

    @abc.abstractmethod
    async def start(self) -> None:
        """Make ready to open sessions.

        Called from ``SessionService.start()``, once. If it raises, the service does not start; ``stop()`` is
        called all the same.
        """

    @abc.abstractmethod
    async def stop(self) -> None:
        """End every kernel, and wait until they are gone.

        Called from ``SessionService.stop()``, once; calls that still run are answered ``ServiceClosed``. If it
        raises, the service closes its store nevertheless and passes the exception on.
        """

    @abc.abstractmethod
    async def open(self, record: SessionRecord, *, timeout: float) -> Place:
        """Give a session a place, with the programs and settings that its journal or its record holds.

        Called from the service when a session is created and when a hibernated, failed or lost one is called.

        Args:
            record: Whose place. ``generation`` is this place's, one more than the last one's; ``directory`` is
                the session's own, and need not be there yet; its contents are what the store holds.
            timeout: Seconds in which the place must answer.

        Raises:
            KernelStartFailed: No place came to be, and nothing is left of it. The service marks the session
                ``failed``, tells every caller that waited, and tries again on the next call.
            NotADSPexKernel: What was started is another kernel; treated the same.
            PlaceGone: The kernel of others that was to have it died meanwhile, and nothing is left of it. The
                service opens another place, a few times.
        """

    @abc.abstractmethod
    async def call(self, session_id: str, call: Call) -> dict[str, Any]:
        """Carry one command to a session and return its result.

        Called from ``SessionService.call()`` for a session that has been opened. If the caller is cancelled, the
        command is cancelled too.

        Raises:
            DSPexError: What the session answered; passed to the caller as it is.
            KernelDied: The place was lost before the answer; passed to the caller, never repeated.
            PlaceGone: The session has no place; nothing of the command ran.
            PoolSaturated: Too many calls wait; nothing of the command ran.
        """

    @abc.abstractmethod
    async def close(self, session_id: str) -> None:
        """End a session's place; what it holds has been journaled. Without a place, nothing happens.

        Called from the service when a session is destroyed or hibernated; calls that still run are answered
        ``CommandCancelled``. If it raises, the service logs it and goes on: the session counts as closed.
        """

    @abc.abstractmethod
    def withdraw(self, session_id: str, request_id: str) -> bool:
        """Cancel a call that still waits for its turn; False where none of that id does. Must not raise.

        Called from the service when a call is cancelled, before the session is asked.
        """

    @abc.abstractmethod
    async def interrupt(self, session_id: str) -> None:
        """Interrupt what a session runs, and nobody else's. Without a place, nothing happens.

        Called from ``SessionService.interrupt_session()``, to which an exception passes.
        """

    def figures(self) -> dict[str, Any]:
        """Numbers of the moment, for ``health_check`` and metrics; from any thread. Must not raise."""
        return {}

    @abc.abstractmethod
    def get_place(self, session_id: str) -> Place | None:
        """Where a session is now; None where it has no place. Must not raise."""
