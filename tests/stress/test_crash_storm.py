"""Kernels die under load: nothing acknowledged is lost, every call is answered, no question is asked twice."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from traitlets.config import Config

from dspex_kernels import SessionService, errors
from dspex_kernels.protocol import journal
from dspex_kernels.protocol.records import Change, Spent
from dspex_kernels.sessions.service import ServiceSession
from tests.lm_server import Answer, Exchange, LMServer, RecordedRequest, canary
from tests.stress import figures
from tests.stress.accounts import Account
from tests.stress.services import until_whole
from tests.waiting import wait_until

CALLS = 200
"""Calls at once."""
KILLS = figures.scaled(100)
KILLS_OF_A_KIND = figures.scaled(30)
"""With an LM request open; and between the durable write and the reply."""
BETWEEN_KILLS = 20
"""Questions and changes that must be answered well between two kills of a kind: what never works proves nothing."""
SESSIONS = {"pooled": 40, "dedicated": 8}
KERNELS = 4
"""In the pool."""
CALL_TIMEOUT = 60.0
"""Seconds for a call: with it comes its answer, whatever dies."""
LATE = 10.0
"""Seconds after that from when a call counts as unanswered."""
LATENCY = {"pooled": 0.3, "dedicated": 2.0}
"""Seconds that the LM server thinks: requests are open at any moment, and two cores are enough for the rest."""
TIMEOUT = 2 * figures.TIMEOUT
"""Seconds for a storm: each dead kernel of eight sessions costs two processors a start."""
NONCE = re.compile(r"storm-\d+-\d+")

WATCHER = """
import fcntl, os, signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
for line in sys.stdin:
    path, mark, pid = line.rstrip("\\n").split("\\t")
    read = os.path.getsize(path)
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    fcntl.fcntl(directory, fcntl.F_NOTIFY, fcntl.DN_MODIFY | fcntl.DN_CREATE | fcntl.DN_RENAME | fcntl.DN_MULTISHOT)
    print("ready", flush=True)
    found, until = False, time.monotonic() + 3
    while not found and signal.sigtimedwait({signal.SIGIO}, max(until - time.monotonic(), 0)) is not None:
        with open(path, "rb") as file:
            file.seek(read if os.path.getsize(path) >= read else 0)
            found = mark.encode() in file.read()
    try:
        if found:
            os.kill(int(pid), signal.SIGKILL)
    except ProcessLookupError:  # somebody else was quicker
        found = False
    os.close(directory)
    print("killed" if found else "nothing", flush=True)
"""
"""Kills a process as soon as a text stands in a file. A process of its own: a thread would wait for the others.

