"""The service's sessions, as the culler sees them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from dspex_kernels import errors
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions.backend import PlaceGone
from dspex_kernels.sessions.calls import Call
from dspex_kernels.sessions.culling import Facts
from dspex_kernels.sessions.keeper import Keeper
from dspex_kernels.sessions.lifetimes import Lifetimes
from dspex_kernels.sessions.live import LiveSession
from dspex_kernels.sessions.places import Places
from dspex_kernels.sessions.registry import Registry
from dspex_kernels.sessions.tenure import Tenure

LOOK_TIMEOUT = 5.0
"""Seconds for a kernel to tell whether it is in use."""


def facts_of(live: LiveSession) -> Facts:
    """What is known of a session without asking its kernel."""
    if live.status is not SessionStatus.READY:  # what was told of a kernel went with it
        return Facts(live.status, live.last_activity, live.running)
    return Facts(live.status, live.last_activity, live.running, 0, live.clients, live.busy)


class IdleSessions:
    """What may be culled (``culling.Cullable``).

    Args:
        registry: The service's sessions.
        places: Where they live.
        lifetimes: Ends them.
        keeper: Is told that one is in use.
        tenure: Says which are this service's.
    """

    def __init__(
        self,
        registry: Registry,
        places: Places,
        lifetimes: Lifetimes,
        keeper: Keeper,
        tenure: Tenure,
    ) -> None:
        self._registry = registry
        self._places = places
        self._lifetimes = lifetimes
        self._keeper = keeper
        self._tenure = tenure

    def candidates(self) -> Iterable[str]:
        """Called by the culler."""
        return (live.session_id for live in self._registry)

    def facts(self, session_id: str) -> Facts | None:
        """Called by the culler."""
        live = self._registry.find(session_id)
        return facts_of(live) if live is not None else None

    async def look(self, session_id: str) -> Facts | None:
        """Called by the culler for a session that would be culled."""
        live = self._registry.find(session_id)
        if live is None:
            return None
        if not live.held:
            try:
                record = await self._tenure.claim(session_id)
            except (errors.SessionNotReady, errors.SessionNotFound):
                return None
            live.last_activity = max(live.last_activity, record.last_activity)
            if live.opening is None and not live.held:  # else a call has come, which knows more by now
                live.refresh(record)  # another service may have used it, and moved it, meanwhile
            live.held = True
        elif live.status is SessionStatus.READY and live.record.directory is not None:
            await self._ask_kernel(live)
        return self.facts(session_id)

    def touch(self, session_id: str) -> None:
        """Called by the culler for a session that is in use."""
        live = self._registry.find(session_id)
        if live is not None:
            self._keeper.touch(live)

    async def hibernate(self, session_id: str, reason: str) -> None:
        """Called by the culler."""
        live = self._registry.find(session_id)
        if live is not None and not live.running:
            await self._places.hibernate(live, reason)

    async def destroy(self, session_id: str, reason: str) -> None:
        """Called by the culler."""
        live = self._registry.find(session_id)
        if live is not None and not live.running:
            await self._lifetimes.end(live)

    async def _ask_kernel(self, live: LiveSession) -> None:
        """Ask a dedicated kernel what happens in it beside the service's calls: cells, notebooks that listen."""
        try:
            told = await self._places.backend_of(live).call(live.session_id, Call("ping", {}, LOOK_TIMEOUT))
        except PlaceGone:  # it was lost just now: there is nothing to cull
            return
        except (
            errors.CommandTimeout
        ):  # a cell that holds the interpreter's lock, most likely: ``cull_busy`` decides
            live.busy = True
            return
        live.busy = told["busy"]
        live.clients = told["clients"] or 0
        if told["last_activity"] is not None:
            live.last_activity = max(live.last_activity, datetime.fromisoformat(told["last_activity"]))
