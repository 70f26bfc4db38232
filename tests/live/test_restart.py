"""The service is started anew, with real kernels: what it held comes back, its secrets stay, nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography.fernet import Fernet
from jupyter_client.asynchronous import AsyncKernelClient
from traitlets.config import Config

from dspex_kernels import SessionService, errors
from tests.waiting import wait_until

RUN = {"program_id": "qa", "inputs": {"question": "?", "hint": "?"}}
KEY = "sk-test-4711-canary"


@pytest.fixture(params=["dedicated", "pooled"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(tmp_path: Path, mode: str) -> Callable[..., SessionService]:
    def make(**traits: Any) -> SessionService:
        return SessionService(
            backend=mode,
            data_dir=str(tmp_path),
            store_url=f"sqlite:///{tmp_path / 'store.sqlite'}",
            config=Config({"KernelPool": {"size": 1}}),
            **traits,
        )

    return make


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(90):
            await work

    asyncio.run(bounded())


_THERE_BEFORE: set[int] = set()
"""Processes that fixtures of the whole run have started: a database server."""


@pytest.fixture(autouse=True)
def _knows_what_was_there() -> None:
    _THERE_BEFORE.clear()
    _THERE_BEFORE.update(child.pid for child in psutil.Process().children(recursive=True))


def children() -> list[int]:
    found = (child.pid for child in psutil.Process().children(recursive=True))
    return [pid for pid in found if pid not in _THERE_BEFORE]


async def has_key(service: SessionService, variable: str) -> bool:
    """Whether the kernel of session ``s`` finds a key in its environment."""
    try:
        await service.call("s", "configure", {"lm": {"model": "openai/x", "api_key_env": variable}})
    except errors.LMCredentialsRequired:
        return False
    return True


def kernels() -> list[int]:
    """Those of them that are somebody's kernel: no guardian, fork server or kernel that stands by."""
    told = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in children()}
    return [pid for pid, words in told.items() if b"dspex_kernels.kernel" in words]


@pytest.mark.parametrize("sealed", [True, False], ids=["with-a-vault", "without"])
def test_everything_comes_back_with_the_next_service(make, monkeypatch, lm_server, sealed, tmp_path):
    if sealed:
        monkeypatch.setenv("DSPEX_CRYPT_KEY", Fernet.generate_key().decode())
    lm = {
        "model": "openai/gpt-x",
        "api_base": lm_server.api_base,
        "api_key": KEY,
        "cache": False,
        "temperature": 0.5,
    }

    async def work() -> None:
        async with make() as service:
            session = await service.create_session(owner="alice", session_id="s", lm=lm)
            await session.configure(budget={"lm_calls": 3})
            for signature in ("question -> answer", "question, hint -> answer"):
                await session.create_program("qa", signature, replace=True)
            assert (await session.call("execute_program", RUN))["lm_calls"] == 1
            before = await session.get_stats()
        assert children() == []
        async with make() as service:
            session = service.get_session("s")
            info = await service.get_session_info("s")
            assert (info.owner, info.status, info.generation) == ("alice", "hibernated", 1)
            summary = await session.get_program("qa")
            assert (summary["versions"], summary["signature"]) == ([1, 2], "question, hint -> answer")
            after = await session.get_stats()
            for kept in ("executions", "lm", "lm_calls", "total_tokens", "cost", "budget"):
                assert after[kept] == before[kept], kept
            assert (await service.get_session_info("s")).generation == 2
            if not sealed:
                with pytest.raises(errors.LMCredentialsRequired):
                    await session.call("execute_program", RUN)
                await session.configure(lm=lm)
            for _ in range(2):
                assert (await session.call("execute_program", RUN))["lm_calls"] == 1
            with pytest.raises(errors.BudgetExceeded):
                await session.call("execute_program", RUN)
            assert [request.api_key for request in lm_server.requests] == [KEY] * 3, "to restore asks nobody"
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]

    run(work())


def test_kernels_and_what_they_started_end_with_their_service(make):
    async def work() -> None:
        async with make(spare_kernels=0) as service:
            session = await service.create_session(session_id="s", lm="offline/echo")
            await session.create_program("qa", "question, hint -> answer")
            os.kill((await service.get_session_info("s")).kernel_pid, signal.SIGKILL)
            await wait_until(lambda: service._registry.get("s").status != "ready", what="the news of its death")
            await session.list_programs()
            assert len(kernels()) == 1
        assert children() == []
        runtime = Path(os.environ["JUPYTER_RUNTIME_DIR"])
        assert list(runtime.glob("kernel-*.json")) == []

    run(work())


def test_the_services_own_secrets_are_in_no_kernels_environment(make, monkeypatch):
    monkeypatch.setenv("DSPEX_CRYPT_KEY", crypt_key := Fernet.generate_key().decode())
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "hub-canary")
    monkeypatch.setenv("OWNERS_API_KEY", "owners-canary")

    async def work() -> None:
        async with make() as service:
            await service.create_session(session_id="s")
            for pid in children():
                try:
                    seen = Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
                except FileNotFoundError:
                    continue  # it was there for a fork only
                assert crypt_key.encode() not in seen
                assert b"hub-canary" not in seen
            told = await has_key(service, "OWNERS_API_KEY")
            assert told, "a single owner's keys are its own"
            assert not await has_key(service, "JUPYTERHUB_API_TOKEN")

    run(work())


@pytest.mark.parametrize("mode", ["dedicated"])
def test_where_code_is_not_allowed_a_notebook_can_run_none(make):
    async def work() -> None:
        async with make(allow_code=False) as service:
            session = await service.create_session(session_id="s", lm="offline/echo")
            await session.create_program("qa", "question, hint -> answer")
            with pytest.raises(errors.PolicyDenied, match="allow_code"):
                await service.get_connection_file("s")
            connection_file = service._places.of(service._registry.get("s")).connection_file
            client = AsyncKernelClient(connection_file=connection_file)
            client.load_connection_file()
            client.start_channels()
            try:
                reply = await client.execute("open('/tmp/never', 'w')", reply=True, timeout=30)
                assert (reply["content"]["status"], reply["content"]["ename"]) == ("error", "PolicyDenied")
            finally:
                client.stop_channels()
                client.context.destroy(linger=0)
            assert (await session.call("execute_program", RUN))["outputs"]["answer"]

    run(work())


def test_a_service_that_stops_while_kernels_start_leaves_none(make):
    async def work() -> None:
        service = await make().start()
        creating = asyncio.create_task(service.create_session(session_id="s"))
        await wait_until(lambda: len(children()) > 1, deadline=30, what="more than a guardian")
        await service.stop()
        with pytest.raises(errors.DSPexError):
            await creating
        assert children() == []

    run(work())
