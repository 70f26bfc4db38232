"""The kernel pool by itself: it starts kernels, replaces those that die, gives up where they die over and over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client.asynchronous import AsyncKernelClient

from dspex_kernels import errors
from dspex_kernels.config import LMPolicy
from dspex_kernels.sessions import pool as pool_module
from dspex_kernels.sessions.kernels import Kernels
from dspex_kernels.sessions.pool import KernelPool, PoolKernel
from tests.waiting import wait_until

NAME = "dspex-test-pool"
LIVES = "from tests.sessions.light_kernel import main; main(sys.argv[1])"
"""What makes a scripted process a kernel of ours."""


@pytest.fixture
def kernelspec() -> Iterator[Callable[[str], str]]:
    """Installs a kernelspec whose process runs this code; returns its name."""
    directory = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / NAME

    def install(code: str) -> str:
        directory.mkdir(parents=True, exist_ok=True)
        argv = ["python", "-c", f"import os, signal, sys\n{code}", "{connection_file}"]
        (directory / "kernel.json").write_text(
            json.dumps({"argv": argv, "display_name": "scripted", "language": "python"})
        )
        return NAME

    yield install
    if directory.exists():
        (directory / "kernel.json").unlink()
        directory.rmdir()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "FIRST_PAUSE", 0.001)


class Told:
    """The backend's side of a pool: what the pool tells it."""

    def __init__(self, pool: KernelPool) -> None:
        self.joined: list[PoolKernel] = []
        self.left: list[tuple[PoolKernel, str]] = []
        self.emptied: list[tuple[PoolKernel, float | None]] = []
        self.may_empty = asyncio.Event()
        self.may_empty.set()
        pool.joined, pool.left = self.joined.append, lambda *told: self.left.append(told)
        pool.vacate = self._vacate

    async def _vacate(self, member: PoolKernel, within: float | None) -> None:
        self.emptied.append((member, within))
        await self.may_empty.wait()


@contextlib.asynccontextmanager
async def started(
    tmp_path: Path, kernel_name: str, *, start_timeout: float = 60.0, **traits: Any
) -> AsyncIterator[tuple[KernelPool, Told]]:
    kernels = Kernels(kernel_name=kernel_name, policy=LMPolicy())
    await kernels.start()
    pool = KernelPool(kernels, tmp_path / "pool", start_timeout=start_timeout, **traits)
    told = Told(pool)
    await pool.start()
    try:
        yield pool, told
    finally:
        await pool.stop()
        await kernels.stop()


_THERE_BEFORE: set[int] = set()
"""Processes that fixtures of the whole run have started: a database server."""


@pytest.fixture(autouse=True)
def _knows_what_was_there() -> None:
    _THERE_BEFORE.clear()
    _THERE_BEFORE.update(child.pid for child in psutil.Process().children())


def kernels_of_the_test() -> list[int]:
    return [child.pid for child in psutil.Process().children() if child.pid not in _THERE_BEFORE]


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(90):
            await work

    asyncio.run(bounded())


async def serving(pool: KernelPool, count: int) -> None:
    await wait_until(lambda: len(pool.serving) == count, deadline=60, what=f"{count} kernels: {pool.figures()}")


async def end_cleanly(member: PoolKernel) -> None:
    """Have a kernel exit with code 0, as any client of it can."""
    client = AsyncKernelClient(connection_file=member.kernel.connection_file)
    client.load_connection_file()
    client.start_channels()
    try:
        client.shutdown()
        await wait_until(lambda: member.kernel.ending, what="its end", deadline=30)
    finally:
        client.stop_channels()
        client.context.destroy(linger=0)


