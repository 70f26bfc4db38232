"""LM keys at rest: who can open them, and how a store's are brought under a new key."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from dspex_kernels import errors
from dspex_kernels.sessions import secrets
from dspex_kernels.sessions.model import SessionRecord
from dspex_kernels.sessions.secrets import CRYPT_KEY_VARIABLE, Vault, rotate_secrets
from dspex_kernels.sessions.store.sql import SQLStore

OLD, NEW = Fernet.generate_key().decode(), Fernet.generate_key().decode()
T0 = datetime(2026, 1, 2, tzinfo=UTC)


def _record(session_id: str) -> SessionRecord:
    return SessionRecord(session_id=session_id, owner="alice", backend="pooled", created_at=T0, last_activity=T0)


def test_what_was_sealed_opens_again_and_shows_nothing() -> None:
    vault = Vault([OLD])
    token = vault.seal("s", "sk-canary-ü")

    assert vault.open("s", token) == "sk-canary-ü"
    assert b"canary" not in token
    assert vault.seal("s", "sk-canary-ü") != token


def test_a_token_of_another_session_does_not_open() -> None:
    vault = Vault([OLD])
    with pytest.raises(errors.LMCredentialsRequired, match="session 'mallory' is another session's"):
        vault.open("mallory", vault.seal("alice", "sk-canary"))


@pytest.mark.parametrize("text", ["sk-canary", "[]", '{"session_id": "s"}', '{"text": "sk-canary"}', "\xff"])
def test_what_another_program_encrypted_under_the_same_key_is_not_told(text: str) -> None:
    with pytest.raises(errors.LMCredentialsRequired, match="session 's'") as caught:
        Vault([OLD]).open("s", Fernet(OLD).encrypt(text.encode("latin-1")))
    assert caught.value.__cause__ is None
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("token", [Vault([OLD]).seal("s", "x"), b"", b"no token", b"\xff\x00"], ids=range(4))
def test_a_token_that_no_key_opens_asks_for_the_lm_again(token: bytes) -> None:
    vault = Vault([NEW])
    with pytest.raises(errors.LMCredentialsRequired, match=r"session 's'.*configure the LM again") as caught:
        vault.open("s", token)
    assert caught.value.details == {"session_id": "s"}
    with pytest.raises(errors.LMCredentialsRequired, match="add the key it was kept under"):
        vault.rotate(token)


def test_the_first_key_encrypts_and_all_decrypt() -> None:
    old, both, new = Vault([OLD]), Vault([NEW, OLD]), Vault([NEW])

    token = old.seal("s", "sk")
    assert both.open("s", token) == "sk"
    assert new.open("s", both.seal("s", "sk")) == "sk"
    assert new.open("s", both.rotate(token)) == "sk"


@pytest.mark.parametrize("value", [None, "", "  \n"])
def test_without_a_key_there_is_no_vault(value: str | None) -> None:
    assert Vault.from_environment({} if value is None else {CRYPT_KEY_VARIABLE: value}) is None


def test_the_keys_of_the_environment_are_separated_by_semicolons() -> None:
    vault = Vault.from_environment({CRYPT_KEY_VARIABLE: f"{NEW} ; {OLD}\n"})
    assert vault is not None
    assert vault.open("s", Vault([OLD]).seal("s", "sk")) == "sk"
    assert Vault([NEW]).open("s", vault.seal("s", "sk")) == "sk"


@pytest.mark.parametrize("bad", ["canary", "", f"canary{OLD}", "cänary", "canary=" * 9], ids=range(5))
def test_a_malformed_key_is_named_by_its_number_and_never_told(bad: str) -> None:
    with pytest.raises(errors.StoreError, match=r"key 2 of 3 .* no Fernet key: make one with python3") as caught:
        Vault.from_environment({CRYPT_KEY_VARIABLE: f"{OLD};{bad};{NEW}"})
    told = f"{caught.value.message} {caught.value.details} {caught.value.__cause__}"
    assert not any(text in told for text in ("canary", "cänary", OLD, NEW))


def test_a_key_without_the_package_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.fernet", None)
    assert Vault.from_environment({}) is None
    with pytest.raises(errors.DependencyMissing, match=r"pip install 'dspex-kernels\[crypt\]'"):
        Vault.from_environment({CRYPT_KEY_VARIABLE: OLD})


def test_a_store_is_brought_under_the_new_key_while_sessions_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "MAX_PAGE", 2)  # several pages
    old, both, new = Vault([OLD]), Vault([NEW, OLD]), Vault([NEW])

    async def main() -> None:
        async with SQLStore(f"sqlite:///{tmp_path}/s.sqlite") as store:
            for n in range(5):
                await store.create(_record(f"s{n}"))
                await store.set_secret(f"s{n}", old.seal(f"s{n}", f"sk-{n}"))
            await store.create(_record("without"))

            assert await rotate_secrets(store, both) == 5
            for n in range(5):
                token = await store.get_secret(f"s{n}")
                assert token is not None
                assert new.open(f"s{n}", token) == f"sk-{n}"
            assert await store.get_secret("without") is None

    asyncio.run(main())


def test_secrets_that_no_key_opens_are_told_and_hold_up_no_other(tmp_path: Path) -> None:
    lost = Vault([Fernet.generate_key().decode()])

    async def main() -> None:
        async with SQLStore(f"sqlite:///{tmp_path}/s.sqlite") as store:
            for name, vault in (("a", lost), ("b", Vault([OLD]))):
                await store.create(_record(name))
                await store.set_secret(name, vault.seal(name, "sk"))
            kept = await store.get_secret("a")

            with pytest.raises(errors.LMCredentialsRequired, match="1 sessions, 'a' the first; 1 others") as caught:
                await rotate_secrets(store, Vault([NEW, OLD]))
            assert caught.value.details == {"sessions": ["a"], "count": 1}
            assert await store.get_secret("a") == kept
            token = await store.get_secret("b")
            assert token is not None
            assert Vault([NEW]).open("b", token) == "sk"

    asyncio.run(main())
