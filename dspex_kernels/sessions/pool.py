"""The kernel pool: keeps a number of kernels warm, replaces those that die, recycles those that are old or fat.

A pool has ``size`` slots. Each slot keeps one kernel: it is started, serves, and when it dies or is retired the
slot starts the next one. A slot whose kernels die over and over before they have answered a call waits longer
each time, and at last leaves the pool, which ``figures`` tells. A retired kernel takes no new sessions; it is
emptied (``vacate``) beside its successor, and ended when nothing runs in it any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traitlets import Bool, Enum, Float, Integer
from traitlets.config import LoggingConfigurable

from dspex_kernels import config, errors
from dspex_kernels.sessions.calls import ReplyListener
from dspex_kernels.sessions.happenings import KernelRecycled, Listeners, RecycleReason
from dspex_kernels.sessions.kernels import Kernel, Kernels
from dspex_kernels.sessions.tasks import Tasks

BESIDE_CALLS = 500
"""Requests that may wait on a kernel beside the calls that have their turn: sessions that are opened and closed."""
FIRST_PAUSE = 0.2
"""Seconds before a slot starts again after one kernel that died at once; doubled for each further one."""
RETRY_PAUSE = 300.0
"""Seconds after which a slot that has left the pool is tried again: the cause may be gone."""
LONGEST_PAUSE = 30.0
"""Seconds that a slot waits at most between two starts."""


@dataclass(eq=False, slots=True)
class PoolKernel:
    """A kernel of the pool while it is in a slot or being emptied."""

    kernel: Kernel
    slot: int
    retiring: str = ""
    """Why it takes no new sessions; "" while it serves."""
    sessions: int = 0
    """How many live in it; the backend counts them."""
    answered: int = 0
    """Commands it has answered; the backend counts them."""

    @property
    def kernel_id(self) -> str:
        return self.kernel.kernel_id


@dataclass(eq=False, slots=True)
class _Slot:
    number: int
    serving: PoolKernel | None = None
    task: asyncio.Task[None] | None = None
    """Starts its next kernel."""
    quick_deaths: int = 0
    """Kernels in a row that died before they answered a call."""
    failed: str = ""
    """Why it has left the pool; "" while it is in."""
    failed_at: float = 0.0
    """When that was, on the loop's clock."""
    final: bool = False
    """It left because kernels are not to be replaced (``restart_strategy``)."""


