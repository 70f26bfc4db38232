"""The service with real kernels: owners apart, deaths noticed, nothing acknowledged lost, nothing left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client.asynchronous import AsyncKernelClient

from dspex_kernels import SessionService, config, connect_kernel, errors
from dspex_kernels.sessions.store.sql import SQLStore
from tests.live.births import wait_for_standby
from tests.waiting import halt, wait_until, wait_until_stored

SLOW = {"model": "offline/echo", "cache": False, "offline": {"latency_s": 60}}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., SessionService]:
    def make(**traits: Any) -> SessionService:
        return SessionService(data_dir=str(tmp_path), store_url=f"sqlite:///{tmp_path / 'store.sqlite'}", **traits)

    return make


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(100):
            await work

    asyncio.run(bounded())


async def run_cell(connection_file: str | None, code: str) -> None:
    """Run a cell in a session's kernel, as a notebook does."""
    client = AsyncKernelClient(connection_file=connection_file)
    client.load_connection_file()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=30)
        reply = await client.execute(code, reply=True, timeout=30)
        assert reply["content"]["status"] == "ok", reply["content"]
    finally:
        client.stop_channels()
        client.context.destroy(linger=0)


def test_two_owners_keep_a_program_of_one_id_in_two_kernels(make):
    async def work() -> None:
        async with (
            make() as service,
            service.session(owner="alice", lm="offline/echo") as alice,
            service.session(owner="bob", lm="offline/echo") as bob,
        ):
            await alice.create_program("qa_bot", "question -> answer", module="ChainOfThought")
            theirs = await bob.create_program("qa_bot", "question -> answer: int")
            prediction = await alice.program("qa_bot").acall(question="Why is the sky blue?")
            assert isinstance(prediction.answer, str)
            assert isinstance(prediction.reasoning, str)
            assert isinstance((await theirs.acall(question="How many?")).answer, int)
            assert "offline/echo" in str(prediction.get_lm_usage())

            infos = await service.list_sessions()
            pids = {info.kernel_pid for info in infos}
            assert len(pids) == 2
            for pid in pids:
                assert "dspex_kernels.kernel" in psutil.Process(pid).cmdline()
            await alice.delete_program("qa_bot")
            assert await alice.list_programs() == []
            assert [p["program_id"] for p in await bob.list_programs()] == ["qa_bot"]
            assert {info.owner: info.programs for info in await service.list_sessions()} == {
                "alice": [],
                "bob": ["qa_bot"],
            }

    run(work())


def test_a_killed_kernel_is_reported_within_two_seconds_and_its_programs_come_back(make, birth):
    async def work() -> None:
        async with (
            make() as service,
            service.session(owner="alice", lm=SLOW) as alice,
            service.session(owner="bob", lm="offline/echo") as bob,
        ):
            await alice.create_program("by_command", "question -> answer")
            await run_cell(
                await service.get_connection_file(alice.session_id),
                '%dspex create by_magic "question -> answer" --module ChainOfThought',
            )
            await bob.create_program("qa_bot", "question -> answer")
            call = asyncio.create_task(alice.execute_program("by_command", {"question": "?"}, timeout=60))
            await _is_running(alice)
            if birth == "standby":
                await wait_for_standby(service)
            killed_at = time.monotonic()
            os.kill((await service.get_session_info(alice.session_id)).kernel_pid, signal.SIGKILL)
            with pytest.raises(errors.KernelDied, match="was killed by SIGKILL during execute_program") as died:
                await call
            assert time.monotonic() - killed_at < 2.0
            assert not died.value.retryable, "it may have reached an LM"
            before = await bob.ping()
            assert (await bob.execute_program("qa_bot", {"question": "?"})).answer
            programs = {p["program_id"] for p in await alice.list_programs()}
            assert programs == {"by_command", "by_magic"}
            assert (await service.get_session_info(alice.session_id)).generation == 2
            assert (await bob.ping())["pid"] == before["pid"]
            async with SQLStore(service.store_url) as store:
                await wait_until_stored(store, alice.session_id, lambda told: set(told.programs) == programs)

    run(work())


async def _is_running(session: Any) -> None:
    """Wait until the session's kernel runs a command."""
    async with asyncio.timeout(20):
        while (await session.ping())["running"] < 1:
            pass


def test_a_cancelled_caller_ends_its_call_in_the_kernel(make):
    async def work() -> None:
        async with make() as service, service.session(lm=SLOW) as session:
            await session.create_program("qa_bot", "question -> answer")
            call = asyncio.create_task(session.execute_program("qa_bot", {"question": "?"}, timeout=60))
            await _is_running(session)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            async with asyncio.timeout(1):
                while (await session.ping())["running"]:
                    pass

            named = asyncio.create_task(
                session.call("execute_program", _inputs("?"), request_id="mine", timeout=60)
            )
            await _is_running(session)
            assert await session.cancel("mine")
            with pytest.raises(errors.CommandCancelled):
                await named
            with pytest.raises(errors.CommandTimeout):
                await session.call("execute_program", _inputs("?"), timeout=0.3)

    run(work())


def _inputs(question: str) -> dict[str, Any]:
    return {"program_id": "qa_bot", "inputs": {"question": question}}


