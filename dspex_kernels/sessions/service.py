"""The session service: the one object that the outside holds. It owns ids, owners, limits, states and the store.

A session's way: ``create_session`` counts it against the limits at once, then has the backend open a place for it.
When the place is lost, or the service starts anew, the session is ``hibernated``: its record and its journal stay,
and its next call opens a place again, one generation later. Opening is one task for each session, which all its
callers await; what is decided about a session is decided without an await in between, so there is no lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from jupyter_core.paths import jupyter_data_dir
from pydantic import ValidationError
from traitlets import Bool, Float, Instance, Integer, Unicode, Union, default
from traitlets import Callable as CallableTrait
from traitlets.config import LoggingConfigurable

from dspex_kernels import config, errors
from dspex_kernels.protocol import journal, names
from dspex_kernels.protocol.commands import COMMANDS, Command, get_command
from dspex_kernels.protocol.messages import first_problem
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions.backend import Call, Place, SessionBackend
from dspex_kernels.sessions.dedicated import DedicatedBackend
from dspex_kernels.sessions.kernel_connection import MAX_PENDING, EventListener
from dspex_kernels.sessions.live import LiveSession
from dspex_kernels.sessions.model import SessionInfo, SessionRecord
from dspex_kernels.sessions.session import Session
from dspex_kernels.sessions.store import MAX_PAGE, SessionStore, default_store_url
from dspex_kernels.sessions.store.sql import SQLStore

STOP_TIMEOUT = 20.0
"""Seconds in which running calls and folds must have ended when the service stops."""
TOUCH_INTERVAL = 10.0
"""Seconds between two writes of a session's ``last_activity``: reads need not cost a write each."""