class TestStarting:
    def test_kernels_are_started_when_one_is_first_wanted(self, tmp_path, kernelspec):
        async def work() -> None:
            async with started(tmp_path, kernelspec(LIVES), size=2) as (pool, told):
                assert pool.figures()["starting"] == 0
                assert kernels_of_the_test() == []
                member = await pool.pick(60)
                assert member in pool.serving
                await serving(pool, 2)
                assert set(told.joined) == set(pool.serving)
                assert {(await pool.pick(1)).kernel_id for _ in range(3)} <= {one.kernel_id for one in pool.serving}
                pool.serving[0].sessions = 3
                assert await pool.pick(1) is pool.serving[1], "the one with the fewest sessions"
                assert pool.figures()["size"] == pool.figures()["available"] == 2

        run(work())

    def test_a_pool_may_be_started_ahead(self, tmp_path, kernelspec):
        async def work() -> None:
            async with started(tmp_path, kernelspec("signal.pause()"), size=3, prestart=True) as (pool, _):
                assert pool.figures()["starting"] == 3

        run(work())

    def test_who_wants_a_kernel_waits_no_longer_than_it_may(self, tmp_path, kernelspec):
        async def work() -> None:
            async with started(tmp_path, kernelspec("signal.pause()"), size=1) as (pool, _):
                with pytest.raises(errors.KernelStartFailed, match=r"no kernel of the pool answered within 0\.2 s"):
                    await pool.pick(0.2)
                waiting = asyncio.create_task(pool.pick(60))
                await asyncio.sleep(0)
                await pool.stop()
                with pytest.raises(errors.ServiceClosed):
                    await waiting

        run(work())


class TestSlotsWhoseKernelsDie:
    def test_a_pool_where_none_starts_says_why_and_tries_one_for_each_who_asks(self, tmp_path, kernelspec):
        broken = tmp_path / "broken"
        broken.touch()
        name = kernelspec(f"if os.path.exists({str(broken)!r}): sys.exit('the disk is full')\n{LIVES}")

        async def work() -> None:
            async with started(tmp_path, name, size=2, max_restarts=1) as (pool, _):
                with pytest.raises(errors.KernelStartFailed, match=r"no kernel left.*the disk is full"):
                    await pool.pick(60)
                assert set(pool.figures()["failed"]) == {"0", "1"}
                assert pool.figures()["starting"] == 0, "nobody asks, so nothing is tried"
                with pytest.raises(errors.KernelStartFailed, match="the disk is full"):
                    await pool.pick(60)
                broken.unlink()
                assert (await pool.pick(60)).kernel.ready
                await pool.resize(2)  # a fresh start for all of them
                await serving(pool, 2)
                assert pool.figures()["failed"] == {}

        run(work())

    def test_a_slot_gives_up_after_so_many_tries_and_the_others_serve_on(self, tmp_path, kernelspec):
        starts, first = tmp_path / "starts", tmp_path / "first"
        starts.mkdir()
        name = kernelspec(
            f"open(os.path.join({str(starts)!r}, str(os.getpid())), 'w')\n"
            f"try: os.mkdir({str(first)!r})\nexcept FileExistsError: sys.exit(3)\n{LIVES}"
        )

        async def work() -> None:
            async with started(tmp_path, name, size=2, max_restarts=3, prestart=True) as (pool, _):
                await wait_until(lambda: pool.figures()["failed"], deadline=60, what="the slot's end")
                await serving(pool, 1)
                [why] = pool.figures()["failed"].values()
                assert "exited with code 3" in why
                assert len(list(starts.iterdir())) == 1 + 4, "one that serves, and one and three more tries"
                assert (await pool.pick(1)).kernel.ready
                assert pool.figures()["available"] == 1

        run(work())

    def test_kernels_that_answer_and_die_before_their_first_call_count_as_dead_at_once(self, tmp_path, kernelspec):
        async def work() -> None:
            async with started(tmp_path, kernelspec(LIVES), size=1, max_restarts=1) as (pool, told):
                for _ in range(2):
                    member = await pool.pick(60)
                    os.kill(member.kernel.pid, signal.SIGKILL)
                    await wait_until(lambda gone=member: gone not in pool.serving, what="its end")
                await wait_until(lambda: pool.figures()["failed"], what="the slot's end")
                assert "die at once" in pool.figures()["failed"]["0"]
                assert pool.figures()["deaths"] == 2
                assert [how for _, how in told.left] == ["was killed by SIGKILL"] * 2

        run(work())

    def test_pauses_between_tries_double_up_to_a_limit(self, tmp_path, kernelspec, monkeypatch):
        pauses: list[float] = []
        sleep = asyncio.sleep

        async def noted(seconds: float) -> None:
            pauses.append(seconds)
            await sleep(0)

        monkeypatch.setattr(pool_module, "FIRST_PAUSE", 0.2)
        monkeypatch.setattr(pool_module, "LONGEST_PAUSE", 0.7)

        async def work() -> None:
            async with started(tmp_path, kernelspec("sys.exit(3)"), size=1, max_restarts=4, look_interval=999) as (
                pool,
                _,
            ):
                monkeypatch.setattr(pool_module.asyncio, "sleep", noted)
                with pytest.raises(errors.KernelStartFailed):
                    await pool.pick(60)
                monkeypatch.setattr(pool_module.asyncio, "sleep", sleep)
                assert [pause for pause in pauses if 0.2 <= pause < 1] == [0.2, 0.4, 0.7, 0.7]

        run(work())

    @pytest.mark.parametrize(
        ("strategy", "cleanly", "replaced"),
        [
            ("permanent", True, True),
            ("transient", True, False),
            ("transient", False, True),
            ("temporary", False, False),
        ],
    )
    def test_which_kernels_are_replaced_when_they_end(self, tmp_path, kernelspec, strategy, cleanly, replaced):
        async def work() -> None:
            async with started(tmp_path, kernelspec(LIVES), size=1, restart_strategy=strategy) as (pool, told):
                member = await pool.pick(60)
                member.answered = 1
                if cleanly:
                    await end_cleanly(member)
                else:
                    os.kill(member.kernel.pid, signal.SIGKILL)
                await wait_until(lambda: told.left, what="the news")
                assert told.left[0][1] == ("exited with code 0" if cleanly else "was killed by SIGKILL")
                if replaced:
                    assert await pool.pick(60) is not member
                    assert pool.figures()["restarts"] == 1
                else:
                    assert f"restart_strategy is '{strategy}'" in pool.figures()["failed"]["0"]
                    with pytest.raises(errors.KernelStartFailed, match="restart_strategy"):
                        await pool.pick(60)
                    assert pool.figures()["restarts"] == 0

        run(work())