Lines of path, text, pid; answers ``ready``, then ``killed``, or ``nothing`` when the text did not come
within three seconds.
"""


class Watcher:
    """The process that kills a kernel when its journal has grown."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    @contextlib.asynccontextmanager
    async def started(cls) -> AsyncIterator[Watcher]:
        command = (sys.executable, "-I", "-S", "-c", WATCHER)
        process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            yield cls(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()

    async def watch(self, path: Path, mark: str, pid: int) -> None:
        """Return when it watches."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{path}\t{mark}\t{pid}\n".encode())
        assert await self._read() == "ready"

    async def is_killed(self) -> bool:
        return await self._read() == "killed"

    async def _read(self) -> str:
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode().strip()


class Thinking:
    """Answers after a moment; knows which requests are open."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._requests: dict[int, RecordedRequest] = {}

    async def respond(self, exchange: Exchange) -> None:
        self._requests[id(exchange.request)] = exchange.request
        try:
            await asyncio.sleep(self._seconds)
            await Answer().respond(exchange)
        finally:
            del self._requests[id(exchange.request)]

    def of(self, api_keys: set[str]) -> list[RecordedRequest]:
        """The open requests that came with one of these keys."""
        return [request for request in self._requests.copy().values() if request.api_key in api_keys]


class Customer:
    """One session, and what is asked of it."""

    def __init__(self, number: int, session: ServiceSession) -> None:
        self.number = number
        self.session = session
        self.api_key = f"sk-customer-{number}"
        self.account = Account(f"session {number}")
        self.ambushed = asyncio.Event()
        """Set when its next change is to be the last thing that its kernel does."""


class Storm:
    """A service under load whose kernels are killed."""

    def __init__(self, service: SessionService, server: LMServer, watcher: Watcher, backend: str) -> None:
        self.service = service
        self.server = server
        self.watcher = watcher
        self.backend = backend
        self.thinking = Thinking(LATENCY[backend])
        server.behaviour = self.thinking
        self.customers: list[Customer] = []
        self.outcomes: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.answered: set[str] = set()
        self.wrong: list[str] = []
        self._nonces = itertools.count(1)
        self.progress = 0
        """Questions and changes that were answered well."""
        self._over = asyncio.Event()
        self._trap: asyncio.Future[None] | None = None
        self._random = random.Random(20260101)

    async def prepare(self) -> None:
        """Make the sessions, each with a program, an LM and a key of its own."""
        numbers = range(SESSIONS[self.backend])
        self.customers = await asyncio.gather(*(self._make_customer(number) for number in numbers))

    async def _make_customer(self, number: int) -> Customer:
        session = await self.service.create_session(f"owner-{number}", session_id=f"customer-{number}")
        customer = Customer(number, session)
        lm = {
            "model": "openai/canary-model",
            "api_base": self.server.api_base,
            "api_key": customer.api_key,
            "cache": False,
            "json_fallback": False,
            "max_retries": 0,
        }
        await session.configure(lm=lm)
        await session.create_program("qa", "question -> answer")
        return customer

    async def rage(self) -> None:
        """Call and kill, until enough kernels have died; then let the last calls end."""
        each = CALLS // len(self.customers)
        async with asyncio.TaskGroup() as group:
            for customer in self.customers:
                group.create_task(self._keep_changing(customer))
                for _ in range(each - 1):
                    group.create_task(self._keep_asking(customer))
            try:
                await self._keep_killing()
            finally:
                self._over.set()

    async def _keep_asking(self, customer: Customer) -> None:
        while not self._over.is_set():
            nonce = f"storm-{customer.number}-{next(self._nonces)}"
            args = {"program_id": "qa", "inputs": {"question": nonce}}
            try:
                told = await self.ask(customer, "execute_program", args)
            except errors.KernelDied as died:
                if died.retryable:
                    self.wrong.append(f"{nonce}: it may have reached the LM, and is told to be asked again")
                continue
            self.answered.add(nonce)
            self.progress += 1
            if told["outputs"]["answer"] != f"{canary(customer.api_key)} answers: {nonce}":
                self.wrong.append(f"{nonce}: {told['outputs']['answer']}")

    async def _keep_changing(self, customer: Customer) -> None:
        async def ask(command: str, args: dict[str, Any]) -> dict[str, Any]:
            return await self.ask(customer, command, args)

        while not self._over.is_set():
            try:
                if customer.ambushed.is_set():
                    await self._change_and_die(customer)
                else:
                    await customer.account.change(ask)
                self.progress += 1
            except errors.KernelDied:
                self.wrong += await self.look(customer)

    async def ask(self, customer: Customer, command: str, args: dict[str, Any]) -> dict[str, Any]:
        """One call; how it ended is counted."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT + LATE):
                told = await customer.session.call(command, args, timeout=CALL_TIMEOUT)
        except errors.DSPexError as failure:
            self.outcomes[failure.code] += 1
            raise
        except TimeoutError:
            self.outcomes["unanswered"] += 1
            raise
        self.outcomes["ok"] += 1
        return told

    async def look(self, customer: Customer) -> list[str]:
        """What a session has lost; asked again where a kernel dies meanwhile, for reading repeats nothing."""
        while True:
            try:
                return await customer.account.find_lost(lambda *asked: self.ask(customer, *asked))
            except errors.KernelDied:
                continue

    async def _keep_killing(self) -> None:
        """Kill in three ways at once, each until it has had its share."""
        async with asyncio.TaskGroup() as group:
            for kind, kill in (("requesting", self._kill_requesting), ("written", self._kill_written)):
                group.create_task(self._repeat(kill, lambda kind=kind: self.kills[kind] >= KILLS_OF_A_KIND))
            others = KILLS - 2 * KILLS_OF_A_KIND
            group.create_task(self._repeat(self._kill_any, lambda: self.kills["any"] >= others))

    async def _repeat(self, kill: Callable[[], Awaitable[None]], is_enough: Callable[[], bool]) -> None:
        while not is_enough():
            before = self.progress
            await wait_until(lambda before=before: self.progress >= before + BETWEEN_KILLS, deadline=90)
            await kill()

    async def _find_kernel(self) -> tuple[int, list[Customer]]:
        """A kernel that serves, and the sessions in it."""
        while True:
            pids = [(await c.session.info())["kernel_pid"] for c in self.customers]
            living = sorted({pid for pid in pids if pid is not None})
            if living:
                chosen = self._random.choice(living)
                return chosen, [c for c, pid in zip(self.customers, pids, strict=True) if pid == chosen]
            await wait_until(lambda: any(self.place_of(c) for c in self.customers), deadline=60)

    def place_of(self, customer: Customer) -> object:
        return self.service._backends[self.backend].get_place(customer.session.session_id)

    async def _kill_any(self) -> None:
        pid, _ = await self._find_kernel()
        self._kill(pid, "any")

    async def _kill_requesting(self) -> None:
        """Kill a kernel that waits for the LM server; the server must see that it left."""
        pid, customers = await self._find_kernel()
        api_keys = {customer.api_key for customer in customers}
        with contextlib.suppress(AssertionError):  # it has died meanwhile, or does nothing: another one will do
            await wait_until(lambda: self.thinking.of(api_keys), deadline=1)
        waiting = self.thinking.of(api_keys)
        if not waiting or not _is_alive(pid):
            return
        self._kill(pid, "")
        with contextlib.suppress(AssertionError):
            await wait_until(lambda: any(request.disconnected_at for request in waiting), deadline=2)
        self.kills["requesting" if any(request.disconnected_at for request in waiting) else "any"] += 1

    async def _kill_written(self) -> None:
        """Kill a kernel after its change is durable and before the caller knows."""
        if self.backend == "pooled":
            self._trap = asyncio.get_running_loop().create_future()
            async with asyncio.timeout(60):  # ``wait_for`` may lose the cancel that ends a storm that failed
                await self._trap
        else:
            _, customers = await self._find_kernel()
            customer = self._random.choice(customers)
            customer.ambushed.set()
            await wait_until(lambda: not customer.ambushed.is_set(), deadline=60)

    def spring_trap(self) -> None:
        """Have the service's store kill the kernel of whoever is just written, once that is written."""
        save = self.service._store.save_changes

        async def save_changes(session_id: str, changes: Sequence[Change], *rest: Any) -> None:
            await save(session_id, changes, *rest)
            place = self.service._backends[self.backend].get_place(session_id)
            if self._trap is None or place is None or all(isinstance(change, Spent) for change in changes):
                return
            trap, self._trap = self._trap, None
            self._kill(place.pid, "written")
            # The caller is answered after the service has seen it: the later half of the race.
            await wait_until(lambda: self.service._backends[self.backend].get_place(session_id) != place)
            trap.set_result(None)

        self.service._store.save_changes = save_changes  # type: ignore[method-assign]  # the fault's place

    async def _change_and_die(self, customer: Customer) -> None:
        """Make a change whose kernel dies with the journal's line; it counts when the caller did not hear of it."""
        account, text = customer.account, customer.account.next_text()
        info = await customer.session.info()
        path = Path(self.service.data_dir) / "sessions" / customer.session.session_id / journal.FILE_NAME
        if info["kernel_pid"] is None:
            await self.look(customer)
            return
        await self.watcher.watch(path, text, info["kernel_pid"])
        try:
            await account.change_steady(lambda *asked: self.ask(customer, *asked), text)
        except errors.KernelDied:
            killed = await self.watcher.is_killed()
            customer.ambushed.clear()
            if killed:
                self.kills["written" if await self._is_written(customer, text) else "any"] += 1
            raise
        else:
            self.kills["any"] += await self.watcher.is_killed()
            customer.ambushed.clear()

    async def _is_written(self, customer: Customer, text: str) -> bool:
        while True:
            try:
                args = {"program_id": "steady"}
                return (await self.ask(customer, "get_program", args))["instructions"] == text
            except errors.ProgramNotFound:
                return False
            except errors.KernelDied:
                continue

    def _kill(self, pid: int, kind: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            if kind:
                self.kills[kind] += 1

    async def find_lost(self) -> list[str]:
        """What is not as it was acknowledged, in any session."""
        return self.wrong + [line for customer in self.customers for line in await self.look(customer)]

    async def wait_until_whole(self) -> None:
        """Return when every kernel that died has a successor."""
        if self.backend == "pooled":
            await until_whole(self.service, KERNELS)
        else:
            assert len({(await c.session.info())["kernel_pid"] for c in self.customers}) == len(self.customers)

    def find_repeated(self) -> list[str]:
        """Nonces that the LM server has seen more than once; it must have seen all that were answered."""
        seen = Counter(NONCE.findall("\n".join(_question(request) for request in self.server.requests)))
        assert self.answered <= seen.keys()
        return [nonce for nonce, times in seen.items() if times > 1]


def _question(request: RecordedRequest) -> str:
    found = NONCE.search(request.prompt)
    assert found is not None
    return found[0]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.stress
@pytest.mark.timeout(TIMEOUT + 60)
@pytest.mark.parametrize("backend", ["pooled", "dedicated"])
def test_a_hundred_deaths_under_load_lose_nothing_that_was_acknowledged(backend, tmp_path, lm_server):
    async def work() -> None:
        config = Config({"KernelPool": {"size": KERNELS}})
        service = SessionService(
            data_dir=str(tmp_path),
            store_url=f"sqlite:///{tmp_path / 'store.sqlite'}",
            backend=backend,
            config=config,
        )
        async with asyncio.timeout(TIMEOUT), service, Watcher.started() as watcher:
            storm = Storm(service, lm_server, watcher, backend)
            await storm.prepare()
            if backend == "pooled":
                storm.spring_trap()
            began = time.monotonic()
            await storm.rage()
            seconds = time.monotonic() - began
            lost = await storm.find_lost()
            await storm.wait_until_whole()
            changes = sum(customer.account.acknowledged for customer in storm.customers)
            figures.tell(
                f"crash storm, {backend}",
                kills=storm.kills.total(),
                requesting=storm.kills["requesting"],
                written=storm.kills["written"],
                calls=storm.outcomes.total(),
                outcomes=dict(storm.outcomes),
                changes=changes,
                uncertain=sum(customer.account.uncertain for customer in storm.customers),
                questions=len(lm_server.requests),
                seconds=seconds,
                answered_well=storm.progress,
                answered_well_per_s=storm.progress / seconds,
            )
            assert lost == []
            assert storm.outcomes["unanswered"] == 0
            assert storm.find_repeated() == []
            assert storm.outcomes.keys() <= {"ok", "kernel_died", "program_not_found"}
            assert storm.kills.total() >= KILLS
            assert storm.kills["requesting"] >= KILLS_OF_A_KIND
            assert storm.kills["written"] >= KILLS_OF_A_KIND
            assert storm.progress >= BETWEEN_KILLS * KILLS / 3
            assert changes >= KILLS

    asyncio.run(work())
