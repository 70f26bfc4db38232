"""When a session is culled for idleness: a pure decision, and the loop that acts on it.

An idle session is *hibernated*: its place is closed, its record stays, the next call brings it back. Much later
(``session_ttl``) it is destroyed. A running call keeps a session whatever the policy; a background job, a busy
kernel or an attached notebook keeps it unless the policy says otherwise. Health checks do not count as activity.

The loop reads a session's state once more right before it acts: what the kernel alone knows (a cell that runs, a
notebook that is attached) is asked only of those that would be culled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from logging import Logger, LoggerAdapter
from typing import Any, NamedTuple, Protocol

from dspex_kernels import errors
from dspex_kernels.protocol.states import SessionStatus

MAX_CULLING = 16
"""Sessions that are looked at or culled at the same time: each may cost a kernel's end."""
CULL_TIMEOUT = 60.0
"""Seconds for one session, its look included: a kernel's end takes fifteen at most."""
PORTION = 500
"""Sessions decided on between two rounds of the event loop: about 1 ms."""


class Facts(NamedTuple):
    """What is known of a session. Not a dataclass: ten thousand are made in each pass, and this costs a third."""

    status: SessionStatus
    last_activity: datetime
    """With a time zone."""
    running: int = 0
    """Calls that have not been answered, health checks left out."""
    jobs: int = 0
    """Background jobs in its kernel."""
    clients: int = 0
    """Notebooks and consoles attached to its kernel."""
    busy: bool = False
    """Its kernel runs a cell."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What is culled.

    Attributes:
        cull_idle_timeout: Seconds after the last activity until a session is hibernated; 0 is never.
        cull_busy: Also while its kernel is busy or has background jobs.
        cull_connected: Also while notebooks are attached.
        session_ttl: Seconds after the last activity until a session is destroyed, hibernated or not; 0 is never.
    """

    cull_idle_timeout: float = 3600.0
    cull_busy: bool = False
    cull_connected: bool = False
    session_ttl: float = 0.0


class Action(StrEnum):
    """What is due."""

    KEEP = "keep"
    HIBERNATE = "hibernate"
    DESTROY = "destroy"


class Verdict(NamedTuple):
    """What is due for a session."""

    action: Action
    reason: str
    """One line."""
    at: datetime | None
    """Since when ``action`` is due; for one that is kept, when it will not be kept any more, in UTC. None is never,
    as things are."""


def due(facts: Facts, policy: Policy, now: datetime) -> Verdict:
    """Decide what becomes of a session.

    Args:
        facts: What is known of it.
        policy: What is culled.
        now: With a time zone.

    Raises:
        ValueError: A time has no time zone.
    """
    if reason := kept_by(facts, policy):
        return Verdict(Action.KEEP, reason, None)
    now = _in_utc(now)
    since = _in_utc(facts.last_activity)
    destroyed_at = _later(since, policy.session_ttl)
    hibernated_at = _later(since, policy.cull_idle_timeout) if facts.status is SessionStatus.READY else None
    if destroyed_at is not None and destroyed_at <= now:
        return Verdict(Action.DESTROY, f"it was not used for {policy.session_ttl:g} s (session_ttl)", destroyed_at)
    if hibernated_at is not None and hibernated_at <= now:
        reason = f"it was idle for {policy.cull_idle_timeout:g} s (cull_idle_timeout)"
        return Verdict(Action.HIBERNATE, reason, hibernated_at)
    at = min((moment for moment in (hibernated_at, destroyed_at) if moment is not None), default=None)
    return Verdict(Action.KEEP, "it was used of late" if at is not None else "the policy never culls it", at)


def kept_by(facts: Facts, policy: Policy) -> str:
    """What keeps a session however long ago it was used, in one line; "" where nothing does."""
    if facts.status is SessionStatus.STARTING:
        return "it is starting"
    if facts.status is SessionStatus.DESTROYED:
        return "it is destroyed"
    if facts.running:
        return f"calls run in it: {facts.running}"
    if not policy.cull_busy and facts.jobs:
        return f"background jobs run in it: {facts.jobs}"
    if not policy.cull_busy and facts.busy:
        return "its kernel is busy"
    if not policy.cull_connected and facts.clients:
        return f"notebooks are attached to it: {facts.clients}"
    return ""


def _in_utc(moment: datetime) -> datetime:
    """The same moment in UTC: sums in another time zone skip and repeat an hour."""
    if moment.tzinfo is UTC:
        return moment
    if moment.utcoffset() is None:
        raise ValueError(f"{moment} has no time zone: give datetime.now(UTC)")
    return moment.astimezone(UTC)


def _later(since: datetime, seconds: float) -> datetime | None:
    """So many seconds later; None for 0, which is never, and for what no calendar holds."""
    try:
        return since + timedelta(seconds=seconds) if seconds else None
    except OverflowError:
        return None


