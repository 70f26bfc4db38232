"""Whose a session is: one service's at a time, told by a lock on one machine and by a lease across machines."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dspex_kernels import errors
from dspex_kernels.sessions import tenure as tenure_module
from dspex_kernels.sessions.registry import new_record
from dspex_kernels.sessions.store import ServiceRecord
from dspex_kernels.sessions.store.sql import SQLStore
from dspex_kernels.sessions.tenure import LEASE, RENEW_INTERVAL, Tenure
from tests.waiting import wait_until

LOG = logging.getLogger(__name__)


class Service:
    """A service as far as others see it: its store and its tenure."""

    def __init__(self, service_id: str, directory: Path, locks: Path | None = None) -> None:
        self.store = SQLStore(f"sqlite:///{directory / 'store.sqlite'}", service_id)
        self.tenure = Tenure(service_id, self.store, locks or directory / "leases", LOG, self._deposed)
        self.deposed = 0

    async def _deposed(self) -> None:
        self.deposed += 1


@contextlib.asynccontextmanager
async def begun(service_id: str, directory: Path, locks: Path | None = None) -> AsyncIterator[Service]:
    service = Service(service_id, directory, locks)
    async with service.store:
        await service.tenure.begin()
        try:
            yield service
        finally:
            await service.tenure.end()


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work

    asyncio.run(bounded())


async def make_session(service: Service, session_id: str = "s") -> None:
    await service.store.create(new_record(session_id, owner="", backend="pooled", directory=None))


def registered(service_id: str, *, host: str, pid: int, lease: float) -> ServiceRecord:
    now = datetime.now(UTC)
    return ServiceRecord(service_id, host, pid, now, now + timedelta(seconds=lease))


@contextlib.contextmanager
def lock_held_by_another_process(path: Path) -> Any:
    """A process that holds a service's lock, as its kernels' guardian does when the service is gone."""
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        yield holder
        if holder.poll() is None:
            holder.kill()


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_a_lease_survives_three_failed_renewals():
    assert 3 * RENEW_INTERVAL < LEASE


def test_a_session_is_one_services_until_that_ends(tmp_path):
    async def work() -> None:
        async with begun("one", tmp_path) as one:
            await make_session(one)
            async with begun("other", tmp_path) as other:
                with pytest.raises(errors.SessionNotReady, match="used by another service") as refused:
                    await other.tenure.claim("s")
                assert refused.value.details["pid"] == os.getpid()
                assert (await one.tenure.claim("s")).session_id == "s", "its own it may claim again"
                await one.tenure.end()
                assert (await other.tenure.claim("s")).session_id == "s"
                with pytest.raises(errors.SessionNotReady, match="another service has taken"):
                    await one.store.set_generation("s", 7)
                with pytest.raises(errors.SessionNotFound):
                    await other.tenure.claim("none")

    run(work())


def test_nothing_is_left_of_services_that_ended(tmp_path):
    async def work() -> None:
        async with begun("one", tmp_path) as one:
            assert [path.name for path in (tmp_path / "leases").iterdir()] == ["one"]
            assert [service.service_id for service in await one.store.services()] == ["one"]
        assert list((tmp_path / "leases").iterdir()) == []
        async with SQLStore(f"sqlite:///{tmp_path / 'store.sqlite'}") as store:
            assert await store.services() == []

    run(work())


def test_a_service_of_this_machine_whose_lock_is_free_is_dead_at_once_whatever_its_lease(tmp_path):
    async def work() -> None:
        async with begun("one", tmp_path) as one:
            await make_session(one)
            (tmp_path / "leases" / "killed").touch()  # the lock went with its process
            killed = registered("killed", host=socket.gethostname(), pid=dead_pid(), lease=3600)
            await one.store.register(killed)
            async with SQLStore(f"sqlite:///{tmp_path / 'store.sqlite'}", "killed") as its_store:
                await its_store.create(new_record("theirs", owner="", backend="pooled", directory=None))
            assert (await one.tenure.claim("theirs")).session_id == "theirs"
            assert [service.service_id for service in await one.store.services()] == ["one"]
            assert not (tmp_path / "leases" / "killed").exists()

    run(work())


def test_while_the_kernels_of_a_killed_service_are_being_ended_its_sessions_are_waited_for(tmp_path):
    async def work() -> None:
        async with begun("one", tmp_path) as one:
            lock = tmp_path / "leases" / "killed"
            await one.store.register(registered("killed", host=socket.gethostname(), pid=dead_pid(), lease=3600))
            async with SQLStore(f"sqlite:///{tmp_path / 'store.sqlite'}", "killed") as its_store:
                await its_store.create(new_record("theirs", owner="", backend="pooled", directory=None))
            with lock_held_by_another_process(lock) as guardian:
                claiming = asyncio.create_task(one.tenure.claim("theirs"))
                asked = _count(one.store, "claim")
                await wait_until(lambda: len(asked) > 2, what="some looks at it")
                assert not claiming.done()
                guardian.kill()
                assert (await claiming).session_id == "theirs"

    run(work())


def _count(store: SQLStore, method: str) -> list[Any]:
    """Notes each call of a store's method."""
    calls: list[Any] = []
    original = getattr(store, method)

    async def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return await original(*args, **options)

    setattr(store, method, counted)
    return calls


