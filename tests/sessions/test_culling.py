"""Who is culled and when, as a table and as properties; and the loop that acts on it, without a ticking clock."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Coroutine, Iterable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from dspex_kernels import errors
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions import culling, idle
from dspex_kernels.sessions.culling import Action, Culler, Facts, Policy, due
from dspex_kernels.sessions.idle import facts_of
from dspex_kernels.sessions.live import LiveSession
from dspex_kernels.sessions.model import SessionRecord
from dspex_kernels.sessions.store.sql import SQLStore
from tests.sessions.memory_backend import MemoryService

KEEP, HIBERNATE, DESTROY = Action.KEEP, Action.HIBERNATE, Action.DESTROY
READY, HIBERNATED = SessionStatus.READY, SessionStatus.HIBERNATED
USED = datetime(2026, 3, 28, 12, tzinfo=UTC)
IDLE = Policy(cull_idle_timeout=100)
BOTH = Policy(cull_idle_timeout=100, session_ttl=1000)
TICK = timedelta(microseconds=1)


def after(seconds: float) -> datetime:
    return USED + timedelta(seconds=seconds)


def facts(status: SessionStatus = READY, **more: Any) -> Facts:
    return Facts(status, USED, **more)


@pytest.mark.parametrize(
    ("known", "policy", "seconds", "action", "at"),
    [
        (facts(), IDLE, 0, KEEP, 100),
        (facts(), IDLE, 99.9, KEEP, 100),
        (facts(), IDLE, 100, HIBERNATE, 100),
        (facts(), IDLE, 10**6, HIBERNATE, 100),
        (facts(), IDLE, -50, KEEP, 100),  # the clock was set back
        (facts(HIBERNATED), IDLE, 10**6, KEEP, None),
        (facts(SessionStatus.FAILED), IDLE, 10**6, KEEP, None),
        (facts(SessionStatus.STARTING), BOTH, 10**6, KEEP, None),
        (facts(SessionStatus.DESTROYED), BOTH, 10**6, KEEP, None),
        (facts(), BOTH, 999.9, HIBERNATE, 100),
        (facts(), BOTH, 1000, DESTROY, 1000),
        (facts(HIBERNATED), BOTH, 999.9, KEEP, 1000),
        (facts(HIBERNATED), BOTH, 1000, DESTROY, 1000),
        (facts(SessionStatus.FAILED), BOTH, 1000, DESTROY, 1000),
        (facts(), Policy(cull_idle_timeout=100, session_ttl=50), 49, KEEP, 50),
        (facts(), Policy(cull_idle_timeout=100, session_ttl=50), 200, DESTROY, 50),
        (facts(), Policy(cull_idle_timeout=0), 10**6, KEEP, None),
        (facts(), Policy(cull_idle_timeout=0, session_ttl=50), 49, KEEP, 50),
        (facts(), Policy(cull_idle_timeout=1e300), 10**6, KEEP, None),
        (facts(running=1), BOTH, 10**6, KEEP, None),
        (facts(running=1), Policy(100, True, True, 1000), 10**6, KEEP, None),
        (facts(HIBERNATED, running=1), BOTH, 10**6, KEEP, None),
        (facts(jobs=1), BOTH, 10**6, KEEP, None),
        (facts(busy=True), BOTH, 10**6, KEEP, None),
        (facts(clients=1), BOTH, 10**6, KEEP, None),
        (facts(jobs=1), Policy(100, cull_busy=True), 100, HIBERNATE, 100),
        (facts(busy=True), Policy(100, cull_busy=True), 100, HIBERNATE, 100),
        (facts(clients=1), Policy(100, cull_busy=True), 100, KEEP, None),
        (facts(clients=1), Policy(100, cull_connected=True), 100, HIBERNATE, 100),
        (facts(busy=True), Policy(100, cull_connected=True), 100, KEEP, None),
        (facts(busy=True, clients=1), Policy(100, True, True), 100, HIBERNATE, 100),
    ],
)
def test_what_is_due(known: Facts, policy: Policy, seconds: float, action: Action, at: float | None) -> None:
    verdict = due(known, policy, after(seconds))
    assert (verdict.action, verdict.at) == (action, None if at is None else after(at))
    assert verdict.reason


def every_case() -> Iterable[tuple[Facts, Policy]]:
    draw = random.Random(7)
    for status, running, jobs, clients, busy in itertools.product(
        SessionStatus, (0, 1), (0, 1), (0, 2), (False, True)
    ):
        for cull_busy, cull_connected in itertools.product((False, True), repeat=2):
            timeouts = draw.choices([0, 0.1, 0.3, 60, 3600.000001, 86400], k=2)
            yield (
                Facts(status, USED, running, jobs, clients, busy),
                Policy(timeouts[0], cull_busy, cull_connected, timeouts[1]),
            )


def test_what_was_due_once_stays_due_and_at_is_the_first_moment_of_it() -> None:
    order, seen = list(Action), set()
    for known, policy in every_case():
        edges = [after(seconds) for seconds in (0, policy.cull_idle_timeout, policy.session_ttl, 10**7)]
        moments = sorted(edge + step for edge in edges for step in (-TICK, timedelta(0), TICK))
        verdicts = [due(known, policy, moment) for moment in moments]
        ranks = [order.index(verdict.action) for verdict in verdicts]
        assert ranks == sorted(ranks)
        for moment, verdict in zip(moments, verdicts, strict=True):
            if verdict.at is None:
                assert verdicts[-1].action is KEEP
                continue
            first = due(known, policy, verdict.at).action
            assert due(known, policy, verdict.at - TICK).action is not first
            assert (
                (moment < verdict.at and first is not KEEP) if verdict.action is KEEP else first is verdict.action
            )
            seen.add(verdict.action)
    assert seen == {KEEP, HIBERNATE, DESTROY}


@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=5)), ZoneInfo("Europe/Berlin")], ids=str)
def test_the_time_zone_changes_nothing_not_even_where_clocks_are_turned(zone: Any) -> None:
    # Berlin's clocks were turned an hour ahead in the night after USED.
    day = Policy(cull_idle_timeout=86400)
    known = Facts(READY, USED.astimezone(zone))
    assert due(known, day, after(86399).astimezone(zone)) == (KEEP, "it was used of late", after(86400))
    assert due(known, day, after(86400).astimezone(zone)).action is HIBERNATE


def test_times_without_a_zone_are_refused() -> None:
    naive = USED.replace(tzinfo=None)
    with pytest.raises(ValueError, match="no time zone"):
        due(Facts(READY, naive), IDLE, USED)
    with pytest.raises(ValueError, match="no time zone"):
        due(Facts(READY, naive), IDLE, naive)
    with pytest.raises(ValueError, match="no time zone"):
        due(facts(), IDLE, naive)


class Sessions:
    """Sessions for a culler: what is known of them, what a look at their kernels adds, what was done to them."""

    def __init__(self, known: dict[str, Facts]) -> None:
        self.known = known
        self.seen: dict[str, Facts | None] = {}
        self.looked: list[str] = []
        self.touched: list[str] = []
        self.done: list[tuple[str, str]] = []

    def candidates(self) -> Iterable[str]:
        return iter(self.known)

    def facts(self, session_id: str) -> Facts | None:
        return self.known.get(session_id)

    async def look(self, session_id: str) -> Facts | None:
        self.looked.append(session_id)
        await asyncio.sleep(0)
        return self.seen.get(session_id, self.known.get(session_id))

    def touch(self, session_id: str) -> None:
        self.touched.append(session_id)

    async def hibernate(self, session_id: str, reason: str) -> None:
        self.done.append(("hibernate", session_id))

    async def destroy(self, session_id: str, reason: str) -> None:
        self.done.append(("destroy", session_id))


class SessionsThatFail(Sessions):
    """Some cannot be looked at, some cannot be culled."""

    async def look(self, session_id: str) -> Facts | None:
        if session_id == "unreachable":
            raise errors.KernelDied("it died just now")
        return await super().look(session_id)

    async def hibernate(self, session_id: str, reason: str) -> None:
        if session_id == "broken":
            raise RuntimeError("a fault of ours")
        await super().hibernate(session_id, reason)


class SessionsThatHang(Sessions):
    """Whose end does not come."""

    def __init__(self, known: dict[str, Facts]) -> None:
        super().__init__(known)
        self.hanging = 0
        self.most = 0
        self.changed = asyncio.Event()

    async def hibernate(self, session_id: str, reason: str) -> None:
        self.hanging += 1
        self.most = max(self.most, self.hanging)
        self.changed.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.hanging -= 1


def culler(sessions: Sessions, policy: Policy = BOTH, seconds: float = 200, **options: Any) -> Culler:
    return Culler(
        sessions,
        lambda: policy,
        interval=60,
        log=logging.getLogger("test.culling"),
        now=lambda: after(seconds),
        **options,
    )


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work()

    asyncio.run(bounded())


def test_a_pass_hibernates_and_destroys_what_is_due_and_looks_at_nothing_else() -> None:
    async def main() -> None:
        sessions = Sessions(
            {
                "idle": facts(),
                "used": Facts(READY, after(150)),
                "calling": facts(running=1),
                "asleep": facts(HIBERNATED),
                "forgotten": Facts(HIBERNATED, after(-2000)),
            }
        )
        await culler(sessions).cull()
        assert sorted(sessions.done) == [("destroy", "forgotten"), ("hibernate", "idle")]
        assert sorted(sessions.looked) == ["forgotten", "idle"]
        assert sessions.touched == []

    run(main)


@pytest.mark.parametrize(
    ("found", "touched"),
    [
        (facts(busy=True), True),
        (facts(jobs=1), True),
        (facts(clients=1), True),
        (facts(running=1), False),  # its end will be activity
        (Facts(READY, after(190)), False),
        (facts(HIBERNATED), False),
        (None, False),
    ],
    ids=["busy", "job", "notebook", "call", "used", "hibernated", "gone"],
)
def test_what_a_look_finds_in_use_is_kept(found: Facts | None, touched: bool) -> None:
    async def main() -> None:
        sessions = Sessions({"s": facts()})
        sessions.seen["s"] = found
        await culler(sessions).cull()
        assert sessions.looked == ["s"]
        assert sessions.done == []
        assert sessions.touched == (["s"] if touched else [])

    run(main)


def test_what_was_in_use_at_an_earlier_look_is_looked_at_again() -> None:
    async def main() -> None:
        sessions = Sessions({"s": facts(busy=True, clients=1)})
        sessions.seen["s"] = facts()
        await culler(sessions).cull()
        assert sessions.done == [("hibernate", "s")]

    run(main)


def test_nothing_is_looked_at_where_nothing_is_ever_culled() -> None:
    async def main() -> None:
        sessions = Sessions({"s": facts()})
        for policy in (Policy(0), Policy(1e300), Policy(0, session_ttl=1e11)):
            await culler(sessions, policy).cull()
        assert sessions.looked == sessions.done == []

    run(main)


def test_one_failure_is_logged_and_keeps_no_other_session(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        names = ["unreachable", *(f"a{n}" for n in range(20)), "broken", *(f"b{n}" for n in range(20))]
        sessions = SessionsThatFail({name: facts() for name in names})
        await culler(sessions).cull()
        assert {name for _, name in sessions.done} == set(names) - {"unreachable", "broken"}

    with caplog.at_level(logging.WARNING, "test.culling"):
        run(main)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "session unreachable was not culled: it died just now"),
        ("ERROR", "session broken was not culled"),
    ]


def test_so_many_are_culled_at_a_time_and_cancelling_ends_them() -> None:
    async def main() -> None:
        sessions = SessionsThatHang({f"s{n}": facts() for n in range(100)})
        culling_them = asyncio.create_task(culler(sessions).cull())
        while sessions.hanging < culling.MAX_CULLING:
            sessions.changed.clear()
            await sessions.changed.wait()
        for _ in range(100):  # none of the others comes in, whatever the loop does
            await asyncio.sleep(0)
        culling_them.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await culling_them
        assert culling_them.cancelled()
        assert (sessions.most, sessions.hanging) == (culling.MAX_CULLING, 0)

    run(main)


def test_one_that_hangs_is_left_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        sessions = SessionsThatHang({"s": facts()})
        await culler(sessions, timeout=0.01).cull()
        assert (sessions.most, sessions.hanging) == (1, 0)

    run(main)
    assert "session s was not culled within 0.01 s" in caplog.text


class PassingTime:
    """The time a loop sleeps through: it ends the loop after some sleeps."""

    def __init__(self, sleeps: int) -> None:
        self.slept: list[float] = []
        self.sleeps = sleeps

    async def sleep(self, seconds: float) -> None:
        if len(self.slept) == self.sleeps:
            raise asyncio.CancelledError
        self.slept.append(seconds)


def test_the_loop_makes_a_pass_each_interval_and_a_failed_pass_does_not_end_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class SessionsThatFailOnce(Sessions):
        passes = 0

        def candidates(self) -> Iterable[str]:
            self.passes += 1
            if self.passes == 1:
                raise RuntimeError("a fault of ours")
            return super().candidates()

    async def main() -> None:
        sessions, time = SessionsThatFailOnce({"s": facts()}), PassingTime(3)
        with pytest.raises(asyncio.CancelledError):
            await culler(sessions, sleep=time.sleep).run()
        assert time.slept == [60, 60, 60]
        assert sessions.done == [("hibernate", "s")] * 2

    run(main)
    assert "a pass over the idle sessions failed" in caplog.text


def test_the_loop_goes_on_while_ten_thousand_sessions_are_decided_on() -> None:
    async def main() -> None:
        known = {f"s{n}": Facts(READY, after(150)) for n in range(10_000)}
        sessions = Sessions(known)
        rounds = 0

        async def count() -> None:
            nonlocal rounds
            while True:
                rounds += 1
                known.pop(f"s{rounds}")  # they come and go meanwhile
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        await culler(sessions).cull()
        counting.cancel()
        assert rounds >= 10_000 // culling.PORTION - 1
        assert sessions.looked == []

    run(main)


# The service's sessions, as the culler sees them


def record_of(session_id: str) -> SessionRecord:
    return SessionRecord(session_id=session_id, owner="", backend="dedicated", created_at=USED, last_activity=USED)


def test_what_was_told_of_a_kernel_went_with_it() -> None:
    """Else a notebook that was attached once would keep a session for ever that has no kernel any more."""
    live = LiveSession.of(record_of("s"))
    live.busy, live.clients, live.running = True, 2, 1
    assert facts_of(live) == Facts(HIBERNATED, USED, running=1)
    live.status = READY
    assert facts_of(live) == Facts(READY, USED, running=1, clients=2, busy=True)


@pytest.fixture
def make_service(tmp_path: Path) -> Callable[[], MemoryService]:
    return lambda: MemoryService(data_dir=str(tmp_path), store_url=f"sqlite:///{tmp_path / 'store.sqlite'}")


def test_a_kernel_that_does_not_answer_a_look_counts_as_busy(
    make_service: Callable[[], MemoryService], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle, "LOOK_TIMEOUT", 0.01)

    async def main() -> None:
        async with make_service() as service:
            await service.create_session(session_id="s")
            service.memory.answering.clear()
            found = await service._culler._sessions.look("s")
            assert found is not None
            assert found.busy
            service.memory.answering.set()

    asyncio.run(main())


def test_a_look_at_a_session_that_no_service_has_learns_what_became_of_it(
    make_service: Callable[[], MemoryService],
) -> None:
    async def main() -> None:
        async with make_service() as service:
            await service.create_session(session_id="s")
        async with make_service() as service:
            later = datetime.now(UTC) + timedelta(hours=1)
            async with SQLStore(service.store_url) as other:  # as a service that came and went meanwhile
                await other.set_backend("s", "pooled", None)
                await other.touch("s", later)
            found = await service._culler._sessions.look("s")
            assert found == Facts(HIBERNATED, later)
            assert (await service.get_session_info("s")).backend == "pooled"

    asyncio.run(main())
