"""Places for sessions: opened when they are called, shared by all who wait, opened anew when they are lost.

Opening is one task for each session, which all its callers await. What is decided about a session is decided
without an await in between, so there is no lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from logging import Logger, LoggerAdapter
from typing import Any

from dspex_kernels import errors
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions import happenings
from dspex_kernels.sessions.backend import Place, PlaceGone, SessionBackend
from dspex_kernels.sessions.calls import Call
from dspex_kernels.sessions.happenings import Listeners
from dspex_kernels.sessions.keeper import Keeper
from dspex_kernels.sessions.kernel_connection import MAX_PENDING
from dspex_kernels.sessions.keys import Keys
from dspex_kernels.sessions.live import LiveSession
from dspex_kernels.sessions.model import SessionRecord
from dspex_kernels.sessions.registry import Registry, not_found
from dspex_kernels.sessions.store import SessionStore
from dspex_kernels.sessions.tasks import Tasks
from dspex_kernels.sessions.tenure import Tenure

OPEN_PAUSES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Seconds before each try to open a place, where the one before was lost before it was ready; after the last the
callers are told. Kernels that die one after another are to be outlived; a session that kills each kernel it is
opened in must not have them all."""
CANCEL_TIMEOUT = 20.0
"""Seconds in which a start that was cancelled must have ended."""


@dataclass(frozen=True, slots=True)
class Waiter:
    """A call that may have to wait for its session's place.

    Attributes:
        command: Which command, for messages.
        deadline: On the loop's clock.
        request_id: By which ``Places.withdraw`` finds it; None is none.
        waits: False to be told at once that there is no place yet.
    """

    command: str
    deadline: float
    request_id: str | None = None
    waits: bool = True


