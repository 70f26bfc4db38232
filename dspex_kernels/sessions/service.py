"""The session service: the one object that the outside holds.

A session's way: ``create_session`` counts it against the limits at once (``registry``), then has a backend open a
place for it (``places``). When the place is lost, or the service starts anew, the session is ``hibernated``: what
it holds stays in the store, and its next call (``carrier``) opens a place again, one generation later. What a call
changed is durable before it returns (``keeper``); ``lifetimes`` begins and ends sessions; ``tenure`` tells
whether they are this service's.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, Unpack

from jupyter_core.paths import jupyter_data_dir
from traitlets import Bool, Float, Instance, Integer, Unicode, Union, default
from traitlets import Callable as CallableTrait
from traitlets.config import LoggingConfigurable

from dspex_kernels import config, errors, logs
from dspex_kernels.protocol import names
from dspex_kernels.protocol.commands import get_command
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions.backend import SessionBackend
from dspex_kernels.sessions.calls import Call, CallOptions, EventListener
from dspex_kernels.sessions.carrier import Carrier
from dspex_kernels.sessions.culling import Culler, Policy, due
from dspex_kernels.sessions.dedicated import DedicatedBackend
from dspex_kernels.sessions.figures import Figures
from dspex_kernels.sessions.followers import Followers
from dspex_kernels.sessions.garbage import SURVIVORS_ASIDE
from dspex_kernels.sessions.happenings import Happening, Listeners, SessionDestroyed, SessionMigrated
from dspex_kernels.sessions.idle import IdleSessions, facts_of
from dspex_kernels.sessions.keeper import Keeper
from dspex_kernels.sessions.kernels import Kernels
from dspex_kernels.sessions.keys import Keys
from dspex_kernels.sessions.library import AliasInfo, Library, PublishedProgram, PublishedVersion
from dspex_kernels.sessions.lifetimes import Lifetimes
from dspex_kernels.sessions.live import LiveSession
from dspex_kernels.sessions.migration import Migration
from dspex_kernels.sessions.model import SessionInfo
from dspex_kernels.sessions.outcomes import Outcomes
from dspex_kernels.sessions.places import Places, Waiter
from dspex_kernels.sessions.pool import KernelPool
from dspex_kernels.sessions.pooled import PooledBackend
from dspex_kernels.sessions.registry import Registry, new_record
from dspex_kernels.sessions.secrets import Vault
from dspex_kernels.sessions.session import Session
from dspex_kernels.sessions.sizes import Size, memory_bytes, read_memory
from dspex_kernels.sessions.store import SessionStore, default_store_url
from dspex_kernels.sessions.store.sql import SQLStore
from dspex_kernels.sessions.tasks import Tasks
from dspex_kernels.sessions.tenure import Tenure, new_service_id

PORTION = 100
"""Sessions told of between two rounds of the event loop: about 2 ms."""
STORE_SIZE_AGE, MEMORY_AGE = 10.0, 1.0
"""Seconds after which a health check has the store's size, and the service's, looked at anew."""
STOP_TIMEOUT = 20.0
"""Seconds in which running calls and folds must have ended when the service stops."""


class SessionService(LoggingConfigurable):
    """Sessions of many owners. ``async with SessionService() as service: …``.

    Args:
        **kwargs: Values of traits; ``config``, ``parent``, ``log`` as traitlets takes them.
    """

    backend = Unicode(
        "dedicated", help='Where sessions live unless they say: "dedicated", a kernel each, or "pooled".'
    ).tag(config=True)
    pooled_fraction = Float(
        0.0, min=0, max=1, help="Share of the sessions that name no backend which go to the pool, for comparison."
    ).tag(config=True)
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
        help="Whether owners may run code in kernels of their own; where false, sessions take data only.",
    ).tag(config=True)
    lean_kernels = Bool(
        True,
        help="Whether dedicated kernels do without what only a notebook needs: debugger, subshells, history, the "
        "owner's IPython configuration. They are smaller and sooner there; cells run in them all the same.",
    ).tag(config=True)
    spare_kernels = Integer(
        2,
        min=0,
        help="Kernels that are started ahead once a dedicated session had one, so that the next has its own at "
        "once; 16 MiB each. Only with lean_kernels, and where kernels are forked.",
    ).tag(config=True)
    cull_idle_timeout = Float(
        3600.0, min=0, help="Seconds after its last use until a session is hibernated; 0 is never."
    ).tag(config=True)
    cull_interval = Float(60.0, min=0.01, help="Seconds between two looks for idle sessions.").tag(config=True)
    cull_busy = Bool(False, help="Hibernate sessions whose kernel runs a cell, too.").tag(config=True)
    cull_connected = Bool(False, help="Hibernate sessions to which a notebook is attached, too.").tag(config=True)
    session_ttl = Float(
        0.0, min=0, help="Seconds after its last use until a session is destroyed, hibernated or not; 0 is never."
    ).tag(config=True)
    survivors_aside_from = Integer(
        100,
        min=0,
        help="Sessions from which on Python's garbage collector goes through what it has been through before only "
        "once an hour: ten thousand sessions stop everything for 0.2 s. For the whole process; 0 is never.",
    ).tag(config=True)
    lm_policy = Instance(config.LMPolicy, help="Which models, hosts and keys LM profiles may name.")
    provider_limits = Instance(config.ProviderLimits, help="What all sessions together may ask of a provider.")

    @default("lm_policy")
    def _default_lm_policy(self) -> config.LMPolicy:
        return config.LMPolicy(parent=self)

    @default("provider_limits")
    def _default_provider_limits(self) -> config.ProviderLimits:
        return config.ProviderLimits(parent=self)

    @default("data_dir")
    def _default_data_dir(self) -> str:
        return str(Path(jupyter_data_dir()) / "dspex")

    @default("store_url")
    def _default_store_url(self) -> str:
        return default_store_url()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        logs.cover(self.log)
        self.figures = Figures()
        self.listeners = Listeners(self.log)
        self.listeners.add(self.figures.take)
        self.listeners.add(self._heed)
        self._registry = Registry(self.figures.moved)
        self._tasks = Tasks(self.log)
        self._running = False
        self._has_survivors_aside = False
        self._culling: asyncio.Task[None] | None = None
        self._chosen = 0
        """Sessions whose backend was left to the service."""

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
            await self._tenure.begin()
            await self._kernels.start(self._tenure, Path(self.data_dir) / "services")
            for backend in self._backends.values():
                await backend.start()
            await self._lifetimes.load()
            self._set_survivors_aside()
            self._keeper.start()
            self._culling = asyncio.create_task(self._culler.run())
        except BaseException:
            await self._stop_all()
            raise
        self._running = True
        return self

    def _wire(self) -> None:
        self.figures.forget_sessions()
        self._registry = Registry(self.figures.moved)
        service_id = new_service_id()
        self._store: SessionStore = SQLStore(self.store_url, service_id)
        self._outcomes = Outcomes()
        self._keeper = Keeper(self._store, self._tasks, self.log)
        self._keys = Keys(self._store, Vault.from_environment(os.environ))
        self._tenure = Tenure(service_id, self._store, Path(self.data_dir) / "leases", self.log, self._deposed)
        self._kernels = Kernels(
            kernel_name=self.kernel_name,
            policy=self.lm_policy,
            listeners=self.listeners,
            limits=self.provider_limits,
            limits_dir=Path(self.data_dir) / "limits",
            parent=self,
        )
        self._backends: dict[str, SessionBackend] = {backend.name: backend for backend in self._make_backends()}
        self._places = Places(
            self._backends,
            self._registry,
            self._store,
            self._keeper,
            self._tenure,
            self._keys,
            self.log,
            self.listeners,
            self._tasks,
            start_timeout=self.kernel_start_timeout,
            command_timeout=self.command_timeout,
        )
        self._library = Library(self._store, self.log)
        followers = Followers(self._library, self._keeper, self._tasks, timeout=self.command_timeout)
        self._carrier = Carrier(self._places, self._keeper, self._keys, self._outcomes, followers, self.listeners)
        self._lifetimes = Lifetimes(
            self._registry,
            self._store,
            self._places,
            self._keeper,
            self._tenure,
            self.listeners,
            self._tasks,
            self.log,
        )
        self._migration = Migration(self._store, self._places, self._keeper, self._sessions_dir, self.log)
        self._culler = Culler(
            IdleSessions(self._registry, self._places, self._lifetimes, self._keeper, self._tenure),
            self._cull_policy,
            interval=self.cull_interval,
            log=self.log,
        )
        self._memory = Size(
            read_memory, "the service's memory", self._tasks, max_age=MEMORY_AGE, known=memory_bytes()
        )
        self._store_size = Size(self._store.size, "the store's size", self._tasks, max_age=STORE_SIZE_AGE)
        self._keeper.refused = self._places.discard
        for backend in self._backends.values():
            self.figures.watch(backend.name, backend.figures if isinstance(backend, PooledBackend) else None)
            backend.lost, backend.changed, backend.replied = self._places.lost, self._changed, self._replied

    def _make_backends(self) -> list[SessionBackend]:
        pool = KernelPool(
            self._kernels,
            Path(self.data_dir) / "pool",
            start_timeout=self.kernel_start_timeout,
            listeners=self.listeners,
            parent=self,
        )
        return [
            DedicatedBackend(
                self._kernels,
                allow_code=self.allow_code,
                lean=self.lean_kernels,
                spares=self.spare_kernels if self.lean_kernels else 0,
                parent=self,
            ),
            PooledBackend(pool, parent=self),
        ]

    async def stop(self) -> None:
        """Refuse new calls, answer the running ones, end the kernels, keep what changed, close the store."""
        if not self._running:
            return
        self._running = False
        self._places.close()
        await self._stop_all()

    async def _stop_all(self) -> None:
        try:
            if self._culling is not None:
                self._culling.cancel()
                await asyncio.wait({self._culling})
            try:
                await asyncio.gather(*(backend.stop() for backend in self._backends.values()))
            finally:
                await self._kernels.stop()
        finally:
            await self._keeper.stop()
            if pending := self._carrier.running | self._tasks.running:
                await asyncio.wait(pending, timeout=STOP_TIMEOUT)
            await self._keep_all()
            await self._tenure.end()
            await self._store.close()
            if self._has_survivors_aside:
                self._has_survivors_aside = False
                SURVIVORS_ASIDE.end()

    def _set_survivors_aside(self) -> None:
        """Spare the collector, and everybody who waits for it, once the sessions are many."""
        if not self._has_survivors_aside and 0 < self.survivors_aside_from <= len(self._registry):
            self._has_survivors_aside = True
            SURVIVORS_ASIDE.begin()

    async def _keep_all(self) -> None:
        """Keep what the kernels' ends left to be kept; what takes too long is found again by the next service."""
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await asyncio.gather(*(self._keep_last(live) for live in self._registry if live.held))
        except TimeoutError:
            self.log.warning("the last of what sessions did could not be kept within %g s", STOP_TIMEOUT)

    async def _keep_last(self, live: LiveSession) -> None:
        if live.record.directory is not None:
            await self._keeper.fold(live)
        await self._keeper.save_activity(live)

    async def _deposed(self) -> None:
        """Another service has our sessions now: end what we have of them."""
        sessions = list(self._registry)
        await asyncio.gather(*(self._places.cancel_opening(live) for live in sessions))
        outcomes = await asyncio.gather(
            *(self._places.hibernate(live, "another service took it over") for live in sessions),
            return_exceptions=True,
        )
        for live, outcome in zip(sessions, outcomes, strict=True):
            live.held, live.spent, live.unfolded = False, None, []  # the journal is the other's to read now
            if isinstance(outcome, BaseException):
                self.log.error("session %s could not be given up", live.session_id, exc_info=outcome)

    def _changed(self, session_id: str, generation: int, changes: list[dict[str, Any]]) -> None:
        """Called by a backend with what a reply says that its call changed."""
        live = self._registry.find(session_id)
        if live is not None and live.record.generation == generation:
            self._keeper.take(live, changes)

    def _replied(self, content: dict[str, Any]) -> None:
        """Called by a backend with every reply; what it changed has been taken already."""
        live = self._registry.find(content.get("session_id") or "")
        if live is None or not content.get("changes"):
            self._outcomes.replied(content)
        elif self._outcomes.knows(live.session_id, content.get("request_id")):
            self._tasks.spawn(self._remember_reply(live, content))

    async def _remember_reply(self, live: LiveSession, content: dict[str, Any]) -> None:
        """Have a reply fetched only when what it acknowledges is durable."""
        await self._keeper.settle(live, content["generation"])
        self._outcomes.replied(content)

    def _heed(self, happening: Happening) -> None:
        """Called with whatever happens."""
        if isinstance(happening, SessionDestroyed):
            self._outcomes.forget(happening.session_id)

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
            backend: ``"dedicated"`` or ``"pooled"``; None is the service's own ``backend``, or the pool for the
                share of ``pooled_fraction``.
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
        if backend is not None:
            self._places.backend(backend)
        session_id = names.new_session_id() if session_id is None else session_id
        self._registry.check_id(session_id)
        self._registry.check_limits(owner, self.max_sessions, self.max_sessions_per_owner)
        backend = backend or self._next_backend()  # last: who is refused takes nothing of the pool's share
        directory = self._sessions_dir / session_id if backend == DedicatedBackend.name else None
        record = new_record(session_id, owner=owner, backend=backend, directory=directory)
        live = LiveSession.of(record)
        self._registry.add(live)  # counted from here on, while it starts
        self._set_survivors_aside()
        with self._carrier.counted(live, None):
            try:
                await self._begin(live)
                if lm is not None:
                    args = {"lm": lm if isinstance(lm, str) else dict(lm)}
                    await self._carrier.call(live, Call("configure", args, self.command_timeout))
            except BaseException:
                await self._lifetimes.end(live)
                raise
        return ServiceSession(self, session_id)

    async def _begin(self, live: LiveSession) -> None:
        """Write a new session down, and meanwhile open its place."""
        deadline = asyncio.get_running_loop().time() + self.kernel_start_timeout + self.command_timeout
        creating = live.creating = self._tasks.spawn(self._lifetimes.begin(live))
        try:
            await self._places.ensure(live, Waiter("create_session", deadline))
        except errors.SessionNotFound:
            await asyncio.shield(creating)  # it tells why
            raise

    def _cull_policy(self) -> Policy:
        return Policy(self.cull_idle_timeout, self.cull_busy, self.cull_connected, self.session_ttl)

    def _next_backend(self) -> str:
        """The service's own, or the pool so often that its share comes out exactly."""
        self._chosen += 1
        before, now = (
            math.floor(count * self.pooled_fraction + 1e-9) for count in (self._chosen - 1, self._chosen)
        )
        return PooledBackend.name if now > before else self.backend

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
        listed = []
        for number, live in enumerate(chosen, start=1):
            if live.status is not SessionStatus.DESTROYED:  # it may have been meanwhile
                listed.append(self._info(live))
            if number % PORTION == 0:
                await asyncio.sleep(0)
        return listed

    async def get_session_info(self, session_id: str) -> SessionInfo:
        """What the service knows about a session; asks no kernel.

        Raises:
            SessionNotFound: There is none of that id.
        """
        return self._info(await self._find_live(session_id))

    async def get_connection_file(self, session_id: str) -> str | None:
        """The connection file of a session's kernel, for notebooks and consoles; None while it has no kernel.

        Raises:
            SessionNotFound: There is none of that id.
            PolicyDenied: ``allow_code`` is false.
        """
        live = await self._find_live(session_id)
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
        await self._lifetimes.end(await self._find_live(session_id))

    async def destroy_sessions(self, *, owner: str) -> int:
        """End all sessions of an owner; how many those were."""
        self._check_running()
        chosen = self._registry.owned_by(owner)
        await asyncio.gather(*(self._lifetimes.end(live) for live in chosen))
        return len(chosen)

    async def interrupt_session(self, session_id: str) -> None:
        """Interrupt the code that a session's kernel runs; without a kernel nothing happens.

        Raises:
            SessionNotFound: There is none of that id.
        """
        live = await self._find_live(session_id)
        await self._places.backend_of(live).interrupt(session_id)

    async def migrate_session(self, session_id: str, *, backend: str, timeout: float | None = None) -> None:
        """Move a session to another backend with all it holds: programs, versions, LM, budget, statistics.

        Args:
            session_id: Which.
            backend: ``"dedicated"`` or ``"pooled"``; its own already, nothing happens.
            timeout: Seconds for everything, running calls included; None is what a kernel's start may take, and
                ``command_timeout``.

        Raises:
            NotPortable: It holds tools or modules of its notebook; the details tell which. Nothing was changed.
            CommandTimeout: Its calls did not end in time; nothing was changed.
            KernelStartFailed: The new place did not open; it is in its old backend again.
            InvalidSession: There is no such backend.
            SessionNotFound: There is no such session.
        """
        live = await self._find_live(session_id)
        target = self._places.backend(backend).name
        with self._carrier.counted(live, None):
            seconds = timeout or self.kernel_start_timeout + self.command_timeout
            previous = live.record.backend
            await self._tasks.finish(self._migration.move(live, target, seconds))
            if live.record.backend != previous:
                self.listeners.tell(SessionMigrated(**live.about(), previous=previous))

    async def resize_pool(self, size: int) -> None:
        """Change the number of kernels in the pool; those that are too many end when they are empty.

        Raises:
            InvalidArguments: ``size`` is below 1.
        """
        self._check_running()
        pooled = self._places.backend(PooledBackend.name)
        assert isinstance(pooled, PooledBackend)
        await pooled.pool.resize(size)

    async def health_check(self) -> dict[str, Any]:
        """How the service is: no ids, no owners, nothing that a kernel is asked for.

        Returns:
            ``status`` ("ok"; "degraded" where kernels have left the pool; "stopped"), ``calls`` that run,
            ``memory_bytes`` of the service, ``store_bytes`` (None where unknown), both as of a moment ago,
            ``sessions`` by status, and ``backends`` by name: their sessions, ``memory_bytes`` of their kernels,
            what happened in the ``last_minute`` and in ``totals``; of the pool its kernels and its queue.
        """
        figures = self.figures.read()
        for name, told in figures["backends"].items():
            told["memory_bytes"] = self._kernels.memory_bytes(name)
        pool = figures["backends"].get(PooledBackend.name, {}).get("pool", {})
        running = "degraded" if pool.get("failed") else "ok"
        return {
            "status": running if self._running else "stopped",
            "calls": len(self._carrier.running),
            "memory_bytes": self._memory.read() if self._running else memory_bytes(),
            "store_bytes": self._store_size.read() if self._running else None,
            **figures,
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
        live = await self._find_live(session_id)
        row = get_command(command)
        if row.internal:
            raise errors.UnknownCommand(f"{command!r} is between a service and its kernels: callers cannot ask it")
        given = dict(args or {})
        if command == "cancel":
            withdrawn = self._places.withdraw(live, row.parse(given).request_id)
            if withdrawn is not None:
                return {"cancelled": withdrawn}
        seconds = timeout or row.timeout_s or self.command_timeout
        call = Call(command, given, seconds, request_id, stream, on_event)
        return await self._carrier.call(live, call, waits=timeout != 0)

    async def fetch_result(self, session_id: str, request_id: str, *, timeout: float = 0.0) -> dict[str, Any]:
        """What a call was answered whose caller went away; kept for a while.

        Args:
            session_id: Of which session.
            request_id: The name that its caller gave the call.
            timeout: Seconds to wait for one that still runs.

        Raises:
            DSPexError: What the call was answered.
            ResultNotFound: No such call is remembered.
            CommandTimeout: It still runs.
            SessionNotFound: There is no such session.
        """
        await self._find_live(session_id)
        return await self._outcomes.fetch(session_id, request_id, timeout)

    async def publish_program(
        self, session_id: str, program_id: str, name: str, *, alias: str | None = None, by: str = ""
    ) -> PublishedVersion:
        """Publish a session's program in the program library.

        Args:
            session_id: Whose program.
            program_id: Its latest version is published.
            name: Under which name; its versions ascend.
            alias: Points to the new version from then on; None moves none.
            by: Who publishes, for the record; "" is nobody in particular.

        Raises:
            NotPortable: The program needs what only its notebook's kernel has.
            DSPexError: As ``export_program`` and ``publish_record``.
        """
        exported = await self.call(session_id, "export_program", {"program_id": program_id})
        return await self._library.publish_record(exported["record"], name, alias=alias, by=by)

    async def publish_record(
        self, record: Mapping[str, Any], name: str, *, alias: str | None = None, by: str = ""
    ) -> PublishedVersion:
        """As ``Library.publish_record``."""
        self._check_running()
        return await self._library.publish_record(record, name, alias=alias, by=by)

    async def move_alias(self, reference: str, version: int, *, by: str = "") -> AliasInfo:
        """As ``Library.move_alias``."""
        self._check_running()
        return await self._library.move_alias(reference, version, by=by)

    async def roll_back_alias(self, reference: str, *, by: str = "") -> AliasInfo:
        """As ``Library.roll_back_alias``."""
        self._check_running()
        return await self._library.roll_back_alias(reference, by=by)

    async def list_library(self) -> list[PublishedProgram]:
        """As ``Library.list_library``."""
        self._check_running()
        return await self._library.list_library()

    async def unpublish_program(self, name: str) -> None:
        """As ``Library.unpublish_program``."""
        self._check_running()
        await self._library.unpublish_program(name)

    @property
    def _sessions_dir(self) -> Path:
        return Path(self.data_dir) / "sessions"

    def _check_running(self) -> None:
        if not self._running:
            raise errors.ServiceClosed(
                "the session service does not run: use it as `async with SessionService() as service`"
            )

    async def _find_live(self, session_id: str) -> LiveSession:
        """A session, also one that another service has made since this one began."""
        self._check_running()
        if self._registry.find(session_id) is None:
            await self._lifetimes.adopt(session_id)
        return self._registry.get(session_id)

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
            cull_at=due(facts_of(live), self._cull_policy(), datetime.now(UTC)).at,
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