def test_a_hundred_concurrent_calls_of_one_session_get_their_own_answers(make):
    async def work() -> None:
        async with make() as service, service.session(lm="offline/echo") as session:
            await session.create_program("qa_bot", "question -> answer")
            alone = [(await session.call("execute_program", _inputs(f"q{n}")))["outputs"] for n in range(5)]
            results = await asyncio.gather(
                *(session.call("execute_program", _inputs(f"q{n % 5}"), timeout=60) for n in range(100))
            )
            assert [result["outputs"] for result in results] == alone * 20
            assert len({str(outputs) for outputs in alone}) == 5, "else the test could not fail"

    run(work())


def test_sessions_of_a_service_that_ended_come_back_with_the_next(make):
    async def work() -> None:
        async with make() as service:
            session = await service.create_session(owner="alice", session_id="s", lm="offline/echo")
            await session.create_program("qa_bot", "question -> answer")
            answer = (await session.program("qa_bot").acall(question="?")).answer
            pid = (await service.get_session_info("s")).kernel_pid
        assert not psutil.pid_exists(pid)
        async with make() as service:
            assert (await service.get_session_info("s")).status == "hibernated"
            session = service.get_session("s")
            assert (await session.program("qa_bot").acall(question="?")).answer == answer
            await session.destroy()

    run(work())


def test_stopping_during_a_call_and_a_start_leaves_no_process(make, monkeypatch):
    monkeypatch.setenv(config.ENV_FORK, "0")  # a start that takes its time

    async def work() -> None:
        service = await make().start()
        try:
            session = await service.create_session(session_id="s", lm=SLOW)
            await session.create_program("qa_bot", "question -> answer")
            call = asyncio.create_task(session.execute_program("qa_bot", {"question": "?"}, timeout=60))
            await _is_running(session)
            starting = asyncio.create_task(service.create_session(session_id="late"))
            await wait_until(lambda: len(_kernels()) == 2, what="the second kernel's process")
        finally:
            await service.stop()
        with pytest.raises(errors.ServiceClosed):
            await call
        with pytest.raises(errors.DSPexError):
            await starting
        assert _kernels() == []

    run(work())


def test_a_second_service_leaves_a_living_kernels_connection_file_and_log(make):
    async def work() -> None:
        async with make() as first:
            session = await first.create_session(session_id="s")
            async with make() as second:
                path = await first.get_connection_file("s")
                with pytest.raises(errors.SessionNotReady, match="used by another service"):
                    await second.get_session("s").list_programs()
                assert path is not None
                async with connect_kernel(path) as direct:
                    await direct.create_program("qa", "question -> answer")
                assert not list(Path(first.data_dir).rglob("kernel.log.1"))
            assert len(await session.list_programs()) == 1

    run(work())


def test_a_stopped_kernel_costs_its_caller_the_deadline_and_others_nothing(make):
    async def work() -> None:
        async with make() as service:
            hung, other = [await service.create_session(lm="offline/echo") for _ in range(2)]
            await other.create_program("qa", "question -> answer")
            halt((await service.get_session_info(hung.session_id)).kernel_pid)
            call = asyncio.create_task(hung.list_programs(timeout=0.2))
            async with asyncio.timeout(2):
                assert (await other.execute_program("qa", {"question": "?"})).answer
            async with asyncio.timeout(5):
                with pytest.raises(errors.CommandTimeout, match=r"gave no answer in 0\.2 s"):
                    await call
        assert _kernels() == []

    run(work())


def test_an_interrupt_ends_the_commands_of_its_session_only(make):
    async def work() -> None:
        async with make() as service:
            sessions = [await service.create_session(lm=SLOW) for _ in range(2)]
            calls = []
            for session in sessions:
                await session.create_program("qa", "question -> answer")
                calls.append(asyncio.create_task(session.execute_program("qa", {"question": "?"}, timeout=60)))
                await _is_running(session)
            await sessions[0].interrupt()
            with pytest.raises(errors.CommandInterrupted):
                await calls[0]
            assert (await sessions[1].ping())["running"] == 1
            assert (await sessions[0].ping())["running"] == 0
            calls[1].cancel()
            await asyncio.wait({calls[1]})

    run(work())


SERVICE_OF_ITS_OWN = """
import asyncio, sys
from dspex_kernels import SessionService

async def main():
    async with SessionService(data_dir=sys.argv[1], store_url=f"sqlite:///{sys.argv[1]}/store.sqlite") as service:
        session = await service.create_session(session_id="s", lm="offline/echo")
        await session.create_program("qa_bot", "question -> answer")
        print((await service.get_session_info("s")).kernel_pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_killed_service_leaves_no_kernel_and_the_next_one_has_its_sessions(make, tmp_path):
    async def work() -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVICE_OF_ITS_OWN, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            kernel = psutil.Process(int(process.stdout.readline()))
            process.kill()
        async with make() as service:
            assert [p["program_id"] for p in await service.get_session("s").list_programs()] == ["qa_bot"]
            await wait_until(lambda: not kernel.is_running(), what="the orphan's end")
        assert not list(Path(os.environ["JUPYTER_RUNTIME_DIR"]).glob("kernel-*.json"))

    run(work())


def _kernels() -> list[int]:
    return [
        child.pid
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "dspex_kernels.kernel" in child.cmdline()
    ]
