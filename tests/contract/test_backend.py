"""What every backend promises the service: one suite over all of them."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dspex_kernels import errors
from dspex_kernels.config import LMPolicy
from dspex_kernels.sessions.backend import Place, SessionBackend
from dspex_kernels.sessions.calls import Call
from dspex_kernels.sessions.dedicated import DedicatedBackend
from dspex_kernels.sessions.model import SessionRecord
from tests.sessions.memory_backend import MemoryBackend
from tests.waiting import wait_until

SLOW = {"model": "offline/echo", "offline": {"latency_s": 60}}
KERNEL_THAT_DIES_DURING_START = "dspex-test-dies-during-start"


class Implementation(abc.ABC):
    """How the suite makes a backend, and breaks it."""

    @abc.abstractmethod
    def make(self) -> SessionBackend: ...

    @abc.abstractmethod
    def make_that_cannot_start(self) -> SessionBackend: ...

    @abc.abstractmethod
    def lose(self, backend: Any, place: Place, session_id: str) -> None: ...


class Dedicated(Implementation):
    def make(self) -> SessionBackend:
        return DedicatedBackend(kernel_name="dspex", policy=LMPolicy())

    def make_that_cannot_start(self) -> SessionBackend:
        return DedicatedBackend(kernel_name=KERNEL_THAT_DIES_DURING_START, policy=LMPolicy())

    def lose(self, backend: Any, place: Place, session_id: str) -> None:
        assert place.pid is not None
        os.kill(place.pid, signal.SIGKILL)


class Memory(Implementation):
    def make(self) -> SessionBackend:
        return MemoryBackend()

    def make_that_cannot_start(self) -> SessionBackend:
        backend = MemoryBackend()
        backend.start_failure = errors.KernelStartFailed("the process exited with code 3")
        return backend

    def lose(self, backend: Any, place: Place, session_id: str) -> None:
        backend.lose(session_id)


@pytest.fixture(params=[Memory, Dedicated], ids=["memory", "dedicated"])
def implementation(request: pytest.FixtureRequest) -> Implementation:
    made: Implementation = request.param()
    return made


@pytest.fixture(autouse=True)
def kernel_that_dies_during_start() -> Iterator[None]:
    """A kernelspec whose process ends at once, with a last word."""
    directory = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / KERNEL_THAT_DIES_DURING_START
    directory.mkdir(parents=True, exist_ok=True)
    argv = ["python", "-c", "import sys; print('cannot go on', flush=True); sys.exit(3)", "{connection_file}"]
    (directory / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "dies", "language": "python"}))
    yield
    (directory / "kernel.json").unlink()
    directory.rmdir()


class Losses:
    """Takes the backend's word about lost places."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Place, str]] = []

    def __call__(self, session_id: str, place: Place, why: str) -> None:
        self.told.append((session_id, place, why))


@contextlib.asynccontextmanager
async def started(backend: SessionBackend) -> AsyncIterator[Losses]:
    losses = Losses()
    backend.lost = losses
    await backend.start()
    try:
        yield losses
    finally:
        await backend.stop()


def record(tmp_path: Path, session_id: str, generation: int = 1) -> SessionRecord:
    now = datetime.now(UTC)
    return SessionRecord(
        session_id=session_id,
        owner="alice",
        backend="dedicated",
        generation=generation,
        created_at=now,
        last_activity=now,
        directory=str(tmp_path / session_id),
    )


def call(command: str, timeout: float = 20.0, **args: Any) -> Call:
    return Call(command, args, timeout)


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(90):
            await work

    asyncio.run(bounded())


async def running(backend: SessionBackend, session_id: str) -> asyncio.Task[dict[str, Any]]:
    """A call that will not end by itself, and runs already."""
    await backend.call(session_id, call("configure", lm=SLOW))
    task = asyncio.create_task(
        backend.call(session_id, call("execute_program", 60, program_id="qa", inputs={"question": "?"}))
    )
    # Answered on the same road behind it, so it has arrived by then.
    await backend.call(session_id, call("list_programs"))
    assert not task.done()
    return task


