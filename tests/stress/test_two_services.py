"""Two services on one store: a session is one service's at a time, and lives in one kernel at a time."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from dspex_kernels import errors
from dspex_kernels.sessions import tenure
from tests.provisioning.families import Identity
from tests.stress import figures
from tests.stress.accounts import program
from tests.stress.remote_service import RemoteService
from tests.waiting import wait_until

SESSIONS = {"pooled-1": "pooled", "pooled-2": "pooled", "dedicated-1": "dedicated"}
TAKEOVERS = figures.scaled(5)
"""Times that a service is killed and the other one takes over."""
CALL_TIMEOUT = 60.0
OTHER = "another-machine"


async def found(service: RemoteService) -> None:
    """Make the sessions, each with a program that tells where it runs."""
    for session_id, backend in SESSIONS.items():
        await service.ask("create_session", session_id=session_id, backend=backend)
        await service.call(session_id, "configure", {"lm": "offline/echo"})
        await service.call(session_id, "create_program", {"program_id": "where", "module": "where"})


async def where(service: RemoteService, session_id: str, *, timeout: float = CALL_TIMEOUT) -> Identity:
    """The kernel in which a session's program runs, as the program itself says."""
    args = {"program_id": "where", "inputs": {"question": "?"}}
    told = await service.call(session_id, "execute_program", args, timeout=timeout)
    return Identity.of(int(told["outputs"]["answer"]))


async def change(service: RemoteService, session_id: str, text: str) -> None:
    await service.call(session_id, "create_program", program("text", text), timeout=CALL_TIMEOUT)


async def steal(service: RemoteService, session_id: str) -> None:
    await change(service, session_id, "Stolen.")


async def text_of(service: RemoteService, session_id: str) -> str:
    told = await service.call(session_id, "get_program", {"program_id": "text"}, timeout=CALL_TIMEOUT)
    return str(told["instructions"])


async def assert_refused(service: RemoteService, session_id: str) -> None:
    """Neither to run a program nor to change one is the service given the session."""
    for asked in (where(service, session_id), steal(service, session_id)):
        with pytest.raises(errors.SessionNotReady, match="another service"):
            await asked


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(figures.TIMEOUT):
            await work()

    asyncio.run(bounded())


pytestmark = [pytest.mark.stress, pytest.mark.timeout(figures.TIMEOUT + 60)]


def test_the_second_refuses_and_takes_over_when_the_first_is_killed(tmp_path):
    async def work() -> None:
        slowest = 0.0
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(RemoteService.started(tmp_path))
            await found(first)
            for number in range(TAKEOVERS):
                second = await stack.enter_async_context(RemoteService.started(tmp_path))
                former = {}
                for session_id in SESSIONS:
                    await change(first, session_id, f"Text {number}.")
                    former[session_id] = await where(first, session_id)
                    await assert_refused(second, session_id)
                killed_at = time.monotonic()
                await first.kill()
                first = second
                await asyncio.gather(*(_take_over(second, s, former[s], f"Text {number}.") for s in SESSIONS))
                slowest = max(slowest, time.monotonic() - killed_at)
        figures.tell("two services, first killed", takeovers=TAKEOVERS, slowest_takeover_s=slowest)
        assert slowest < tenure.LEASE

    run(work)


async def _take_over(service: RemoteService, session_id: str, former: Identity, text: str) -> None:
    """Its first answer comes when the session's former kernel is gone: no session lives in two kernels."""
    here = await where(service, session_id)
    assert not former.is_alive
    assert here != former
    assert await text_of(service, session_id) == text


def test_a_session_that_was_made_after_the_second_began_is_taken_over_too(tmp_path):
    async def work() -> None:
        async with RemoteService.started(tmp_path) as first, RemoteService.started(tmp_path) as second:
            await found(first)
            former = {session_id: await where(first, session_id) for session_id in SESSIONS}
            for session_id in SESSIONS:
                await change(first, session_id, "Made later.")
                await assert_refused(second, session_id)
            await first.kill()
            await asyncio.gather(*(_take_over(second, s, former[s], "Made later.") for s in SESSIONS))

    run(work)


def test_a_service_that_was_stopped_on_this_machine_keeps_its_sessions(tmp_path):
    async def work() -> None:
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(RemoteService.started(tmp_path))
            await found(first)
            second = await stack.enter_async_context(RemoteService.started(tmp_path))
            former = {session_id: await where(first, session_id) for session_id in SESSIONS}
            first.send_signal(signal.SIGSTOP)
            stopped_at = time.monotonic()
            refusals = 0
            while time.monotonic() < stopped_at + tenure.LEASE + tenure.RENEW_INTERVAL:
                for session_id in SESSIONS:
                    await assert_refused(second, session_id)
                    refusals += 1
            first.send_signal(signal.SIGCONT)
            for session_id in SESSIONS:
                assert await where(first, session_id) == former[session_id]
                await change(first, session_id, "Kept.")
                await assert_refused(second, session_id)
            figures.tell("two services, first stopped", stopped_s=time.monotonic() - stopped_at, refusals=refusals)

    run(work)


def test_a_service_on_another_machine_takes_over_from_one_that_sleeps_and_the_sleeper_is_refused(tmp_path):
    async def work() -> None:
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(RemoteService.started(tmp_path))
            await found(first)
            second = await stack.enter_async_context(RemoteService.started(tmp_path, host=OTHER))
            former = {session_id: await where(first, session_id) for session_id in SESSIONS}
            first.send_signal(signal.SIGSTOP)
            stopped_at = time.monotonic()
            await assert_refused(second, "pooled-1")
            # They wait in the pipe, and are the first that it sees when it wakes.
            late = [
                asyncio.create_task(ask(first, session_id)) for session_id in SESSIONS for ask in (where, steal)
            ]
            pooled = [session_id for session_id, backend in SESSIONS.items() if backend == "pooled"]
            await asyncio.gather(*(_wait_for_takeover(second, session_id) for session_id in pooled))
            taken_s = time.monotonic() - stopped_at
            for session_id in pooled:
                assert await where(second, session_id) != former[session_id]
                await change(second, session_id, "Taken over.")
            # The journal of a dedicated one is its kernel's as long as that lives, wherever its service may be.
            with pytest.raises(errors.KernelStartFailed):
                await where(second, "dedicated-1")
            first.send_signal(signal.SIGCONT)
            for outcome in await asyncio.gather(*late, return_exceptions=True):
                assert isinstance(outcome, errors.SessionNotReady), outcome
            for session_id in SESSIONS:
                await assert_refused(first, session_id)
            for session_id in pooled:
                assert await text_of(second, session_id) == "Taken over."
            dedicated = former["dedicated-1"]
            await wait_until(lambda: not dedicated.is_alive, deadline=tenure.RENEW_INTERVAL + 20, what="its end")
            await _wait_for_takeover(second, "dedicated-1")
            figures.tell("two services, first asleep", taken_s=taken_s, lease_s=tenure.LEASE)
            assert tenure.LEASE - tenure.RENEW_INTERVAL < taken_s < 2 * tenure.LEASE

    run(work)


async def _wait_for_takeover(service: RemoteService, session_id: str) -> Identity:
    """Ask until the session is the service's."""
    while True:
        try:
            return await where(service, session_id)
        except (errors.SessionNotReady, errors.KernelStartFailed):
            await asyncio.sleep(0.2)
