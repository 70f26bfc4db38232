"""Sessions that are asked all the time move to and fro between the backends, and lose nothing on the way."""

from __future__ import annotations

import asyncio
import copy
import time
from collections import Counter
from typing import Any

import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient

from dspex_kernels import SessionService, errors
from dspex_kernels.sessions.service import ServiceSession
from tests.lm_server import LMServer, canary
from tests.stress import figures
from tests.stress.accounts import Account
from tests.stress.services import started

MOVES = figures.scaled(100)
TRAVELLERS = 4
"""Sessions that move, each its share: the kernels' starts are what takes the time."""
ASKERS = 3
"""Callers of each session, besides the one that changes it."""
TIMEOUT = 90.0
"""Seconds for a call: those that come during a move wait for it."""
DEMOS = [{"question": "What was in it?", "answer": "A spoon.", "augmented": True}]
"""What the program has learned."""


class Traveller:
    """A session that is asked while it moves, and what must be in it at the end."""

    def __init__(self, number: int, session: ServiceSession, server: LMServer) -> None:
        self.session = session
        self.api_key = f"sk-traveller-{number}"
        self.server = server
        self.account = Account(f"session {number}")
        self.calls: Counter[str] = Counter()
        self.state: dict[str, Any] = {}
        self._over = asyncio.Event()

    async def prepare(self) -> None:
        """Give it an LM whose key only the service's memory holds, and a program that has learned something."""
        profile = {"model": "openai/canary-model", "api_base": self.server.api_base, "api_key": self.api_key}
        await self.session.configure(lm={**profile, "cache": False, "max_retries": 0})
        await self.session.create_program("qa", "question -> answer")
        record = copy.deepcopy((await self.ask("export_program", {"program_id": "qa"}))["record"])
        for predictor in record["state"].values():
            predictor["demos"] = DEMOS
        await self.ask("import_program", {"record": record, "replace": True})
        self.state = (await self.ask("export_program", {"program_id": "qa"}))["record"]["state"]

    async def ask(self, command: str, args: dict[str, Any]) -> dict[str, Any]:
        try:
            told = await self.session.call(command, args, timeout=TIMEOUT)
        except errors.ProgramNotFound:
            self.calls["refused"] += 1
            raise
        self.calls[command] += 1
        return told

    async def travel(self, service: SessionService, moves: int) -> list[float]:
        """Move so often while it is asked; how long each move took, in seconds."""
        took = []
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_changing())
            for number in range(ASKERS):
                group.create_task(self._keep_asking(number))
            try:
                for number in range(moves):
                    began = time.monotonic()
                    target = "pooled" if number % 2 else "dedicated"
                    await service.migrate_session(self.session.session_id, backend=target, timeout=TIMEOUT)
                    took.append(time.monotonic() - began)
                    assert (await self.session.info())["backend"] == target
                    await self._until_used()
            finally:
                self._over.set()
        return took

    async def _until_used(self) -> None:
        """Return when the session was changed and run where it is now."""
        before = self.account.acknowledged, self.calls["execute_program"]
        async with asyncio.timeout(TIMEOUT):
            while self.account.acknowledged <= before[0] or self.calls["execute_program"] <= before[1]:
                await self.ask("list_programs", {})

    async def _keep_changing(self) -> None:
        while not self._over.is_set():
            await self.account.change(self.ask)

    async def _keep_asking(self, number: int) -> None:
        while not self._over.is_set():
            question = f"{self.session.session_id}, {number}"
            told = await self.ask("execute_program", {"program_id": "qa", "inputs": {"question": question}})
            assert told["outputs"]["answer"] == f"{canary(self.api_key)} answers: {question}"

    async def find_lost(self) -> list[str]:
        """A line for each thing that is not as it was told."""
        lost = await self.account.find_lost(self.ask)
        record = (await self.ask("export_program", {"program_id": "qa"}))["record"]
        if record["state"] != self.state:
            lost.append(f"the learned state is {record['state']}")
        told = await self.ask("get_program", {"program_id": "qa"})
        if told["versions"] != [1, 2]:
            lost.append(f"the versions are {told['versions']}")
        requests = [request for request in self.server.requests if request.api_key == self.api_key]
        if not all(DEMOS[0]["answer"] in request.prompt for request in requests):
            lost.append("a request was sent without what the program has learned")
        stats = await self.ask("get_stats", {})
        executions = self.calls["execute_program"]
        counted = {"executions": stats["executions"], "lm_calls": stats["lm_calls"], "requests": len(requests)}
        if set(counted.values()) != {executions}:
            lost.append(f"there were {executions} executions, and counted are {counted}")
        # What configured it and made its program was not asked by ``ask``; control commands are not counted.
        answered = self.calls.total() - self.calls["get_stats"] - self.calls["refused"] + 2
        told_again = (await self.session.info())["generation"]  # each new place is told the LM's key
        commands = stats["commands"]
        if not answered <= commands["ok"] <= answered + told_again:
            lost.append(f"{answered} commands were answered, and counted are {commands['ok']}")
        if (commands["error"], commands["aborted"]) != (self.calls["refused"], 0):
            lost.append(f"{self.calls['refused']} commands were refused, and counted are {commands}")
        return [f"{self.session.session_id}: {line}" for line in lost]