class Cullable(Protocol):
    """The sessions, as a culler sees them."""

    def candidates(self) -> Iterable[str]:
        """The ids of all sessions; read at once, before the event loop goes on."""

    def facts(self, session_id: str) -> Facts | None:
        """What is known of a session without asking anybody; None where there is no such session.

        Of ``jobs``, ``clients`` and ``busy`` only the look's word counts.
        """

    async def look(self, session_id: str) -> Facts | None:
        """What is known of a session and its kernel now; None where there is no such session.

        Called for sessions that would be culled. What a kernel is asked for comes first, what ``facts`` tells is
        read after its answer: a call may have come meanwhile.
        """

    def touch(self, session_id: str) -> None:
        """Note that a session is in use now. Called from ``Culler``, when a look finds jobs, cells or notebooks."""

    async def hibernate(self, session_id: str, reason: str) -> None:
        """Close a session's place; it takes no call in between. What it raises is logged."""

    async def destroy(self, session_id: str, reason: str) -> None:
        """End a session for good. What it raises is logged."""


class Culler:
    """Culls what is due, again and again.

    Args:
        sessions: What may be culled.
        policy: Read for each pass, so that it may change.
        interval: Seconds between two passes, above 0.
        log: Is told what is culled, and what could not be.
        now: The time, in UTC; injected by tests.
        sleep: Waits for seconds; injected by tests.
        timeout: Seconds for one session.
    """

    def __init__(
        self,
        sessions: Cullable,
        policy: Callable[[], Policy],
        *,
        interval: float,
        log: Logger | LoggerAdapter[Any],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        timeout: float = CULL_TIMEOUT,
    ) -> None:
        self._sessions = sessions
        self._policy = policy
        self._interval = interval
        self._log = log
        self._now = now
        self._sleep = sleep
        self._timeout = timeout

    async def run(self) -> None:
        """Make a pass every ``interval`` seconds, until cancelled."""
        while True:
            await self._sleep(self._interval)
            try:
                await self.cull()
            except Exception:  # noqa: BLE001  # whatever failed, idle sessions are culled in the next pass
                self._log.exception("a pass over the idle sessions failed; the next is in %g s", self._interval)

    async def cull(self) -> None:
        """Make one pass: decide on every session, then act on those that are due, and wait for that."""
        policy = self._policy()
        found = await self._find_due(policy)
        if not found:
            return
        left = iter(found)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(MAX_CULLING, len(found))):
                group.create_task(self._work(left, policy))

    async def _find_due(self, policy: Policy) -> list[str]:
        timeouts = [seconds for seconds in (policy.cull_idle_timeout, policy.session_ttl) if seconds]
        now = self._now()
        # Most sessions are told by one comparison, which halves what a pass over ten thousand costs.
        used_before = _later(now, -min(timeouts)) if timeouts else None
        if used_before is None:
            return []
        found = []
        for number, session_id in enumerate(list(self._sessions.candidates()), start=1):
            facts = self._sessions.facts(session_id)
            if facts is not None and facts.last_activity <= used_before:
                # What its kernel told in an earlier look may be over: only the next look tells.
                facts = facts._replace(jobs=0, clients=0, busy=False)
                if due(facts, policy, now).action is not Action.KEEP:
                    found.append(session_id)
            if number % PORTION == 0:
                await asyncio.sleep(0)
        return found

    async def _work(self, left: Iterator[str], policy: Policy) -> None:
        for session_id in left:
            try:
                async with asyncio.timeout(self._timeout):
                    await self._cull_one(session_id, policy)
            except TimeoutError:
                self._log.warning("session %s was not culled within %g s", session_id, self._timeout)
            except errors.DSPexError as failure:
                self._log.warning("session %s was not culled: %s", session_id, failure.message)
            except Exception:  # noqa: BLE001  # one session's failure must not keep the others
                self._log.exception("session %s was not culled", session_id)

    async def _cull_one(self, session_id: str, policy: Policy) -> None:
        """Look at a session, and act if it is due still. From the look's answer to the act there is no await."""
        facts = await self._sessions.look(session_id)
        if facts is None:
            return
        verdict = due(facts, policy, self._now())
        if verdict.action is Action.KEEP:
            if facts.jobs or facts.busy or facts.clients:
                # Its kernel's word of a job's end may never come: it shall not be culled the moment the job ends.
                self._sessions.touch(session_id)
            return
        self._log.info("session %s: %s, for %s", session_id, verdict.action, verdict.reason)
        if verdict.action is Action.HIBERNATE:
            await self._sessions.hibernate(session_id, verdict.reason)
        else:
            await self._sessions.destroy(session_id, verdict.reason)
