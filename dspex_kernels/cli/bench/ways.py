"""The ways of starting a session that are compared."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from traitlets.config import Config

from dspex_kernels.cli.bench.measurement import Bench

if TYPE_CHECKING:
    from dspex_kernels.sessions.service import SessionService
    from dspex_kernels.sessions.session import Session

STOCK = "stock"
"""Jupyter's own kernel, `import dspy` and a first Predict."""

OWNER = "bench"
PATIENCE_S = 300.0
"""Seconds that a start, or a call, may take."""
LM = {"model": "offline/echo", "cache": False}
"""The LM that every call reaches: a cache would answer all but the first."""
PROGRAM_ID = "qa"
SIGNATURE = "question -> answer"
INPUTS = {"question": "Why is the sky blue?"}
EXECUTE = {"program_id": PROGRAM_ID, "inputs": INPUTS}


@dataclass(frozen=True, slots=True)
class Way:
    """How a session's kernel comes to be.

    Attributes:
        name: As the tables call it.
        forks: Whether the fork server may be used.
        standby: Kernels that wait: as many forked ones, and as many that are started.
    """

    name: str
    forks: bool
    standby: int = 0

    def settings(self) -> Config:
        """What makes kernels start this way, in any application."""
        forking = {"enabled": self.forks, "standby": self.standby}
        return Config({"ForkServerProvisioner": forking, "SessionService": {"spare_kernels": self.standby}})


PLAIN = Way("plain", forks=False)
FORKED = Way("forked", forks=True)
STANDBY = Way("standby", forks=True, standby=2)
WAYS = (PLAIN, FORKED, STANDBY)


@contextlib.asynccontextmanager
async def service_of(
    bench: Bench, way: Way = FORKED, pool: dict[str, Any] | None = None, **traits: Any
) -> AsyncIterator[SessionService]:
    """A running service whose kernels start one way, with a SQLite store; all its files go with it.

    Args:
        bench: Whose settings and directory.
        way: How.
        pool: Traits of its pool.
        **traits: Its own.
    """
    from dspex_kernels.sessions.service import SessionService

    settings = Config(bench.settings)
    settings.merge(way.settings())
    settings.merge(Config({"KernelPool": pool or {}}))
    with tempfile.TemporaryDirectory(dir=bench.directory, prefix="s") as directory:
        files = {"data_dir": directory, "store_url": f"sqlite:///{directory}/store.sqlite"}
        # What is slow is to be measured, not refused.
        patience = {"max_sessions": 0, "kernel_start_timeout": PATIENCE_S, "command_timeout": PATIENCE_S}
        async with SessionService(config=settings, **files, **patience, **traits) as service:
            yield service


def only_errors() -> logging.Logger:
    """A log for services whose kernels are killed on purpose: of that it needs no warning."""
    log = logging.getLogger("dspex-bench")
    log.setLevel(logging.ERROR)
    return log


async def make_program(session: Session) -> None:
    """Give a session its LM and the program that is called."""
    await session.call("configure", {"lm": LM})
    await session.call("create_program", {"program_id": PROGRAM_ID, "signature": SIGNATURE})


async def call_program(session: Session) -> None:
    """Call it."""
    await session.call("execute_program", EXECUTE)
