"""The keys that sessions were given for their LMs: in memory, and sealed in the store where there is a vault."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dspex_kernels import errors
from dspex_kernels.protocol.commands import Command, ConfigureArgs, LMProfileArgs
from dspex_kernels.protocol.records import LMProfile, schema_hash
from dspex_kernels.sessions.live import LiveSession
from dspex_kernels.sessions.secrets import Vault
from dspex_kernels.sessions.store import SessionStore


class Keys:
    """Remembers the key of each session's LM profile, for the kernels that come after the present one.

    Args:
        store: Open, once anything is remembered.
        vault: Seals keys for the store; None keeps them in memory only, so that a service restart loses them.
    """

    def __init__(self, store: SessionStore, vault: Vault | None) -> None:
        self._store = store
        self._vault = vault

    async def remember(self, live: LiveSession, row: Command, args: Mapping[str, Any]) -> None:
        """Note the key that a successful command gave, or that it took the keyed LM away.

        Raises:
            StoreError: It could not be kept for after a restart.
        """
        had = live.lm_with_key
        if row.name == "reset":
            live.lm_with_key = None
        elif row.name == "configure" and "lm" in args:
            given: ConfigureArgs = row.parse(args)
            profile = given.lm if isinstance(given.lm, LMProfileArgs) else None
            live.lm_with_key = profile if profile is not None and profile.api_key is not None else None
        else:
            return
        if had is None and live.lm_with_key is None and not live.sealed:
            return
        # Without a vault too: a key that was sealed when there was one must not come back in place of this one.
        token = None
        if self._vault is not None and live.lm_with_key is not None:
            token = self._seal(live.session_id, live.lm_with_key)
        await self._store.set_secret(live.session_id, token)
        live.sealed = token is not None

    async def recall(self, live: LiveSession) -> dict[str, Any] | None:
        """The LM profile with its key, as ``configure`` takes it; None where no key is to be told again.

        Only while the session's settings still tell of that profile: the LM may have been changed from inside a
        dedicated kernel.

        Raises:
            LMCredentialsRequired: The sealed key cannot be opened with the keys of this service.
        """
        if live.lm is None or not live.lm.key_given:
            live.lm_with_key = None
            return None
        told = live.lm.model_dump()
        if live.lm_with_key is not None and live.lm_with_key.profile().model_dump() != told:
            live.lm_with_key = None
        if live.lm_with_key is None and self._vault is not None:
            live.lm_with_key = await self._unseal(live)
        profile = live.lm_with_key
        if profile is None or profile.api_key is None:
            return None
        args = profile.model_dump(mode="json", exclude_unset=True)
        return {**args, "api_key": profile.api_key.get_secret_value()}

    def _seal(self, session_id: str, profile: LMProfileArgs) -> bytes:
        """A key, bound to its profile: the settings may come to name another provider without us."""
        assert self._vault is not None
        assert profile.api_key is not None
        sealed = {"key": profile.api_key.get_secret_value(), "of": _fingerprint(profile.profile())}
        return self._vault.seal(session_id, json.dumps(sealed))

    async def _unseal(self, live: LiveSession) -> LMProfileArgs | None:
        assert self._vault is not None
        assert live.lm is not None
        token = await self._store.get_secret(live.session_id)
        live.sealed = token is not None
        if token is None:
            return None
        try:
            sealed = json.loads(self._vault.open(live.session_id, token))
        except errors.LMCredentialsRequired as refusal:
            raise errors.LMCredentialsRequired(
                f"session {live.session_id!r}: {refusal.message}; or give the key again with configure",
                details={"session_id": live.session_id},
            ) from refusal
        if sealed["of"] != _fingerprint(live.lm):
            return None
        given = live.lm.model_dump(mode="json", exclude={"key_given"})
        return LMProfileArgs.model_validate({**given, "api_key": sealed["key"]})


def _fingerprint(profile: LMProfile) -> str:
    return schema_hash(profile.model_dump(mode="json"))
