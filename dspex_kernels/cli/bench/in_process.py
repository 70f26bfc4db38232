"""DSPy called in a process of its own, without any transport: what a round trip is measured against.

Not in this process: the LM gate would get into its DSPy, and DSPy into everything that is started from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import orjson

from dspex_kernels import errors

Side = Literal["dspy", "execute", "pooled"]
"""``dspy.Predict`` alone; ``execute_program`` of a dedicated kernel; of a pooled one."""

DSPY = "dspy in process"
EXECUTE = "execute in process"
MAX_ANSWER = 64 * 1024 * 1024

NOTE = (
    f"{DSPY}: `await dspy.Predict(…).acall(…)` in a loop of its own, the same LM, adapter, callbacks, history and "
    f"usage. {EXECUTE}: the kernel's own execute_program in its namespace, with gate, ledger and journal, on its "
    "command loop; only the transport is missing. Both call in a tight loop, which keeps the processor's caches "
    "warm: that favours them."
)


class InProcess:
    """A process in which one side is measured.

    Args:
        process: Runs ``baseline``.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def one_by_one(self, count: int) -> list[float]:
        """Seconds of each of so many calls, one after another."""
        samples = await self._ask({"count": count})
        assert isinstance(samples, list)
        return samples

    async def per_second(self, *, concurrency: int, seconds: float) -> float:
        """Calls per second, so many side by side."""
        return float(await self._ask({"concurrency": concurrency, "seconds": seconds}))

    async def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(orjson.dumps(question) + b"\n")
        line = await self._process.stdout.readline()
        if not line:
            raise errors.ProgramFailed("the calls in process failed: their process ended, see its error above")
        return orjson.loads(line)


@contextlib.asynccontextmanager
async def in_process(side: Side, directory: Path, *, latency_s: float = 0.0) -> AsyncIterator[InProcess]:
    """A process for one side, ready to be asked.

    Args:
        side: Which.
        directory: Where it may keep a journal.
        latency_s: What the offline LM waits before it answers.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dspex_kernels.cli.bench.baseline", side, str(directory), str(latency_s)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=MAX_ANSWER,
    )
    assert process.stdin is not None
    try:
        yield InProcess(process)
        process.stdin.close()
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