class KernelPool(LoggingConfigurable):
    """Kernels that pooled sessions share.

    Args:
        kernels: Where they are started.
        log_dir: Where their logs go, a file for each slot.
        start_timeout: Seconds in which a started kernel must answer.
        listeners: Are told of kernels that are recycled; None is nobody.
        **kwargs: For traitlets: ``parent``, ``config``, ``log``.
    """

    size = Integer(10, min=1, help="Kernels in the pool.").tag(config=True)
    prestart = Bool(False, help="Start them with the service, not when the pool is first used.").tag(config=True)
    max_queue_size = Integer(1000, min=1, help="Calls that may wait for their turn; more are refused at once.").tag(
        config=True
    )
    queue_timeout = Float(30.0, min=0.001, help="Seconds that a call waits for its turn at most.").tag(config=True)
    max_calls_per_kernel = Integer(256, min=1, help="Calls that run side by side in one kernel.").tag(config=True)
    max_calls_per_session = Integer(
        16,
        min=1,
        help="Calls of one session that run side by side; one slot of its kernel is left to others in any case.",
    ).tag(config=True)
    restart_strategy = Enum(
        ["permanent", "transient", "temporary"],
        "permanent",
        help='Which kernels are replaced when they end: "permanent" all, "transient" those that did not exit with '
        'code 0, "temporary" none.',
    ).tag(config=True)
    max_restarts = Integer(
        5,
        min=0,
        help="Kernels in a row that may die in a slot before they answered a call; then it leaves the pool.",
    ).tag(config=True)
    max_age = Float(0.0, min=0, help="Seconds after which a kernel is recycled; 0 is never.").tag(config=True)
    max_calls = Integer(0, min=0, help="Calls after which a kernel is recycled; 0 is never.").tag(config=True)
    max_memory = Integer(
        0, min=0, help="Bytes of resident memory over which a kernel is recycled; 0 is never."
    ).tag(config=True)
    look_interval = Float(5.0, min=0.05, help="Seconds between two looks at each kernel.").tag(config=True)
    drain_timeout = Float(
        30.0, min=0, help="Seconds in which the neighbours of a program that will not end may finish their calls."
    ).tag(config=True)

    left: Callable[[PoolKernel, str], None]
    """Called when a kernel's process has ended, with one line how. Set by the backend; it must not raise."""
    vacate: Callable[[PoolKernel, float | None], Awaitable[None]]
    """Empties a retired kernel: waits for its calls (seconds at most, None is as long as they may run) and sends
    its sessions elsewhere. Set by the backend."""
    joined: Callable[[PoolKernel], None]
    """Called when a kernel begins to serve. Set by the backend; it must not raise."""
    on_reply: ReplyListener | None = None
    """As ``KernelConnection`` takes it. Set by the backend."""

    def __init__(
        self,
        kernels: Kernels,
        log_dir: Path,
        *,
        start_timeout: float,
        listeners: Listeners | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._start_timeout = start_timeout
        self._listeners = listeners or Listeners(self.log)
        self._kernels = kernels
        self._log_dir = log_dir
        self._tasks = Tasks(self.log)
        self._slots: list[_Slot] = []
        self._retiring: set[PoolKernel] = set()
        self._change = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._closed = False
        self._last_failure: errors.DSPexError | None = None
        self.deaths = 0
        """Kernels that ended unasked."""
        self.restarts = 0
        """Kernels that took a dead or retired one's place."""
        self.recycled = 0
        """Kernels that were retired."""

    async def start(self) -> None:
        """Make ready; kernels start when they are first wanted, or now (``prestart``)."""
        if self.prestart:
            self._fill()

    async def stop(self) -> None:
        """End every kernel."""
        self._closed = True
        self._signal()
        starting = [slot.task for slot in self._slots if slot.task is not None]
        for task in (*starting, *([self._looking] if self._looking is not None else [])):
            task.cancel()
        if starting:
            await asyncio.wait(starting)
        closed = errors.ServiceClosed("the session service is closing")
        ending = [*self._retiring, *(slot.serving for slot in self._slots if slot.serving is not None)]
        await asyncio.gather(*(self._kernels.end(member.kernel, closed) for member in ending))
        if running := self._tasks.running:
            for task in running:
                task.cancel()
            await asyncio.wait(running)

    @property
    def serving(self) -> list[PoolKernel]:
        """The kernels that take sessions."""
        return [slot.serving for slot in self._slots if slot.serving is not None]

    @property
    def members(self) -> list[PoolKernel]:
        """All kernels that live, those that are being emptied too."""
        return [*self.serving, *self._retiring]

    async def pick(self, timeout: float) -> PoolKernel:
        """The kernel with the fewest sessions; waits while all are starting.

        Raises:
            KernelStartFailed: There is none, and none comes within ``timeout`` seconds.
        """
        self._fill()
        try:
            async with asyncio.timeout(timeout):
                while not self.serving:
                    self._check_coming()
                    self._change.clear()
                    await self._change.wait()
        except TimeoutError:
            because = f"; the last one failed: {self._last_failure.message}" if self._last_failure else ""
            raise errors.KernelStartFailed(
                f"no kernel of the pool answered within {timeout:g} s{because}", details={"size": self.size}
            ) from None  # the TimeoutError tells nothing more
        return min(self.serving, key=lambda member: member.sessions)

    async def resize(self, size: int) -> None:
        """Change the number of kernels while the pool runs; those that are too many are emptied and ended.

        Raises:
            InvalidArguments: ``size`` is below 1.
        """
        if size < 1:
            raise errors.InvalidArguments(f"a pool of {size} kernels cannot serve: give at least 1")
        self.size = size
        if not self._slots:  # not used yet
            return
        for slot in self._slots[size:]:
            if slot.task is not None:
                slot.task.cancel()
            if slot.serving is not None:
                self._retire(slot.serving, "the pool was made smaller", None, "resize")
        del self._slots[size:]
        for slot in self._slots:
            slot.failed, slot.final, slot.quick_deaths = "", False, 0
        self._fill()

    def retire(self, member: PoolKernel, why: str, within: float | None, *, reason: RecycleReason = "sick") -> None:
        """Let a kernel take no new sessions, start its successor, end it when it is empty.

        Args:
            member: Which; a second time nothing happens.
            why: One line, for logs and health.
            reason: The same in one word, for metrics.
            within: Seconds that its calls have left; None is as long as they may run.
        """
        if member.retiring or self._closed:
            return
        self._retire(member, why, within, reason)
        self._fill()

    async def suspect(self, member: PoolKernel) -> None:
        """Look at a kernel in which a call did not end as it should; retire it if a program there will not end."""
        why = await self._kernels.why_sick(member.kernel)
        if why and not member.kernel.ending:
            self.log.warning("pool kernel %s is retired: %s", member.kernel_id, why)
            self.retire(member, why, 0.0 if _is_hung(why) else self.drain_timeout)

    def figures(self) -> dict[str, Any]:
        """Numbers of kernels (``available`` ones serve), ``failed`` slots with why, bytes of memory."""
        return {
            "size": self.size,
            "available": len(self.serving),
            "starting": sum(slot.task is not None for slot in self._slots),
            "retiring": len(self._retiring),
            "failed": {str(slot.number): slot.failed for slot in self._slots if slot.failed},
            "deaths": self.deaths,
            "restarts": self.restarts,
            "recycled": self.recycled,
            "memory_bytes": sum(member.kernel.memory_bytes for member in self.members),
        }

    def _fill(self) -> None:
        """Start what is missing."""
        if self._closed:
            return
        if self._looking is None:
            self._looking = self._tasks.spawn(self._look())
        while len(self._slots) < self.size:
            self._slots.append(_Slot(len(self._slots)))
        self._try_again()
        for slot in self._slots:
            if slot.serving is None and slot.task is None and not slot.failed:
                slot.task = self._tasks.spawn(self._start(slot))

    def _try_again(self) -> None:
        """Let slots that had left the pool have one more kernel: one if there is none, each after a while."""
        now = asyncio.get_running_loop().time()
        lost = [slot for slot in self._slots if slot.failed and not slot.final]
        due = [slot for slot in lost if now - slot.failed_at >= RETRY_PAUSE]
        for slot in due or (lost[:1] if all(slot.failed for slot in self._slots) else []):
            slot.failed = ""

    async def _start(self, slot: _Slot) -> None:
        """Give a slot its next kernel. Runs as ``slot.task``."""
        try:
            if slot.quick_deaths:
                await asyncio.sleep(min(FIRST_PAUSE * 2 ** (slot.quick_deaths - 1), LONGEST_PAUSE))
            kernel = await self._kernels.start_kernel(
                whose="the pool",
                backend="pooled",
                env={config.ENV_BACKEND: "pooled", config.ENV_LEAN: "1"},
                log_path=self._log_dir / f"pool-{slot.number}.log",
                timeout=self._start_timeout,
                died=self._died,
                on_reply=self.on_reply,
                max_pending=self.max_calls_per_kernel + BESIDE_CALLS,
            )
            slot.serving = PoolKernel(kernel, slot.number)
            self._last_failure = None
            self.joined(slot.serving)
        except errors.DSPexError as failure:
            self._last_failure = failure
            self.log.warning("pool slot %d: %s", slot.number, failure.message)
            self._count_quick_death(slot, failure.message)
        finally:
            slot.task = None
            self._signal()
        if slot.serving is None and slot in self._slots:
            self._fill_slot(slot)

    def _fill_slot(self, slot: _Slot) -> None:
        if not self._closed and not slot.failed and slot.task is None:
            slot.task = self._tasks.spawn(self._start(slot))

    def _died(self, kernel: Kernel, how: str) -> None:
        """A kernel's process ended unasked."""
        self.deaths += 1
        for member in self.members:
            if member.kernel is kernel:
                self._lose(member, how)
                return

    def _lose(self, member: PoolKernel, how: str) -> None:
        slot = next((slot for slot in self._slots if slot.serving is member), None)
        self._retiring.discard(member)
        if slot is not None:
            slot.serving = None
            if member.answered:
                slot.quick_deaths = 0
            else:
                self._count_quick_death(slot, f"its kernels die at once: the last one {how}")
            if self.restart_strategy == "temporary" or (self.restart_strategy == "transient" and _was_clean(how)):
                slot.failed = f"its kernel {how}, and KernelPool.restart_strategy is {self.restart_strategy!r}"
                slot.final = True
            self.restarts += not slot.failed
            self._fill_slot(slot)
        self.left(member, how)
        self._signal()

    def _count_quick_death(self, slot: _Slot, why: str) -> None:
        slot.quick_deaths += 1
        if slot.quick_deaths > self.max_restarts:
            slot.failed, slot.failed_at = why, asyncio.get_running_loop().time()
            self.log.error("pool slot %d leaves the pool: %s", slot.number, why)

    def _retire(self, member: PoolKernel, why: str, within: float | None, reason: RecycleReason) -> None:
        member.retiring = why
        self.recycled += 1
        self._listeners.tell(KernelRecycled(backend="pooled", kernel_id=member.kernel_id, reason=reason))
        self._retiring.add(member)
        for slot in self._slots:
            if slot.serving is member:
                slot.serving = None
                self.restarts += 1
        self._tasks.spawn(self._empty(member, within))

    async def _empty(self, member: PoolKernel, within: float | None) -> None:
        await self.vacate(member, within)
        self._retiring.discard(member)
        if not member.kernel.ending:
            gone = errors.KernelDied(f"kernel {member.kernel_id} was ended: {member.retiring}")
            await self._kernels.end(member.kernel, gone, now=within is not None)

    def _check_coming(self) -> None:
        if self._closed:
            raise errors.ServiceClosed("the session service is closing")
        if all(slot.failed for slot in self._slots):
            raise errors.KernelStartFailed(
                f"the pool has no kernel left: {self._slots[0].failed}; see health_check() and the logs in "
                f"{self._log_dir}, then call again or resize the pool",
                details={"size": self.size},
            ) from self._last_failure

    async def _look(self) -> None:
        """Look at each kernel now and then, and recycle those that are due."""
        while True:
            await asyncio.sleep(self.look_interval)
            await asyncio.gather(*(self._look_at(member) for member in self.members))

    async def _look_at(self, member: PoolKernel) -> None:
        why = await self._kernels.why_sick(member.kernel)
        if member.retiring:
            if why and _is_hung(why) and not member.kernel.ending:
                # It was retired for another reason, or before that was known: nothing that runs there will end.
                self.log.warning("pool kernel %s is killed: %s", member.kernel_id, why)
                await self._kernels.kill(member.kernel)
            return
        if why:
            await self.suspect(member)
            return
        age = asyncio.get_running_loop().time() - member.kernel.started_at
        due = self._why_recycle(age, member.answered, member.kernel.memory_bytes)
        if due is not None and not self._retiring:  # one after another, so that the pool keeps its strength
            reason, why = due
            self.log.info("pool kernel %s is recycled: %s", member.kernel_id, why)
            self.retire(member, why, None, reason=reason)

    def _why_recycle(self, age: float, answered: int, memory_bytes: int) -> tuple[RecycleReason, str] | None:
        """What of its limits a kernel has reached, in a word and in a line; None where none."""
        if self.max_age and age >= self.max_age:
            return "age", f"it is {age:.0f} s old (KernelPool.max_age {self.max_age:g})"
        if self.max_calls and answered >= self.max_calls:
            return "calls", f"it has answered {answered} calls (KernelPool.max_calls {self.max_calls})"
        if self.max_memory and memory_bytes >= self.max_memory:
            return "memory", f"it uses {memory_bytes:,} bytes (KernelPool.max_memory {self.max_memory:,})"
        return None

    def _signal(self) -> None:
        """Wake whoever waits for a kernel."""
        self._change.set()


def _is_hung(why: str) -> bool:
    """Whether a kernel is sick as a whole, and not one program of it."""
    return not why.startswith("a program")


def _was_clean(how: str) -> bool:
    return how.endswith("with code 0")
