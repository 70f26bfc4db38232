"""What every backend promises the service: one suite over all of them."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from dspex_kernels import errors
from dspex_kernels.config import LMPolicy
from dspex_kernels.protocol.records import Change, SessionContents
from dspex_kernels.sessions.backend import Place, PlaceGone, SessionBackend
from dspex_kernels.sessions.calls import Call
from dspex_kernels.sessions.dedicated import DedicatedBackend
from dspex_kernels.sessions.kernels import Kernels
from dspex_kernels.sessions.model import BackendName, SessionRecord
from dspex_kernels.sessions.pool import KernelPool
from dspex_kernels.sessions.pooled import PooledBackend
from dspex_kernels.sessions.store.sql import SQLStore
from dspex_kernels.sessions.tenure import Tenure
from tests.sessions.memory_backend import MemoryBackend, MemoryService
from tests.waiting import wait_until

SLOW = {"model": "offline/echo", "offline": {"latency_s": 60}}
KERNEL_THAT_DIES_DURING_START = "dspex-test-dies-during-start"
KERNEL_THAT_DIES_TWICE_DURING_START = "dspex-test-dies-twice-during-start"


class Implementation(abc.ABC):
    """How the suite makes a backend, and breaks it."""

    @abc.abstractmethod
    def made(self, directory: Path) -> contextlib.AbstractAsyncContextManager[SessionBackend]: ...

    @abc.abstractmethod
    def made_that_cannot_start(self, directory: Path) -> contextlib.AbstractAsyncContextManager[SessionBackend]: ...

    @abc.abstractmethod
    def lose(self, backend: Any, place: Place, session_id: str) -> None: ...


class Dedicated(Implementation):
    @contextlib.asynccontextmanager
    async def made(self, directory: Path, kernel_name: str = "dspex") -> AsyncIterator[SessionBackend]:
        kernels = Kernels(kernel_name=kernel_name, policy=LMPolicy())
        await kernels.start()
        try:
            yield DedicatedBackend(kernels)
        finally:
            await kernels.stop()

    def made_that_cannot_start(self, directory: Path) -> contextlib.AbstractAsyncContextManager[SessionBackend]:
        return self.made(directory, KERNEL_THAT_DIES_DURING_START)

    def lose(self, backend: Any, place: Place, session_id: str) -> None:
        assert place.pid is not None
        os.kill(place.pid, signal.SIGKILL)


class DedicatedInSpareKernels(Dedicated):
    """The first session of each test has a spare kernel, the others have, if there is one by then."""

    @contextlib.asynccontextmanager
    async def made(self, directory: Path, kernel_name: str = "dspex") -> AsyncIterator[SessionBackend]:
        kernels = Kernels(kernel_name=kernel_name, policy=LMPolicy())
        async with SQLStore(f"sqlite:///{directory / 'store.sqlite'}", "one") as store:
            tenure = Tenure("one", store, directory / "leases", logging.getLogger(), _nobody_else)
            await tenure.begin()
            await kernels.start(tenure, directory / "services")
            try:
                backend = DedicatedBackend(kernels, spares=1)
                await backend._spares._fill()
                (spare,) = backend._spares.kernels
                yield backend
                assert not spare.spare, "no session had it"
            finally:
                await kernels.stop()
                await tenure.end()

    def made_that_cannot_start(self, directory: Path) -> contextlib.AbstractAsyncContextManager[SessionBackend]:
        return Dedicated().made_that_cannot_start(directory)


class Pooled(Dedicated):
    max_restarts = 0

    @contextlib.asynccontextmanager
    async def made(self, directory: Path, kernel_name: str = "dspex") -> AsyncIterator[SessionBackend]:
        kernels = Kernels(kernel_name=kernel_name, policy=LMPolicy())
        await kernels.start()
        try:
            traits = {"size": 2, "max_restarts": self.max_restarts, "prestart": True}
            yield PooledBackend(KernelPool(kernels, directory / "pool", start_timeout=60.0, **traits))
        finally:
            await kernels.stop()


class PooledWhoseFirstKernelsDie(Pooled):
    max_restarts = 5

    def made(self, directory: Path, kernel_name: str = "") -> Any:
        if kernel_name:
            return super().made(directory, kernel_name)
        (directory / "deaths").mkdir()
        _install(
            KERNEL_THAT_DIES_TWICE_DURING_START,
            "import os, sys\n"
            "for death in '12':\n"
            f"    try: os.mkdir(os.path.join({str(directory / 'deaths')!r}, death))\n"
            "    except FileExistsError: continue\n"
            "    sys.exit(3)\n"
            "os.execv(sys.executable, [sys.executable, '-m', 'dspex_kernels.kernel', '-f', sys.argv[1]])",
        )
        return super().made(directory, KERNEL_THAT_DIES_TWICE_DURING_START)


class Memory(Implementation):
    name: BackendName = "dedicated"

    def make(self) -> MemoryBackend:
        return MemoryBackend(self.name)

    @contextlib.asynccontextmanager
    async def made(self, directory: Path) -> AsyncIterator[SessionBackend]:
        yield self.make()

    @contextlib.asynccontextmanager
    async def made_that_cannot_start(self, directory: Path) -> AsyncIterator[SessionBackend]:
        backend = self.make()
        backend.start_failure = errors.KernelStartFailed("the process exited with code 3")
        yield backend

    def lose(self, backend: Any, place: Place, session_id: str) -> None:
        backend.lose(session_id)


class PooledMemory(Memory):
    name = "pooled"


class BackendThatTakesItsTime(MemoryBackend):
    """Others get the event loop many times before each of its steps is done."""

    async def open(self, record: SessionRecord, *, timeout: float) -> Place:
        await _turns(20)
        return await super().open(record, timeout=timeout)

    async def call(self, session_id: str, call: Call) -> dict[str, Any]:
        await _turns(5)
        return await super().call(session_id, call)

    async def close(self, session_id: str) -> None:
        await _turns(20)
        await super().close(session_id)


class MemoryThatTakesItsTime(Memory):
    def make(self) -> MemoryBackend:
        return BackendThatTakesItsTime(self.name)


async def _nobody_else() -> None:
    raise AssertionError("no other service is there")


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def _install(name: str, code: str) -> None:
    directory = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / name
    directory.mkdir(parents=True, exist_ok=True)
    argv = ["python", "-c", code, "{connection_file}"]
    (directory / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": name, "language": "python"}))


IMPLEMENTATIONS = {
    "memory": Memory,
    "memory-pooled": PooledMemory,
    "memory-that-takes-its-time": MemoryThatTakesItsTime,
    "dedicated": Dedicated,
    "dedicated-in-spare-kernels": DedicatedInSpareKernels,
    "pooled": Pooled,
    "pooled-whose-first-kernels-die": PooledWhoseFirstKernelsDie,
}


@pytest.fixture(
    params=[
        # With two seconds for each fork server, that is no suite for every run.
        pytest.param(made, id=name, marks=[pytest.mark.stress] if made is DedicatedInSpareKernels else [])
        for name, made in IMPLEMENTATIONS.items()
    ]
)
def implementation(request: pytest.FixtureRequest) -> Implementation:
    made: Implementation = request.param()
    return made


@pytest.fixture(autouse=True)
def failing_kernels() -> Iterator[None]:
    """Kernelspecs whose processes end at once: one always, with a last word; the tests may add another."""
    _install(KERNEL_THAT_DIES_DURING_START, "import sys; print('cannot go on', flush=True); sys.exit(3)")
    yield
    for name in (KERNEL_THAT_DIES_DURING_START, KERNEL_THAT_DIES_TWICE_DURING_START):
        shutil.rmtree(Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / name, ignore_errors=True)


class Told:
    """The service's side: what the backend tells it."""

    def __init__(self, backend: SessionBackend, directory: Path) -> None:
        self.lost: list[tuple[str, Place, str]] = []
        self._contents: dict[str, SessionContents] = defaultdict(SessionContents)
        self._backend = backend
        self._directory = directory
        backend.lost = lambda *told: self.lost.append(told)
        backend.changed = self._changed

    def record(self, session_id: str, generation: int = 1) -> SessionRecord:
        """The session's record, as the store would hold it now."""
        now = datetime.now(UTC)
        keeps_a_journal = self._backend.name == "dedicated"
        return SessionRecord(
            session_id=session_id,
            owner="alice",
            backend=self._backend.name,
            generation=generation,
            created_at=now,
            last_activity=now,
            directory=str(self._directory / session_id) if keeps_a_journal else None,
            contents=self._contents[session_id],
        )

    def _changed(self, session_id: str, generation: int, changes: list[dict[str, Any]]) -> None:
        for change in TypeAdapter(list[Change]).validate_python(changes):
            self._contents[session_id].apply(change)