class SessionService(LoggingConfigurable):
    """Sessions of many owners. ``async with SessionService() as service: …``.

    Args:
        **kwargs: Values of traits; ``config``, ``parent``, ``log`` as traitlets takes them.
    """

    backend = Unicode("dedicated", help='Where sessions live unless they say: "dedicated", a kernel each.').tag(
        config=True
    )
    max_sessions = Integer(1000, min=0, help="Sessions at most, hibernated ones included; 0 is no limit.").tag(
        config=True
    )
    max_sessions_per_owner = Union(
        [Integer(0, min=0), CallableTrait()],
        default_value=0,
        help="Sessions of one owner at most: a number, or a callable that takes the owner; 0 is no limit.",
    ).tag(config=True)
    kernel_name = Unicode(config.KERNEL_NAME, help="The kernelspec that sessions start.").tag(config=True)
    command_timeout = Float(
        30.0, min=0.001, help="Seconds for a call that names no timeout, the kernel's start included."
    ).tag(config=True)
    kernel_start_timeout = Float(60.0, min=0.1, help="Seconds in which a started kernel must answer.").tag(
        config=True
    )
    store_url = Unicode(
        help="Where sessions and program records are kept, as an SQLAlchemy URL; default: SQLite in Jupyter's data "
        "directory."
    ).tag(config=True)
    data_dir = Unicode(
        help='Each session has a directory here, with its journal and log; default: "dspex" in Jupyter\'s data '
        "directory."
    ).tag(config=True)
    allow_code = Bool(
        True,
        help="Whether owners may run code in their kernels: where false, get_connection_file tells nobody how.",
    ).tag(config=True)
    lm_policy = Instance(config.LMPolicy, help="Which models, hosts and keys LM profiles may name.")

    @default("lm_policy")
    def _default_lm_policy(self) -> config.LMPolicy:
        return config.LMPolicy(parent=self)

    @default("data_dir")
    def _default_data_dir(self) -> str:
        return str(Path(jupyter_data_dir()) / "dspex")

    @default("store_url")
    def _default_store_url(self) -> str:
        return default_store_url()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sessions: dict[str, LiveSession] = {}
        self._leaving: set[str] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._calls: set[asyncio.Future[None]] = set()
        self._backends: dict[str, SessionBackend] = {}
        self._store: SessionStore | None = None
        self._running = False

    async def start(self) -> Self:
        """Open the store, make the backends ready; sessions of an earlier service are there, hibernated."""
        await asyncio.to_thread(self._sessions_dir.mkdir, mode=0o700, parents=True, exist_ok=True)
        self._make_backends()
        self._get_backend(self.backend)
        self._store = SQLStore(self.store_url)
        try:
            await self._store.open()
            for backend in self._backends.values():
                await backend.start()
            await self._load()
        except BaseException:
            await self._stop_all()
            raise
        self._running = True
        return self

    async def _load(self) -> None:
        """Know the sessions of an earlier service; what it was destroying is gone now."""
        cursor: str | None = None
        while True:
            page = await self._the_store.list(limit=MAX_PAGE, after=cursor)
            for record in page.records:
                live = LiveSession.of(record, reason="the service was started anew")
                if record.status is SessionStatus.DESTROYED:
                    await self._remove(live)
                else:
                    self._sessions[live.session_id] = live
            cursor = page.next_cursor
            if cursor is None:
                return

    async def stop(self) -> None:
        """Refuse new calls, answer the running ones, end the kernels, fold what they journaled, close the store."""
        if not self._running:
            return
        self._running = False
        for live in self._sessions.values():
            if live.opening is not None:
                live.opening.cancel()
        await self._stop_all()

    async def _stop_all(self) -> None:
        opened = [live for live in self._sessions.values() if live.status is not SessionStatus.HIBERNATED]
        try:
            await asyncio.gather(*(backend.stop() for backend in self._backends.values()))
        finally:
            if pending := self._calls | self._tasks:
                await asyncio.wait(pending, timeout=STOP_TIMEOUT)
            for live in opened:
                await self._fold(live)
                await self._save_activity(live)
            if self._store is not None:
                await self._store.close()
                self._store = None

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    async def create_session(
        self,
        owner: str = "",
        *,
        backend: str | None = None,
        session_id: str | None = None,
        lm: str | Mapping[str, Any] | None = None,
    ) -> ServiceSession:
        """Make a session, and wait until it answers.

        Args:
            owner: Whose session; "" is nobody in particular.
            backend: ``"dedicated"``; None is the service's own ``backend``.
            session_id: Letters, digits, ``_ . -``, at most 128; None generates one.
            lm: A model string or an LM profile; None leaves the session without.

        Raises:
            InvalidSession: The id or the backend is not one.
            SessionExists: There is a session of that id.
            SessionLimitReached: The limit of the service or of the owner is reached.
            KernelStartFailed: Its kernel did not start; no session was made.
            DSPexError: ``configure`` refused ``lm``; no session was made.
        """
        self._check_running()
        record = self._new_record(owner, backend or self.backend, session_id)
        live = LiveSession.of(record)
        self._sessions[record.session_id] = live  # counted from here on, while it starts
        with self._counted():
            try:
                await self._the_store.create(record)
                deadline = asyncio.get_running_loop().time() + self.kernel_start_timeout + self.command_timeout
                await self._ensure_open(live, deadline, "create_session", None)
                if lm is not None:
                    args = {"lm": lm if isinstance(lm, str) else dict(lm)}
                    await self._ask(live, COMMANDS["configure"], Call("configure", args, self.command_timeout))
            except BaseException:
                if self._sessions.get(record.session_id) is live:
                    await asyncio.shield(self._spawn(self._destroy(live)))
                raise
        return ServiceSession(self, record.session_id)

    def get_session(self, session_id: str) -> ServiceSession:
        """A handle on a session.

        Raises:
            SessionNotFound: There is none of that id.
        """
        self._get_live(session_id)
        return ServiceSession(self, session_id)

    @contextlib.asynccontextmanager
    async def session(self, owner: str = "", **options: Any) -> AsyncIterator[ServiceSession]:
        """A session for the length of a block: ``create_session`` before it, ``destroy_session`` after it."""
        session = await self.create_session(owner, **options)
        try:
            yield session
        finally:
            if session.session_id in self._sessions:
                await session.destroy()

    async def list_sessions(self, owner: str | None = None) -> list[SessionInfo]:
        """All sessions, oldest first; only those of ``owner``, if not None."""
        self._check_running()
        chosen = [live for live in self._sessions.values() if owner is None or live.record.owner == owner]
        chosen.sort(key=lambda live: (live.record.created_at, live.session_id))
        return [self._info(live) for live in chosen]

    async def get_session_info(self, session_id: str) -> SessionInfo:
        """What the service knows about a session; asks no kernel.

        Raises:
            SessionNotFound: There is none of that id.
        """
        return self._info(self._get_live(session_id))

    async def get_connection_file(self, session_id: str) -> str | None:
        """The connection file of a session's kernel, for notebooks and consoles; None while it has no kernel.

        Raises:
            SessionNotFound: There is none of that id.
            PolicyDenied: ``allow_code`` is false.
        """
        live = self._get_live(session_id)
        if not self.allow_code:
            raise errors.PolicyDenied("sessions take no code here: SessionService.allow_code is false")
        place = self._backend_of(live).get_place(session_id)
        return place.connection_file if place is not None else None

    async def destroy_session(self, session_id: str) -> None:
        """End a session for good: its kernel, programs, directory and record; its running calls are cancelled.

        Raises:
            SessionNotFound: There is none of that id.
        """
        await asyncio.shield(self._spawn(self._destroy(self._get_live(session_id))))

    async def destroy_sessions(self, *, owner: str) -> int:
        """End all sessions of an owner; how many those were."""
        self._check_running()
        chosen = [live for live in self._sessions.values() if live.record.owner == owner]
        await asyncio.shield(asyncio.gather(*(self._spawn(self._destroy(live)) for live in chosen)))
        return len(chosen)

    async def interrupt_session(self, session_id: str) -> None:
        """Interrupt the code that a session's kernel runs; without a kernel nothing happens.

        Raises:
            SessionNotFound: There is none of that id.
        """
        live = self._get_live(session_id)
        await self._backend_of(live).interrupt(session_id)

    async def health_check(self) -> dict[str, Any]:
        """``status`` ("ok", "stopped"), ``sessions`` by status, ``calls`` running; no ids and no owners."""
        return {
            "status": "ok" if self._running else "stopped",
            "sessions": dict(Counter(str(live.status) for live in self._sessions.values())),
            "calls": len(self._calls),
        }

    async def call(
        self,
        session_id: str,
        command: str,
        args: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        stream: bool = False,
        on_event: EventListener | None = None,
    ) -> dict[str, Any]:
        """Ask one command of a session and return its result.

        Args:
            session_id: Of which session.
            command: A name of the command table.
            args: Its arguments; None is none.
            timeout: Seconds for everything, a kernel's start included; 0 does not wait for a kernel, and gives
                the command its default; None is the default.
            request_id: A name for the call, by which ``cancel`` finds it; None is none.
            stream: Whether tokens and status are reported on the way.
            on_event: Takes each event's content, on the event loop; it must not block.

        Raises:
            DSPexError: What the session answered.
            SessionNotFound: There is none of that id.
            SessionNotReady: ``timeout`` is 0 and the session has no kernel yet.
            CommandTimeout: The time was over.
            KernelStartFailed: The session's kernel did not start; the next call tries again.
            KernelDied: The kernel died during the call; the next call brings another.
            ServiceClosed: The service stops.
        """
        live = self._get_live(session_id)
        row = get_command(command)
        given = dict(args or {})
        if command == "cancel" and (withdrawn := self._cancel_queued(live, given)) is not None:
            return {"cancelled": withdrawn}
        with self._counted():
            deadline = asyncio.get_running_loop().time() + (timeout or self._default_timeout(row))
            await self._ensure_open(live, deadline, command, request_id, wait=timeout != 0)
            # The start may have taken it all, and 0 would be no deadline.
            left = max(deadline - asyncio.get_running_loop().time(), 0.001)
            return await self._ask(live, row, Call(command, given, left, request_id, stream, on_event))

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """While this lasts, ``stop()`` waits for it."""
        mark = asyncio.get_running_loop().create_future()
        self._calls.add(mark)
        try:
            yield
        finally:
            self._calls.discard(mark)
            mark.set_result(None)

    async def _ask(self, live: LiveSession, row: Command, call: Call) -> dict[str, Any]:
        """Carry a call to the session's place; fold what it changed."""
        try:
            result = await self._backend_of(live).call(live.session_id, call)
            live.remember_key(row, call.args)
            return result
        finally:
            if not row.control:
                self._touch(live)
            if row.mutates and live.status is not SessionStatus.DESTROYED:
                # Also after an error: a call that ran out of time may have changed something.
                await asyncio.shield(self._spawn(self._fold(live)))

    def _default_timeout(self, row: Command) -> float:
        return row.timeout_s or self.command_timeout

    def _cancel_queued(self, live: LiveSession, args: Mapping[str, Any]) -> bool | None:
        """Cancel a call that still waits for its kernel. None when the kernel is to be asked."""
        COMMANDS["cancel"].parse(args)
        queued = live.queued.get(str(args.get("request_id")))
        if queued is not None:
            if not queued.done():
                queued.set_result(None)
            return True
        return None if live.status is SessionStatus.READY else False

    async def _ensure_open(
        self, live: LiveSession, deadline: float, command: str, request_id: str | None, *, wait: bool = True
    ) -> None:
        """Return when the session has a place; opening it is shared by all who wait.

        Raises:
            SessionNotReady: ``wait`` is false and it has none.
            CommandTimeout: Not by ``deadline``.
            CommandCancelled: ``cancel`` found the request while it waited.
            KernelError: Opening failed.
        """
        if live.status is SessionStatus.READY:
            if self._backend_of(live).get_place(live.session_id) is not None:
                return
            live.become(SessionStatus.HIBERNATED, "its place was lost")
        if live.opening is None:
            live.opening = self._spawn(self._open(live))
        if not wait:
            because = f" ({live.reason})" if live.reason else ""
            raise errors.SessionNotReady(
                f"session {live.session_id!r} has no kernel yet{because}; one is being started: call again, or "
                "give the call time to wait",
                details={"session_id": live.session_id, "status": str(live.status)},
                retry_after=1.0,
            )
        if len(live.queued) >= MAX_PENDING:
            raise errors.SessionLimitReached(
                f"{MAX_PENDING} calls wait for session {live.session_id!r} to start, the limit: call again later",
                details={"pending": len(live.queued), "limit": MAX_PENDING},
                retry_after=1.0,
            )
        opening = live.opening
        withdrawn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        key = request_id if request_id is not None else f"{id(withdrawn)}"
        if key in live.queued:
            raise errors.DuplicateRequest(f"a call {key!r} of session {live.session_id!r} is waiting already")
        live.queued[key] = withdrawn
        try:
            left = deadline - asyncio.get_running_loop().time()
            await asyncio.wait({opening, withdrawn}, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
        finally:
            del live.queued[key]
        self._check_opened(live, opening, command, cancelled=withdrawn.done())

    def _check_opened(
        self, live: LiveSession, opening: asyncio.Task[None], command: str, *, cancelled: bool
    ) -> None:
        if cancelled:
            raise errors.CommandCancelled(f"{command} was cancelled while session {live.session_id!r} started")
        if not opening.done():
            raise errors.CommandTimeout(
                f"{command}: the time was over while the kernel of session {live.session_id!r} was still starting; "
                "call again, or give more time",
                details={"session_id": live.session_id, "command": command, "status": str(live.status)},
                retry_after=1.0,
            )
        if opening.cancelled():
            self._check_running()
            raise self._not_found(live.session_id)
        failure = opening.exception()
        if isinstance(failure, errors.DSPexError):
            raise errors.from_dict(failure.to_dict()) from failure  # each waiter has an exception of its own
        if failure is not None:
            raise failure

    async def _open(self, live: LiveSession) -> None:
        """Give a session its next place. Runs as ``live.opening``."""
        live.become(SessionStatus.STARTING)
        backend = self._backend_of(live)
        try:
            await self._fold(live)  # what an earlier service did not come to read
            generation = live.record.generation + 1
            await self._the_store.set_generation(live.session_id, generation)
            live.note(generation=generation)
            await backend.open(live.record, timeout=self.kernel_start_timeout)
            if (lm := live.keyed_lm()) is not None:
                await backend.call(live.session_id, Call("configure", {"lm": lm}, self.command_timeout))
            if live.status is SessionStatus.STARTING:
                live.become(SessionStatus.READY)
        except BaseException as failure:
            if live.status is SessionStatus.STARTING:
                if isinstance(failure, asyncio.CancelledError):
                    live.become(SessionStatus.HIBERNATED, "its start was cancelled")
                else:
                    live.become(SessionStatus.FAILED, "its kernel could not be started")
            if not isinstance(failure, errors.KernelStartFailed | errors.NotADSPexKernel):
                await backend.close(live.session_id)
            raise
        finally:
            live.opening = None

    def _lost(self, session_id: str, place: Place, why: str) -> None:
        """Take the backend's word that a place is gone: the next call opens another."""
        live = self._sessions.get(session_id)
        if live is None or live.record.generation != place.generation:
            return
        if live.status is SessionStatus.READY:
            live.become(SessionStatus.HIBERNATED, why)
        self._spawn(self._fold(live))

    async def _fold(self, live: LiveSession) -> None:
        """Take the new part of a session's journal into the store.

        A failure is logged and not raised: the journal itself is durable, and the next fold takes it up.
        """
        path = live.directory / journal.FILE_NAME
        async with live.folding:
            if self._store is None or live.status is SessionStatus.DESTROYED:
                return
            try:
                data = await asyncio.to_thread(_read_if_there, path)
                new = journal.unread(data, live.record.journal_offset)
                if new.changes:
                    await self._store.save_changes(live.session_id, new.changes, new.offset)
                    for change in new.changes:
                        live.apply(change)
                    live.note(journal_offset=new.offset)
            except (errors.DSPexError, OSError):
                self.log.exception("session %s: its journal could not be taken into the store", live.session_id)

    def _touch(self, live: LiveSession) -> None:
        now = asyncio.get_running_loop().time()
        live.last_activity = datetime.now(UTC)
        if now - live.touched >= TOUCH_INTERVAL and self._running:
            live.touched = now
            self._spawn(self._save_activity(live))

    async def _save_activity(self, live: LiveSession) -> None:
        if self._store is None or live.status is SessionStatus.DESTROYED:
            return
        try:
            await self._store.touch(live.session_id, live.last_activity)
        except errors.DSPexError:
            self.log.exception("session %s: its last activity could not be kept", live.session_id)

    async def _destroy(self, live: LiveSession) -> None:
        session_id = live.session_id
        live.become(SessionStatus.DESTROYED)
        self._leaving.add(session_id)
        self._sessions.pop(session_id, None)
        live.lm_with_key = None
        try:
            # From here on a service that comes back after a crash goes on with it.
            await self._the_store.set_status(session_id, SessionStatus.DESTROYED)
            if live.opening is not None:
                live.opening.cancel()
                await asyncio.wait({live.opening}, timeout=STOP_TIMEOUT)
            try:
                await self._backend_of(live).close(session_id)
            except Exception:  # a backend may fail in any way; the session goes all the same
                self.log.exception("session %s: its place could not be closed", session_id)
            async with live.folding:  # a fold that has begun would write to a session that is gone
                await self._remove(live)
        finally:
            self._leaving.discard(session_id)

    async def _remove(self, live: LiveSession) -> None:
        """Remove what outlived a session's kernel: the directory, then the record that names it."""
        await asyncio.to_thread(shutil.rmtree, live.directory, ignore_errors=True)
        await self._the_store.delete(live.session_id)

    @property
    def _sessions_dir(self) -> Path:
        return Path(self.data_dir) / "sessions"

    @property
    def _the_store(self) -> SessionStore:
        if self._store is None:
            raise errors.ServiceClosed("the session service is closed")
        return self._store

    def _check_running(self) -> None:
        if not self._running:
            raise errors.ServiceClosed(
                "the session service does not run: use it as `async with SessionService() as service`"
            )

    def _get_live(self, session_id: str) -> LiveSession:
        self._check_running()
        live = self._sessions.get(session_id)
        if live is None:
            raise self._not_found(session_id)
        return live

    def _not_found(self, session_id: str) -> errors.SessionNotFound:
        return errors.SessionNotFound(
            f"no session {session_id!r}: it was never created here, or has been destroyed",
            details={"session_id": session_id[:128]},
        )

    def _new_record(self, owner: str, backend: str, session_id: str | None) -> SessionRecord:
        """The record of a session that may be created now; decided without an await."""
        self._get_backend(backend)
        if session_id is None:
            session_id = names.new_session_id()
        elif not names.is_session_id(session_id):
            raise errors.InvalidSession(
                f"{session_id[:128]!r} is no session id: use letters, digits and _ . - , at most 128, the first a "
                "letter or digit"
            )
        if session_id in self._sessions or session_id in self._leaving:
            raise errors.SessionExists(
                f"session {session_id!r} exists: get it with get_session, or choose another id",
                details={"session_id": session_id},
            )
        self._check_limit(self.max_sessions, len(self._sessions), "SessionService.max_sessions", "")
        limit = self.max_sessions_per_owner
        limit = limit(owner) if callable(limit) else limit
        count = sum(live.record.owner == owner for live in self._sessions.values())
        self._check_limit(limit, count, "SessionService.max_sessions_per_owner", f" of owner {owner!r}")
        now = datetime.now(UTC)
        try:
            return SessionRecord.model_validate(
                {
                    "session_id": session_id,
                    "owner": owner,
                    "backend": backend,
                    "status": SessionStatus.READY,  # what it is meant to be
                    "created_at": now,
                    "last_activity": now,
                    "directory": str(self._sessions_dir / session_id),
                }
            )
        except ValidationError as failure:
            raise errors.InvalidSession(f"no session can be made so: {first_problem(failure)}") from failure

    def _check_limit(self, limit: int, count: int, trait: str, whose: str) -> None:
        if limit and count >= limit:
            raise errors.SessionLimitReached(
                f"there are {count} sessions{whose}, and {trait} is {limit}: destroy one, or raise it",
                details={"count": count, "limit": limit, "trait": trait},
            )

    def _make_backends(self) -> None:
        dedicated = DedicatedBackend(kernel_name=self.kernel_name, policy=self.lm_policy, parent=self)
        self._backends = {backend.name: backend for backend in (dedicated,)}
        for backend in self._backends.values():
            backend.lost = self._lost

    def _get_backend(self, name: str) -> SessionBackend:
        try:
            return self._backends[name]
        except KeyError:
            raise errors.InvalidSession(
                f"no backend {name!r} here: there is {', '.join(sorted(self._backends))}",
                details={"backend": str(name)[:64]},
            ) from None

    def _backend_of(self, live: LiveSession) -> SessionBackend:
        return self._get_backend(live.record.backend)

    def _info(self, live: LiveSession) -> SessionInfo:
        place = self._backend_of(live).get_place(live.session_id)
        return SessionInfo(
            session_id=live.session_id,
            owner=live.record.owner,
            backend=live.record.backend,
            status=live.status,
            generation=live.record.generation,
            kernel_id=place.kernel_id if place else None,
            kernel_pid=place.pid if place else None,
            programs=list(live.programs),
            created_at=live.record.created_at,
            last_activity=live.last_activity,
        )

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.log.debug("a task of the session service failed", exc_info=task.exception())


def _read_if_there(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:  # the kernel has changed nothing yet
        return b""


class ServiceSession(Session):
    """A session of a service.

    Args:
        service: The service.
        session_id: The session's id.
    """

    session_id: str

    def __init__(self, service: SessionService, session_id: str) -> None:
        super().__init__(session_id)
        self._service = service

    async def call(
        self,
        command: str,
        args: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        stream: bool = False,
        on_event: EventListener | None = None,
    ) -> dict[str, Any]:
        """As ``SessionService.call``."""
        return await self._service.call(
            self.session_id,
            command,
            args,
            timeout=timeout,
            request_id=request_id,
            stream=stream,
            on_event=on_event,
        )

    async def info(self) -> dict[str, Any]:
        """As ``SessionService.get_session_info``, as a dictionary."""
        return (await self._service.get_session_info(self.session_id)).model_dump(mode="json")

    async def destroy(self) -> None:
        """As ``SessionService.destroy_session``."""
        await self._service.destroy_session(self.session_id)

    async def interrupt(self) -> None:
        """As ``SessionService.interrupt_session``."""
        await self._service.interrupt_session(self.session_id)
