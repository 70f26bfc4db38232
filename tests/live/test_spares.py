"""Spare kernels: a session's own is there at once, and it is as if it had been started for it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import threading
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.connect import find_connection_file

from dspex_kernels import SessionService, connect_kernel, errors
from dspex_kernels.sessions import kernel_log, kernels, spares
from dspex_kernels.sessions.kernels import Kernel
from tests.waiting import halt, wait_until

ECHO = {"model": "offline/echo", "cache": False}
PROGRAM = {"program_id": "qa", "signature": "question -> answer"}


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(100):
            await work

    asyncio.run(bounded())


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "QUIET", 0.0)


def there(service: SessionService) -> list[Kernel]:
    return list(service._backends["dedicated"]._spares.kernels)  # type: ignore[attr-defined]  # the dedicated one's


def files(tmp_path: Path) -> list[str]:
    """Those of spare kernels."""
    return [path.suffix for path in tmp_path.glob("services/*/spare-*")]


@contextlib.asynccontextmanager
async def running(tmp_path: Path, **traits: Any) -> AsyncIterator[SessionService]:
    """A service that has had a session, and has its spare kernels now."""
    files = {"data_dir": str(tmp_path), "store_url": f"sqlite:///{tmp_path / 'store.sqlite'}"}
    traits = {"spare_kernels": 1, **traits}
    async with SessionService(**files, **traits) as service:
        assert there(service) == []
        await service.create_session(session_id="first")
        await wait_until(lambda: len(there(service)) == traits["spare_kernels"], what="the spare kernels")
        yield service


async def evaluated(service: SessionService, session_id: str, expression: str) -> Any:
    """What a cell of a session's kernel makes of an expression."""
    from jupyter_client.asynchronous import AsyncKernelClient

    client = AsyncKernelClient()
    client.load_connection_file(await service.get_connection_file(session_id))
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=30)
        reply = await client.execute_interactive(
            "", user_expressions={"it": expression}, store_history=False, timeout=30
        )
        return reply["content"]["user_expressions"]["it"]["data"]["text/plain"]
    finally:
        client.stop_channels()


def test_a_session_gets_a_spare_kernel_as_if_it_had_been_started_for_it(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as service:
            (kernel,) = there(service)
            session = await service.create_session("alice", session_id="mine", lm=ECHO)
            info = await service.get_session_info("mine")
            assert (info.kernel_pid, info.kernel_id, info.generation) == (kernel.pid, kernel.kernel_id, 1)
            await session.call("create_program", PROGRAM)
            assert (await session.program("qa").acall(question="?")).answer
            variables = (
                "[__import__('os').environ.get('DSPEX_' + n) for n in ('SESSION_ID', 'SPARE', 'GENERATION')]"
            )
            assert await evaluated(service, "mine", variables) == "['mine', None, '1']"
            assert await evaluated(service, "mine", "list(__import__('dspy').settings.lm.model)") == str(
                list(ECHO["model"])
            )
            await evaluated(service, "mine", "__import__('os').write(1, b'said by the kernel')")
            directory = tmp_path / "sessions" / "mine"
            assert "said by the kernel" in (directory / "kernel.log").read_text()
            file = await service.get_connection_file("mine")
            assert Path(str(file)).name == f"kernel-{kernel.kernel_id}.json"
            assert (directory / "kernel.json").resolve() == Path(str(file)).resolve()
            async with connect_kernel(str(file)) as direct:
                assert (await direct.info())["session_id"] == "mine"
                told = {"session_id": "another", "directory": "/", "generation": 1, "connection_file": ""}
                with pytest.raises(errors.SessionMismatch):
                    await direct.call("adopt_session", told)
            await wait_until(lambda: there(service) not in ([], [kernel]), what="another spare kernel")

    run(work())


def test_nobody_sees_a_spare_kernel_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, spare_kernels=2) as service:
            assert [info.session_id for info in await service.list_sessions()] == ["first"]
            assert sorted(files(tmp_path)) == [".connection", ".connection", ".log", ".log"]
            for kernel in there(service):
                for name in (kernel.kernel_id, "*spare*"):
                    with pytest.raises(OSError, match="Could not find"):
                        find_connection_file(name)
            killed, _ = there(service)
            assert killed.pid is not None
            os.kill(killed.pid, signal.SIGKILL)
            await wait_until(lambda: killed not in there(service), what="its death to be noticed")
            await wait_until(lambda: not killed.log_path.exists(), what="its log to be removed")
        assert list((tmp_path / "services").iterdir()) == []

    run(work())