def test_a_killed_service_whose_kernels_do_not_end_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tenure_module, "DYING_TIMEOUT", 0.2)

    async def work() -> None:
        async with begun("one", tmp_path) as one:
            await one.store.register(registered("killed", host=socket.gethostname(), pid=dead_pid(), lease=3600))
            async with SQLStore(f"sqlite:///{tmp_path / 'store.sqlite'}", "killed") as its_store:
                await its_store.create(new_record("theirs", owner="", backend="pooled", directory=None))
            with (
                lock_held_by_another_process(tmp_path / "leases" / "killed"),
                pytest.raises(errors.SessionNotReady),
            ):
                await one.tenure.claim("theirs")

    run(work())


def test_a_service_of_another_machine_is_dead_when_its_lease_has_run_out(tmp_path):
    async def work() -> None:
        async with begun("one", tmp_path) as one:
            for name, lease in (("alive", 3600.0), ("silent", -1.0)):
                await one.store.register(registered(name, host="elsewhere", pid=1, lease=lease))
                async with SQLStore(f"sqlite:///{tmp_path / 'store.sqlite'}", name) as its_store:
                    await its_store.create(new_record(f"of-{name}", owner="", backend="pooled", directory=None))
            with pytest.raises(errors.SessionNotReady):
                await one.tenure.claim("of-alive")
            assert (await one.tenure.claim("of-silent")).session_id == "of-silent"

    run(work())


def test_what_dead_services_left_is_freed_when_one_begins(tmp_path):
    async def work() -> None:
        async with SQLStore(f"sqlite:///{tmp_path / 'store.sqlite'}") as store:
            await store.register(registered("silent", host="elsewhere", pid=1, lease=-1.0))
            await store.register(registered("alive", host="elsewhere", pid=1, lease=3600))
            async with begun("one", tmp_path):
                assert {service.service_id for service in await store.services()} == {"alive", "one"}

    run(work())


def test_a_service_that_was_taken_for_dead_gives_its_kernels_up_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(tenure_module, "RENEW_INTERVAL", 0.01)

    async def work() -> None:
        async with begun("one", tmp_path) as one:
            await make_session(one)
            await one.store.bury("one")
            await wait_until(lambda: one.deposed, what="the news")
            async with asyncio.timeout(10):
                while not await one.store.services():
                    await asyncio.sleep(0)
            assert (await one.tenure.claim("s")).session_id == "s", "nobody has taken it meanwhile"

    run(work())


