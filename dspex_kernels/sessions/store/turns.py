"""The store's thread: reads one after the other, waiting writes together in one transaction.

A commit waits for the disk (an fsync), whatever it carries. So a write takes along those that came in behind it
while the thread was busy: alone it costs one commit, and two hundred at once cost one as well. Each runs in a
savepoint of its own, so one that fails is undone alone; nobody is told before the commit. What ends the whole
transaction (a full disk, a lost connection, a commit that fails) is told to all that were in it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
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
        self._waiting = 0  # read and changed on the event loop only
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
        await self._result(last)

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

        def submit(thread: ThreadPoolExecutor) -> Future[T]:
            write = _Write(work)
            self._writes.append(write)
            thread.submit(self._write_group)  # finds nothing left to do when an earlier turn took the write along
            return write.answer

        return await self._take_turn(submit)

    async def run(self, work: Callable[[], T]) -> T:
        """Do work on the thread, in the order asked."""
        return await self._take_turn(lambda thread: thread.submit(work))

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

    async def _take_turn(self, submit: Callable[[ThreadPoolExecutor], Future[T]]) -> T:
        thread = self.check_open()
        if self._waiting >= MAX_WAITING:
            raise errors.StoreError(
                f"the store {self._database.url!r} has {self._waiting:,} calls waiting, its limit: ask again later",
                retry_after=1.0,
            )
        self._waiting += 1
        try:
            return await self._result(submit(thread))
        finally:
            self._waiting -= 1

    async def _result(self, future: Future[T]) -> T:
        try:
            # Cancelled or late, a call that has begun still ends as a whole; one that has not is dropped.
            return await asyncio.wait_for(asyncio.wrap_future(future), CALL_TIMEOUT)
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
