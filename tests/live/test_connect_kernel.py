"""A session straight over the connection file of a running kernel, and the client class that speaks dspex."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import AsyncKernelManager, KernelManager

from dspex_kernels import DSPexKernelClient, connect_kernel, errors
from tests.live.kernels import LiveKernel


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work

    asyncio.run(bounded())


def test_a_running_kernel_gives_a_session_with_the_same_methods(offline: LiveKernel):
    async def work() -> None:
        async with connect_kernel(offline.manager.connection_file) as session:
            qa = await session.create_program("qa", "question -> answer")
            assert (qa.program_id, qa.version) == ("qa", 1)
            prediction = await qa.acall(question="Why?")
            assert prediction.answer == prediction["answer"] == prediction.toDict()["answer"]
            assert [p["program_id"] for p in await session.list_programs()] == ["qa"]
            assert (await qa.info())["module"] == "Predict"
            copy = await session.import_program(await qa.export(), program_id="copy")
            assert (await copy.acall(question="Why?")).answer == prediction.answer
            assert (await session.get_stats())["executions"] >= 2
            assert len(await session.inspect_history(2)) == 2
            assert (await session.configure(adapter="json"))["adapter"] == "json"
            assert not await session.cancel("nothing")
            info = await session.info()
            assert (info["session_id"], info["backend"]) == (session.session_id, "dedicated")
            with pytest.raises(errors.ProgramNotFound):
                await session.program("none").acall(question="?")
            await qa.delete()
            assert await session.reset() == 1
        # What was asked on this connection is the kernel's, not the connection's.
        assert offline.result("list_programs")["count"] == 0

    run(work())


@pytest.fixture
def known_by_name(offline: LiveKernel) -> Iterator[str]:
    """The kernel's connection file in Jupyter's runtime directory, by its name."""
    path = Path(os.environ["JUPYTER_RUNTIME_DIR"]) / "kernel-known-by-name.json"
    shutil.copy(offline.manager.connection_file, path)
    yield path.name
    path.unlink()


def test_a_connection_can_be_awaited_and_closed_and_given_by_name(offline: LiveKernel, known_by_name: str):
    async def work() -> None:
        session = await connect_kernel(known_by_name)
        try:
            assert (await session.ping())["pid"] == offline.pid
        finally:
            await session.close()
        with pytest.raises(errors.ServiceClosed):
            await session.ping()

    run(work())


def test_a_cell_that_blocks_does_not_keep_a_client_from_connecting(offline: LiveKernel):
    async def work() -> None:
        message_id = offline.execute("import time; time.sleep(3)")
        offline.wait_for_state(message_id, "busy")
        async with asyncio.timeout(2), connect_kernel(offline.manager.connection_file) as session:
            assert await session.list_programs() == []
        offline.reply(message_id)

    run(work())


def test_the_session_of_another_kernel_is_refused(offline: LiveKernel):
    async def work() -> None:
        with pytest.raises(errors.SessionMismatch, match="not 'another'"):
            await connect_kernel(offline.manager.connection_file, session_id="another")

    run(work())


def test_a_file_that_is_not_there_or_no_connection_file_is_named(tmp_path: Path):
    async def work() -> None:
        with pytest.raises(errors.NotADSPexKernel, match="no-such-file"):
            await connect_kernel("no-such-file.json")
        other = tmp_path / "other.json"
        other.write_text("{}")
        with pytest.raises(errors.NotADSPexKernel, match="lacks ip or ports"):
            await connect_kernel(other)

    run(work())


@pytest.mark.parametrize("wrong", [{"signature_scheme": "rot13"}, {"shell_port": "none"}])
def test_a_file_whose_values_no_kernel_has_is_named(offline: LiveKernel, tmp_path: Path, wrong: dict[str, Any]):
    async def work() -> None:
        path = tmp_path / "wrong.json"
        path.write_text(json.dumps(json.loads(Path(offline.manager.connection_file).read_text()) | wrong))
        with pytest.raises(errors.NotADSPexKernel, match=r"wrong\.json is no connection file of a kernel"):
            await connect_kernel(path)

    run(work())


def test_a_wrong_key_or_a_kernel_that_is_gone_costs_the_timeout_and_no_more(offline: LiveKernel, tmp_path: Path):
    async def work() -> None:
        info = json.loads(Path(offline.manager.connection_file).read_text())
        path = tmp_path / "wrong.json"
        gone = {"shell_port": 1, "control_port": 2, "iopub_port": 3}
        for wrong in ({"key": "another"}, gone):
            path.write_text(json.dumps(info | wrong))
            async with asyncio.timeout(5):
                with pytest.raises(errors.CommandTimeout, match=r"within 0\.3 s.*the ports and the key"):
                    await connect_kernel(path, timeout=0.3)
                client = DSPexKernelClient()
                client.load_connection_info(info | wrong)
                try:
                    with pytest.raises(errors.CommandTimeout):
                        await client.dspex("list_programs", timeout=0.3)
                finally:
                    client.stop_channels()
                    client.context.destroy(linger=0)

    run(work())


def test_a_pooled_kernel_is_asked_for_the_session_that_is_named(tmp_path: Path):
    with LiveKernel(env={"DSPEX_BACKEND": "pooled"}) as pooled:
        pooled.open_session("a")
        pooled.open_session("b")

        async def work() -> None:
            path = pooled.manager.connection_file
            with pytest.raises(errors.InvalidSession, match="session_id="):
                await connect_kernel(path)
            async with connect_kernel(path, session_id="a") as a, connect_kernel(path, session_id="b") as b:
                await a.create_program("qa", "question -> answer")
                assert await b.list_programs() == []
                assert (await a.info())["session_id"] == "a"

        run(work())


def test_a_plain_python_kernel_is_told_apart():
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel()
    try:

        async def work() -> None:
            with pytest.raises(errors.NotADSPexKernel, match="is not a dspex kernel"):
                await connect_kernel(manager.connection_file)

        run(work())
    finally:
        manager.shutdown_kernel(now=True)
        manager.context.destroy(linger=0)


def test_events_of_a_streamed_call_arrive_before_its_result(offline: LiveKernel):
    async def work() -> None:
        events: list[dict[str, Any]] = []
        async with connect_kernel(offline.manager.connection_file) as session:
            await session.create_program("qa", "question -> answer")
            prediction = await session.execute_program(
                "qa", {"question": "?"}, stream=True, on_event=events.append, request_id="mine"
            )
        assert prediction.answer
        assert {event["request_id"] for event in events} == {"mine"}
        assert [event["sequence"] for event in events] == list(range(len(events)))
        assert "token" in {event["event"] for event in events}

    run(work())


def test_the_client_class_speaks_dspex_beside_its_own_channels(offline: LiveKernel):
    async def work() -> None:
        manager = AsyncKernelManager(client_class="dspex_kernels.DSPexKernelClient")
        manager.load_connection_file(offline.manager.connection_file)
        client = manager.client()
        assert isinstance(client, DSPexKernelClient)
        client.start_channels(hb=False)
        try:
            await client.wait_for_ready(timeout=30)
            await client.dspex("create_program", {"program_id": "qa", "signature": "question -> answer"})
            calls = [
                client.dspex("execute_program", {"program_id": "qa", "inputs": {"question": f"q{n}"}})
                for n in range(20)
            ]
            cell = client.execute("1 + 1", reply=True, timeout=30)
            reply, *results = await asyncio.gather(cell, *calls)
            assert reply["content"]["status"] == "ok"
            assert all(result["status"] == "executed" for result in results)
            assert len({result["outputs"]["answer"] for result in results}) > 1
            with pytest.raises(errors.ProgramNotFound):
                await client.dspex("get_program", {"program_id": "none"})
        finally:
            client.stop_channels()
            client.context.destroy(linger=0)
            manager.context.destroy(linger=0)

    run(work())
