"""The service is killed while its sessions change: what was acknowledged comes back, and nothing else is left."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.provisioning.families import Identity
from tests.stress import figures
from tests.stress.accounts import Account
from tests.stress.remote_service import RemoteService, ServiceGone
from tests.waiting import wait_until

KILLS = figures.scaled(20)
CHANGES = (30, 120)
"""Changes that are acknowledged before the next kill, at least and at most."""
SESSIONS = {"pooled-1": "pooled", "pooled-2": "pooled", "dedicated-1": "dedicated", "dedicated-2": "dedicated"}
GONE_WITHIN = 5.0
"""Seconds after the service's death in which everything below it must have ended: the issue's own figure."""
STATISTICS_WITHIN = 1.0
"""Seconds after which statistics are kept: the design's promise."""
CALL_TIMEOUT = 60.0


@dataclass
class Customer:
    """One session, over all services that have had it."""

    session_id: str
    backend: str
    account: Account
    spent: list[tuple[float, int]] = field(default_factory=list)
    """When it was told how many requests it had made, on the monotonic clock, and the number."""

    async def ask(self, service: RemoteService, command: str, args: dict[str, Any]) -> dict[str, Any]:
        told: dict[str, Any] = await service.call(self.session_id, command, args, timeout=CALL_TIMEOUT)
        return told

    async def find_lost(self, service: RemoteService, killed_at: float) -> list[str]:
        """What is not as it was acknowledged."""
        lost = await self.account.find_lost(lambda *asked: self.ask(service, *asked))
        kept = (await self.ask(service, "get_stats", {}))["lm_calls"]
        due = max((number for at, number in self.spent if at < killed_at - STATISTICS_WITHIN), default=0)
        if kept < due:
            lost.append(f"{self.session_id}: {kept} requests are counted, {due} were told in time")
        self.spent = [(0.0, kept)]
        return lost


class Town:
    """Sessions that change all the time, whoever serves them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.customers = [Customer(name, backend, Account(name)) for name, backend in SESSIONS.items()]
        self.changes = 0
        self.slowest_end = 0.0
        self.slowest_return = 0.0

    async def found(self, service: RemoteService) -> None:
        """Make the sessions."""
        for customer in self.customers:
            await service.ask("create_session", session_id=customer.session_id, backend=customer.backend)
            lm = {"model": "offline/echo", "cache": False}
            await customer.ask(service, "configure", {"lm": lm, "budget": {"lm_calls": 10**6}})
            qa = {"program_id": "qa", "signature": "question -> answer"}
            for args in (qa, {"program_id": "forks", "module": "forks"}):
                await customer.ask(service, "create_program", args)

    async def live(self, service: RemoteService, changes: int) -> tuple[list[Identity], float]:
        """Change the sessions until so many changes were acknowledged; then kill the service.

        Returns:
            What ran below it, and when it was killed.
        """
        detached = [pid for customer in self.customers for pid in await self._fork(service, customer)]
        enough = self.changes + changes
        async with asyncio.TaskGroup() as group:
            for customer in self.customers:
                group.create_task(self._until_gone(lambda c=customer: self._change(service, c)))
                group.create_task(self._until_gone(lambda c=customer: self._spend(service, c)))
            await wait_until(lambda: self.changes >= enough, deadline=60)
            family = await asyncio.to_thread(service.descendants)
            killed_at = time.monotonic()
            await service.kill()
        assert set(detached) <= {process.pid for process in family}
        return family, killed_at

    async def _fork(self, service: RemoteService, customer: Customer) -> list[int]:
        """Have a program leave a child and a detached grandchild in the session's kernel."""
        args = {"program_id": "forks", "inputs": {"question": "?"}}
        answer = (await customer.ask(service, "execute_program", args))["outputs"]["answer"]
        return [int(pid) for pid in answer.split()]

    async def _until_gone(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            while True:
                await work()
        except ServiceGone:
            return

    async def _change(self, service: RemoteService, customer: Customer) -> None:
        await customer.account.change(lambda *asked: customer.ask(service, *asked))
        self.changes += 1

    async def _spend(self, service: RemoteService, customer: Customer) -> None:
        await customer.ask(service, "execute_program", {"program_id": "qa", "inputs": {"question": "?"}})
        number = (await customer.ask(service, "get_stats", {}))["lm_calls"]
        customer.spent.append((time.monotonic(), number))

    async def bury(self, family: list[Identity], killed_at: float) -> None:
        """Return when nothing of a service is alive any more; in time, or the test fails."""
        left = GONE_WITHIN - (time.monotonic() - killed_at)
        await wait_until(lambda: not [p for p in family if p.is_alive], deadline=left, what=f"the end of {family}")
        self.slowest_end = max(self.slowest_end, time.monotonic() - killed_at)

    async def find_lost(self, service: RemoteService, killed_at: float) -> list[str]:
        """What a new service does not have of what the last one acknowledged."""
        lost = [line for customer in self.customers for line in await customer.find_lost(service, killed_at)]
        self.slowest_return = max(self.slowest_return, time.monotonic() - killed_at)
        return lost


@pytest.mark.stress
@pytest.mark.timeout(figures.TIMEOUT + 60)
def test_twenty_deaths_of_the_service_lose_nothing_that_was_acknowledged_and_leave_nothing(tmp_path):
    async def work() -> None:
        town = Town(tmp_path)
        chance = random.Random(20260102)
        began = time.monotonic()
        service = await RemoteService.start(tmp_path)
        await town.found(service)
        try:
            for _ in range(KILLS):
                family, killed_at = await town.live(service, chance.randint(*CHANGES))
                # The next one comes while the dead one's kernels are being ended.
                async with asyncio.TaskGroup() as group:
                    group.create_task(town.bury(family, killed_at))
                    starting = group.create_task(RemoteService.start(tmp_path))
                service = starting.result()
                assert await town.find_lost(service, killed_at) == []
        finally:
            await service.end()
        figures.tell(
            "service killed",
            kills=KILLS,
            changes=town.changes,
            uncertain=sum(customer.account.uncertain for customer in town.customers),
            slowest_end_s=town.slowest_end,
            slowest_return_s=town.slowest_return,
            seconds=time.monotonic() - began,
        )
        assert town.changes >= KILLS * CHANGES[0]

    async def bounded() -> None:
        async with asyncio.timeout(figures.TIMEOUT):
            await work()

    asyncio.run(bounded())