def test_sessions_keep_programs_of_one_id_apart_and_find_them_again(implementation, tmp_path):
    async def work() -> None:
        backend = implementation.make()
        async with started(backend) as losses:
            places = await asyncio.gather(
                *(backend.open(record(tmp_path, session_id), timeout=60) for session_id in ("a", "b"))
            )
            assert [place.generation for place in places] == [1, 1]
            assert places[0].kernel_id != places[1].kernel_id
            assert backend.get_place("a") == places[0]
            for session_id in ("a", "b"):
                await backend.call(
                    session_id, call("create_program", program_id="qa", signature="question -> answer")
                )
            await backend.call("b", call("delete_program", program_id="qa"))
            assert (await backend.call("a", call("list_programs")))["count"] == 1
            assert (await backend.call("b", call("list_programs")))["count"] == 0
            with pytest.raises(errors.ProgramExists):
                await backend.call("a", call("create_program", program_id="qa", signature="question -> answer"))

            await backend.close("a")
            assert backend.get_place("a") is None
            with pytest.raises(errors.SessionNotReady):
                await backend.call("a", call("list_programs"))
            await backend.close("a")
            again = await backend.open(record(tmp_path, "a", generation=2), timeout=60)
            assert again.generation == 2
            assert (await backend.call("a", call("list_programs")))["count"] == 1
            assert losses.told == [], "what was closed on request is not lost"

    run(work())


def test_a_lost_place_answers_its_calls_and_tells_once_and_others_notice_nothing(implementation, tmp_path):
    async def work() -> None:
        backend = implementation.make()
        async with started(backend) as losses:
            for session_id in ("a", "b"):
                await backend.open(record(tmp_path, session_id), timeout=60)
                await backend.call(
                    session_id, call("create_program", program_id="qa", signature="question -> answer")
                )
            lost, unharmed = await running(backend, "a"), await running(backend, "b")
            place = backend.get_place("a")
            implementation.lose(backend, place, "a")
            async with asyncio.timeout(2):
                with pytest.raises(errors.KernelDied):
                    await lost
            assert [(session_id, gone) for session_id, gone, _ in losses.told] == [("a", place)]
            assert backend.get_place("a") is None
            assert not unharmed.done()
            assert (await backend.call("b", call("list_programs")))["count"] == 1

            await backend.open(record(tmp_path, "a", generation=2), timeout=60)
            assert (await backend.call("a", call("list_programs")))["count"] == 1
            unharmed.cancel()
            await asyncio.wait({unharmed})
            assert len(losses.told) == 1

    run(work())


def test_closing_cancels_calls_and_stopping_answers_that_the_service_is_closed(implementation, tmp_path):
    async def work() -> None:
        backend = implementation.make()
        async with started(backend) as losses:
            for session_id in ("a", "b"):
                await backend.open(record(tmp_path, session_id), timeout=60)
                await backend.call(
                    session_id, call("create_program", program_id="qa", signature="question -> answer")
                )
            closed, stopped = await running(backend, "a"), await running(backend, "b")
            await backend.close("a")
            with pytest.raises(errors.CommandCancelled):
                await closed
        with pytest.raises(errors.ServiceClosed):
            await stopped
        assert losses.told == []

    run(work())


def test_a_start_that_fails_says_why_and_leaves_nothing(implementation, tmp_path):
    async def work() -> None:
        backend = implementation.make_that_cannot_start()
        async with started(backend) as losses:
            with pytest.raises(errors.KernelStartFailed, match="exited with code 3"):
                await backend.open(record(tmp_path, "a"), timeout=30)
            assert backend.get_place("a") is None
            await backend.close("a")
            assert losses.told == [], "open() itself told it"

    run(work())


def test_a_start_that_is_cancelled_leaves_nothing(implementation, tmp_path):
    async def work() -> None:
        backend = implementation.make()
        if isinstance(backend, MemoryBackend):
            backend.gate.clear()
        async with started(backend):
            opening = asyncio.create_task(backend.open(record(tmp_path, "a"), timeout=60))
            runtime = Path(os.environ["JUPYTER_RUNTIME_DIR"])
            if isinstance(backend, DedicatedBackend):
                await wait_until(lambda: list(runtime.glob("kernel-*.json")), what="the kernel's launch")
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            assert backend.get_place("a") is None
            assert not list(runtime.glob("kernel-*.json"))

    run(work())
