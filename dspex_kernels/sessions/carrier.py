"""Carries a call to its session: a place is opened if there is none, the call asked there, its changes kept."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dspex_kernels import errors
from dspex_kernels.protocol.commands import Command, get_command
from dspex_kernels.protocol.states import SessionStatus
from dspex_kernels.sessions.backend import PlaceGone
from dspex_kernels.sessions.calls import Call
from dspex_kernels.sessions.followers import Followers
from dspex_kernels.sessions.happenings import Listeners
from dspex_kernels.sessions.keeper import Keeper
from dspex_kernels.sessions.keys import Keys
from dspex_kernels.sessions.live import LiveSession
from dspex_kernels.sessions.outcomes import Outcomes
from dspex_kernels.sessions.places import Places, Waiter
from dspex_kernels.sessions.watch import watched

GONE_PAUSE = 0.005
"""Seconds before a session whose place was gone is looked for again: others are to have the event loop too."""


class Carrier:
    """Carries calls; knows which run.

    Args:
        places: Opens places, and says where they are.
        keeper: Makes durable what calls change.
        keys: Remembers the keys that calls give.
        outcomes: Remembers how calls ended that have a name.
        followers: Brings programs to where their aliases in the library point.
        listeners: Are told how each call ended.
    """

    def __init__(
        self,
        places: Places,
        keeper: Keeper,
        keys: Keys,
        outcomes: Outcomes,
        followers: Followers,
        listeners: Listeners,
    ) -> None:
        self._listeners = listeners
        self._places = places
        self._keeper = keeper
        self._keys = keys
        self._outcomes = outcomes
        self._followers = followers
        self._running: set[asyncio.Future[None]] = set()

    @property
    def running(self) -> set[asyncio.Future[None]]:
        """A future for each call that has not been answered, done when it is."""
        return set(self._running)

    async def call(self, live: LiveSession, call: Call, *, waits: bool = True) -> dict[str, Any]:
        """Ask a command and return its result.

        Args:
            live: Of which session.
            call: ``timeout`` is for everything: a kernel's start, the session's restoring, its turn, the command.
            waits: False to be told at once that there is no place yet.

        Raises:
            DSPexError: As ``SessionService.call``.
        """
        row = get_command(call.command)
        # Log lines and spans of a call that its caller did not name have an id too.
        request_id = call.request_id or secrets.token_hex(8)
        about = {"session_id": live.session_id, "owner": live.record.owner, "backend": live.record.backend}
        with (
            self.counted(live, row),
            watched(self._listeners, **about, command=row.name, request_id=request_id) as watch,
        ):
            call = replace(call, watch=watch)
            if call.request_id is None or row.control:
                return await self._answer(live, call, waits)
            self._outcomes.begin(live.session_id, call.request_id)
            try:
                result = await self._answer(live, call, waits)
            except errors.DSPexError as failure:
                self._outcomes.keep(live.session_id, call.request_id, failure)
                raise
            except BaseException:
                gone = errors.CommandCancelled(f"{call.command}: its caller went away before it was answered")
                self._outcomes.keep(live.session_id, call.request_id, gone)
                raise
            self._outcomes.keep(live.session_id, call.request_id, result)
            return result

    @contextlib.contextmanager
    def counted(self, live: LiveSession, row: Command | None) -> Iterator[None]:
        """While this lasts, the service does not stop; unless it is a health check, the session is in use."""
        mark = asyncio.get_running_loop().create_future()
        self._running.add(mark)
        active = row is None or not row.control
        live.running += active
        try:
            yield
        finally:
            live.running -= active
            if active:
                self._keeper.touch(live)
            self._running.discard(mark)
            mark.set_result(None)

    async def _answer(self, live: LiveSession, call: Call, waits: bool) -> dict[str, Any]:
        return await self._carry(live, await self._followers.translate(call), waits)

    async def _carry(self, live: LiveSession, call: Call, waits: bool = True) -> dict[str, Any]:
        row = get_command(call.command)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + call.timeout
        while True:
            await self._places.ensure(live, Waiter(call.command, deadline, call.request_id, waits=waits))
            if await self._followers.follow(live, call, deadline, self._carry):
                continue  # the session may have moved meanwhile
            # The start may have taken it all, and 0 would be no deadline.
            left = max(deadline - loop.time(), 0.001)
            try:
                return await self._ask(
                    live, row, replace(call, timeout=left, request_id=call.watch.named.request_id)
                )
            except PlaceGone:
                # Nothing of it ran: the place was lost between the look and the call.
                await asyncio.sleep(GONE_PAUSE)
                if loop.time() >= deadline:
                    raise errors.CommandTimeout(
                        f"{call.command}: the time was over while session {live.session_id!r} moved to another "
                        "kernel; call again, or give more time",
                        details={"session_id": live.session_id, "command": call.command},
                        retry_after=1.0,
                    ) from None  # PlaceGone tells nothing more

    async def _ask(self, live: LiveSession, row: Command, call: Call) -> dict[str, Any]:
        """Carry a call to the session's place; what it changed is durable when this returns."""
        generation = live.record.generation
        live.asking += 1
        try:
            result = await self._places.backend_of(live).call(live.session_id, call)
        finally:
            live.asking -= 1
            if not live.asking and live.quiet is not None:
                live.quiet.set()
            if row.mutates and live.status is not SessionStatus.DESTROYED:
                # Also after an error: a call that ran out of time may have changed something.
                await self._keeper.settle(live, generation)
        await self._keys.remember(live, row, call.args)  # only now: a refused change keeps the former key
        return result
