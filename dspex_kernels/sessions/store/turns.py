"""The store's thread: reads one after the other, waiting writes together in one transaction.

A commit waits for the disk (an fsync), whatever it carries. So a write takes along those that came in behind it
while the thread was busy: alone it costs one commit, and two hundred at once cost one as well. Of several, each
runs in a savepoint of its own, so one that fails is undone alone; nobody is told before the commit. What ends the
whole transaction (a full disk, a lost connection, a commit that fails) is told to all that were in it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from dspex_kernels import errors
from dspex_kernels.sessions.store.database import Database

CALL_TIMEOUT: Final = 30.0
"""Seconds that a caller waits for the store, its turn included."""
MAX_WAITING: Final = 10_000
"""Calls that may wait for the store's thread; more are refused."""
MAX_GROUP: Final = 256
"""Writes of one transaction."""
MAX_GROUP_TIME: Final = 0.1
"""Seconds after which a transaction takes no further write: other processes wait for its end."""

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Write:
    """A change that waits for its transaction, and then for that transaction's end."""

    work: Callable[[sa.Connection], Any]
    answer: Future[Any] = field(default_factory=Future)
    outcome: Any = None
    failure: Exception | None = None


class Turns:
    """Gives calls their turn on the one thread that speaks to the database, so that the loop never waits for it.

    Args:
        database: Opened and closed here.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._thread: ThreadPoolExecutor | None = None
        # Turns that were asked for, by the loop, and those that have come, by the thread. Callers that gave up are
        # among the first: what they asked for is in memory until its turn comes.
        self._asked = 0
        self._come = 0
        self._writes: deque[_Write] = deque()  # the loop appends, the thread takes: each step is atomic

    async def open(self) -> None:
        """Start the thread and open the database."""
        if self._thread is not None:
            raise errors.StoreError(f"the store {self._database.url!r} is open already")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dspex-store")
        try:
            await self.run(self._database.open)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End the thread and close the database, after what was asked before."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        last = thread.submit(self._database.close)
        thread.shutdown(wait=False)
        # Shielded: dropped before its turn, it would leave the database open for good.
        await self._answered(asyncio.shield(asyncio.wrap_future(last)))

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Do work that changes nothing, in a transaction of its own."""

        def read() -> T:
            with self._database.told(), self._database.transaction(writes=False) as connection:
                return work(connection)

        return await self.run(read)

    async def write(self, work: Callable[[sa.Connection], T]) -> T:
        """Do work that changes something, as a whole or not at all; it is durable on return.

        It runs in the order asked among the writes, and no later than its turn among all calls.
        """
        thread = self._check_room()
        write = _Write(work)
        self._writes.append(write)
        self._take_turn(thread, self._write_group)  # it finds nothing where an earlier turn took the write along
        return await self._answered(asyncio.wrap_future(write.answer))

    async def run(self, work: Callable[[], T]) -> T:
        """Do work on the thread, in the order asked."""
        thread = self._check_room()
        answer: Future[T] = Future()

        def run() -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(work())
                except Exception as failure:  # noqa: BLE001  # of whatever kind, it is what the caller is told
                    answer.set_exception(failure)

        self._take_turn(thread, run)
        return await self._answered(asyncio.wrap_future(answer))

    def check_open(self) -> ThreadPoolExecutor:
        """The thread.

        Raises:
            StoreError: It is not there: before ``open``, or after ``close``.
        """
        if self._thread is None:
            raise errors.StoreError(
                f"the store {self._database.url!r} is not open: call open() first, and not after close()"
            )
        return self._thread

    def _check_room(self) -> ThreadPoolExecutor:
        """The thread, if one more call may wait for it."""
        thread = self.check_open()
        waiting = self._asked - self._come
        if waiting >= MAX_WAITING:
            raise errors.StoreError(
                f"the store {self._database.url!r} has {waiting:,} calls waiting, its limit: ask again later",
                retry_after=1.0,
            )
        return thread

    def _take_turn(self, thread: ThreadPoolExecutor, work: Callable[[], None]) -> None:
        def turn() -> None:
            self._come += 1
            work()

        self._asked += 1
        thread.submit(turn)

    async def _answered(self, answer: Awaitable[T]) -> T:
        try:
            # Cancelled or late, a call that has begun still ends as a whole; one that has not is dropped.
            async with asyncio.timeout(CALL_TIMEOUT):
                return await answer
        except TimeoutError:
            raise errors.StoreError(
                f"the store {self._database.url!r} did not answer within {CALL_TIMEOUT:g} s; the change may still "
                "be made: look before asking again"
            ) from None  # the cause says nothing more

    def _write_group(self) -> None:
        """Run the writes that wait in one transaction. One for each write is asked for, so none is left behind."""
        group = deque(self._writes.popleft() for _ in range(min(len(self._writes), MAX_GROUP)))
        if not group:
            return
        begun: list[_Write] = []
        try:
            with self._database.transaction(writes=True) as connection:
                late = time.monotonic() + MAX_GROUP_TIME
                while group and (not begun or time.monotonic() < late):
                    if _begin(write := group.popleft()):
                        begun.append(write)
                        if len(begun) == 1 and not group:  # alone: the transaction is its savepoint
                            write.outcome = write.work(connection)
                        else:
                            _run_in_savepoint(connection, write)
        except Exception as failure:  # noqa: BLE001  # of whatever kind, it is what each of them is told
            if not begun:  # there was no transaction: they have all waited for it
                begun = [write for write in group if _begin(write)]
                group.clear()
            for write in begun:
                write.failure = failure
        self._writes.extendleft(reversed(group))
        for write in begun:
            if write.failure is None:
                write.answer.set_result(write.outcome)
            else:
                write.answer.set_exception(self._database.translated(write.failure))


def _begin(write: _Write) -> bool:
    """Whether the write's caller is still there; from now on it cannot be dropped."""
    return write.answer.set_running_or_notify_cancel()


def _run_in_savepoint(connection: sa.Connection, write: _Write) -> None:
    savepoint = connection.begin_nested()
    try:
        write.outcome = write.work(connection)
        savepoint.commit()
    except Exception as failure:  # of whatever kind, it is what the caller is told
        write.failure = failure
        try:
            savepoint.rollback()
        except SQLAlchemyError as lost:
            # A full disk, perhaps, ended the whole transaction: the first failure says why.
            raise failure if isinstance(failure, SQLAlchemyError) else lost from None
        if connection.invalidated:  # it was lost, and the whole transaction with it
            raise
