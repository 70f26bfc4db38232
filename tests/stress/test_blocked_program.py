"""A program that will not end: its call ends all the same, and its neighbours do not notice, or come back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dspex_kernels import SessionService, errors
from dspex_kernels.sessions.service import ServiceSession
from tests.live.kernels import plugin_path
from tests.stress import figures
from tests.stress.services import pids_of_pool, started, until_whole
from tests.waiting import wait_until

KERNELS = 2
NEIGHBOURS = 8
"""In the pool, beside the session whose program blocks; in the dedicated backend, each with a kernel, fewer."""
ROUNDS = figures.scaled(2)
"""How often a program blocks."""
BLOCKED_TIMEOUT = 1.0
"""Seconds that the blocking call has."""
LATE = 15.0
"""Seconds after its deadline from when it counts as unanswered."""


class Neighbours:
    """Sessions that ask all the time, and how they are answered."""

    def __init__(self, sessions: list[ServiceSession]) -> None:
        self.sessions = sessions
        self.outcomes: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        """Calls that went well, by session."""
        self.longest = 0.0
        """Seconds that a call took at most."""

    @contextlib.asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for session in self.sessions:
                group.create_task(self._keep_asking(session, over))
            try:
                yield
            finally:
                over.set()

    async def _keep_asking(self, session: ServiceSession, over: asyncio.Event) -> None:
        while not over.is_set():
            began = time.monotonic()
            try:
                told = await session.call("get_program", {"program_id": "qa"}, timeout=30)
                assert told["instructions"] == f"Answer for {session.session_id}."
                await ask(session)
            except errors.DSPexError as failure:
                self.outcomes[failure.code] += 1
            else:
                self.outcomes["ok"] += 1
                self.answered[session.session_id] += 1
            self.longest = max(self.longest, time.monotonic() - began)

    async def until_answered(self, times: int = 3) -> None:
        """Return when each was answered so many times more."""
        before = self.answered.copy()
        everybody = [session.session_id for session in self.sessions]
        await wait_until(
            lambda: all(self.answered[name] >= before[name] + times for name in everybody),
            deadline=60,
            what="answers to all neighbours",
        )


async def make(service: SessionService, session_id: str) -> ServiceSession:
    session = await service.create_session(session_id=session_id, lm="offline/echo")
    fields = {"inputs": [{"name": "question"}], "outputs": [{"name": "answer"}]}
    await session.create_program("qa", {**fields, "instructions": f"Answer for {session_id}."})
    await ask(session)
    return session


async def ask(session: ServiceSession) -> None:
    told = await session.execute_program("qa", {"question": session.session_id}, timeout=30)
    assert told.answer


async def block(session: ServiceSession, fifo: Path) -> str:
    """Run the program that does not end; with which code the call ended."""
    try:
        async with asyncio.timeout(BLOCKED_TIMEOUT + LATE):
            await session.execute_program("blocked", {"question": "?"}, timeout=BLOCKED_TIMEOUT)
    except errors.DSPexError as failure:
        return failure.code
    raise AssertionError(f"{fifo} was opened by somebody")


async def pid_of(session: ServiceSession) -> int | None:
    pid: int | None = (await session.info())["kernel_pid"]
    return pid


async def until_gone(service: SessionService, pid: int) -> None:
    """Return when a kernel has ended, and the service knows."""
    await wait_until(lambda: not Path(f"/proc/{pid}").exists(), deadline=60, what=f"the end of kernel {pid}")
    living = service._kernels._living
    await wait_until(lambda: all(kernel.pid != pid for kernel in living.values()), what="the service to see it")


@pytest.fixture
def fifo(tmp_path, monkeypatch) -> Path:
    """What nobody ever opens for writing. The kernels know the modules that wait for it."""
    monkeypatch.setenv("PYTHONPATH", plugin_path())
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


@pytest.mark.stress
@pytest.mark.timeout(figures.TIMEOUT + 60)
@pytest.mark.parametrize("backend", ["pooled", "dedicated"])
def test_a_program_that_blocks_its_thread_costs_its_neighbours_nothing(backend, tmp_path, fifo):
    async def work() -> None:
        async with started(tmp_path, backend, kernels=KERNELS) as service:
            blocked = await make(service, "blocked")
            await blocked.create_program("blocked", module="blocks", module_args={"fifo": str(fifo)})
            number = NEIGHBOURS if backend == "pooled" else 1
            neighbours = Neighbours([await make(service, f"neighbour-{n}") for n in range(number)])
            codes: Counter[str] = Counter()
            async with neighbours.asking():
                for _ in range(ROUNDS):
                    pid = await pid_of(blocked)
                    await neighbours.until_answered()
                    codes[await block(blocked, fifo)] += 1
                    await ask(blocked)
                    await until_gone(service, pid)
                    if backend == "pooled":
                        await until_whole(service, KERNELS)
                        assert pid not in pids_of_pool(service)
                    await ask(blocked)
                    assert await pid_of(blocked) != pid
                    await neighbours.until_answered()
            figures.tell(f"blocked thread, {backend}", codes=dict(codes), neighbours=dict(neighbours.outcomes))
        assert codes == {"timeout": ROUNDS}
        assert neighbours.outcomes.keys() == {"ok"}

    asyncio.run(work())


@pytest.mark.stress
@pytest.mark.timeout(figures.TIMEOUT + 60)
@pytest.mark.parametrize("backend", ["pooled", "dedicated"])
def test_after_a_program_that_blocks_its_kernel_all_sessions_come_back(backend, tmp_path, fifo):
    async def work() -> None:
        async with started(tmp_path, backend, kernels=KERNELS) as service:
            for module in ("hangs", "grips"):
                blocked = await make(service, f"{module}-itself")
                await blocked.create_program("blocked", module=module, module_args={"fifo": str(fifo)})
                names = [f"{module}-{number}" for number in range(NEIGHBOURS if backend == "pooled" else 1)]
                sessions = [await make(service, name) for name in names]
                await come_back(service, blocked, sessions, backend, module, fifo)
                for session in (blocked, *sessions):
                    await session.destroy()

    async def come_back(
        service: SessionService,
        blocked: ServiceSession,
        sessions: list[ServiceSession],
        backend: str,
        module: str,
        fifo: Path,
    ) -> None:
        pid = await pid_of(blocked)
        near = Neighbours([session for session in sessions if await pid_of(session) == pid])
        far = Neighbours([session for session in sessions if session not in near.sessions])
        assert bool(near.sessions) == (backend == "pooled")
        async with far.asking(), near.asking():
            await far.until_answered()
            await near.until_answered()
            code = await block(blocked, fifo)
            await until_gone(service, pid)
            await ask(blocked)
            assert await pid_of(blocked) != pid
            await far.until_answered()
            await near.until_answered()
            if backend == "pooled":
                await until_whole(service, KERNELS)
        figures.tell(
            f"blocked kernel ({module}), {backend}",
            code=code,
            near=dict(near.outcomes),
            far=dict(far.outcomes),
            near_s_max=near.longest,
        )
        assert code in {"timeout", "kernel_died"}
        assert near.outcomes.keys() <= {"ok", "kernel_died"}, (
            "its kernel was not ended before their calls were over"
        )
        assert far.outcomes.keys() == {"ok"}

    asyncio.run(work())
