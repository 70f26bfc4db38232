"""The pooled backend's bookkeeping: whose reply counts, where sessions are, and that every slot comes back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dspex_kernels import errors
from dspex_kernels.config import LMPolicy
from dspex_kernels.sessions.backend import Place, PlaceGone
from dspex_kernels.sessions.calls import Call
from dspex_kernels.sessions.kernels import Kernels
from dspex_kernels.sessions.model import SessionRecord
from dspex_kernels.sessions.pool import KernelPool
from dspex_kernels.sessions.pooled import PooledBackend
from tests.waiting import halt, wait_until

SLOW = {"model": "offline/echo", "cache": False, "offline": {"latency_s": 60}}
CHANGE = {"change": "program_deleted", "program_id": "qa"}


class Told:
    """What the backend tells the service."""

    def __init__(self, backend: PooledBackend) -> None:
        self.lost: list[tuple[str, Place, str]] = []
        self.changed: list[tuple[str, int, list[Any]]] = []
        self.replied: list[dict[str, Any]] = []
        backend.lost = lambda *told: self.lost.append(told)
        backend.changed = lambda *told: self.changed.append(told)
        backend.replied = self.replied.append


@contextlib.asynccontextmanager
async def started(tmp_path: Path, **traits: Any) -> AsyncIterator[tuple[PooledBackend, Told]]:
    kernels = Kernels(kernel_name="dspex", policy=LMPolicy())
    await kernels.start()
    pool = KernelPool(kernels, tmp_path / "pool", start_timeout=60.0, **{"size": 1, **traits})
    backend = PooledBackend(pool)
    told = Told(backend)
    await backend.start()
    try:
        yield backend, told
    finally:
        await backend.stop()
        await kernels.stop()


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(90):
            await work

    asyncio.run(bounded())


def record(session_id: str, generation: int = 1) -> SessionRecord:
    now = datetime.now(UTC)
    return SessionRecord(
        session_id=session_id,
        owner="",
        backend="pooled",
        generation=generation,
        created_at=now,
        last_activity=now,
    )


def call(command: str, timeout: float = 20.0, **args: Any) -> Call:
    return Call(command, args, timeout)


def test_which_replies_count_and_what_they_tell(tmp_path):
    async def work() -> None:
        async with started(tmp_path) as (backend, told):
            await backend.open(record("s"), timeout=60)
            await backend.call("s", call("create_program", program_id="qa", signature="question -> answer"))
            [(session_id, generation, changes)] = told.changed
            assert (session_id, generation) == ("s", 1)
            assert changes[0]["change"] == "program_put"
            await backend.close("s")
            await backend.open(record("s", generation=2), timeout=60)
            kernel_id = backend.get_place("s").kernel_id

            told.changed.clear()
            reply = {"session_id": "s", "kernel_id": kernel_id, "status": "ok", "changes": [CHANGE]}
            backend._take_reply({**reply, "generation": 1})
            assert told.changed == [], "of the same kernel, and of the place before"
            backend._take_reply({**reply, "generation": 2, "kernel_id": "another"})
            backend._take_reply({**reply, "generation": 2, "session_id": "another"})
            assert told.changed == []
            backend._take_reply({**reply, "generation": 2})
            assert told.changed == [("s", 2, [CHANGE])]

    run(work())


@pytest.mark.parametrize(("slots", "limit", "at_once"), [(8, 16, 7), (256, 16, 16), (2, 16, 1), (1, 16, 1)])
def test_a_session_leaves_a_slot_of_its_kernel_to_others(slots, limit, at_once, tmp_path):
    async def work() -> None:
        async with started(tmp_path, max_calls_per_kernel=slots, max_calls_per_session=limit) as (backend, _):
            await backend.open(record("s"), timeout=60)
            await backend.call("s", call("configure", lm=SLOW))
            await backend.call("s", call("create_program", program_id="qa", signature="question -> answer"))
            asked = [call("execute_program", program_id="qa", inputs={"question": "?"}) for _ in range(at_once + 1)]
            tasks = [asyncio.create_task(backend.call("s", one)) for one in asked]
            await wait_until(lambda: backend.queue.waiting_of("s") == 1, what="the last of them to wait")
            assert backend.queue.running_of("s") == at_once
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    run(work())


def test_a_kernel_that_dies_while_it_opens_a_session_leaves_it_to_the_service_to_ask_another(tmp_path):
    async def work() -> None:
        async with started(tmp_path) as (backend, told):
            member = await backend.pool.pick(60)
            halt(member.kernel.pid)
            opening = asyncio.create_task(backend.open(record("s"), timeout=60))
            await wait_until(lambda: member.sessions == 1, what="the session to be on its way")
            os.kill(member.kernel.pid, signal.SIGKILL)
            with pytest.raises(PlaceGone):
                await opening
            assert (member.sessions, backend.get_place("s"), told.lost) == (0, None, [])
            await backend.open(record("s", generation=2), timeout=60)
            assert backend.get_place("s").kernel_id != member.kernel_id

    run(work())


def test_however_a_call_ends_its_slot_and_its_session_are_accounted_for(tmp_path):
    async def work() -> None:
        async with started(tmp_path) as (backend, told):
            await backend.open(record("s"), timeout=60)
            await _calls_and_slots(backend, told)

    run(work())


async def _calls_and_slots(backend: PooledBackend, told: Told) -> None:
    await backend.call("s", call("create_program", program_id="qa", signature="question -> answer"))
    await backend.call("s", call("configure", lm=SLOW))
    slow = call("execute_program", 60, program_id="qa", inputs={"question": "?"})
    cancelled = asyncio.create_task(backend.call("s", slow))
    late = asyncio.create_task(backend.call("s", Call(slow.command, slow.args, 0.2)))
    await wait_until(lambda: backend.queue.figures()["running"] == 2, what="two turns")
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    with pytest.raises(errors.CommandTimeout):
        await late
    with pytest.raises(errors.ProgramNotFound):
        await backend.call("s", call("execute_program", program_id="none", inputs={}))
    with pytest.raises(errors.InvalidArguments):
        await backend.call("s", call("execute_program", no_such=1))
    figures = backend.queue.figures()
    assert (figures["running"], figures["waiting"]) == (0, 0)

    closed = asyncio.create_task(backend.call("s", slow))
    await wait_until(lambda: backend.queue.figures()["running"] == 1, what="the turn")
    async with asyncio.timeout(10):
        while (await backend.call("s", call("ping")))["running"] < 1:
            pass
    await backend.close("s")
    with pytest.raises((errors.CommandCancelled, PlaceGone)):
        await closed
    assert backend.pool.serving[0].sessions == 0
    assert backend.queue.figures()["running"] == 0
    with pytest.raises(PlaceGone):
        await backend.call("s", call("list_programs"))
    assert told.lost == [], "it was asked to close"

    opening = asyncio.create_task(backend.open(record("cancelled"), timeout=60))
    await asyncio.sleep(0)
    opening.cancel()
    await asyncio.wait({opening})
    assert backend.get_place("cancelled") is None
    assert backend.pool.serving[0].sessions == 0
    await backend.open(record("s", generation=3), timeout=60)

    member = backend.pool.serving[0]
    await member.kernel.connection.request("close_session", session_id="s", timeout=5)
    with pytest.raises(PlaceGone):  # the kernel forgot it: nothing of the call ran
        await backend.call("s", call("list_programs"))
    assert [(session_id, place.generation) for session_id, place, _ in told.lost] == [("s", 3)]
    assert (member.sessions, backend.get_place("s")) == (0, None)
