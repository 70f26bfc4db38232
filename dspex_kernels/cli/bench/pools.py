"""The kernels of a service's pool, seen from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dspex_kernels import errors
from dspex_kernels.cli.bench import clock

if TYPE_CHECKING:
    from dspex_kernels.sessions.service import ServiceSession, SessionService

TIMEOUT_S = 120.0


async def until_whole(service: SessionService, size: int) -> None:
    """Wait until a pool has all its kernels.

    Raises:
        KernelStartFailed: It does not get them.
    """

    def is_whole() -> bool:
        told = _figures(service)["pool"]
        return bool((told["available"], told["starting"], told["retiring"]) == (size, 0, 0))

    if not await clock.until(is_whole, timeout=TIMEOUT_S):
        raise errors.KernelStartFailed(f"the pool has not {size} kernels after {TIMEOUT_S:g} s")


def died(service: SessionService) -> int:
    """How many kernels of the pool have died since the service was made."""
    return int(_figures(service)["totals"]["kernels_died"])


async def occupy(service: SessionService, size: int, owner: str) -> tuple[list[ServiceSession], set[int]]:
    """Put a session into each kernel of a pool; the sessions, and the ids of the kernels' processes.

    Raises:
        KernelStartFailed: Some kernel gets no session.
    """
    sessions: list[ServiceSession] = []
    pids: set[int] = set()
    while len(pids) < size:
        if len(sessions) >= 10 * size:
            raise errors.KernelStartFailed(f"{len(sessions)} sessions are in {len(pids)} of {size} kernels")
        sessions.append(await service.create_session(owner))
        pid = (await service.get_session_info(sessions[-1].session_id)).kernel_pid
        pids |= {pid} if pid is not None else set()
    return sessions, pids


def _figures(service: SessionService) -> dict[str, Any]:
    told: dict[str, Any] = service.figures.read()["backends"]["pooled"]
    return told