@contextlib.asynccontextmanager
async def started(
    made: contextlib.AbstractAsyncContextManager[SessionBackend], directory: Path
) -> AsyncIterator[tuple[Any, Told]]:
    async with made as backend:
        told = Told(backend, directory)
        await backend.start()
        try:
            if isinstance(backend, PooledBackend):  # so that two sessions have a kernel each
                pool = backend.pool
                await wait_until(
                    lambda: len(pool.serving) == 2 or pool.figures()["failed"], deadline=60, what="the pool"
                )
            yield backend, told
        finally:
            await backend.stop()


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
        async with started(implementation.made(tmp_path), tmp_path) as (backend, told):
            places = await asyncio.gather(
                *(backend.open(told.record(session_id), timeout=60) for session_id in ("a", "b"))
            )
            assert [place.generation for place in places] == [1, 1]
            assert (places[0].kernel_id == places[1].kernel_id) <= isinstance(backend, PooledBackend)
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
            with pytest.raises(PlaceGone):
                await backend.call("a", call("list_programs"))
            await backend.close("a")
            again = await backend.open(told.record("a", generation=2), timeout=60)
            assert again.generation == 2
            assert (await backend.call("a", call("list_programs")))["count"] == 1
            assert told.lost == [], "what was closed on request is not lost"

    run(work())


