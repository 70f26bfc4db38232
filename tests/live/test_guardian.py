"""A service whose guardian is killed loses its kernels, and nothing else; over every transport that Jupyter has."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
from traitlets.config import Config

from dspex_kernels import SessionService
from dspex_kernels.sessions import tenure as tenure_module
from tests.waiting import wait_until

ECHO = {"model": "offline/echo", "cache": False}


@pytest.mark.parametrize(
    ("backend", "transport"),
    [("dedicated", {"transport_encryption": "required"}), ("pooled", {"transport": "ipc"})],
)
def test_a_killed_guardian_takes_the_kernels_along_and_the_sessions_come_back(tmp_path, backend, transport):
    def kernels(service: SessionService) -> list[Any]:
        return list(service._kernels._living)

    async def work() -> None:
        config = Config({"KernelManager": transport, "KernelPool": {"size": 1}})
        url = f"sqlite:///{tmp_path / 'store.sqlite'}"
        async with (
            asyncio.timeout(100),
            SessionService(backend=backend, data_dir=str(tmp_path), store_url=url, config=config) as service,
        ):
            session = await service.create_session(lm=ECHO)
            program = await session.create_program("qa", "question -> answer")
            before = kernels(service)
            os.kill(service._kernels._guardian.pid, signal.SIGKILL)
            await wait_until(lambda: not set(before) & set(kernels(service)), what="the kernels' end")
            assert tenure_module._is_held(tmp_path / "leases" / service._tenure.service_id)
            await program.acall(question="?")
            assert (await session.info()).get("generation", 0) == 2

    asyncio.run(work())
