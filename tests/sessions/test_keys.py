"""The keys of sessions' LMs: told to the next kernel, sealed in the store, never told to another provider."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from dspex_kernels import errors
from dspex_kernels.protocol.records import LMProfile, SessionSettings, SettingsChanged
from dspex_kernels.sessions.secrets import CRYPT_KEY_VARIABLE, Vault, rotate_secrets
from dspex_kernels.sessions.store.sql import SQLStore
from tests.sessions.memory_backend import MemoryService, store_that_refuses

KEY, OTHER_KEY = "sk-test-4711-canary", "sk-test-0815-canary"
LM = {"model": "openai/gpt-x", "api_base": "https://llm.example.org", "temperature": 0.5}


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work

    asyncio.run(bounded())


@pytest.fixture(params=["dedicated", "pooled"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., MemoryService]:
    def make(**traits: Any) -> MemoryService:
        url = f"sqlite:///{tmp_path / 'store.sqlite'}"
        return MemoryService(data_dir=str(tmp_path), store_url=url, backend=request.param, **traits)

    return make


@pytest.fixture
def crypt_key(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The environment's Fernet key."""
    key = Fernet.generate_key().decode()
    monkeypatch.setenv(CRYPT_KEY_VARIABLE, key)
    return key


def told(service: MemoryService) -> list[Any]:
    """The LMs that kernels were told, keys with them."""
    return [call.args["lm"] for _, call in service.memory.asked if call.command == "configure"]


@pytest.mark.usefixtures("crypt_key")
class TestWithAVault:
    def test_a_key_comes_back_after_a_restart_with_the_profile_it_was_given_with(self, make, tmp_path):
        async def work() -> None:
            async with make() as service:
                await service.create_session(session_id="s", lm={**LM, "api_key": KEY})
            assert not [
                path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()
            ]
            for _ in range(2):
                async with make() as service:
                    await service.get_session("s").list_programs()
                    [lm] = told(service)
                    assert {name: lm[name] for name in (*LM, "api_key")} == {**LM, "api_key": KEY}

        run(work())

    @pytest.mark.parametrize("change", [("configure", {"lm": "offline/echo"}), ("reset", {})])
    def test_a_key_whose_lm_was_replaced_is_gone_from_the_store(self, make, change):
        async def work() -> None:
            async with make() as service, SQLStore(service.store_url) as store:
                session = await service.create_session(session_id="s", lm={**LM, "api_key": KEY})
                assert await store.get_secret("s")
                await session.call(*change)
                assert await store.get_secret("s") is None
            async with make() as service:
                await service.get_session("s").list_programs()
                assert told(service) == []

        run(work())

    def test_a_key_given_anew_after_a_restart_replaces_the_sealed_one(self, make):
        async def work() -> None:
            async with make() as service:
                await service.create_session(session_id="s", lm={**LM, "api_key": KEY})
            async with make() as service:
                await service.get_session("s").configure(lm={**LM, "api_key": OTHER_KEY})
            async with make() as service:
                await service.get_session("s").list_programs()
                assert [lm["api_key"] for lm in told(service)] == [OTHER_KEY]

        run(work())

    def test_a_key_taken_away_after_a_restart_is_gone_from_the_store(self, make):
        async def work() -> None:
            async with make() as service:
                await service.create_session(session_id="s", lm={**LM, "api_key": KEY})
            async with make() as service, SQLStore(service.store_url) as store:
                await service.get_session("s").reset()
                assert await store.get_secret("s") is None

        run(work())

    def test_a_sealed_key_is_never_told_to_another_provider(self, make):
        """The settings may have come to name another one without the service: by a cell, or before a crash."""

        async def work() -> None:
            async with make() as service:
                await service.create_session(session_id="s", lm={**LM, "api_key": KEY})
                directory = (await service.get_session_info("s")).backend == "dedicated"
            elsewhere = LMProfile(model="openai/gpt-x", api_base="https://elsewhere.example.org", key_given=True)
            if directory:  # as a cell does: the kernel's journal tells of it
                async with make() as service:
                    await service.get_session("s").list_programs()
                    room = service.memory._rooms["s"]
                    service.memory._write(room, SettingsChanged(settings=SessionSettings(lm=elsewhere)))
            async with SQLStore(service.store_url) as store:
                await store.save_changes("s", [SettingsChanged(settings=SessionSettings(lm=elsewhere))])
            async with make() as service:
                await service.get_session("s").list_programs()
                assert KEY not in str(told(service))

        run(work())

    def test_a_session_whose_key_does_not_open_can_be_used_and_given_another(self, make, monkeypatch, caplog):
        async def work() -> None:
            async with make() as service:
                session = await service.create_session(session_id="s", lm={**LM, "api_key": KEY})
                await session.create_program("qa", "question -> answer")
            monkeypatch.setenv(CRYPT_KEY_VARIABLE, Fernet.generate_key().decode())
            async with make() as service:
                session = service.get_session("s")
                assert len(await session.list_programs()) == 1
                assert told(service) == []
                assert "give the key again with configure" in caplog.text
                await session.configure(lm={**LM, "api_key": OTHER_KEY})
            async with make() as service:
                await service.get_session("s").list_programs()
                assert [lm["api_key"] for lm in told(service)] == [OTHER_KEY]
            assert KEY not in caplog.text

        run(work())

    def test_keys_open_under_a_new_crypt_key_beside_the_old_one_and_after_rotation_without_it(
        self, make, monkeypatch, crypt_key
    ):
        async def work() -> None:
            async with make() as service:
                await service.create_session(session_id="s", lm={**LM, "api_key": KEY})
            new = Fernet.generate_key().decode()
            async with SQLStore(service.store_url) as store:
                assert await rotate_secrets(store, Vault([new, crypt_key])) == 1
            monkeypatch.setenv(CRYPT_KEY_VARIABLE, new)
            async with make() as service:
                await service.get_session("s").list_programs()
                assert [lm["api_key"] for lm in told(service)] == [KEY]

        run(work())