class TestResizing:
    def test_a_pool_grows_and_shrinks_and_ends_what_is_too_much_when_it_is_empty(self, tmp_path, kernelspec):
        async def work() -> None:
            async with started(tmp_path, kernelspec(LIVES), size=1) as (pool, told):
                with pytest.raises(errors.InvalidArguments, match="a pool of 0 kernels"):
                    await pool.resize(0)
                stays = await pool.pick(60)
                await pool.resize(2)
                await serving(pool, 2)
                goes = next(member for member in pool.serving if member is not stays)
                told.may_empty.clear()
                await pool.resize(1)
                assert pool.serving == [stays]
                await wait_until(lambda: told.emptied, what="its emptying")
                assert told.emptied == [(goes, None)], "its calls may run as long as they do"
                assert psutil.pid_exists(goes.kernel.pid)
                assert pool.figures()["retiring"] == 1
                told.may_empty.set()
                await wait_until(lambda: not psutil.pid_exists(goes.kernel.pid), deadline=30, what="its end")
                await wait_until(lambda: pool.figures()["retiring"] == 0, what="its leaving")
                assert told.left == [], "it was asked to go"

        run(work())

    def test_a_slot_that_is_taken_away_while_its_kernel_starts_leaves_nothing(self, tmp_path, kernelspec):
        async def work() -> None:
            async with started(tmp_path, kernelspec("signal.pause()"), size=3, prestart=True) as (pool, _):
                await wait_until(lambda: len(kernels_of_the_test()) == 3, what="the processes")
                await pool.resize(1)
                await wait_until(lambda: len(kernels_of_the_test()) == 1, deadline=30, what="their end")
                assert pool.figures()["starting"] == 1

        run(work())

    def test_a_pool_that_was_not_used_yet_only_notes_its_new_size(self, tmp_path, kernelspec):
        async def work() -> None:
            async with started(tmp_path, kernelspec(LIVES), size=1) as (pool, _):
                await pool.resize(5)
                assert (pool.figures()["size"], pool.figures()["starting"]) == (5, 0)

        run(work())
