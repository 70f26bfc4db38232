"""The pooled backend: sessions are namespaces in the kernels of a pool, which take data only.

A session is opened in the kernel with the fewest others, from what the store holds; from then on its calls go
there, each in its turn (``queue``). Where its namespace is only saves the way: when its kernel dies, or is emptied,
the session is opened in another one. What a call changed comes back in its reply, and is durable in the service's
store before the caller is answered (``changed``).
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any, NoReturn

from dspex_kernels import errors
from dspex_kernels.protocol.commands import Command, get_command
from dspex_kernels.sessions.backend import Place, PlaceGone, SessionBackend
from dspex_kernels.sessions.calls import Call
from dspex_kernels.sessions.kernels import SUSPICION_AFTER
from dspex_kernels.sessions.model import SessionRecord
from dspex_kernels.sessions.pool import KernelPool, PoolKernel
from dspex_kernels.sessions.queue import FairQueue, Moved
from dspex_kernels.sessions.tasks import Tasks

MAX_OPENING = 128
"""Sessions that are opened at the same time: when a kernel dies, thousands may come back at once."""
CLOSE_TIMEOUT = 5.0
"""Seconds for a kernel to let a session go: it gives running calls two."""
COLLECT_INTERVAL = 0.5
"""Seconds between two questions of what running calls have spent."""
CROWDED_RATIO, CROWDED_BY = 2, 16
"""A kernel is crowded with more than this often as many sessions as the emptiest has, and this many more."""


@dataclass(eq=False, slots=True)
class _Room:
    """A session's namespace in a kernel of the pool."""

    session_id: str
    generation: int
    member: PoolKernel
    leaving: bool = False
    """It takes no new calls: its kernel is retired, or the session is being closed."""
    gone: asyncio.Event | None = None
    """Set when the session has left; made by who waits for that."""


