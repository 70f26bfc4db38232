"""The contract of a backend: where sessions live, and what the service may ask of that place."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from traitlets import MetaHasTraits
from traitlets.config import LoggingConfigurable

from dspex_kernels.sessions.calls import Call
from dspex_kernels.sessions.model import SessionRecord


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


LostListener = Callable[[str, Place, str], None]
"""Takes the session's id, the place that is gone, and one line why."""


class _BackendMeta(abc.ABCMeta, MetaHasTraits):
    pass


class SessionBackend(LoggingConfigurable, metaclass=_BackendMeta):
    """Gives sessions a place to live, carries their calls there, and tells when the place is lost.

    The service owns ids, owners, limits, states and the store; a backend owns kernels. The service never has
    two of ``open`` and ``close`` running for one session; any number of ``call`` may run beside them.
    """

    name: str
    """As ``SessionService.backend`` and a session's record call it."""

    lost: LostListener | None = None
    """Called by the backend, on the event loop, once for each place that is gone without ``close`` (its kernel
    died). All calls there have been answered by then. Set by the service before ``start()``; it must not raise."""

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
        """Give a session a place, with the programs and settings that its journal holds.

        Called from the service when a session is created and when a hibernated, failed or lost one is called.

        Args:
            record: Whose place. ``generation`` is this place's, one more than the last one's; ``directory`` is
                the session's own, and need not be there yet. Its contents are not filled in.
            timeout: Seconds in which the place must answer.

        Raises:
            KernelStartFailed: No place came to be, and nothing is left of it. The service marks the session
                ``failed``, tells every caller that waited, and tries again on the next call.
            NotADSPexKernel: What was started is another kernel; treated the same.
        """

    @abc.abstractmethod
    async def call(self, session_id: str, call: Call) -> dict[str, Any]:
        """Carry one command to a session and return its result.

        Called from ``SessionService.call()`` for a session that has been opened. If the caller is cancelled, the
        command is cancelled too.

        Raises:
            DSPexError: What the session answered; passed to the caller as it is.
            KernelDied: The place was lost before the answer; passed to the caller, never repeated.
            SessionNotReady: The session has no place.
        """

    @abc.abstractmethod
    async def close(self, session_id: str) -> None:
        """End a session's place; what it holds has been journaled. Without a place, nothing happens.

        Called from the service when a session is destroyed or hibernated; calls that still run are answered
        ``CommandCancelled``. If it raises, the service logs it and goes on: the session counts as closed.
        """

    @abc.abstractmethod
    async def interrupt(self, session_id: str) -> None:
        """Interrupt the code that a session's kernel runs, as Jupyter does. Without a place, nothing happens.

        Called from ``SessionService.interrupt_session()``, to which an exception passes.
        """

    @abc.abstractmethod
    def get_place(self, session_id: str) -> Place | None:
        """Where a session is now; None where it has no place. Must not raise."""