def test_a_lost_place_answers_its_calls_and_tells_once_and_others_notice_nothing(implementation, tmp_path):
    async def work() -> None:
        async with started(implementation.made(tmp_path), tmp_path) as (backend, told):
            for session_id in ("a", "b"):
                await backend.open(told.record(session_id), timeout=60)
                await backend.call(
                    session_id, call("create_program", program_id="qa", signature="question -> answer")
                )
            lost, unharmed = await running(backend, "a"), await running(backend, "b")
            place = backend.get_place("a")
            implementation.lose(backend, place, "a")
            async with asyncio.timeout(2):
                with pytest.raises(errors.KernelDied):
                    await lost
            assert [(session_id, gone) for session_id, gone, _ in told.lost] == [("a", place)]
            assert backend.get_place("a") is None
            assert not unharmed.done()
            assert (await backend.call("b", call("list_programs")))["count"] == 1

            await backend.open(told.record("a", generation=2), timeout=60)
            assert (await backend.call("a", call("list_programs")))["count"] == 1
            unharmed.cancel()
            await asyncio.wait({unharmed})
            assert len(told.lost) == 1

    run(work())


def test_closing_cancels_calls_and_stopping_answers_that_the_service_is_closed(implementation, tmp_path):
    async def work() -> None:
        async with started(implementation.made(tmp_path), tmp_path) as (backend, told):
            for session_id in ("a", "b"):
                await backend.open(told.record(session_id), timeout=60)
                await backend.call(
                    session_id, call("create_program", program_id="qa", signature="question -> answer")
                )
            closed, stopped = await running(backend, "a"), await running(backend, "b")
            await backend.close("a")
            with pytest.raises(errors.CommandCancelled):
                await closed
        with pytest.raises(errors.ServiceClosed):
            await stopped
        assert told.lost == []

    run(work())


def test_a_start_that_fails_says_why_and_leaves_nothing(implementation, tmp_path):
    async def work() -> None:
        async with started(implementation.made_that_cannot_start(tmp_path), tmp_path) as (backend, told):
            with pytest.raises(errors.KernelStartFailed, match="exited with code 3"):
                await backend.open(told.record("a"), timeout=30)
            assert backend.get_place("a") is None
            await backend.close("a")
            assert told.lost == [], "open() itself told it"

    run(work())


def test_a_start_that_is_cancelled_leaves_nothing(implementation, tmp_path):
    async def work() -> None:
        async with started(implementation.made(tmp_path), tmp_path) as (backend, told):
            if isinstance(backend, MemoryBackend):
                backend.gate.clear()
            opening = asyncio.create_task(backend.open(told.record("a"), timeout=60))
            runtime = Path(os.environ["JUPYTER_RUNTIME_DIR"])
            if isinstance(implementation, DedicatedInSpareKernels):
                await wait_until(lambda: not backend._spares.kernels, what="the kernel to be taken")
            elif isinstance(backend, DedicatedBackend):
                await wait_until(lambda: list(runtime.glob("kernel-*.json")), what="the kernel's launch")
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            assert backend.get_place("a") is None
            if isinstance(backend, DedicatedBackend):
                assert not list(runtime.glob("kernel-*.json"))

    run(work())


class FaultyBackend(MemoryBackend):
    """Does as it should until ``faulty`` is set."""

    faulty = False


class BackendThatFailsToOpen(FaultyBackend):
    async def open(self, record: SessionRecord, *, timeout: float) -> Place:
        if self.faulty:
            raise RuntimeError("what no contract names")
        return await super().open(record, timeout=timeout)


