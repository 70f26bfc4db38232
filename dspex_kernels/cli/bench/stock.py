"""Jupyter's own kernel with DSPy in it: what there is without us."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import zmq
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

from dspex_kernels import errors
from dspex_kernels.cli.bench.machine import IRI_PACKAGE
from dspex_kernels.sockets import LoopSocket

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
    """A kernel behind Jupyter's own manager, asked over a bare socket, any number of requests at a time.

    Not by Jupyter's asyncio client, which is slower and, with ten requests under way, waits for ever: what comes in
    while it sends is told once.

    Args:
        manager: Whose kernel runs.
    """

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self._session = manager.session
        self._context = zmq.Context()
        socket = self._context.socket(zmq.DEALER)
        socket.sndhwm = socket.rcvhwm = 0
        socket.connect(manager._make_url("shell"))
        self._shell = LoopSocket(socket, self._take)
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}

    @property
    def pid(self) -> int:
        return int(self.manager.provisioner.pid)

    async def answer(self) -> None:
        """Ask for kernel_info. Not ``wait_for_ready``: that waits 200 ms more for output that may be left."""
        await self._ask("kernel_info_request", {})

    async def execute(self, code: str, expressions: dict[str, str] | None = None) -> dict[str, Any]:
        """Run code; its reply's content.

        Raises:
            ProgramFailed: The code failed.
        """
        asked = {"code": code, "silent": False, "store_history": False, "user_expressions": expressions or {}}
        content = await self._ask("execute_request", {**asked, "allow_stdin": False, "stop_on_error": True})
        if content["status"] != "ok":
            raise errors.ProgramFailed(f"the stock kernel failed: {content.get('ename')}: {content.get('evalue')}")
        return content

    async def call(self) -> None:
        """Ask the program that ``SAME_CALLS`` made; its answer and usage come back."""
        await self.execute(CALL, EXPRESSIONS)

    async def _ask(self, msg_type: str, content: dict[str, Any]) -> dict[str, Any]:
        message = self._session.msg(msg_type, content)
        reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[message["header"]["msg_id"]] = reply
        self._shell.send(self._session.serialize(message))
        async with asyncio.timeout(ANSWER_TIMEOUT):
            return await reply

    def _take(self, frames: list[bytes]) -> None:
        _, parts = self._session.feed_identities(frames, copy=True)
        message = self._session.deserialize(parts)
        reply = self._waiting.pop(message["parent_header"].get("msg_id"), None)
        if reply is not None and not reply.done():
            reply.set_result(message["content"])

    async def close(self) -> None:
        """End the kernel."""
        self._shell.close(linger=0)
        await self.manager.shutdown_kernel(now=True)
        self._context.destroy(linger=0)


@contextlib.asynccontextmanager
async def stock_kernel(**options: Any) -> AsyncIterator[StockKernel]:
    """A stock kernel that has been launched, and may not answer yet.

    Args:
        **options: For ``AsyncKernelManager``; ``kernel_name`` takes another kernel than the stock one.
    """
    specs = {} if "kernel_name" in options else {"kernel_spec_manager": _Specs()}
    manager: Any = AsyncKernelManager(**specs, **options)
    await manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kernel = StockKernel(manager)
    try:
        yield kernel
    finally:
        await kernel.close()
