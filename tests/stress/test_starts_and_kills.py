"""Kernels start and die in random order, their fork server too: every start is answered, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from typing import Any

import pytest

from dspex_kernels import SessionService, errors
from dspex_kernels.provisioning import guardian as guardian_process
from tests.stress import figures
from tests.stress.services import descriptors_of, started
from tests.waiting import wait_until

STARTS = figures.scaled(500)
FORK_SERVER_KILLS = max(1, figures.scaled(5))
SESSIONS = 8
"""Whose kernels are killed, and started anew by the next call."""
WORKERS = 4


class Lottery:
    """A service whose kernels, and whose fork server, die at random moments."""

    def __init__(self, service: SessionService) -> None:
        self.service = service
        self.counts: Counter[str] = Counter()
        self.start_s: list[float] = []
        self._random = random.Random(20261125)

    @property
    def fork_server(self) -> Any:
        (server,) = self.service._kernels._guardian.fork_servers.all()
        return server

    async def prepare(self, session_id: str) -> None:
        session = await self.service.create_session("owner", session_id=session_id, lm="offline/echo")
        await session.create_program("qa", "question -> answer")

    async def start(self, session_id: str) -> None:
        """Kill a session's kernel at a random moment, and ask for what it holds: that starts the next one."""
        info = await self.service.get_session_info(session_id)
        if info.kernel_pid is not None:
            os.kill(info.kernel_pid, signal.SIGKILL)
            self.counts["kills"] += 1
            if self._random.random() < 0.5:
                await wait_until(lambda: not _is_alive(info.kernel_pid), what="the kernel's end")
        began = time.monotonic()
        while True:
            try:
                told = await self.service.call(session_id, "list_programs", timeout=60)
                break
            except errors.KernelDied:  # it was asked before its death was seen
                self.counts["died during a call"] += 1
        self.start_s.append(time.monotonic() - began)
        assert [program["program_id"] for program in told["programs"]] == ["qa"]
        self.counts["starts"] += 1

    async def kill_fork_server(self) -> None:
        """Kill it, and make sure that the kernels that it forked live on."""
        living = [info.kernel_pid for info in await self.service.list_sessions() if info.kernel_pid is not None]
        pid = await wait_until(lambda: self.fork_server.pid, deadline=60, what="the fork server")
        os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: self.fork_server.pid != pid, what="its loss noticed")
        killed_meanwhile = [one for one in living if not _is_alive(one)]
        assert len(killed_meanwhile) <= WORKERS, "kernels died with their fork server"
        self.counts["fork servers killed"] += 1


def _is_alive(pid: int) -> bool:
    found = guardian_process.stat(pid)
    return found is not None and found[0] not in "ZX"


@pytest.mark.stress
@pytest.mark.timeout(figures.TIMEOUT + 60)
def test_five_hundred_starts_and_kills_lose_nothing_and_leave_nothing(tmp_path):
    async def work() -> None:
        async with started(tmp_path, "dedicated") as service:
            lottery = Lottery(service)
            ids = [f"session-{number}" for number in range(SESSIONS)]
            for session_id in ids:
                await lottery.prepare(session_id)
            guardian = service._kernels._guardian
            before = descriptors_of(os.getpid()), descriptors_of(guardian.pid)
            left = iter(range(STARTS))

            async def keep_starting(mine: list[str]) -> None:
                for number in left:
                    await lottery.start(mine[number % len(mine)])

            async def keep_killing() -> None:
                for number in range(FORK_SERVER_KILLS):
                    due = (number + 1) * STARTS // (FORK_SERVER_KILLS + 1)
                    await wait_until(lambda due=due: lottery.counts["starts"] >= due, deadline=figures.TIMEOUT)
                    await lottery.kill_fork_server()

            async with asyncio.TaskGroup() as group:
                for worker in range(WORKERS):
                    group.create_task(keep_starting(ids[worker::WORKERS]))
                group.create_task(keep_killing())
            programs = [await service.call(session_id, "list_programs") for session_id in ids]
            kernels = {info.kernel_pid for info in await service.list_sessions()}
            mine = guardian_process.children(guardian.pid)
            standing = set(lottery.fork_server.standby)
            more = (descriptors_of(os.getpid()) - before[0], descriptors_of(guardian.pid) - before[1])
            figures.tell(
                "starts and kills",
                **{name.replace(" ", "_"): count for name, count in lottery.counts.items()},
                start_ms_p50=1000 * sorted(lottery.start_s)[len(lottery.start_s) // 2],
                start_ms_max=1000 * max(lottery.start_s),
                zombies=sum(not _is_alive(pid) for pid in mine),
                more_descriptors=more,
            )
            assert lottery.counts["starts"] == STARTS
            assert lottery.counts["fork servers killed"] == FORK_SERVER_KILLS
            assert all(told["count"] == 1 for told in programs)
            assert kernels <= set(mine), "a kernel is not the guardian's child"
            strangers = set(mine) - kernels - standing - {lottery.fork_server.pid}
            assert len(strangers) <= 2, "orphans, or zombies"  # a kernel that is being forked, and who forks it
            assert max(more) <= 4

    asyncio.run(work())
