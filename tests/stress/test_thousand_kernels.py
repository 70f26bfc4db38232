"""A thousand sessions with a kernel each on one machine: all answer, all go, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from dspex_kernels import SessionService
from dspex_kernels.provisioning import guardian as guardian_process
from tests.stress import figures
from tests.stress.services import descriptors_of, memory_of, side_by_side, started
from tests.waiting import wait_until

SESSIONS = figures.scaled(1000)
WORKERS = 4
SMALL = 20
"""Sessions whose memory is looked at."""
IDLE_MIB, USED_MIB = 11, 16
"""Private memory of a kernel at most: when it answers, and when it has run a program."""
FIRST = 3
"""Sessions whose kernels were forked before the fork server had rehearsed."""
IDLE_KERNELS, SETTLE_S, IDLE_S, IDLE_SHARE = 100, 12, 30, 0.001
"""So many kernels together may use so much of a core, looked at for so many seconds; so long after they were made:
ten seconds after something was published, a kernel looks once what threads have left."""
QUIET_S = 0.5
"""Seconds without computing after which a kernel that stands by has done what it does ahead."""
DESCRIPTORS = 3
"""Of the service, for each kernel."""


def processor_s(pids: list[int]) -> float:
    """Seconds that processes have computed, all their threads; in nanoseconds, where ticks would hide them."""
    told = [path.read_text() for pid in pids for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(text.split()[0]) for text in told) / 1e9


async def make(service: SessionService, session_id: str) -> None:
    session = await service.create_session("owner", session_id=session_id, lm="offline/echo")
    await session.create_program("qa", "question -> answer")


async def execute(service: SessionService, session_id: str) -> None:
    args = {"program_id": "qa", "inputs": {"question": session_id}}
    assert "answer" in (await service.call(session_id, "execute_program", args, timeout=120))["outputs"]


@pytest.mark.stress
@pytest.mark.timeout(2 * figures.TIMEOUT)
def test_a_thousand_dedicated_sessions_live_at_once_and_are_quiet(tmp_path):
    async def work() -> None:
        async with started(tmp_path, "dedicated", max_sessions=0) as service:
            await live(service)

    async def live(service: SessionService) -> None:
        await service.create_session("first", session_id="first")  # with it comes the fork server
        guardian = service._kernels._guardian
        ids = [f"session-{number}" for number in range(SESSIONS)]
        files_before = descriptors_of(os.getpid())
        began = time.monotonic()
        await side_by_side((make(service, one) for one in ids), WORKERS)
        create_s = time.monotonic() - began
        files = (descriptors_of(os.getpid()) - files_before) / SESSIONS
        pids = [info.kernel_pid for info in await service.list_sessions() if info.session_id != "first"]
        idle_mib = sum(map(memory_of, pids)) / len(pids) / 2**20
        quiet = pids[:IDLE_KERNELS]
        await asyncio.sleep(SETTLE_S)
        computed = processor_s(quiet)
        await asyncio.sleep(IDLE_S)  # that is what is measured: nothing happens meanwhile
        share = (processor_s(quiet) - computed) / IDLE_S * IDLE_KERNELS / len(quiet)
        began = time.monotonic()
        await side_by_side((execute(service, one) for one in ids), WORKERS)
        execute_s = time.monotonic() - began
        used_mib = sum(map(memory_of, pids)) / len(pids) / 2**20
        began = time.monotonic()
        await service.destroy_sessions(owner="owner")
        destroy_s = time.monotonic() - began
        figures.tell(
            "a thousand kernels",
            sessions=SESSIONS,
            created_per_s=SESSIONS / create_s,
            executed_per_s=SESSIONS / execute_s,
            destroyed_per_s=SESSIONS / destroy_s,
            idle_mib=idle_mib,
            used_mib=used_mib,
            idle_cpu_of_100=share,
            descriptors_each=files,
        )
        assert len(set(pids)) == SESSIONS
        assert [info.session_id for info in await service.list_sessions()] == ["first"]
        left = [pid for pid in guardian_process.children(guardian.pid) if pid in pids]
        assert left == []
        assert share <= IDLE_SHARE
        assert files <= DESCRIPTORS

    asyncio.run(work())


@pytest.mark.stress
@pytest.mark.parametrize(
    ("standby", "most_idle_mib", "most_used_mib"),
    [(0, IDLE_MIB, USED_MIB), (2, USED_MIB, USED_MIB + 1)],
    ids=["forked", "standby"],
)
def test_a_kernel_of_its_own_is_small(standby, most_idle_mib, most_used_mib, tmp_path):
    """One that stood by has lived its first moments: it is as large as others are after a program."""

    seen = (0.0, 0.0)

    def are_parked(service: SessionService) -> bool:
        """Whether those that stand by do nothing any more."""
        nonlocal seen
        servers = service._kernels._guardian.fork_servers.all()
        standing = [pid for server in servers for pid in server.standby]
        has_threads = [len(list(Path(f"/proc/{pid}/task").iterdir())) > 1 for pid in standing]
        if (computed := processor_s(standing)) != seen[0]:
            seen = (computed, time.monotonic())
        return len(standing) == standby and all(has_threads) and time.monotonic() - seen[1] >= QUIET_S

    async def work() -> None:
        async with started(tmp_path, "dedicated", standby=standby, spare_kernels=0) as service:
            ids = [f"session-{number}" for number in range(SMALL)]
            for one in ids:
                await service.create_session("owner", session_id=one)
                await wait_until(lambda: are_parked(service), deadline=30, what="kernels that stand by")
            pids = [info.kernel_pid for info in await service.list_sessions()][FIRST:]
            idle_mib = sum(map(memory_of, pids)) / len(pids) / 2**20
            for one in ids:
                session = service.get_session(one)
                await session.configure(lm="offline/echo")
                await session.create_program("qa", "question -> answer")
                await execute(service, one)
            used_mib = sum(map(memory_of, pids)) / len(pids) / 2**20
            figures.tell("a kernel's private memory", standby=standby, idle_mib=idle_mib, used_mib=used_mib)
            assert idle_mib <= most_idle_mib
            assert used_mib <= most_used_mib

    asyncio.run(work())