def test_without_a_vault_a_key_outlives_kernels_and_not_the_service(make, tmp_path):
    async def work() -> None:
        async with make() as service, SQLStore(service.store_url) as store:
            session = await service.create_session(session_id="s", lm={**LM, "api_key": KEY})
            service.memory.lose("s")
            await session.list_programs()
            assert [lm["api_key"] for lm in told(service)] == [KEY, KEY]
            assert await store.get_secret("s") is None
        async with make() as service:
            await service.get_session("s").list_programs()
            assert told(service) == []
            async with SQLStore(service.store_url) as store:
                lm = (await store.get("s")).contents.settings.lm
            assert lm is not None
            assert lm.key_given, "else nobody could tell that one is missing"

    run(work())


def test_a_key_travels_with_its_session_to_the_other_backend(make):
    async def work() -> None:
        async with make() as service:
            await service.create_session(session_id="s", lm={**LM, "api_key": KEY})
            other = service.dedicated if service.memory is service.pooled else service.pooled
            await service.migrate_session("s", backend=other.name)
            assert [call.args["lm"]["api_key"] for _, call in other.asked if call.command == "configure"] == [KEY]

    run(work())


@pytest.mark.parametrize("make", ["pooled"], indirect=True)
def test_an_lm_that_the_store_refused_does_not_take_the_former_ones_key(make, tmp_path):
    async def work() -> None:
        async with make() as service:
            session = await service.create_session(session_id="s", lm={**LM, "api_key": KEY})
            await session.create_program("kept", "question -> answer")
            with store_that_refuses(tmp_path / "store.sqlite", "refused"):
                service.memory.answering.clear()
                refused = asyncio.create_task(session.create_program("refused", "question -> answer"))
                changed = asyncio.create_task(
                    session.configure(lm={**LM, "temperature": 1.0, "api_key": OTHER_KEY})
                )
                while service.memory.late < 2:
                    await asyncio.sleep(0)
                service.memory.answering.set()
                outcomes = await asyncio.gather(refused, changed, return_exceptions=True)
                assert [type(outcome) for outcome in outcomes] == [errors.StoreError] * 2
            assert [program["program_id"] for program in await session.list_programs()] == ["kept"]
            assert told(service)[-1] == {**LM, "api_key": KEY}

    run(work())