class PooledBackend(SessionBackend):
    """Many sessions in few kernels.

    Args:
        pool: Not started yet; started and stopped with the backend.
        **kwargs: For traitlets: ``parent``, ``config``, ``log``.
    """

    name = "pooled"

    def __init__(self, pool: KernelPool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pool = pool
        pool.joined, pool.left, pool.vacate, pool.on_reply = (
            self._joined,
            self._left,
            self._vacate,
            self._take_reply,
        )
        # One slot of its kernel a session leaves to others: whoever comes need not wait for a call of it to end.
        at_once = min(pool.max_calls_per_session, max(pool.max_calls_per_kernel - 1, 1))
        self.queue = FairQueue(max_waiting=pool.max_queue_size, max_running_per_session=at_once)
        self._rooms: dict[str, _Room] = {}
        self._tasks = Tasks(self.log)
        self._collecting: asyncio.Task[None] | None = None
        self._suspected: set[PoolKernel] = set()
        self._opening = asyncio.Semaphore(MAX_OPENING)

    async def start(self) -> None:
        self._collecting = self._tasks.spawn(self._collect())
        await self.pool.start()

    async def stop(self) -> None:
        closed = errors.ServiceClosed("the session service is closing")
        for session_id in list(self._rooms):
            self.queue.cancel(session_id, closed)
        try:
            await self.pool.stop()
        finally:
            for room in list(self._rooms.values()):
                self._forget(room)
            running = self._tasks.running
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)

    async def open(self, record: SessionRecord, *, timeout: float) -> Place:
        async with self._opening:
            return await self._open(record, timeout)

    async def _open(self, record: SessionRecord, timeout: float) -> Place:
        deadline = asyncio.get_running_loop().time() + timeout
        args = {
            "session_id": record.session_id,
            "contents": record.contents.model_dump(mode="json"),
            "generation": record.generation,
            "created_at": record.created_at.isoformat(),
        }
        while True:
            member = await self.pool.pick(_left(deadline))
            member.sessions += 1  # counted at once: others that open now shall see it
            try:
                await member.kernel.connection.request(
                    "open_session", args, session_id=record.session_id, timeout=_left(deadline)
                )
                if not member.retiring and not member.kernel.ending:
                    room = _Room(record.session_id, record.generation, member)
                    self._rooms[record.session_id] = room
                    self.queue.bind(record.session_id, member.kernel_id)
                    return _place(room)
            except errors.KernelDied:
                raise PlaceGone(record.session_id) from None  # the service counts how often
            except errors.CommandTimeout as late:
                self._suspect(member)
                raise errors.KernelStartFailed(
                    f"session {record.session_id!r}: no kernel of the pool opened it within {timeout:g} s",
                    details={"session_id": record.session_id, "kernel_id": member.kernel_id},
                ) from late
            finally:
                if record.session_id not in self._rooms:
                    member.sessions -= 1
                    self._tasks.spawn(self._close_behind(record.session_id, member))

    async def call(self, session_id: str, call: Call) -> dict[str, Any]:
        room = self._rooms.get(session_id)
        if room is None:
            raise PlaceGone(session_id)
        if get_command(call.command).control:
            return await self._ask(room, call, call.timeout)
        deadline = asyncio.get_running_loop().time() + call.timeout
        if room.leaving:
            await self._until_gone(room, deadline)
        self._move_if_crowded(room)
        entered = asyncio.get_running_loop().time()
        try:
            turn = await self.queue.enter(
                session_id,
                room.member.kernel_id,
                timeout=self.pool.queue_timeout,
                deadline=deadline,
                request_id=call.request_id,
            )
        except Moved:
            await self._until_gone(room, deadline)
        finally:
            call.watch.waited(asyncio.get_running_loop().time() - entered)
        try:
            return await self._ask(room, call, _left(deadline))
        finally:
            turn.leave()

    async def close(self, session_id: str) -> None:
        room = self._rooms.get(session_id)
        if room is None:
            return
        room.leaving = True
        closed = errors.CommandCancelled(f"session {session_id!r} was closed during the call")
        self.queue.cancel(session_id, closed)
        try:
            told = await room.member.kernel.connection.request(
                "close_session", session_id=session_id, timeout=CLOSE_TIMEOUT
            )
            if told["spent"] is not None:
                self._tell(room, [told["spent"]])
        except errors.CommandTimeout:
            self._suspect(room.member)
        except (errors.KernelError, errors.ServiceClosed, errors.SessionNotReady):
            self.log.debug("session %s: its kernel was gone before it was closed", session_id)
        finally:
            self._forget(room)

    def withdraw(self, session_id: str, request_id: str) -> bool:
        return self.queue.withdraw(session_id, request_id)

    async def interrupt(self, session_id: str) -> None:
        room = self._rooms.get(session_id)
        if room is not None:
            await room.member.kernel.connection.request("interrupt", session_id=session_id)

    def get_place(self, session_id: str) -> Place | None:
        room = self._rooms.get(session_id)
        return _place(room) if room is not None else None

    def figures(self) -> dict[str, Any]:
        return {**self.pool.figures(), "waiting": self.queue.waiting, "queue_wait_s": self.queue.waits()}

    async def _ask(self, room: _Room, call: Call, timeout: float) -> dict[str, Any]:
        connection = room.member.kernel.connection
        call.watch.asked(room.member.kernel_id)
        try:
            return await connection.request(
                call.command,
                call.args,
                session_id=room.session_id,
                timeout=timeout,
                request_id=call.request_id,
                stream=call.stream,
                on_event=call.on_event,
            )
        except errors.SessionNotReady:
            # The kernel does not have it: nothing ran, and the store does have it.
            self._leave(room, "its kernel does not hold it")
            raise PlaceGone(room.session_id) from None
        except (errors.CommandTimeout, errors.CommandCancelled, errors.CommandInterrupted, asyncio.CancelledError):
            self._suspect(room.member)
            raise

    def _move_if_crowded(self, room: _Room) -> None:
        """Send an idle session elsewhere where its kernel has far more sessions than another.

        Raises:
            PlaceGone: It was sent.
        """
        if self.queue.running_of(room.session_id) or self.queue.waiting_of(room.session_id):
            return
        fewest = min((member.sessions for member in self.pool.serving), default=room.member.sessions)
        if room.member.sessions <= CROWDED_RATIO * fewest + CROWDED_BY:
            return
        self._leave(room, "it moved to a kernel with fewer sessions")
        self._tasks.spawn(self._close_behind(room.session_id, room.member))
        raise PlaceGone(room.session_id)

    async def _close_behind(self, session_id: str, member: PoolKernel) -> None:
        """Drop the namespace that a session has left, or did not come to use; its replies have told all there was.

        Sent before the session can be opened there again: the connection keeps the order.
        """
        try:
            await member.kernel.connection.request("close_session", session_id=session_id, timeout=CLOSE_TIMEOUT)
        except errors.DSPexError as failure:
            self.log.debug("session %s: the kernel it left did not drop it: %s", session_id, failure)

    async def _until_gone(self, room: _Room, deadline: float) -> NoReturn:
        """Wait until a session that leaves its kernel has left, or a call's time is over.

        Raises:
            PlaceGone: In any case: who carries the call asks anew, or tells that its time is over.
        """
        if self._rooms.get(room.session_id) is room:
            room.gone = room.gone or asyncio.Event()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await room.gone.wait()
        raise PlaceGone(room.session_id)

    def _joined(self, member: PoolKernel) -> None:
        """Called by the pool."""
        self.queue.add_kernel(member.kernel_id, self.pool.max_calls_per_kernel)

    def _left(self, member: PoolKernel, how: str) -> None:
        """Called by the pool: the kernel's process is gone, and its calls have been answered."""
        for room in self._rooms_of(member):
            self._leave(room, f"its kernel {how}")
        self.queue.remove_kernel(member.kernel_id)

    async def _vacate(self, member: PoolKernel, within: float | None) -> None:
        """Called by the pool: let what runs end, and every session go."""
        self.queue.close_kernel(member.kernel_id)
        for room in self._rooms_of(member):
            room.leaving = True
        try:
            async with asyncio.timeout(within):
                await asyncio.gather(*(self._empty(room, member) for room in self._rooms_of(member)))
        except TimeoutError:
            self.log.warning("pool kernel %s is ended with calls running in it", member.kernel_id)
            # Before the sessions leave: an answer that came now would tell of changes that are not kept any more.
            member.kernel.connection.fail_all(lambda row: _ended(member, row))
        for room in self._rooms_of(member):
            self._leave(room, f"its kernel was ended: {member.retiring}")
        self.queue.remove_kernel(member.kernel_id)

    async def _empty(self, room: _Room, member: PoolKernel) -> None:
        await self.queue.idle(room.session_id)
        # Its replies have told all there was: the namespace goes with its kernel.
        self._leave(room, f"its kernel is retired: {member.retiring}")

    def _leave(self, room: _Room, why: str) -> None:
        """The session has left its kernel, unasked."""
        if self._rooms.get(room.session_id) is not room:
            return
        place = _place(room)
        self._forget(room)
        if self.lost is not None:
            self.lost(room.session_id, place, why)

    def _forget(self, room: _Room) -> None:
        if self._rooms.get(room.session_id) is room:
            del self._rooms[room.session_id]
            self.queue.unbind(room.session_id)
            room.member.sessions -= 1
        if room.gone is not None:
            room.gone.set()

    def _rooms_of(self, member: PoolKernel) -> list[_Room]:
        return [room for room in self._rooms.values() if room.member is member]

    def _take_reply(self, content: dict[str, Any]) -> None:
        """Called by the connections with every reply."""
        room = self._rooms.get(content.get("session_id") or "")
        if room is None or (content.get("kernel_id"), content.get("generation")) != (
            room.member.kernel_id,
            room.generation,
        ):
            return  # of a session that has left: what it may have changed was acknowledged to nobody
        room.member.answered += 1
        if changes := content.get("changes"):
            self._tell(room, changes)
        if self.replied is not None:
            self.replied(content)

    def _tell(self, room: _Room, changes: list[dict[str, Any]]) -> None:
        if self.changed is not None:
            self.changed(room.session_id, room.generation, changes)

    async def _collect(self) -> None:
        """Ask now and then what calls that still run have spent."""
        while True:
            await asyncio.sleep(COLLECT_INTERVAL)
            busy = [member for member in self.pool.members if self.queue.running_in(member.kernel_id)]
            await asyncio.gather(*(self._collect_from(member) for member in busy))

    async def _collect_from(self, member: PoolKernel) -> None:
        try:
            told = await member.kernel.connection.request("collect_spent", timeout=COLLECT_INTERVAL * 4)
        except errors.DSPexError as failure:
            self.log.debug("pool kernel %s did not tell what was spent: %s", member.kernel_id, failure)
            return
        for session_id, spent in told["spent"].items():
            room = self._rooms.get(session_id)
            if room is not None and room.member is member:
                self._tell(room, [spent])

    def _suspect(self, member: PoolKernel) -> None:
        """Have a kernel looked at in which a call was ended: its program may go on."""
        if member not in self._suspected and not member.retiring:
            self._suspected.add(member)
            self._tasks.spawn(self._look_at(member))

    async def _look_at(self, member: PoolKernel) -> None:
        try:
            await asyncio.sleep(SUSPICION_AFTER)
        finally:
            self._suspected.discard(member)
        await self.pool.suspect(member)


def _ended(member: PoolKernel, row: Command | None) -> errors.KernelDied:
    command = row.name if row is not None else "kernel_info"
    return errors.KernelDied(
        f"pool kernel {member.kernel_id} was ended ({member.retiring}) during {command}; programs are kept: the "
        "next call goes to another",
        retryable=row is not None and row.repeatable,
        details={"kernel_id": member.kernel_id},
    )


def _place(room: _Room) -> Place:
    return Place(room.member.kernel_id, room.member.kernel.pid, room.generation)


def _left(deadline: float) -> float:
    """Seconds until then, never none: 0 would be no deadline."""
    return max(deadline - asyncio.get_running_loop().time(), 0.001)