class Places:
    """Gives sessions their places.

    Args:
        backends: By name.
        registry: The service's sessions.
        store: Open.
        keeper: Takes in what sessions change.
        tenure: Says which sessions are this service's.
        keys: Knows the keys of their LMs.
        log: Is told of sealed keys that do not open.
        listeners: Are told of sessions that get or lose a place.
        tasks: Where starts run.
        start_timeout: Seconds in which a started kernel must answer.
        command_timeout: Seconds for it to be told the LM.
    """

    def __init__(
        self,
        backends: Mapping[str, SessionBackend],
        registry: Registry,
        store: SessionStore,
        keeper: Keeper,
        tenure: Tenure,
        keys: Keys,
        log: Logger | LoggerAdapter[Any],
        listeners: Listeners,
        tasks: Tasks,
        *,
        start_timeout: float,
        command_timeout: float,
    ) -> None:
        self._backends = backends
        self._registry = registry
        self._store = store
        self._keeper = keeper
        self._tenure = tenure
        self._keys = keys
        self._log = log
        self._listeners = listeners
        self._tasks = tasks
        self._start_timeout = start_timeout
        self._command_timeout = command_timeout
        self._closed = False

    def backend(self, name: str) -> SessionBackend:
        """The backend of that name.

        Raises:
            InvalidSession: There is none.
        """
        try:
            return self._backends[name]
        except KeyError:
            raise errors.InvalidSession(
                f"no backend {name!r} here: there is {', '.join(sorted(self._backends))}",
                details={"backend": str(name)[:64]},
            ) from None  # the KeyError tells nothing more

    def backend_of(self, live: LiveSession) -> SessionBackend:
        """Where a session lives."""
        return self.backend(live.record.backend)

    def of(self, live: LiveSession) -> Place | None:
        """A session's place; None where it has none."""
        return self.backend_of(live).get_place(live.session_id)

    def close(self) -> None:
        """Open no place any more; starts are cancelled."""
        self._closed = True
        for live in self._registry:
            if live.opening is not None:
                live.opening.cancel()

    async def ensure(self, live: LiveSession, waiter: Waiter) -> None:
        """Return when the session has a place.

        Raises:
            ServiceClosed: The service stops.
            SessionNotFound: The session was destroyed meanwhile.
            SessionNotReady: The waiter does not wait; or another service has the session.
            CommandTimeout: Not by the deadline.
            CommandCancelled: ``withdraw`` found the request while it waited.
            KernelError: Opening failed.
        """
        self._check_open(live)
        if self._tenure.is_lapsed:
            await self._confirm_tenure(live, waiter)
        if live.status is SessionStatus.READY:
            if self.of(live) is not None:
                return
            self._hibernate(live, "its place was lost")
        if live.opening is None:
            live.opening = self._tasks.spawn(self._open(live))
        if not waiter.waits:
            because = f" ({live.reason})" if live.reason else ""
            raise errors.SessionNotReady(
                f"session {live.session_id!r} has no kernel yet{because}; one is being started: call again, or "
                "give the call time to wait",
                details={"session_id": live.session_id, "status": str(live.status)},
                retry_after=1.0,
            )
        await self._wait(live, live.opening, waiter)

    async def _confirm_tenure(self, live: LiveSession, waiter: Waiter) -> None:
        """After a sleep, be sure that the session is not another service's by now, before anything of it runs."""
        try:
            async with asyncio.timeout_at(waiter.deadline):
                await self._tenure.confirm()
        except TimeoutError:
            raise errors.CommandTimeout(
                f"{waiter.command}: the time was over while the service made sure that session {live.session_id!r} "
                "is still its own; call again, or give more time",
                details={"session_id": live.session_id, "command": waiter.command},
                retry_after=1.0,
            ) from None  # the TimeoutError tells nothing more
        self._check_open(live)

    def withdraw(self, live: LiveSession, request_id: str) -> bool | None:
        """Cancel a call that still waits for its place or its turn. None when the place itself is to be asked."""
        queued = live.queued.get(request_id)
        if queued is not None:
            if not queued.done():
                queued.set_result(None)
            return True
        if live.status is not SessionStatus.READY:
            return False
        return self.backend_of(live).withdraw(live.session_id, request_id) or None

    def lost(self, session_id: str, place: Place, why: str) -> None:
        """Take a backend's word that a place is gone: the next call opens another."""
        live = self._registry.find(session_id)
        if live is None or live.record.generation != place.generation:
            return
        if live.status is SessionStatus.READY:
            self._hibernate(live, why)
        if live.record.directory is not None:
            self._tasks.spawn(self._keeper.fold(live))

    def discard(self, live: LiveSession, why: str) -> None:
        """Close a place that holds what the store does not: the next call opens another, from the store."""
        if live.status is SessionStatus.READY:
            self._hibernate(live, why)
            self._close(live)

    async def hibernate(self, live: LiveSession, why: str) -> None:
        """Close a session's place, and wait for it; the next call brings it back."""
        if live.status is SessionStatus.READY:
            self._hibernate(live, why)
            self._close(live)
        if live.closing is not None:
            await asyncio.shield(live.closing)

    async def move(self, live: LiveSession, leave: Callable[[], Awaitable[None]], deadline: float) -> None:
        """Let what runs in a session end, and have it leave its place; calls that come wait for the next place.

        Args:
            live: Which; it has a place.
            leave: Closes the place when nothing runs there; raises to let the session stay.
            deadline: On the loop's clock, for the calls that run.

        Raises:
            CommandTimeout: They did not end in time; the session stays.
            SessionNotReady: It is being closed or opened just now.
        """
        if live.status is not SessionStatus.READY:
            raise errors.SessionNotReady(
                f"session {live.session_id!r} is {live.status}: try again", details={"status": str(live.status)}
            )
        live.become(SessionStatus.HIBERNATED, "it is being moved")
        live.closing = self._tasks.spawn(self._moved(live, leave, deadline))
        await asyncio.shield(live.closing)

    async def _until_quiet(self, live: LiveSession, deadline: float) -> None:
        """Return when no call is in a session's place.

        Raises:
            CommandTimeout: Not by the deadline.
            SessionNotFound: The session is being destroyed.
        """
        while live.asking:
            if live.ending is not None:
                raise not_found(live.session_id)
            live.quiet = asyncio.Event()
            try:
                async with asyncio.timeout_at(deadline):
                    await live.quiet.wait()
            except TimeoutError:
                raise errors.CommandTimeout(
                    f"session {live.session_id!r} stays where it is: {live.asking} of its calls still run; "
                    "cancel them, or give more time",
                    details={"session_id": live.session_id, "running": live.asking},
                    retry_after=1.0,
                ) from None  # the TimeoutError tells nothing more

    async def _moved(self, live: LiveSession, leave: Callable[[], Awaitable[None]], deadline: float) -> None:
        """Empty a place and leave it. Runs as ``live.closing``."""
        try:
            await self._until_quiet(live, deadline)
            await leave()
        except errors.StoreError:
            await self.backend_of(live).close(live.session_id)  # it may hold what the store does not
            raise
        except BaseException:
            if live.status is SessionStatus.HIBERNATED and live.opening is None and self.of(live) is not None:
                live.become(SessionStatus.STARTING)
                live.become(SessionStatus.READY)
            raise
        finally:
            live.closing = live.quiet = None

    def _close(self, live: LiveSession) -> None:
        live.closing = self._tasks.spawn(self._closed_by(live))

    async def _closed_by(self, live: LiveSession) -> None:
        """Close a place. Runs as ``live.closing``: no other is opened meanwhile."""
        try:
            await self.backend_of(live).close(live.session_id)
            if live.record.directory is not None:
                await self._keeper.fold(live)
            await self._keeper.flush(live)
        finally:
            live.closing = None

    async def cancel_opening(self, live: LiveSession) -> None:
        """End a start that is under way, and wait until it has cleared away."""
        if live.opening is not None:
            live.opening.cancel()
            await asyncio.wait({live.opening}, timeout=CANCEL_TIMEOUT)

    async def _wait(self, live: LiveSession, opening: asyncio.Task[None], waiter: Waiter) -> None:
        if len(live.queued) >= MAX_PENDING:
            raise errors.SessionLimitReached(
                f"{MAX_PENDING} calls wait for session {live.session_id!r} to start, the limit: call again later",
                details={"pending": len(live.queued), "limit": MAX_PENDING},
                retry_after=1.0,
            )
        loop = asyncio.get_running_loop()
        withdrawn: asyncio.Future[None] = loop.create_future()
        key = waiter.request_id if waiter.request_id is not None else f"{id(withdrawn)}"
        if key in live.queued:
            raise errors.DuplicateRequest(f"a call {key!r} of session {live.session_id!r} is waiting already")
        live.queued[key] = withdrawn
        try:
            left = max(waiter.deadline - loop.time(), 0)
            await asyncio.wait({opening, withdrawn}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del live.queued[key]
        if withdrawn.done():
            raise errors.CommandCancelled(
                f"{waiter.command} was cancelled while session {live.session_id!r} started"
            )
        if not opening.done():
            raise errors.CommandTimeout(
                f"{waiter.command}: the time was over while the kernel of session {live.session_id!r} was still "
                "starting; call again, or give more time",
                details={"session_id": live.session_id, "command": waiter.command, "status": str(live.status)},
                retry_after=1.0,
            )
        self._check_opened(live, opening)

    def _check_opened(self, live: LiveSession, opening: asyncio.Task[None]) -> None:
        self._check_open(live)
        if opening.cancelled():
            raise not_found(live.session_id)
        failure = opening.exception()
        if isinstance(failure, errors.DSPexError):
            raise errors.from_dict(failure.to_dict()) from failure  # each waiter has an exception of its own
        if failure is not None:
            raise failure

    def _check_running(self) -> None:
        if self._closed:
            raise errors.ServiceClosed("the session service is closing")

    def _check_open(self, live: LiveSession) -> None:
        self._check_running()
        if live.status is SessionStatus.DESTROYED or live.ending is not None:
            raise not_found(live.session_id)

    async def _open(self, live: LiveSession) -> None:
        """Give a session its next place. Runs as ``live.opening``."""
        live.become(SessionStatus.STARTING)
        backend = self.backend_of(live)
        began = asyncio.get_running_loop().time()
        try:
            if live.creating is not None:
                await live.housed.wait()
                if live.record.directory is None:
                    await self._written(live)  # what a pooled kernel tells goes into the store
            if live.closing is not None:
                await asyncio.wait({live.closing})
                backend = self.backend_of(live)  # it may have moved
                if self.of(live) is not None:  # or been asked to, and stayed
                    live.become(SessionStatus.READY)
                    return
            await self._enter(live, backend)
            await self._written(live)
            if self.of(live) is None:  # it was lost meanwhile, and nobody is told while it starts
                await self._enter(live, backend)
            if live.status is SessionStatus.STARTING:
                live.become(SessionStatus.READY)
                self._tell_restored(live, asyncio.get_running_loop().time() - began)
        except BaseException as failure:
            if live.status is SessionStatus.STARTING:
                self._start_failed(live, failure)
            if not isinstance(failure, errors.KernelStartFailed | errors.NotADSPexKernel):
                await backend.close(live.session_id)
            raise
        finally:
            live.opening = None

    async def _written(self, live: LiveSession) -> None:
        """Return when the store holds a new session's record.

        Raises:
            SessionNotFound: It could not be written down: who tried cancels its opening, and waits for that.
        """
        if live.status is SessionStatus.DESTROYED:
            raise not_found(live.session_id)
        if live.creating is not None:
            await asyncio.shield(live.creating)

    async def _enter(self, live: LiveSession, backend: SessionBackend) -> None:
        """Open a place and make it ready; another one, where it is lost meanwhile: nothing of any call has run."""
        for pause in OPEN_PAUSES:
            if pause:
                await asyncio.sleep(pause)
            self._check_running()
            times_deposed = self._tenure.times_deposed
            await self._keeper.drain(live)
            record = live.record if live.fresh else await self._next_record(live)
            live.fresh = False
            try:
                await backend.open(record, timeout=self._start_timeout)
                await self._tell_key(live, backend)
            except (PlaceGone, errors.KernelDied) as lost:
                self._log.info("session %s: its new place was lost before it was ready: %s", live.session_id, lost)
                continue
            if self._tenure.times_deposed == times_deposed:
                return
            await backend.close(live.session_id)  # another service may have the session by now
        raise errors.KernelStartFailed(
            f"session {live.session_id!r}: {len(OPEN_PAUSES)} places in a row were lost before they were ready; "
            "call again, and see the kernels' logs",
            details={"session_id": live.session_id},
        )

    def _hibernate(self, live: LiveSession, why: str) -> None:
        """A session has no place from now on."""
        live.become(SessionStatus.HIBERNATED, why)
        self._listeners.tell(happenings.SessionHibernated(**live.about(), why=why))

    def _start_failed(self, live: LiveSession, failure: BaseException) -> None:
        status, why = _after(failure)
        live.become(status, why)
        if status is SessionStatus.FAILED:
            self._listeners.tell(happenings.SessionFailed(**live.about(), why=why))
        else:
            self._listeners.tell(happenings.SessionHibernated(**live.about(), why=why))

    def _tell_restored(self, live: LiveSession, seconds: float) -> None:
        generation = live.record.generation
        if generation > 1:
            self._listeners.tell(
                happenings.SessionRestored(**live.about(), generation=generation, duration_s=seconds)
            )

    async def _tell_key(self, live: LiveSession, backend: SessionBackend) -> None:
        """Give a new place the key of the session's LM, where one was given directly."""
        try:
            lm = await self._keys.recall(live)
        except errors.LMCredentialsRequired as refusal:
            self._log.warning("%s", refusal.message)  # the session is worth opening; its next LM call says the same
            return
        if lm is not None:
            await backend.call(live.session_id, Call("configure", {"lm": lm}, self._command_timeout))
            await self._keeper.settle(live, live.record.generation)

    async def _next_record(self, live: LiveSession) -> SessionRecord:
        """A session's record for its next place, one generation later."""
        await self._written(live)
        record = await self._claim(live)
        generation = record.generation + 1
        await self._store.set_generation(live.session_id, generation)
        live.note(generation=generation)
        return record.model_copy(update={"generation": generation})

    async def _claim(self, live: LiveSession) -> SessionRecord:
        """Make the session this service's, and know of it what the store holds now."""
        try:
            record = await self._tenure.claim(live.session_id)
            if record.directory is not None:
                live.refresh(record)
                await self._keeper.fold(live)  # what an earlier service did not come to read
                record = await self._store.get(live.session_id)
        except errors.SessionNotFound:
            self._give_up(live)
            raise
        if record.status is SessionStatus.DESTROYED:  # and died before its end: the next start finishes that
            self._give_up(live)
            raise not_found(live.session_id)
        live.held = True
        live.refresh(record)
        return record

    def _give_up(self, live: LiveSession) -> None:
        """Forget a session that another service has destroyed."""
        live.become(SessionStatus.DESTROYED)
        self._registry.leave(live)
        self._registry.free(live)


def _after(failure: BaseException) -> tuple[SessionStatus, str]:
    """What becomes of a session whose start failed, and why."""
    if isinstance(failure, asyncio.CancelledError | errors.ServiceClosed):
        return SessionStatus.HIBERNATED, "its start was cancelled"
    if isinstance(failure, errors.SessionNotReady):
        return SessionStatus.HIBERNATED, "another service uses it"
    return SessionStatus.FAILED, "its kernel could not be started"