def test_a_session_that_comes_back_finds_its_programs_in_a_spare_kernel(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as service:
            session = service.get_session("first")
            await session.configure(lm=ECHO)
            await session.call("create_program", PROGRAM)
            (kernel,) = there(service)
            os.kill(int((await session.info())["kernel_pid"]), signal.SIGKILL)
            await wait_until(lambda: service._registry.find("first").status == "hibernated", what="its end")
            assert (await session.program("qa").acall(question="?")).answer
            info = await session.info()
            assert (info["kernel_pid"], info["generation"]) == (kernel.pid, 2)

    run(work())


async def one_of(service: SessionService) -> Kernel:
    await wait_until(lambda: there(service), what="a spare kernel")
    return there(service)[0]


async def is_gone(kernel: Kernel) -> None:
    await wait_until(lambda: not Path(f"/proc/{kernel.pid}").exists(), what="the kernel's end")


def test_a_spare_kernel_that_is_out_of_date_is_not_handed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with running(tmp_path) as service:
            kernel = await one_of(service)
            monkeypatch.setenv("ADDED_MEANWHILE", "yes")
            await service.create_session(session_id="other-environment")
            assert (await service.get_session_info("other-environment")).kernel_pid != kernel.pid
            told = "__import__('os').environ.get('ADDED_MEANWHILE')"
            assert await evaluated(service, "other-environment", told) == "'yes'"
            await is_gone(kernel)

            kernel = await one_of(service)
            (tmp_path / "elsewhere").mkdir()
            monkeypatch.chdir(tmp_path / "elsewhere")
            await service.create_session(session_id="other-directory")
            assert (await service.get_session_info("other-directory")).kernel_pid != kernel.pid
            assert await evaluated(service, "other-directory", "__import__('os').getcwd()") == repr(
                str(tmp_path / "elsewhere")
            )
            await is_gone(kernel)

            kernel = await one_of(service)
            service._kernels._multi.get_kernel(kernel.kernel_id).provisioner._origin[0].retire()
            await service.create_session(session_id="other-libraries")
            assert (await service.get_session_info("other-libraries")).kernel_pid != kernel.pid
            await is_gone(kernel)

    run(work())


def use(connection_file: str) -> None:
    """Run a cell in somebody's kernel."""
    client = BlockingKernelClient()
    client.load_connection_file(connection_file)
    client.start_channels()
    try:
        client.wait_for_ready(timeout=30)
        client.execute_interactive("left = 'by a stranger'", timeout=30)
    finally:
        client.stop_channels()


def die(kernel: Kernel, monkeypatch: pytest.MonkeyPatch, *, answers: bool) -> None:
    """Have a kernel die as it is asked, or as it has answered."""
    request = kernel.connection.request

    async def and_die(*args: Any, **options: Any) -> dict[str, Any]:
        assert kernel.pid is not None
        answer = await request(*args, **options) if answers else {}
        os.kill(kernel.pid, signal.SIGKILL)
        await wait_until(lambda: kernel.death is not None, what="its death")
        return answer or await request(*args, **options)

    monkeypatch.setattr(kernel.connection, "request", and_die)


def test_a_spare_kernel_that_cannot_become_the_sessions_costs_nobody_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spares, "ADOPT_TIMEOUT", 0.5)

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def work() -> None:
        async with running(tmp_path) as service:
            for why in ("no-room", "dies-at-once", "dies-after-its-answer", "hangs", "was-used"):
                kernel = await one_of(service)
                assert kernel.pid is not None
                with monkeypatch.context() as patch:
                    match why:
                        case "no-room":
                            patch.setattr(kernel_log, "move_log", refuse)
                        case "hangs":
                            halt(kernel.pid)
                        case "was-used":
                            await asyncio.to_thread(use, kernel.connection_file)
                        case _:
                            die(kernel, patch, answers=why == "dies-after-its-answer")
                    session = await service.create_session(session_id=why)
                assert (await session.info())["kernel_pid"] != kernel.pid, why
                await session.ping()
                await is_gone(kernel)
            assert await evaluated(service, "was-used", "'left' in globals()") == "False"
            await wait_until(lambda: there(service), what="another spare kernel")
            assert sorted(files(tmp_path)) == [".connection", ".log"]
        assert list((tmp_path / "services").iterdir()) == []

    run(work())


def test_a_creation_that_is_given_up_while_files_are_renamed_harms_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with running(tmp_path) as service:
            for owner, step in ((kernel_log, "move_log"), (kernels, "_move"), (kernels, "_link")):
                kernel = await one_of(service)
                asked, go_on, real = threading.Event(), threading.Event(), getattr(owner, step)

                def stalled(*args: Any, asked: Any = asked, go_on: Any = go_on, real: Any = real) -> None:
                    asked.set()
                    assert go_on.wait(30)
                    real(*args)

                with monkeypatch.context() as patch:
                    patch.setattr(owner, step, stalled)
                    creating = asyncio.create_task(service.create_session(session_id="mine"))
                    await asyncio.to_thread(asked.wait, 30)
                creating.cancel()
                for _ in range(50):
                    await asyncio.sleep(0)
                assert not creating.done(), "another could have the session while its files are renamed"
                go_on.set()
                with pytest.raises(asyncio.CancelledError):
                    await creating
                await is_gone(kernel)
                await it_has_its_files(service, tmp_path / "sessions" / "mine")

    async def it_has_its_files(service: SessionService, directory: Path) -> None:
        async with service.session(session_id="mine") as session:
            await session.ping()
            file = await service.get_connection_file("mine")
            assert file is not None
            assert (directory / "kernel.json").resolve() == Path(file).resolve()
            assert sorted(path.name for path in directory.glob("kernel.log*")) == ["kernel.log"]
            assert Path(file).exists()

    run(work())


def test_a_creation_that_is_given_up_leaves_no_kernel_and_no_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with running(tmp_path) as service:
            (kernel,) = there(service)
            asked = asyncio.Event()

            async def never(*_: Any, **__: Any) -> dict[str, Any]:
                asked.set()
                await asyncio.Event().wait()
                return {}

            monkeypatch.setattr(kernel.connection, "request", never)
            creating = asyncio.create_task(service.create_session(session_id="mine"))
            await asked.wait()
            creating.cancel()
            with pytest.raises(asyncio.CancelledError):
                await creating
            await is_gone(kernel)
            with pytest.raises(errors.SessionNotFound):
                await service.get_session_info("mine")

    run(work())
