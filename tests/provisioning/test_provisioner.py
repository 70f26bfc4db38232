"""The provisioner: Jupyter's own contract, with the guardian as the kernels' parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager, KernelManager
from jupyter_client.provisioning import KernelProvisionerFactory

from dspex_kernels import errors
from dspex_kernels.provisioning import guardian as guardian_process
from dspex_kernels.provisioning import provisioner as provisioner_module
from dspex_kernels.provisioning.guardians import Guardians, default_directory
from dspex_kernels.provisioning.provisioner import GuardedProvisioner
from tests.provisioning.families import PYTHON
from tests.waiting import wait_until

PAUSE = [*PYTHON, "import signal; signal.pause()"]


IPYKERNEL = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]


def guarded(spec: KernelSpec, manager: type[KernelManager] = AsyncKernelManager, **config: Any) -> Any:
    """A manager of a kernel of that spec, guarded as a service has it."""
    spec.metadata["kernel_provisioner"] = {"provisioner_name": "dspex-guarded", "config": config}
    made = manager(kernel_name="guarded")
    made._kernel_spec = spec
    return made


def make_provisioner(**traits: Any) -> GuardedProvisioner:
    return GuardedProvisioner(kernel_spec=KernelSpec(argv=PAUSE), kernel_id="tested", **traits)


async def start(provisioner: GuardedProvisioner, cmd: list[str] | None = None, **options: Any) -> None:
    """What ``KernelManager.start_kernel`` does with a provisioner."""
    prepared = await provisioner.pre_launch(**{"env": dict(os.environ), **options})
    default = prepared.pop("cmd")
    await provisioner.launch_kernel(cmd or default, **prepared)
    assert provisioner.has_process


def parent_of(pid: int) -> int:
    found = guardian_process.stat(pid)
    assert found is not None
    return found[1]


async def run_cell(client: Any, code: str, output: asyncio.Event | None = None) -> dict[str, Any]:
    def heard(message: dict[str, Any]) -> None:
        if output is not None and message["msg_type"] == "stream":  # others come before the cell runs
            output.set()

    return dict((await client.execute_interactive(code, timeout=30, output_hook=heard))["content"])


@pytest.fixture(autouse=True)
def _own_guardians(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guardian of kernels that no service owns ends with the last of them."""
    monkeypatch.setattr(provisioner_module, "_guardians", Guardians(linger=0))
    monkeypatch.setattr(sys.modules[__name__], "_THERE_BEFORE", set(services()))


_THERE_BEFORE: set[Path] = set()


def services() -> list[Path]:
    there = set(default_directory().iterdir()) if default_directory().exists() else set()
    return sorted(there - _THERE_BEFORE)


def test_the_provisioner_is_found_by_its_name():
    entries = KernelProvisionerFactory().get_provisioner_entries()
    assert entries["dspex-guarded"] == "dspex_kernels.provisioning.provisioner:GuardedProvisioner"


def test_a_real_kernel_starts_executes_is_interrupted_restarts_on_its_ports_and_shuts_down():
    async def scenario() -> None:
        manager = guarded(KernelSpecManager().get_kernel_spec("dspex"))
        await manager.start_kernel()
        client = manager.client(context=manager.context)
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=60)
            first, ports = manager.provisioner.pid, manager.ports
            assert (await run_cell(client, "x = 1; assert x"))["status"] == "ok"
            runs = asyncio.Event()
            cell = asyncio.ensure_future(run_cell(client, "import time; print(flush=True); time.sleep(60)", runs))
            await asyncio.wait_for(runs.wait(), 30)
            await manager.interrupt_kernel()
            assert (await cell)["ename"] == "KeyboardInterrupt"
            await manager.restart_kernel(now=True)
            await client.wait_for_ready(timeout=60)
            assert manager.provisioner.pid != first
            assert manager.ports == ports
            assert (await run_cell(client, "x"))["ename"] == "NameError"
        finally:
            client.stop_channels()
            await manager.shutdown_kernel()
        assert not await manager.is_alive()
        assert not manager.has_kernel
        assert not Path(manager.connection_file).exists()

    asyncio.run(scenario())


def test_the_blocking_manager_works_as_well():
    manager = guarded(KernelSpec(argv=IPYKERNEL, language="python"), KernelManager)
    manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        code = "import os; assert os.getppid() == int(os.environ['JPY_PARENT_PID']) != 1"
        assert client.execute_interactive(code, timeout=30)["content"]["status"] == "ok"
        assert parent_of(manager.provisioner.pid) != os.getpid()
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    assert not manager.is_alive()


