"""`dspex-kernels store`: copies the store, and seals its keys anew. It works on the store itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from traitlets import Unicode

from dspex_kernels import errors
from dspex_kernels.cli.base import BASE_ALIASES, Subcommand, say, store_url

if TYPE_CHECKING:
    from dspex_kernels.sessions.store import SessionStore

_ARGUMENTS = {"backup": ("FILE",), "rotate-keys": ()}
"""What each action is given."""


class StoreApp(Subcommand):
    name = "jupyter-dspex-store"
    usage = f"store ({' | '.join(' '.join([action, *words]) for action, words in _ARGUMENTS.items())})"
    description = (
        "backup: copy the store into a new SQLite file, while services go on using it. rotate-keys: seal every key "
        "that sessions were given with the first of the keys in DSPEX_CRYPT_KEY; the others open what is there."
    )
    examples = """
    dspex-kernels store backup sessions-monday.sqlite
    DSPEX_CRYPT_KEY="$NEW;$OLD" dspex-kernels store rotate-keys
    """
    aliases = BASE_ALIASES | {"store": "StoreApp.store"}

    store = Unicode(
        "", help="The store: a SQLite file, or an SQLAlchemy URL; SessionService.store_url by default."
    ).tag(config=True)

    async def run(self) -> int:
        """Do one action, and say what came of it."""
        action, *words = self.extra_args or [""]
        if action not in _ARGUMENTS:
            self.fail_usage(f"which action? There are {', '.join(_ARGUMENTS)}")
        wanted = _ARGUMENTS[action]
        if len(words) != len(wanted):
            self.fail_usage(f"{action} takes {' and '.join(wanted) or 'nothing more'}, and was given {len(words)}")
        from dspex_kernels.sessions.store.sql import SQLStore

        async with SQLStore(store_url(self.store, self.config)) as store:
            say(await (_backup(store, Path(words[0])) if action == "backup" else _rotate(store)))
        return 0


async def _backup(store: SessionStore, path: Path) -> str:
    sessions = await store.count()
    await store.backup(path)
    return _how_to_use(path, sessions)


def _how_to_use(path: Path, sessions: int) -> str:
    return f"{path}: {sessions} sessions; to use it, set SessionService.store_url to sqlite:///{path.absolute()}"


async def _rotate(store: SessionStore) -> str:
    from dspex_kernels.sessions.secrets import CRYPT_KEY_VARIABLE, Vault, rotate_secrets

    vault = Vault.from_environment(os.environ)
    if vault is None:
        raise errors.LMCredentialsRequired(
            f"there is no {CRYPT_KEY_VARIABLE}: give the new key and the old one, with ; between them"
        )
    return f"{await rotate_secrets(store, vault)} keys are sealed with the first key of {CRYPT_KEY_VARIABLE}"
