"""Culling with real kernels: what is idle goes by the kernel's lifecycle and comes back, what is in use stays."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client.asynchronous import AsyncKernelClient
from traitlets.config import Config

from dspex_kernels import SessionService
from dspex_kernels.sessions.calls import Call
from tests.waiting import wait_until

ECHO = {"model": "offline/echo", "cache": False}
SLOW = {**ECHO, "offline": {"latency_s": 60}}
RUN = {"program_id": "qa", "inputs": {"question": "?"}}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., SessionService]:
    """Makes services that cull what was idle for an hour, when they are told to look."""

    def make(backend: str, **traits: Any) -> SessionService:
        return SessionService(
            backend=backend,
            data_dir=str(tmp_path),
            store_url=f"sqlite:///{tmp_path / 'store.sqlite'}",
            cull_interval=86400.0,
            config=Config({"KernelPool": {"size": 1}}),
            **traits,
        )

    return make


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(90):
            await work

    asyncio.run(bounded())


async def look(service: SessionService, *, hours: float = 2.0) -> None:
    """One pass of the culler, so much later."""
    service._culler._now = lambda: datetime.now(UTC) + timedelta(hours=hours)
    await service._culler.cull()


async def status(service: SessionService, session_id: str) -> str:
    return str((await service.get_session_info(session_id)).status)


async def made(service: SessionService, name: str, lm: Any = ECHO) -> Any:
    session = await service.create_session(session_id=name, lm=lm)
    await session.create_program("qa", "question -> answer")
    return session


def test_an_idle_namespace_is_dropped_and_a_call_that_runs_keeps_its_own(make):
    async def work() -> None:
        async with make("pooled", session_ttl=3 * 3600) as service:
            idle, busy = await made(service, "idle"), await made(service, "busy", SLOW)
            answer = (await idle.call("execute_program", RUN))["outputs"]
            call = asyncio.create_task(busy.call("execute_program", RUN, timeout=60))
            async with asyncio.timeout(20):
                while (await busy.ping())["running"] < 1:
                    pass
            assert (await busy.ping())["sessions"] == 2
            await look(service)
            assert [await status(service, name) for name in ("idle", "busy")] == ["hibernated", "ready"]
            assert (await busy.ping())["sessions"] == 1, "its namespace is gone from the kernel"
            assert not call.done()
            assert (await idle.call("execute_program", RUN))["outputs"] == answer
            info = await service.get_session_info("idle")
            assert (info.generation, info.programs) == (2, ["qa"])
            assert (await idle.get_stats())["executions"] == 2
            call.cancel()
            await asyncio.wait({call})
            await look(service, hours=4)
            assert await service.list_sessions() == []

    run(work())


def test_an_idle_dedicated_kernel_is_shut_down_and_not_taken_for_dead(make, caplog):
    async def work() -> None:
        async with make("dedicated") as service:
            session = await made(service, "s")
            pid = (await service.get_session_info("s")).kernel_pid
            with caplog.at_level(logging.WARNING):
                await look(service)
            assert await status(service, "s") == "hibernated"
            assert not psutil.pid_exists(pid)
            assert "was killed" not in caplog.text
            assert "exited" not in caplog.text
            assert await service.get_connection_file("s") is None
            assert (await session.call("execute_program", RUN))["outputs"]["answer"]
            assert (await service.get_session_info("s")).generation == 2

    run(work())


def test_a_notebook_that_runs_cells_keeps_its_kernel(make):
    async def work() -> None:
        async with make("dedicated", cull_connected=True) as service:
            await made(service, "s")
            client = AsyncKernelClient(connection_file=await service.get_connection_file("s"))
            client.load_connection_file()
            client.start_channels()
            try:
                await client.wait_for_ready(timeout=30)
                client.execute("import time\nfor _ in range(600): time.sleep(0.1)")
                place = service._places.backend_of(service._registry.get("s"))
                async with asyncio.timeout(20):
                    while not (await place.call("s", Call("ping", {}, 5.0)))["busy"]:
                        pass
                await look(service)
                assert await status(service, "s") == "ready", "a cell runs"
                await service.interrupt_session("s")
                async with asyncio.timeout(20):
                    while (await place.call("s", Call("ping", {}, 5.0)))["busy"]:
                        pass
                await look(service, hours=0.9)
                assert await status(service, "s") == "ready", "it ended only now"
                await look(service)
                assert await status(service, "s") == "hibernated"
            finally:
                client.stop_channels()
                client.context.destroy(linger=0)

    run(work())


def test_the_culler_looks_by_itself(make):
    async def work() -> None:
        async with make("pooled", cull_idle_timeout=0.01) as service:
            await made(service, "s")
            service._culler._interval = 0.01
            service._culling.cancel()
            await asyncio.wait({service._culling})
            service._culling = asyncio.create_task(service._culler.run())
            await wait_until(lambda: service._registry.get("s").status == "hibernated", what="the culling")

    run(work())
