"""Kernel processes: their end is noticed however they end, and none outlives the service that started it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspex_kernels import errors
from dspex_kernels.config import LMPolicy
from dspex_kernels.sessions import kernels as kernels_module
from dspex_kernels.sessions import tenure as tenure_module
from dspex_kernels.sessions.kernel_connection import KernelConnection
from dspex_kernels.sessions.kernels import Kernel, Kernels
from dspex_kernels.sessions.store.sql import SQLStore
from dspex_kernels.sessions.tenure import Tenure
from tests.waiting import wait_until

NAME = "dspex-test-light"
LIGHT = "import sys; from tests.sessions.light_kernel import main; main(sys.argv[1])"
LOG = logging.getLogger(__name__)


class ProvisionerThatLosesItsKernel:
    async def wait(self) -> int:
        raise ConnectionError("the other machine does not answer")


@pytest.fixture(autouse=True)
def kernelspec() -> Iterator[None]:
    """Installs a kernelspec of light kernels."""
    directory = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / NAME
    directory.mkdir(parents=True)
    argv = [sys.executable, "-c", LIGHT, "{connection_file}"]
    (directory / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "light", "language": "python"})
    )
    yield
    (directory / "kernel.json").unlink()
    directory.rmdir()


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(50):
            await work

    asyncio.run(bounded())


class Started:
    """Kernels below a guardian, as a service has them.

    Attributes:
        deaths: How each that died ended.
    """

    def __init__(self, kernels: Kernels, tenure: Tenure, tmp_path: Path) -> None:
        self.kernels = kernels
        self.tenure = tenure
        self.deaths: list[str] = []
        self._tmp_path = tmp_path

    async def kernel(self, **env: str) -> Kernel:
        return await self.kernels.start_kernel(
            whose="the test",
            backend="pooled",
            env=env,
            log_path=self._tmp_path / "logs" / "kernel.log",
            timeout=30,
            died=lambda _, how: self.deaths.append(how),
        )


@contextlib.asynccontextmanager
async def started(tmp_path: Path) -> AsyncIterator[Started]:
    async def deposed() -> None:
        raise AssertionError("nobody else is there")

    kernels = Kernels(kernel_name=NAME, policy=LMPolicy())
    async with SQLStore(f"sqlite:///{tmp_path / 'store.sqlite'}", "one") as store:
        tenure = Tenure("one", store, tmp_path / "leases", LOG, deposed)
        await tenure.begin()
        try:
            await kernels.start(tenure, tmp_path / "services")
            yield Started(kernels, tenure, tmp_path)
        finally:
            await kernels.stop()
            assert tenure_module._is_held(tmp_path / "leases" / "one"), "the service still has things to write"
            await tenure.end()


@pytest.mark.parametrize(
    ("signum", "expected"),
    [
        (signal.SIGSEGV, "was killed by SIGSEGV"),
        (signal.SIGRTMIN + 1, f"was killed by signal {signal.SIGRTMIN + 1}"),
    ],
)
def test_a_death_is_noticed_and_told_by_its_signals_name_or_number(tmp_path, signum, expected):
    async def work() -> None:
        async with started(tmp_path) as service:
            kernel = await service.kernel()
            os.kill(kernel.pid, signum)
            await wait_until(lambda: service.deaths == [expected], what="the news of its death")
            with pytest.raises(errors.KernelDied):
                await kernel.connection.request("ping", timeout=10)

    run(work())


def test_a_kernel_that_dies_as_it_answers_has_not_started(tmp_path, monkeypatch):
    async def work() -> None:
        identify = KernelConnection.identify
        async with started(tmp_path) as service:
            launched: list[Kernel] = []
            watch = service.kernels._watch
            monkeypatch.setattr(
                service.kernels, "_watch", lambda kernel, by: (launched.append(kernel), watch(kernel, by))
            )

            async def answered_with_its_last_breath(connection: KernelConnection, **options: Any) -> dict[str, Any]:
                about = await identify(connection, **options)
                os.kill(launched[0].pid, signal.SIGKILL)
                await wait_until(lambda: launched[0].death, what="its death")
                return about

            monkeypatch.setattr(KernelConnection, "identify", answered_with_its_last_breath)
            with pytest.raises(errors.KernelStartFailed, match="its process was killed by SIGKILL"):
                await service.kernel()
            assert service.deaths == [], "nobody had it yet"

    run(work())


def test_a_kernel_that_cannot_be_watched_any_more_counts_as_dead(tmp_path, caplog):
    async def work() -> None:
        async with started(tmp_path) as service:
            kernel = await service.kernel()
            await service.kernels._wait_for_end(kernel, ProvisionerThatLosesItsKernel())
            assert service.deaths == ["cannot be watched any more"]
            assert "the other machine does not answer" in caplog.text

    run(work())


def test_kernels_that_nobody_ended_end_with_stop_and_are_not_told_dead(tmp_path):
    async def work() -> None:
        async with started(tmp_path) as service:
            await service.kernel()
            await service.kernel()
        assert service.deaths == []

    run(work())  # that they are gone is what every test is checked for


def test_stop_waits_no_longer_than_it_says(tmp_path, monkeypatch, caplog):
    async def work() -> None:
        monkeypatch.setattr(kernels_module, "STOP_TIMEOUT", 0.1)
        async with started(tmp_path) as service:
            endless = service.kernels._tasks.spawn(asyncio.Event().wait())
        assert endless.cancelled()
        assert "1 starts or ends of kernels were not over within 0.1 s" in caplog.text

    run(work())


@pytest.mark.parametrize(
    "told", [{"memory_bytes": "much"}, {"lag_s": None}, {"stuck": "no"}, {"memory_bytes": float("inf")}]
)
def test_an_answer_to_a_ping_that_its_owners_code_has_changed_hurts_nobody_else(tmp_path, monkeypatch, told):
    async def work() -> None:
        async with started(tmp_path) as service:
            kernel = await service.kernel()

            async def answer(*_: Any, **__: Any) -> dict[str, Any]:
                return {"memory_bytes": 1, "lag_s": 0.0, "stuck": 0} | told

            monkeypatch.setattr(kernel.connection, "request", answer)
            assert await service.kernels.why_sick(kernel) == "its answer to a ping cannot be read"
            await wait_until(lambda: service.kernels.memory_bytes("pooled") > 1000, what="its memory, read apart")

    run(work())


def test_what_is_asked_of_a_kernel_that_is_gone_is_nothing(tmp_path):
    async def work() -> None:
        async with started(tmp_path) as service:
            kernel = await service.kernel()
            await service.kernels.end(kernel, errors.ServiceClosed("the test ends it"), now=True)
            await service.kernels.interrupt(kernel)
            await service.kernels.kill(kernel)

    run(work())


def test_when_the_guardian_is_killed_its_kernels_are_told_dead_and_others_start_and_the_lock_stays(tmp_path):
    async def work() -> None:
        async with started(tmp_path) as service:
            await service.kernel()
            await service.kernel()
            killed = service.kernels._guardian.pid
            os.kill(killed, signal.SIGKILL)
            await wait_until(lambda: service.deaths == ["was killed by SIGKILL"] * 2, what="both deaths")
            assert tenure_module._is_held(tmp_path / "leases" / "one")
            later = await service.kernel()
            assert service.kernels._guardian.pid != killed
            assert await service.kernels.why_sick(later) == ""
            await service.kernels.end(later, errors.ServiceClosed("the test ends it"), now=True)

    run(work())


def test_logs_of_living_kernels_are_looked_at(tmp_path, monkeypatch):
    async def work() -> None:
        looked_at = []
        monkeypatch.setattr(kernels_module, "LOG_INTERVAL", 0.01)
        monkeypatch.setattr(kernels_module.kernel_log, "cut_logs", looked_at.append)
        async with started(tmp_path) as service:
            kernel = await service.kernel()
            await wait_until(lambda: [kernel.log_path] in looked_at, what="a look at the log")
            await service.kernels.end(kernel, errors.ServiceClosed("the test ends it"), now=True)

    run(work())
