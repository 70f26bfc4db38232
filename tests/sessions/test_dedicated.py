"""What the dedicated backend lets a kernel see, and what it makes of kernels that do not come up as ours."""

from __future__ import annotations

import asyncio
import gc
import json
import os
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dspex_kernels import errors
from dspex_kernels.config import LMPolicy
from dspex_kernels.sessions.dedicated import DedicatedBackend
from dspex_kernels.sessions.environment import kernel_environment
from dspex_kernels.sessions.kernels import Kernels
from dspex_kernels.sessions.model import SessionRecord

NAME = "dspex-test-scripted"


@pytest.fixture
def kernelspec() -> Iterator[Callable[[str], None]]:
    """Installs a kernelspec whose process is this line of Python."""
    directory = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / NAME

    def install(code: str, **spec: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        argv = ["python", "-c", code, "{connection_file}"]
        (directory / "kernel.json").write_text(
            json.dumps({"argv": argv, "display_name": "scripted", "language": "python", **spec})
        )

    yield install
    if directory.exists():
        (directory / "kernel.json").unlink()
        directory.rmdir()


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work

    asyncio.run(bounded())


def record(tmp_path: Path) -> SessionRecord:
    now = datetime.now(UTC)
    return SessionRecord(
        session_id="s",
        owner="",
        backend="dedicated",
        generation=3,
        created_at=now,
        last_activity=now,
        directory=str(tmp_path / "s"),
    )


async def open_failing(kernel_name: str, tmp_path: Path, *, timeout: float = 30.0, **options: Any) -> BaseException:
    """What opening a session on that kernelspec raises."""
    kernels = Kernels(kernel_name=kernel_name, policy=options.pop("policy", LMPolicy()), **options)
    backend = DedicatedBackend(kernels)
    await kernels.start()
    try:
        with pytest.raises(errors.KernelError) as failed:
            await backend.open(record(tmp_path), timeout=timeout)
        assert backend.get_place("s") is None
        return failed.value
    finally:
        await backend.stop()
        await kernels.stop()


ENVIRONMENT = {
    "PATH": "/bin",
    "HOME": "/home/me",
    "OPENAI_API_KEY": "k1",
    "TEAM_API_KEY": "k2",
    "AWS_SECRET_ACCESS_KEY": "k3",
    "DB_PASSWORD": "k4",
    "JUPYTER_TOKEN": "s1",
    "JUPYTERHUB_API_TOKEN": "s2",
    "CONFIGPROXY_AUTH_TOKEN": "s3",
    "DSPEX_CRYPT_KEY": "s4",
    "JUPYTER_GATEWAY_AUTH_TOKEN": "s5",
    "JUPYTERHUB_CRYPT_KEY": "s6",
    "JPY_API_TOKEN": "s7",
    "JUPYTER_PATH": "/share/jupyter",
}


class TestEnvironment:
    def test_a_single_owners_kernel_sees_all_but_the_services_own_secrets(self):
        seen = kernel_environment(ENVIRONMENT, LMPolicy())
        assert not any(value.startswith("s") for value in seen.values())
        assert {"PATH", "OPENAI_API_KEY", "DB_PASSWORD", "JUPYTER_PATH"} <= seen.keys()

    def test_under_a_policy_a_kernel_sees_only_the_keys_that_the_policy_names(self):
        policy = LMPolicy(unrestricted=False, allowed_keys=[("TEAM_API_KEY", "")])
        seen = kernel_environment(ENVIRONMENT, policy)
        assert seen == {
            "PATH": "/bin",
            "HOME": "/home/me",
            "TEAM_API_KEY": "k2",
            "JUPYTER_PATH": "/share/jupyter",
        }

    def test_no_policy_can_let_the_services_own_secrets_pass(self):
        policy = LMPolicy(unrestricted=False, allowed_keys=[("JUPYTER_TOKEN", "")])
        assert "JUPYTER_TOKEN" not in kernel_environment(ENVIRONMENT, policy)

    def test_a_kernel_is_told_whose_it_is_and_where_its_session_is_kept(self, kernelspec, tmp_path):
        async def work() -> None:
            kernelspec("import json, os; print(json.dumps({**os.environ}), flush=True)")
            policy = LMPolicy(unrestricted=False, allowed_models=["openai/x"])
            environment = {**os.environ, "JUPYTER_TOKEN": "s1"}
            await open_failing(NAME, tmp_path, policy=policy, environment=environment)
            seen = json.loads((tmp_path / "s" / "kernel.log").read_text())
            assert "JUPYTER_TOKEN" not in seen
            assert seen["DSPEX_SESSION_ID"] == "s"
            assert seen["DSPEX_SESSION_DIR"] == str(tmp_path / "s")
            assert seen["DSPEX_GENERATION"] == "3"
            assert seen["DSPEX_BACKEND"] == "dedicated"
            assert len(seen["DSPEX_KERNEL_ID"]) == 36
            assert LMPolicy.from_json(seen["DSPEX_LM_POLICY"]).allowed_models == ["openai/x"]
            assert seen["JPY_PARENT_PID"] == str(os.getpid()), "or the kernel would outlive a killed service"

        run(work())


class TestStartsThatFail:
    def test_the_message_ends_with_the_logs_last_line_and_the_details_hold_its_tail(self, kernelspec, tmp_path):
        async def work() -> None:
            kernelspec("print('first', flush=True); raise SystemExit('the last word')")
            failure = await open_failing(NAME, tmp_path)
            assert isinstance(failure, errors.KernelStartFailed)
            assert "exited with code 1" in failure.message
            assert failure.message.endswith("its log ends: the last word")
            assert failure.details["log_tail"] == "first\nthe last word"

        run(work())

    def test_the_log_is_the_owners_only_and_the_one_before_is_kept(self, kernelspec, tmp_path):
        async def work() -> None:
            for word in ("one", "two", "three"):
                kernelspec(f"raise SystemExit('{word}')")
                await open_failing(NAME, tmp_path)
            logs = {path.name: path for path in (tmp_path / "s").iterdir()}
            assert {name: path.read_text() for name, path in logs.items()} == {
                "kernel.log": "three\n",
                "kernel.log.1": "two\n",
            }
            assert [oct(path.stat().st_mode & 0o777) for path in logs.values()] == ["0o600", "0o600"]
            assert oct((tmp_path / "s").stat().st_mode & 0o777) == "0o700"

        run(work())

    def test_a_kernel_that_never_answers_is_ended_and_the_limit_named(self, kernelspec, tmp_path):
        async def work() -> None:
            kernelspec("import signal; signal.pause()")
            failure = await open_failing(NAME, tmp_path, timeout=0.5)
            assert isinstance(failure, errors.KernelStartFailed)
            assert "within 0.5 s (SessionService.kernel_start_timeout)" in failure.message

        run(work())

    def test_a_kernelspec_that_is_not_there_is_named(self, tmp_path):
        async def work() -> None:
            failure = await open_failing("dspex-no-such-kernel", tmp_path)
            assert isinstance(failure, errors.KernelStartFailed)
            assert "dspex-no-such-kernel" in failure.message
            assert "dspex-kernels install" in failure.message

        run(work())

    def test_an_interpreter_that_is_not_there_leaves_no_connection_file(self, kernelspec, tmp_path):
        async def work() -> None:
            kernelspec("", argv=["/no/such/python", "{connection_file}"])
            failure = await open_failing(NAME, tmp_path)
            assert isinstance(failure, errors.KernelStartFailed)
            assert "/no/such/python" in failure.message

        run(work())

    def test_a_plain_python_kernel_is_refused_and_ended(self, tmp_path):
        async def work() -> None:
            failure = await open_failing("python3", tmp_path)
            assert isinstance(failure, errors.NotADSPexKernel)

        run(work())

    def test_a_start_cancelled_at_any_of_its_first_steps_leaves_nothing_open(self, kernelspec, tmp_path):
        """The log is opened in a thread, which nobody can cancel: what it opened must be closed all the same."""

        async def work() -> None:
            kernelspec("import signal; signal.pause()")
            kernels = Kernels(kernel_name=NAME, policy=LMPolicy())
            backend = DedicatedBackend(kernels)
            await kernels.start()
            try:
                for turns in (*range(6), 20):
                    opening = asyncio.create_task(backend.open(record(tmp_path), timeout=30))
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    opening.cancel()
                    await asyncio.wait({opening})
                    assert opening.cancelled()
                    assert backend.get_place("s") is None
            finally:
                await backend.stop()
                await kernels.stop()
            gc.collect()  # an open file that nobody holds any more is a warning, and so a failure

        run(work())
