"""Jupyter's own kernel with DSPy in it: what there is without us."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

from dspex_kernels import errors
from dspex_kernels.cli.bench.machine import IRI_PACKAGE

ANSWER_TIMEOUT = 300.0
"""Seconds for one answer of a kernel that has a machine full of others beside it."""

WITHOUT_IRI = f"import sys\nsys.modules[{IRI_PACKAGE!r}] = None\n"
"""Goes before the import where jupyter_server's dependencies would slow it down."""

FIRST_PREDICTION = """
import dspy
from dspy.utils import DummyLM
dspy.configure(lm=DummyLM([{"answer": "because"}]))
answer = dspy.Predict("question -> answer")(question="Why?").answer
"""
"""All that a user of a stock kernel has to do, with an LM of DSPy's own that answers at once."""

SAME_CALLS = """
import dspy
from dspex_kernels.kernel.offline.engines import offline_engines
from dspex_kernels.protocol.records import OfflineOptions
engine, async_engine = offline_engines(OfflineOptions(), "bench")
lm = dspy.LM("offline/echo", engine=engine, async_engine=async_engine, cache=False, num_retries=0)
dspy.configure(lm=lm, track_usage=True)
qa = dspy.Predict("question -> answer")
"""
"""The very LM and settings that the other sides have; the default adapter, no callbacks, history on."""

CALL = 'prediction = qa(question="Why is the sky blue?")'
EXPRESSIONS = {"answer": "prediction.answer", "usage": "prediction.get_lm_usage()"}
"""What comes back with the reply itself."""


class _Specs(KernelSpecManager):
    """Knows one kernel: ``python -m ipykernel_launcher`` of this interpreter."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="stock", language="python", name=kernel_name)


class StockKernel:
    """A kernel behind Jupyter's own manager and client, any number of whose requests may be under way.

    Args:
        manager: Whose kernel runs.
        client: Its channels are open.
    """

    def __init__(self, manager: Any, client: Any) -> None:
        self.manager = manager
        self._client = client
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._reading: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return int(self.manager.provisioner.pid)

    async def answer(self) -> None:
        """Ask for kernel_info. Not ``wait_for_ready``: that waits 200 ms more for output that may be left."""
        await self._reply_to(self._client.kernel_info())

    async def execute(self, code: str, expressions: dict[str, str] | None = None) -> dict[str, Any]:
        """Run code; its reply's content.

        Raises:
            ProgramFailed: The code failed.
        """
        asked = self._client.execute(code, store_history=False, user_expressions=expressions, allow_stdin=False)
        content = await self._reply_to(asked)
        if content["status"] != "ok":
            raise errors.ProgramFailed(f"the stock kernel failed: {content.get('ename')}: {content.get('evalue')}")
        return content

    async def call(self) -> None:
        """Ask the program that ``SAME_CALLS`` made; its answer and usage come back."""
        await self.execute(CALL, EXPRESSIONS)

    async def _reply_to(self, message_id: str) -> dict[str, Any]:
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[message_id] = reply
        async with asyncio.timeout(ANSWER_TIMEOUT):
            return await reply

    async def _read(self) -> None:
        while True:
            message = await self._client.shell_channel.get_msg()
            reply = self._waiting.pop(message["parent_header"].get("msg_id"), None)
            if reply is not None and not reply.done():
                reply.set_result(message["content"])

    async def close(self) -> None:
        """End the kernel."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})
        self._client.stop_channels()
        await self.manager.shutdown_kernel(now=True)
        self._client.context.destroy(linger=0)


@contextlib.asynccontextmanager
async def stock_kernel(**options: Any) -> AsyncIterator[StockKernel]:
    """A stock kernel that has been launched, and may not answer yet.

    Args:
        **options: For ``AsyncKernelManager``; ``kernel_name`` takes another kernel than the stock one.
    """
    specs = {} if "kernel_name" in options else {"kernel_spec_manager": _Specs()}
    manager: Any = AsyncKernelManager(**specs, **options)
    await manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = manager.client()
    client.start_channels(iopub=False, stdin=False, hb=False)
    kernel = StockKernel(manager, client)
    try:
        yield kernel
    finally:
        await kernel.close()