class BackendThatNeverOpens(FaultyBackend):
    async def open(self, record: SessionRecord, *, timeout: float) -> Place:
        if self.faulty:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.Event().wait(), timeout)
            raise errors.KernelStartFailed(f"it did not answer within {timeout:g} s")
        return await super().open(record, timeout=timeout)


class BackendThatFailsToClose(FaultyBackend):
    async def close(self, session_id: str) -> None:
        await super().close(session_id)
        if self.faulty:
            raise RuntimeError("what no contract names")


class BackendThatFailsInCalls(FaultyBackend):
    async def call(self, session_id: str, call: Call) -> dict[str, Any]:
        if self.faulty:
            raise RuntimeError("what no contract names")
        return await super().call(session_id, call)


class BackendThatLosesThePlaceBeforeEachCall(FaultyBackend):
    async def call(self, session_id: str, call: Call) -> dict[str, Any]:
        if self.faulty:
            self.lose(session_id)
        return await super().call(session_id, call)


class BackendThatLosesThePlaceDuringEachCall(FaultyBackend):
    async def call(self, session_id: str, call: Call) -> dict[str, Any]:
        asking = asyncio.ensure_future(super().call(session_id, call))
        if self.faulty:
            await _turns(1)
            self.lose(session_id)
        return await asking


class BackendThatDoesNotTellOfLosses(FaultyBackend):
    async def call(self, session_id: str, call: Call) -> dict[str, Any]:
        if self.faulty:
            self._leave(session_id, lambda row: errors.KernelDied("it died", retryable=row.repeatable))
        return await super().call(session_id, call)


class BackendThatTellsOfLossesTwiceAndLate(FaultyBackend):
    async def call(self, session_id: str, call: Call) -> dict[str, Any]:
        place = self.get_place(session_id)
        if self.faulty and place is not None:
            self.lose(session_id)
            assert self.lost is not None
            self.lost(session_id, place, "told again")
            asyncio.get_running_loop().call_later(0.01, self.lost, session_id, place, "and again, late")
        return await super().call(session_id, call)


class BackendThatSaysItHasAPlaceAndDoesNot(FaultyBackend):
    async def call(self, session_id: str, call: Call) -> dict[str, Any]:
        if self.faulty:
            raise PlaceGone(session_id)
        return await super().call(session_id, call)


FAULTS = [
    BackendThatFailsToOpen,
    BackendThatNeverOpens,
    BackendThatFailsToClose,
    BackendThatFailsInCalls,
    BackendThatLosesThePlaceBeforeEachCall,
    BackendThatLosesThePlaceDuringEachCall,
    BackendThatDoesNotTellOfLosses,
    BackendThatTellsOfLossesTwiceAndLate,
    BackendThatSaysItHasAPlaceAndDoesNot,
]


@pytest.mark.parametrize("mode", ["dedicated", "pooled"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_whatever_a_backend_does_the_service_answers_every_call_and_loses_nothing(fault, mode, tmp_path):
    class Service(MemoryService):
        def _make_backends(self) -> list[SessionBackend]:
            self.backend_at_fault = fault(mode, parent=self)
            return [self.backend_at_fault]

    def make() -> Service:
        url = f"sqlite:///{tmp_path / 'store.sqlite'}"
        return Service(backend=mode, data_dir=str(tmp_path), store_url=url, kernel_start_timeout=0.3)

    async def work() -> None:
        async with make() as service:
            backend = service.backend_at_fault
            session = await service.create_session(session_id="s")
            await session.create_program("before", "question -> answer")
            backend.faulty = True
            if fault in (BackendThatFailsToOpen, BackendThatNeverOpens):
                backend.lose("s")
            acknowledged = ["before"]
            for number in range(3):
                asked = [session.call("list_programs", timeout=0.3) for _ in range(3)]
                change = session.call("create_program", {"program_id": f"p{number}"}, timeout=0.3)
                async with asyncio.timeout(5):
                    *_, changed = await asyncio.gather(*asked, change, return_exceptions=True)
                if not isinstance(changed, BaseException):
                    acknowledged.append(f"p{number}")
            backend.faulty = False
            with contextlib.suppress(errors.KernelStartFailed):  # of a start that was under way
                await session.list_programs()
            programs = [program["program_id"] for program in await session.list_programs()]
            assert [name for name in acknowledged if name not in programs] == []
            assert (await service.health_check())["calls"] == 0

            backend.faulty = True
            await session.destroy()
            with pytest.raises(errors.SessionNotFound):
                await session.list_programs()
            backend.faulty = False
            await service.create_session(session_id="new")
        async with make() as service:
            assert "new" in [info.session_id for info in await service.list_sessions()]
            assert await service.get_session("new").list_programs() == []

    run(work())