def test_a_deposed_service_that_cannot_give_up_a_kernel_is_registered_again_all_the_same(tmp_path, monkeypatch):
    """Else it would go on without a lease, and nobody would renew it."""
    monkeypatch.setattr(tenure_module, "RENEW_INTERVAL", 0.01)

    async def work() -> None:
        async with begun("one", tmp_path) as one:

            async def fails() -> None:
                one.deposed += 1
                raise errors.StoreError("a kernel would not go")

            one.tenure._deposed = fails
            await one.store.bury("one")
            await wait_until(lambda: one.deposed, what="the news")
            async with asyncio.timeout(5):
                while not await one.store.services():
                    await asyncio.sleep(0.01)

    run(work())


def test_a_lease_is_renewed_after_the_store_failed_for_a_while(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tenure_module, "RENEW_INTERVAL", 0.01)

    async def work() -> None:
        async with begun("one", tmp_path) as one:
            renew = one.store.renew

            async def fails(*_: Any) -> bool:
                raise errors.StoreError("the disk is full")

            one.store.renew = fails
            await wait_until(lambda: "could not renew its lease" in caplog.text, what="the warning")
            one.store.renew = renew
            [before] = await one.store.services()
            async with asyncio.timeout(5):
                while (await one.store.services())[0].expires_at <= before.expires_at:
                    await asyncio.sleep(0.01)
            assert one.deposed == 0

    run(work())


def test_a_directory_that_takes_no_lock_is_named_with_its_setting(tmp_path):
    (tmp_path / "file").touch()

    async def work() -> None:
        service = Service("one", tmp_path, tmp_path / "file" / "leases")
        async with service.store:
            with pytest.raises(errors.StoreError, match=r"SessionService\.data_dir"):
                await service.tenure.begin()
            await service.tenure.end()

    run(work())


def test_a_lock_that_only_a_forked_process_still_holds_keeps_nobody_out(tmp_path):
    """The service and its guardian were both killed, and a worker that the service had forked lives on."""

    async def work() -> None:
        async with begun("one", tmp_path) as one:
            lease = -tenure_module.KERNELS_TIMEOUT - 1
            await one.store.register(registered("killed", host=socket.gethostname(), pid=dead_pid(), lease=lease))
            async with SQLStore(f"sqlite:///{tmp_path / 'store.sqlite'}", "killed") as its_store:
                await its_store.create(new_record("theirs", owner="", backend="pooled", directory=None))
            with lock_held_by_another_process(tmp_path / "leases" / "killed"):
                assert (await one.tenure.claim("theirs")).session_id == "theirs"

    run(work())


def test_a_killed_service_that_nobody_has_reaped_yet_is_gone():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert tenure_module._has_ended(process.pid)
    assert tenure_module._has_ended(process.pid)
    assert not tenure_module._has_ended(os.getpid())


def test_a_holder_that_the_store_does_not_know_is_not_asked_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tenure_module, "DYING_TIMEOUT", 0.2)

    async def work() -> None:
        async with begun("one", tmp_path) as one, begun("other", tmp_path) as other:
            await make_session(one)

            async def none() -> list[ServiceRecord]:
                return []

            monkeypatch.setattr(other.store, "services", none)
            with pytest.raises(errors.SessionNotReady):
                await other.tenure.claim("s")

    run(work())


def test_a_store_that_does_not_answer_a_renewal_is_told_to_who_waits_for_the_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(tenure_module, "RENEW_TIMEOUT", 0.1)

    async def work() -> None:
        async with begun("one", tmp_path) as one:
            assert not one.tenure.is_lapsed
            one.tenure._lapses_at = 0.0

            async def hangs(*_: Any) -> bool:
                await asyncio.Event().wait()
                return True

            monkeypatch.setattr(one.store, "renew", hangs)
            with pytest.raises(errors.StoreError, match="did not answer within"):
                await one.tenure.confirm()
            monkeypatch.undo()
            await one.tenure.confirm()
            assert not one.tenure.is_lapsed

    run(work())


def test_a_clock_that_is_set_neither_ends_nor_prolongs_the_lease(tmp_path, monkeypatch):
    class ClockThatWasSet(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(days=1)

    async def work() -> None:
        async with begun("one", tmp_path) as one:
            monkeypatch.setattr(tenure_module, "datetime", ClockThatWasSet)
            assert not one.tenure.is_lapsed

    run(work())
