"""A namespace: one session's programs, settings, history and counts inside a kernel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Hashable, Mapping
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any

import dspy
from dspy.dsp.utils.settings import DEFAULT_CONFIG, main_thread_config

from dspex_kernels import errors, logs
from dspex_kernels.config import LMPolicy
from dspex_kernels.kernel.calls import SETTING, Call
from dspex_kernels.kernel.journal import Journal
from dspex_kernels.kernel.ledger import Ledger
from dspex_kernels.kernel.lms.history import MAX_BYTES, MAX_BYTES_ALONE, History
from dspex_kernels.kernel.lms.profiles import SessionLM, build_adapter, build_lm
from dspex_kernels.kernel.programs.live import LiveProgram
from dspex_kernels.kernel.programs.tools import Toolbox
from dspex_kernels.kernel.shelf import Shelf
from dspex_kernels.kernel.threads import Lane
from dspex_kernels.protocol import limits
from dspex_kernels.protocol.records import (
    AdapterName,
    Change,
    LMProfile,
    ProgramRecord,
    SessionContents,
    SessionReset,
    SettingsChanged,
    Spent,
)

log = logs.get_logger(__name__)

LM_KEY = "lm"
"""Under which key a session's language model stands on the shelf, beside the ids of its programs."""


class Namespace:
    """One session inside this kernel.

    Its programs and settings change only through ``commit``, one change after another.

    Args:
        session_id: Whose.
        lane: Threads for its blocking programs and tools.
        shelf: Counts what is kept built, of all sessions of this process.
        policy: What its LM profile may name.
        executor: Runs the journal's writes.
        journal: Where changes are durable before they are acknowledged; None where the service's store is
            (a pooled kernel).
        contents: What the session held before.
        shares_process: Whether other sessions live in this process: then its settings stay its own; else
            the process's DSPy settings are the session's, so that notebook cells see the same LM.
        generation: How often the session has been given a kernel.
        created_at: When the session was made; None is now.
    """

    __slots__ = (
        *("__weakref__", "changing", "contents", "created_at", "executions", "generation", "history", "lane"),
        *("last_activity", "ledger", "outcomes", "running", "session_id", "shares_process", "toolbox"),
        *("_closed", "_executor", "_journal", "_live", "_lm", "_policy", "_secrets", "_shelf", "_told_spent"),
        "_writing_spent",
    )

    def __init__(
        self,
        session_id: str,
        *,
        lane: Lane,
        shelf: Shelf,
        policy: LMPolicy,
        executor: Executor,
        journal: Journal | None = None,
        contents: SessionContents | None = None,
        shares_process: bool = False,
        generation: int = 1,
        created_at: datetime | None = None,
    ) -> None:
        self.session_id = session_id
        self.lane = lane
        self.toolbox = Toolbox(lane)
        """Tools, rewards and modules that its programs may name."""
        self.contents = contents or SessionContents()
        self.shares_process = shares_process
        self.generation = generation
        self.last_activity = datetime.now(UTC)
        self.created_at = created_at or self.last_activity
        self.history = History(MAX_BYTES if shares_process else MAX_BYTES_ALONE)
        spent = self.contents.spent
        self.outcomes = {"ok": spent.ok, "error": spent.error, "aborted": spent.aborted}
        self.executions = spent.executions
        self.running = 0
        """Commands that run now; the dispatcher counts them, under its lock."""
        self.ledger = Ledger(self.contents.settings.budget, of=f"session {session_id!r}")
        self.ledger.carry_over(spent)
        # One writer at a time, in the order the commands came: asyncio.Lock is fair.
        self.changing = asyncio.Lock()
        self._closed = False
        self._policy = policy
        self._executor = executor
        self._journal = journal
        self._shelf = shelf
        self._live: dict[tuple[str, int], LiveProgram] = {}
        self._lm: SessionLM | None = None
        self._secrets: frozenset[str] = frozenset()
        self._told_spent = spent
        self._writing_spent: asyncio.Task[bool] | None = None

    # Programs

    def record(self, program_id: str, version: int | None = None) -> ProgramRecord:
        """A program's record; ``version`` of None is the latest.

        Raises:
            ProgramNotFound: There is no such program, or no such version of it.
        """
        versions = self.contents.programs.get(program_id)
        if not versions:
            known = ", ".join(sorted(self.contents.programs)[:20]) or "none"
            raise errors.ProgramNotFound(
                f"no program {program_id!r} in session {self.session_id!r}: there are {known}",
                details={"program_id": program_id},
            )
        if version is None:
            return versions[-1]
        for record in versions:
            if record.version == version:
                return record
        raise errors.ProgramNotFound(
            f"no version {version} of program {program_id!r}: there are {[v.version for v in versions]}",
            details={"program_id": program_id, "version": version},
        )

    def next_version(self, program_id: str, *, replace: bool, if_version: int | None) -> int:
        """The version that a write would make.

        Raises:
            ProgramExists: It exists and ``replace`` was not asked for.
            VersionConflict: The latest version is not ``if_version``.
            ProgramLimitReached: The session holds as many programs as it may.
        """
        versions = self.contents.programs.get(program_id)
        latest = versions[-1].version if versions else 0
        self.check_version(program_id, latest, if_version)
        if versions and not replace and if_version is None:
            raise errors.ProgramExists(
                f"program {program_id!r} exists in session {self.session_id!r}: give replace=true for a new "
                "version, or another id",
                details={"program_id": program_id, "version": latest},
            )
        if not versions and len(self.contents.programs) >= limits.MAX_PROGRAMS:
            raise errors.ProgramLimitReached(
                f"session {self.session_id!r} holds {limits.MAX_PROGRAMS} programs, the limit: delete one",
                details={"limit": limits.MAX_PROGRAMS},
            )
        return latest + 1

    @staticmethod
    def check_version(program_id: str, latest: int, if_version: int | None) -> None:
        """Guard a write.

        Raises:
            VersionConflict: The latest version is not ``if_version``.
        """
        if if_version is not None and if_version != latest:
            raise errors.VersionConflict(
                f"program {program_id!r} is at version {latest}, not {if_version}: read it again, then write",
                details={"program_id": program_id, "version": latest, "if_version": if_version},
            )

    def live(self, record: ProgramRecord) -> LiveProgram:
        """The program of a record, built when it is not there."""
        key = (record.program_id, record.version)
        program = self._live.get(key)
        if program is None or program.record is not record:
            program = LiveProgram.build(record, self.toolbox)
        self.keep(program)
        return program

    def keep(self, program: LiveProgram) -> None:
        """Hold a program that is built already."""
        key = (program.record.program_id, program.record.version)
        self._live[key] = program
        if program.record.portable and not self._closed:  # what a notebook made cannot be built again
            self._shelf.use(self, key)

    def forget_tool(self, name: str) -> None:
        """Have programs with that tool built again: a notebook defined it anew."""
        for key, program in list(self._live.items()):
            if any(tool.name == name for tool in program.record.spec.tools):
                self._put_away(key)

    def give_up(self, key: Hashable) -> None:
        """Hold a program or the LM built no longer; called by the shelf. What runs goes on with it."""
        if key == LM_KEY:
            lm, self._lm = self._lm, None
            if lm is not None and lm.connections is not None:
                lm.connections.retire()
        else:
            self._live.pop(key, None)  # type: ignore[call-overload]  # keys are the shelf's as it got them

    def _put_away(self, key: tuple[str, int]) -> None:
        del self._live[key]
        self._shelf.forget(self, key)

    # Changes

    async def commit(self, call: Call, change: Change, then: Callable[[], None] | None = None) -> None:
        """Make a change durable, then visible. Called under ``changing``.

        In a pooled kernel the store is the service's: there the call's reply carries the change, and is answered
        to nobody before it is durable.

        Args:
            call: Whose change.
            change: What changes.
            then: What goes with it in memory; called once it is written, though the caller be cancelled meanwhile.

        Raises:
            StoreError: It could not be written; nothing changed.
            CallStopped: The call was stopped: its reply may have left, and would not carry the change.
        """
        call.check()
        if self.shares_process:
            call.changes.append(change)
            self._apply(change, then)
            return
        writing = asyncio.ensure_future(self._write(change, then))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            # What is in the journal must be in memory too, before the next change may look.
            await asyncio.wait({writing})
            raise

    async def _write(self, change: Change, then: Callable[[], None] | None) -> None:
        if self._journal is not None:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._journal.append, change)
        self._apply(change, then)

    def _apply(self, change: Change, then: Callable[[], None] | None) -> None:
        self.contents.apply(change)
        for program_id, version in list(self._live):
            versions = self.contents.programs.get(program_id)
            if not versions or version < versions[0].version:  # deleted, or too old to be kept
                self._put_away((program_id, version))
        self.ledger.budget = self.contents.settings.budget
        if then is not None:
            then()

    def spent(self) -> Spent:
        """The session's totals, of earlier kernels too."""
        return self.ledger.spent().model_copy(update={"executions": self.executions, **self.outcomes})

    def untold_spent(self) -> Spent | None:
        """The totals that the service has not been told yet; None when they did not move. In a pooled kernel."""
        spent = self.spent()
        if spent == self._told_spent:
            return None
        self._told_spent = spent
        return spent

    async def write_spent(self) -> bool:
        """Write the totals that a budget stands on, if they moved. Called after each program that ran, and later.

        A disk that refuses is logged: it must not cost an answer that was paid for.

        Returns:
            Whether there is nothing left to write; if not, it is to be called again.
        """
        if self._journal is None:
            return True
        if self._writing_spent is None or self._writing_spent.done():
            self._writing_spent = asyncio.create_task(self._write_spent())
        return await asyncio.shield(self._writing_spent)

    async def _write_spent(self) -> bool:
        """Runs as ``_writing_spent``, for all whose programs ended in the same turn of the loop."""
        self._writing_spent = None  # who comes from here on may have spent more
        assert self._journal is not None
        spent = self.spent()
        if spent == self._told_spent:
            return True
        try:
            if not self._journal.append_at_once(spent):
                await asyncio.get_running_loop().run_in_executor(self._executor, self._journal.append, spent)
            self._told_spent = spent
            return True
        except errors.StoreError as refusal:
            log.warning("what session %s spent is not written yet: %s", self.session_id, refusal)
            return False

    # Language model

    @property
    def lm(self) -> Any:
        """The session's language model, built when it is first asked for.

        In a kernel of its own a notebook cell may also have set one with ``dspy.configure``.

        Raises:
            LMNotConfigured: The session has none.
        """
        if not self.shares_process and main_thread_config.lm is not None:
            return main_thread_config.lm
        profile = self.contents.settings.lm
        if profile is None:
            raise errors.LMNotConfigured(
                f"session {self.session_id!r} has no language model: configure one, "
                'for instance lm="openai/gpt-5-mini", or lm="offline/echo" to try things out',
                details={"session_id": self.session_id},
            )
        if self._lm is None:
            self.use_lm(self.prepare_lm(profile), profile)
        elif self.shares_process and not self._closed:
            self._shelf.use(self, LM_KEY)
        return self._lm

    def prepare_lm(self, profile: LMProfile) -> SessionLM:
        """The LM of a profile, or the reason why there is none; changes nothing."""
        return build_lm(profile, session_id=self.session_id, policy=self._policy)

    def restore_settings(self) -> None:
        """Give cells the LM that the session had, where its key is still to be had, and its adapter.

        Called at the kernel's start.
        """
        profile = self.contents.settings.lm
        try:
            if profile is not None:
                self.use_lm(self.prepare_lm(profile), profile)
        except errors.LMFailure as refusal:
            log.warning("session %s starts without its language model: %s", self.session_id, refusal)
        self._use_adapter()

    def touch(self) -> None:
        """The session was used now."""
        self.last_activity = datetime.now(UTC)

    def use_lm(self, lm: SessionLM | None, profile: LMProfile | None) -> SessionLM | None:
        """Make ``lm`` the session's; returns the one it had, to be closed."""
        previous, self._lm = self._lm, lm
        if profile is not None and profile.api_key is not None:
            self._secrets |= {profile.api_key.get_secret_value()}
        if lm is not None and (key := lm.kwargs.get("api_key")):
            self._secrets |= {key}
        if not self.shares_process:
            main_thread_config["lm"] = lm
        elif lm is None or self._closed:
            self._shelf.forget(self, LM_KEY)
        else:
            self._shelf.use(self, LM_KEY)
        return previous

    async def change_settings(
        self, call: Call, change: SettingsChanged | SessionReset, lm: SessionLM | None, *, changed: Collection[str]
    ) -> None:
        """Make new settings durable and use them. Called under ``changing``.

        Args:
            call: Whose change.
            change: What is written.
            lm: The new LM; None is none.
            changed: Which settings: what a notebook cell set stays where only others change.
        """
        previous: SessionLM | None = None

        def use() -> None:
            nonlocal previous
            if "lm" in changed:
                previous = self.use_lm(lm, self.contents.settings.lm)
            if "adapter" in changed or ("lm" in changed and self.contents.settings.adapter is not None):
                self._use_adapter()

        try:
            await self.commit(call, change, use)
        finally:
            await close_lm(previous)

    def _use_adapter(self) -> None:
        """Give notebook cells the session's adapter."""
        settings, lm = self.contents.settings, main_thread_config.lm
        if self.shares_process:
            return
        # two_step extracts with the LM: without one it has to wait for it.
        ready = settings.adapter is not None and (settings.adapter != "two_step" or lm is not None)
        main_thread_config["adapter"] = build_adapter(settings.adapter, settings.lm, lm) if ready else None

    @property
    def secrets(self) -> frozenset[str]:
        """Keys that must not leave in any text."""
        return self._secrets

    # Context

    def context(
        self, call: Call, *, adapter_name: AdapterName | None = None, **more: Any
    ) -> AbstractContextManager[None]:
        """DSPy's settings for one call of this session: nothing in them is another's.

        Args:
            call: What runs; the LM gate finds it in the settings.
            adapter_name: The program's own adapter; None is the session's.
            more: Settings for this call (streaming).
        """
        lm = self.lm
        process = main_thread_config
        base: Mapping[str, Any] = DEFAULT_CONFIG if self.shares_process else process
        own = {
            SETTING: call,
            "lm": lm,
            "adapter": self._adapter(adapter_name, lm),
            # The process's own callbacks (MLflow's) see every session; the list is this call's.
            "callbacks": list(process.callbacks),
            "trace": [],
            "track_usage": True,
            "usage_tracker": None,
            # Only the session's bounded history: an LM's and a module's own lists are shared objects.
            "max_history_size": 0,
            "caller_modules": None,
            "caller_predict": None,
            "stream_listeners": [],
            "send_stream": None,
            "rm": None if self.shares_process else process.rm,
            "allow_tool_async_sync_conversion": True,
        }
        context: Callable[..., AbstractContextManager[None]] = dspy.context
        return context(**{**base, **own, **more})

    def _adapter(self, name: AdapterName | None, lm: Any) -> Any:
        settings = self.contents.settings
        if name is None and not self.shares_process and main_thread_config.adapter is not None:
            return main_thread_config.adapter
        return build_adapter(name or settings.adapter, settings.lm, lm)

    async def close(self) -> None:
        """Close what the session holds open. Called when it ends or its kernel does."""
        self._closed = True
        self.lane.shutdown(cancel_futures=True)
        self.history.clear()
        for key in list(self._live):
            self._put_away(key)
        await close_lm(self.use_lm(None, None))
        if self._journal is not None:
            await self.write_spent()
            await asyncio.get_running_loop().run_in_executor(self._executor, self._journal.close)


async def close_lm(lm: SessionLM | None) -> None:
    """Close an LM's connections; a failure to close is logged, not raised: the LM is out of use already."""
    if lm is None:
        return
    try:
        await lm.aclose()
    except Exception:
        log.warning("the connections of %r did not close", lm, exc_info=True)