@pytest.mark.parametrize(
    ("code", "expected"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", -9)]
)
def test_wait_tells_how_a_kernel_ended_to_any_number_and_long_after(code, expected):
    async def scenario() -> None:
        provisioner = make_provisioner()
        await start(provisioner, [*PYTHON, code])
        assert await asyncio.gather(provisioner.wait(), provisioner.wait()) == [expected, expected]
        assert not provisioner.has_process
        assert await provisioner.wait() == expected
        await provisioner.cleanup()

    asyncio.run(scenario())


def test_a_waiter_that_is_cancelled_leaves_the_others_waiting():
    async def scenario() -> None:
        provisioner = make_provisioner()
        await start(provisioner)
        first, second = (asyncio.ensure_future(provisioner.wait()) for _ in range(2))
        await asyncio.sleep(0)  # both wait
        first.cancel()
        assert await provisioner.poll() is None
        await provisioner.terminate()
        assert await asyncio.wait_for(second, 30) == -signal.SIGTERM
        await provisioner.cleanup()

    asyncio.run(scenario())


def test_a_signal_for_a_kernel_that_has_ended_is_none():
    async def scenario() -> None:
        provisioner = make_provisioner()
        await start(provisioner)
        await provisioner.kill()
        await wait_until(provisioner.process.ended.done)
        assert await provisioner.poll() == -signal.SIGKILL
        await provisioner.send_signal(signal.SIGINT)  # Jupyter's first step of every shutdown
        await provisioner.cleanup()

    asyncio.run(scenario())


def test_kernels_without_a_service_share_a_guardian_that_ends_with_the_last():
    async def scenario() -> None:
        provisioners = [make_provisioner() for _ in range(3)]
        await asyncio.gather(*(start(provisioner) for provisioner in provisioners))
        guardians = {parent_of(provisioner.pid) for provisioner in provisioners}
        assert len(guardians) == len(services()) == 1
        for provisioner in provisioners:
            assert services()
            await provisioner.kill()
            await provisioner.wait()
            await provisioner.cleanup()
        assert services() == []

    asyncio.run(scenario())


def test_a_restart_keeps_the_guardian_and_one_record():
    async def scenario() -> None:
        manager = guarded(KernelSpec(argv=PAUSE))
        await manager.start_kernel()
        before = parent_of(manager.provisioner.pid)
        for _ in range(2):
            await manager.restart_kernel(now=True)
        assert parent_of(manager.provisioner.pid) == before
        (directory,) = services()
        await manager.provisioner.send_signal(0)  # answered after what was asked before it
        (record,) = guardian_process.read_records(str(directory))
        assert record[1]["paths"] == [os.path.realpath(manager.connection_file)]
        await manager.shutdown_kernel(now=True)

    asyncio.run(scenario())


def test_the_files_of_a_kernel_are_recorded_with_what_the_service_adds(tmp_path):
    async def scenario() -> None:
        manager = guarded(KernelSpec(argv=PAUSE), remove_paths=[str(tmp_path / "link")])
        manager.transport = "ipc"
        await manager.start_kernel()
        (directory,) = services()
        ((_, record),) = guardian_process.read_records(str(directory))
        file = os.path.realpath(manager.connection_file)
        sockets = [f"{manager.ip}-{name}" for name in (*manager.ports, "dspex")]
        assert sorted(record["paths"]) == sorted([file, str(tmp_path / "link"), *sockets])
        await manager.shutdown_kernel(now=True)

    asyncio.run(scenario())


def test_a_service_chooses_its_guardian_by_its_id(tmp_path):
    async def scenario() -> None:
        guardian = await GuardedProvisioner.open_guardian("service-1", tmp_path / "services")
        provisioner = make_provisioner(service_id="service-1")
        await start(provisioner)
        assert parent_of(provisioner.pid) == guardian.pid
        assert services() == []
        info = await provisioner.get_provisioner_info()
        restored = make_provisioner()
        await restored.load_provisioner_info(info)
        assert (restored.service_id, restored.pid) == ("service-1", provisioner.pid)
        await asyncio.wrap_future(guardian.stop())
        assert await provisioner.wait() == -signal.SIGKILL
        await provisioner.cleanup()
        with pytest.raises(errors.KernelStartFailed, match="'service-1' has no guardian"):
            await start(provisioner)

    asyncio.run(scenario())


def test_a_kernel_that_cannot_be_run_leaves_no_guardian():
    async def scenario() -> None:
        with pytest.raises(FileNotFoundError, match="no-such-program"):
            await start(make_provisioner(), ["no-such-program-dspex"])
        assert services() == []

    asyncio.run(scenario())


def test_an_option_of_popen_that_cannot_be_had_is_refused():
    async def scenario() -> None:
        with pytest.raises(TypeError, match="preexec_fn"):
            await start(make_provisioner(), preexec_fn=os.setsid)

    asyncio.run(scenario())


def test_a_start_that_is_cancelled_leaves_no_kernel(tmp_path):
    async def scenario() -> None:
        guardian = await GuardedProvisioner.open_guardian("cancelled", tmp_path / "services")
        starting = asyncio.ensure_future(start(make_provisioner(service_id="cancelled")))
        await wait_until(lambda: guardian._queue or guardian._asked or starting.done())
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await wait_until(lambda: guardian._asked == guardian._processes == {}, what="the kernel's end")
        assert guardian_process.children(guardian.pid) == []
        await asyncio.wrap_future(guardian.stop())

    asyncio.run(scenario())


def test_a_guardian_whose_opening_is_cancelled_ends(tmp_path):
    async def scenario() -> None:
        opening = asyncio.ensure_future(GuardedProvisioner.open_guardian("cancelled", tmp_path / "services"))
        await asyncio.sleep(0)  # it waits
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        with pytest.raises(errors.KernelStartFailed, match="'cancelled' has no guardian"):
            await start(make_provisioner(service_id="cancelled"))

    asyncio.run(scenario())  # no thread and no process is left, as after every test


@pytest.mark.parametrize("why", ["unsupported", "independent"])
def test_where_it_cannot_guard_it_is_the_local_provisioner(monkeypatch, caplog, why):
    async def scenario() -> None:
        for _ in range(2):
            provisioner = make_provisioner()
            await start(provisioner, independent=why == "independent")
            assert parent_of(provisioner.pid) == os.getpid()
            await provisioner.kill()
            assert await provisioner.wait() == -signal.SIGKILL
            await provisioner.cleanup()

    if why == "unsupported":
        monkeypatch.setattr(provisioner_module, "unsupported", lambda: "this system has none")
    provisioner_module._is_supported.cache_clear()
    try:
        asyncio.run(scenario())
    finally:
        provisioner_module._is_supported.cache_clear()
    told = [record for record in caplog.records if "not guarded: this system has none" in record.message]
    assert len(told) == (why == "unsupported")
