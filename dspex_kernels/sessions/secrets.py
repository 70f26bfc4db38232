"""Sessions' LM keys at rest: encrypted by keys that only the environment holds, each bound to its session.

A Fernet key (``cryptography``) encrypts and authenticates. Several of them make a rotation: the first encrypts, all
decrypt; ``rotate_secrets`` brings the whole store to the first, and then the others may go.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final, Self

from dspex_kernels import errors
from dspex_kernels.sessions.store import MAX_PAGE, SessionStore

CRYPT_KEY_VARIABLE: Final = "DSPEX_CRYPT_KEY"
"""One or more Fernet keys, separated by ";"; unset or empty, no secret is kept in the store."""
MAKE_A_KEY: Final = 'python3 -c "from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())"'


class Vault:
    """Encrypts secrets, and opens what it encrypted.

    Args:
        keys: Fernet keys; the first encrypts, all decrypt. At least one.

    Raises:
        DependencyMissing: The package ``cryptography`` is not installed.
        StoreError: A key is malformed. It is named by its number, never by its text.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        try:
            from cryptography.fernet import Fernet, InvalidToken, MultiFernet
        except ModuleNotFoundError as failure:
            raise errors.DependencyMissing(
                f"{CRYPT_KEY_VARIABLE} needs the package 'cryptography': pip install 'dspex-kernels[crypt]'"
            ) from failure
        fernets = []
        for number, key in enumerate(keys, start=1):
            try:
                fernets.append(Fernet(key))
            except ValueError:
                raise errors.StoreError(
                    f"key {number} of {len(keys)} in {CRYPT_KEY_VARIABLE} is no Fernet key: make one with "
                    f"{MAKE_A_KEY}"
                ) from None  # the cause could tell of the key
        self._fernet = MultiFernet(fernets)
        self._invalid_token = InvalidToken

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self | None:
        """The vault whose keys ``DSPEX_CRYPT_KEY`` holds; None where it holds none.

        Raises:
            DependencyMissing: As for the class.
            StoreError: As for the class.
        """
        value = environ.get(CRYPT_KEY_VARIABLE, "").strip()
        return cls([key.strip() for key in value.split(";")]) if value else None

    def seal(self, session_id: str, text: str) -> bytes:
        """The secret as a token that only this session's row may hold."""
        return self._fernet.encrypt(json.dumps({"session_id": session_id, "text": text}).encode())

    def open(self, session_id: str, token: bytes) -> str:
        """What was sealed.

        Raises:
            LMCredentialsRequired: No key of ours opens the token, or it was sealed for another session.
        """
        try:
            sealed = json.loads(self._fernet.decrypt(token))
            sealed_for, text = sealed["session_id"], sealed["text"]
        except (self._invalid_token, ValueError, KeyError, TypeError):  # or another program's, under the same key
            # The cause could tell what was sealed.
            raise _not_opened(f"the LM key of session {session_id!r}", session_id) from None
        if sealed_for != session_id:
            raise errors.LMCredentialsRequired(
                f"the LM key kept for session {session_id!r} is another session's: configure the LM again, with "
                "its key",
                details={"session_id": session_id},
            )
        return str(text)

    def rotate(self, token: bytes) -> bytes:
        """The same secret under the first key.

        Raises:
            LMCredentialsRequired: No key of ours opens the token.
        """
        try:
            return self._fernet.rotate(token)
        except self._invalid_token:
            raise _not_opened("a kept LM key") from None  # it says nothing more


async def rotate_secrets(store: SessionStore, vault: Vault) -> int:
    """Bring every secret of a store under the vault's first key, while sessions go on.

    Args:
        store: Open; a tool's, or the sessions of other services are refused.
        vault: Holds the new key first, and the old ones.

    Returns:
        How many were brought over; one that a session changed meanwhile is under the key of whoever changed it.

    Raises:
        LMCredentialsRequired: No key of the vault opens some of them (details: ``sessions``, at most ten, and
            ``count``). All others are brought over.
        StoreError: The store fails; those before are brought over, and doing it again does no harm.
    """
    rotated = 0
    unopened: list[str] = []
    after: str | None = None
    while page := await store.secrets(limit=MAX_PAGE, after=after):
        for session_id, token in page:
            try:
                new = vault.rotate(token)
            except errors.LMCredentialsRequired:
                unopened.append(session_id)
            else:
                rotated += await store.replace_secret(session_id, token, new)
        after = page[-1][0]
    if unopened:
        raise errors.LMCredentialsRequired(
            f"no key in {CRYPT_KEY_VARIABLE} opens the LM keys of {len(unopened):,} sessions, {unopened[0]!r} the "
            f"first; {rotated:,} others were rotated: add the old key, or configure those LMs again",
            details={"sessions": unopened[:10], "count": len(unopened)},
        )
    return rotated


def _not_opened(what: str, session_id: str | None = None) -> errors.LMCredentialsRequired:
    return errors.LMCredentialsRequired(
        f"no key in {CRYPT_KEY_VARIABLE} opens {what}: add the key it was kept under, or configure the LM again, "
        "with its key",
        details={"session_id": session_id} if session_id is not None else None,
    )
