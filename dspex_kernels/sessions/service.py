"""The session service: the one object that the outside holds.

A session's way: ``create_session`` counts it against the limits at once (``registry``), then has a backend open a
place for it (``places``). When the place is lost, or the service starts anew, the session is ``hibernated``: its
record and its journal stay, and its next call opens a place again, one generation later. What its kernel journals
is taken into the store before a changing call returns (``keeper``); ``lifetimes`` begins and ends sessions.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, Unpack

from jupyter_core.paths import jupyter_data_dir
from traitlets import Bool, Float, Instance, Integer, Unicode, Union, default
from traitlets import Callable as CallableTrait
from traitlets.config import LoggingConfigurable

from dspex_kernels import config, errors
from dspex_kernels.protocol import names
from dspex_kernels.protocol.commands import COMMANDS, Command, get_command
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions.backend import SessionBackend
from dspex_kernels.sessions.calls import Call, CallOptions, EventListener
from dspex_kernels.sessions.dedicated import DedicatedBackend
from dspex_kernels.sessions.keeper import Keeper
from dspex_kernels.sessions.lifetimes import Lifetimes
from dspex_kernels.sessions.live import LiveSession
from dspex_kernels.sessions.model import SessionInfo
from dspex_kernels.sessions.places import Places, Waiter
from dspex_kernels.sessions.registry import Registry, new_record
from dspex_kernels.sessions.session import Session
from dspex_kernels.sessions.store import SessionStore, default_store_url
from dspex_kernels.sessions.store.sql import SQLStore
from dspex_kernels.sessions.tasks import Tasks

STOP_TIMEOUT = 20.0
"""Seconds in which running calls and folds must have ended when the service stops."""


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
        self._registry = Registry()
        self._tasks = Tasks(self.log)
        self._calls: set[asyncio.Future[None]] = set()
        self._running = False

    async def start(self) -> Self:
        """Open the store, make the backends ready; sessions of an earlier service are there, hibernated."""
        if self._running:
            return self
        self._wire()
        self._places.backend(self.backend)
        try:
            await asyncio.to_thread(self._sessions_dir.mkdir, mode=0o700, parents=True, exist_ok=True)
        except OSError as failure:
            raise errors.StoreError(
                f"cannot make the sessions' directory {self._sessions_dir}: {failure.strerror}; make it writable, "
                "or set SessionService.data_dir"
            ) from failure
        try:
            await self._store.open()
            for backend in self._backends.values():
                await backend.start()
            await self._lifetimes.load()
        except BaseException:
            await self._stop_all()
            raise
        self._running = True
        return self

    def _wire(self) -> None:
        self._registry = Registry()
        self._store: SessionStore = SQLStore(self.store_url)
        self._keeper = Keeper(self._store, self._tasks, self.log)
        self._backends = {backend.name: backend for backend in self._make_backends()}
        self._places = Places(
            self._backends,
            self._registry,
            self._store,
            self._keeper,
            self._tasks,
            start_timeout=self.kernel_start_timeout,
            command_timeout=self.command_timeout,
        )
        self._lifetimes = Lifetimes(self._registry, self._store, self._places, self.log)
        for backend in self._backends.values():
            backend.lost = self._places.lost

    def _make_backends(self) -> list[SessionBackend]:
        return [DedicatedBackend(kernel_name=self.kernel_name, policy=self.lm_policy, parent=self)]

    async def stop(self) -> None:
        """Refuse new calls, answer the running ones, end the kernels, fold what they journaled, close the store."""
        if not self._running:
            return
        self._running = False
        self._places.close()
        await self._stop_all()

    async def _stop_all(self) -> None:
        try:
            await asyncio.gather(*(backend.stop() for backend in self._backends.values()))
        finally:
            if pending := self._calls | self._tasks.running:
                await asyncio.wait(pending, timeout=STOP_TIMEOUT)
            for live in self._registry:
                if live.lease is not None:
                    await self._keeper.fold(live)
                    await self._keeper.save_activity(live)
                    live.release()
            await self._store.close()

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
        backend = backend or self.backend
        self._places.backend(backend)
        session_id = names.new_session_id() if session_id is None else session_id
        self._registry.check_id(session_id)
        self._registry.check_limits(owner, self.max_sessions, self.max_sessions_per_owner)
        record = new_record(session_id, owner=owner, backend=backend, directory=self._sessions_dir / session_id)
        live = LiveSession.of(record)
        self._registry.add(live)  # counted from here on, while it starts
        live.creating = self._tasks.spawn(self._lifetimes.begin(live))
        with self._counted():
            try:
                await asyncio.shield(live.creating)
                deadline = asyncio.get_running_loop().time() + self.kernel_start_timeout + self.command_timeout
                await self._places.ensure(live, Waiter("create_session", deadline))
                if lm is not None:
                    args = {"lm": lm if isinstance(lm, str) else dict(lm)}
                    await self._ask(live, COMMANDS["configure"], Call("configure", args, self.command_timeout))
            except BaseException:
                await self._tasks.finish(self._lifetimes.end(live))
                raise
        return ServiceSession(self, session_id)

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
            if self._registry.find(session.session_id) is not None:
                await session.destroy()

    async def list_sessions(self, owner: str | None = None) -> list[SessionInfo]:
        """All sessions, oldest first; only those of ``owner``, if not None."""
        self._check_running()
        chosen = list(self._registry) if owner is None else self._registry.owned_by(owner)
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
        place = self._places.of(live)
        return place.connection_file if place is not None else None

    async def destroy_session(self, session_id: str) -> None:
        """End a session for good: its kernel, programs, directory and record; its running calls are cancelled.

        Raises:
            SessionNotFound: There is none of that id.
            SessionNotReady: Another service on the same store uses it.
            StoreError: The store or the disk refuses; the session stays, or the next start finishes its end.
        """
        await self._tasks.finish(self._lifetimes.end(self._get_live(session_id)))

    async def destroy_sessions(self, *, owner: str) -> int:
        """End all sessions of an owner; how many those were."""
        self._check_running()
        chosen = self._registry.owned_by(owner)
        await asyncio.gather(*(self._tasks.finish(self._lifetimes.end(live)) for live in chosen))
        return len(chosen)

    async def interrupt_session(self, session_id: str) -> None:
        """Interrupt the code that a session's kernel runs; without a kernel nothing happens.

        Raises:
            SessionNotFound: There is none of that id.
        """
        live = self._get_live(session_id)
        await self._places.backend_of(live).interrupt(session_id)

    async def health_check(self) -> dict[str, Any]:
        """``status`` ("ok", "stopped"), ``sessions`` by status, ``calls`` running; no ids and no owners."""
        return {
            "status": "ok" if self._running else "stopped",
            "sessions": dict(Counter(str(live.status) for live in self._registry)),
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
            SessionNotReady: ``timeout`` is 0 and the session has no kernel yet; or another service uses it.
            CommandTimeout: The time was over.
            KernelStartFailed: The session's kernel did not start; the next call tries again.
            KernelDied: The kernel died during the call; the next call brings another.
            ServiceClosed: The service stops.
        """
        live = self._get_live(session_id)
        row = get_command(command)
        given = dict(args or {})
        if command == "cancel":
            withdrawn = self._places.withdraw(live, row.parse(given).request_id)
            if withdrawn is not None:
                return {"cancelled": withdrawn}
        with self._counted():
            deadline = asyncio.get_running_loop().time() + (timeout or row.timeout_s or self.command_timeout)
            await self._places.ensure(live, Waiter(command, deadline, request_id, waits=timeout != 0))
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
            result = await self._places.backend_of(live).call(live.session_id, call)
            live.remember_key(row, call.args)
            return result
        finally:
            if not row.control:
                self._keeper.touch(live)
            if row.mutates and live.status is not SessionStatus.DESTROYED:
                # Also after an error: a call that ran out of time may have changed something.
                await self._tasks.finish(self._keeper.fold(live))

    @property
    def _sessions_dir(self) -> Path:
        return Path(self.data_dir) / "sessions"

    def _check_running(self) -> None:
        if not self._running:
            raise errors.ServiceClosed(
                "the session service does not run: use it as `async with SessionService() as service`"
            )

    def _get_live(self, session_id: str) -> LiveSession:
        self._check_running()
        return self._registry.get(session_id)

    def _info(self, live: LiveSession) -> SessionInfo:
        place = self._places.of(live)
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
        **options: Unpack[CallOptions],
    ) -> dict[str, Any]:
        """As ``SessionService.call``."""
        return await self._service.call(self.session_id, command, args, **options)

    async def info(self) -> dict[str, Any]:
        """As ``SessionService.get_session_info``, as a dictionary."""
        return (await self._service.get_session_info(self.session_id)).model_dump(mode="json")

    async def destroy(self) -> None:
        """As ``SessionService.destroy_session``."""
        await self._service.destroy_session(self.session_id)

    async def interrupt(self) -> None:
        """As ``SessionService.interrupt_session``."""
        await self._service.interrupt_session(self.session_id)
