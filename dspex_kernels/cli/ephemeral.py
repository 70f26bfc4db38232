"""A session service for one run of the command line: its files go when it ends, unless configured to stay."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traitlets.config import Application

if TYPE_CHECKING:
    from dspex_kernels.sessions.service import SessionService


@asynccontextmanager
async def ephemeral_service(app: Application) -> AsyncIterator[SessionService]:
    """A running service that takes its traits from ``app``'s configuration.

    Its store and its sessions' directories are temporary, where the configuration does not name others.

    Args:
        app: The subcommand: parent of the service.
    """
    from dspex_kernels.sessions.service import SessionService

    configured = app.config.get("SessionService", {})
    with tempfile.TemporaryDirectory(prefix="dspex-") as directory:
        temporary: dict[str, Any] = {
            "store_url": f"sqlite:///{Path(directory, 'sessions.sqlite')}",
            "data_dir": directory,
        }
        own = {name: value for name, value in temporary.items() if name not in configured}
        async with SessionService(parent=app, **own) as service:
            yield service


def lm_profile(*, model: str, api_base: str, api_key_env: str) -> dict[str, Any]:
    """An LM profile from options; "" is not given."""
    given = {"model": model, "api_base": api_base, "api_key_env": api_key_env}
    return {name: value for name, value in given.items() if value}