@pytest.mark.stress
@pytest.mark.timeout(figures.TIMEOUT + 60)
def test_sessions_that_move_under_load_lose_nothing(tmp_path, lm_server):
    async def work() -> None:
        async with started(tmp_path, "pooled", kernels=1) as service:
            travellers = []
            for number in range(TRAVELLERS):
                session = await service.create_session(f"owner-{number}", session_id=f"traveller-{number}")
                travellers.append(Traveller(number, session, lm_server))
                await travellers[-1].prepare()
            each = -(-MOVES // TRAVELLERS)
            took = [
                s for told in await asyncio.gather(*(t.travel(service, each) for t in travellers)) for s in told
            ]
            lost = [line for traveller in travellers for line in await traveller.find_lost()]
            figures.tell(
                "migration",
                moves=len(took),
                executions=sum(traveller.calls["execute_program"] for traveller in travellers),
                changes=sum(traveller.account.acknowledged for traveller in travellers),
                move_s_mean=sum(took) / len(took),
                move_s_max=max(took),
                lost=len(lost),
            )
        assert lost == []
        assert len(took) >= MOVES

    asyncio.run(work())


async def run_cell(client: AsyncKernelClient, code: str) -> None:
    reply = await client.execute(code, reply=True, timeout=60)
    assert reply["content"]["status"] == "ok", reply["content"]


@pytest.mark.stress
@pytest.mark.timeout(figures.TIMEOUT + 60)
def test_a_session_with_a_tool_of_its_notebook_stays_whole(tmp_path):
    async def work() -> None:
        async with started(tmp_path, "dedicated") as service:
            session = await service.create_session(session_id="s", lm="offline/echo")
            await session.create_program("qa", "question -> answer")
            client = AsyncKernelClient(connection_file=await service.get_connection_file("s"))
            client.load_connection_file()
            client.start_channels()
            try:
                await client.wait_for_ready(timeout=60)
                await run_cell(client, "def look(where: str) -> str:\n    '''Looks.'''\n    return 'a spoon'")
                await run_cell(client, "%dspex add look")
                await run_cell(client, '%dspex create looks "question -> answer" --module ReAct --tools look')
                before = await session.info(), await session.call("list_programs")
                refused = [await refusal(service) for _ in range(figures.scaled(10))]
                after = await session.info(), await session.call("list_programs")
                await run_cell(client, "assert look('there') == 'a spoon'")
                told = await session.execute_program("qa", {"question": "?"})
                assert told.answer
            finally:
                client.stop_channels()
        assert all("look" in str(refusal.details["because"]["looks"]) for refusal in refused)
        assert all(refusal.details["because"].keys() == {"looks"} for refusal in refused)
        assert [told["backend"] for told, _ in (before, after)] == ["dedicated", "dedicated"]
        assert before[0]["kernel_pid"] == after[0]["kernel_pid"]
        assert before[0]["generation"] == after[0]["generation"]
        assert before[1] == after[1]

    asyncio.run(work())


async def refusal(service: SessionService) -> errors.NotPortable:
    with pytest.raises(errors.NotPortable) as refused:
        await service.migrate_session("s", backend="pooled")
    return refused.value
