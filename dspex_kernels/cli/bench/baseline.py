"""``python -m dspex_kernels.cli.bench.baseline SIDE DIRECTORY LATENCY``: measures one side in this process.

Takes a question a line on stdin, as JSON, and answers it with a line on stdout. Started by ``in_process``.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dspy
import orjson

from dspex_kernels import errors
from dspex_kernels.cli.bench import clock
from dspex_kernels.cli.bench.ways import EXECUTE, INPUTS, LM, PROGRAM_ID, SIGNATURE
from dspex_kernels.config import LMPolicy
from dspex_kernels.kernel.dispatch import Ask, CommandThread, Dispatcher, Identity
from dspex_kernels.kernel.journal import Journal
from dspex_kernels.kernel.lms import cache, gate, history
from dspex_kernels.kernel.namespaces import Namespace
from dspex_kernels.kernel.offline.engines import offline_engines
from dspex_kernels.kernel.shelf import Shelf
from dspex_kernels.kernel.threads import MAX_THREADS_ALONE, Threads
from dspex_kernels.protocol.commands import OpenSessionArgs
from dspex_kernels.protocol.records import OfflineOptions

SESSION_ID = "bench"

Call = Callable[[], Awaitable[object]]


def dspy_alone(latency_s: float) -> tuple[asyncio.AbstractEventLoop, Call, Callable[[], None]]:
    """``dspy.Predict`` as a program calls it that has no sessions. Its loop, the call, and how to end."""
    engine, async_engine = offline_engines(OfflineOptions(latency_s=latency_s), SESSION_ID)
    lm = dspy.LM(LM["model"], engine=engine, async_engine=async_engine, cache=False, num_retries=0)
    predict = dspy.Predict(SIGNATURE)

    async def call() -> object:
        with dspy.context(lm=lm, track_usage=True):
            prediction = await predict.acall(**INPUTS)
        return prediction.answer, prediction.get_lm_usage()

    loop = asyncio.new_event_loop()
    # As the command loop has it: DSPy hops through it.
    loop.set_default_executor(ThreadPoolExecutor(64))
    return loop, call, lambda: None


class Kernelless:
    """What a kernel has behind its channels: dispatcher, namespace, gate, history, cache.

    Args:
        directory: For the journal.
        is_pooled: Whether the namespace shares its process, and leaves its changes to its service.
    """

    def __init__(self, directory: Path, *, is_pooled: bool) -> None:
        self._directory = directory
        self._threads, self._shelf = Threads(), Shelf()
        self._journals = ThreadPoolExecutor(1)
        self._numbers = itertools.count()
        thread = CommandThread()
        self._dispatcher = Dispatcher(
            Identity("bench", None if is_pooled else SESSION_ID, allow_code=not is_pooled),
            open_namespace=self._open,
            thread=thread,
            threads=self._threads,
            heartbeat_interval=10.0,
        )
        self.loop = thread.loop
        gate.install(thread.loop, LMPolicy())
        history.install()
        cache.install()
        dspy.configure()
        self._dispatcher.start()

    def _open(self, session_id: str, opened: OpenSessionArgs | None) -> Namespace:
        own: dict[str, Any]
        if opened is not None:
            own = {"lane": self._threads.lane(), "contents": opened.contents, "shares_process": True}
        else:
            journal, contents = Journal.open(self._directory)
            own = {"lane": self._threads.lane(MAX_THREADS_ALONE), "contents": contents, "journal": journal}
        return Namespace(session_id, shelf=self._shelf, policy=LMPolicy(), executor=self._journals, **own)

    async def command(self, name: str, args: dict[str, Any]) -> dict[str, Any]:
        """One command, on the command loop, as if its message had just been read there."""
        answered: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        request = {"session_id": SESSION_ID, "command": name, "args": args}
        self._dispatcher.submit(Ask(request, message_id=str(next(self._numbers)), reply=answered.set_result))
        reply = await answered
        if reply["status"] != "ok":
            raise errors.ProgramFailed(f"{name} failed: {reply['error']}")
        return reply

    async def execute(self) -> object:
        """The call that is measured."""
        return await self.command("execute_program", EXECUTE)

    def close(self) -> None:
        self._dispatcher.close(errors.KernelDied("the benchmark is over"))
        self._journals.shutdown()


def without_transport(
    directory: Path, latency_s: float, *, is_pooled: bool
) -> tuple[asyncio.AbstractEventLoop, Call, Callable[[], None]]:
    """``execute_program`` as a kernel runs it."""
    kernelless = Kernelless(directory, is_pooled=is_pooled)

    async def prepare() -> None:
        if is_pooled:
            opened = {"session_id": SESSION_ID, "contents": {}, "generation": 1, "created_at": _now()}
            await kernelless.command("open_session", opened)
        await kernelless.command("configure", {"lm": LM | {"offline": {"latency_s": latency_s}}})
        await kernelless.command("create_program", {"program_id": PROGRAM_ID, "signature": SIGNATURE})

    asyncio.run_coroutine_threadsafe(prepare(), kernelless.loop).result()
    return kernelless.loop, kernelless.execute, kernelless.close


async def measure(call: Call, question: dict[str, Any]) -> Any:
    """The answer to one question."""
    if "count" in question:
        return await clock.one_by_one(call, question["count"])
    return await clock.per_second(call, concurrency=question["concurrency"], seconds=question["seconds"])


def main(side: str, directory: str, latency: str) -> None:
    """Answer questions until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    with tempfile.TemporaryDirectory(dir=directory) as own:
        if side == "dspy":
            loop, call, close = dspy_alone(float(latency))
            run: Callable[[Any], Any] = loop.run_until_complete
        else:
            loop, call, close = without_transport(Path(own), float(latency), is_pooled=side == "pooled")

            def run(work: Any) -> Any:
                return asyncio.run_coroutine_threadsafe(work, loop).result()

        for line in sys.stdin.buffer:
            answers.write(orjson.dumps(run(measure(call, orjson.loads(line)))) + b"\n")
            answers.flush()
        close()


def _now() -> str:
    return datetime.now(UTC).isoformat()


if __name__ == "__main__":
    main(*sys.argv[1:])
