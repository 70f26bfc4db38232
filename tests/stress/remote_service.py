"""A session service in a process of its own, asked over a pipe: one that can be killed, stopped and woken.

The process is this module's ``main``. It takes lines of JSON, ``{"id", "verb", "args", "options"}``, where a verb
is a method of the service, and answers each with ``{"id", "result"}`` or ``{"id", "error"}``, side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
from traitlets.config import Config

from dspex_kernels import SessionService, errors
from tests.live.kernels import plugin_path
from tests.provisioning.families import Identity

LINE_BYTES = 16 * 1024 * 1024
"""The longest line: an answer with all programs of a session."""
START_TIMEOUT = 60.0
"""Seconds until a service is ready."""


class ServiceGone(Exception):
    """The service's process ended before it answered."""


class RemoteService:
    """A service in another process.

    Attributes:
        pid: The process's.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._reading = asyncio.create_task(self._read())
        self.pid = process.pid

    @classmethod
    async def start(cls, root: Path, *, host: str | None = None, kernels: int = 1, **traits: Any) -> RemoteService:
        """Start one that keeps all it has below ``root``, and wait until it is ready.

        Args:
            root: Services on the same root share the store and the sessions' directories.
            host: The machine that it takes itself to be on; None is this one.
            kernels: In its pool.
            **traits: Of the service.
        """
        told = json.dumps({"root": str(root), "host": host, "kernels": kernels, "traits": traits})
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", __name__, told),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            limit=LINE_BYTES,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": plugin_path()},
        )
        service = cls(process)
        try:
            async with asyncio.timeout(START_TIMEOUT):
                await service.ask("health_check")
        except BaseException:
            await service.kill()
            raise
        return service

    @classmethod
    @contextlib.asynccontextmanager
    async def started(cls, root: Path, **options: Any) -> AsyncIterator[RemoteService]:
        """As ``start``; it is stopped at the end, or killed if it does not stop."""
        service = await cls.start(root, **options)
        try:
            yield service
        finally:
            await service.end()

    async def ask(self, verb: str, *args: Any, **options: Any) -> Any:
        """Call a method of the service.

        Raises:
            DSPexError: What it raised.
            ServiceGone: Its process ended before.
        """
        if self._reading.done():
            raise ServiceGone(verb)
        assert self._process.stdin is not None
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        line = json.dumps({"id": number, "verb": verb, "args": args, "options": options})
        self._process.stdin.write(line.encode() + b"\n")
        try:
            return await answer
        finally:
            del self._waiting[number]

    async def call(self, session_id: str, command: str, args: dict[str, Any] | None = None, **options: Any) -> Any:
        """As ``SessionService.call``."""
        return await self.ask("call", session_id, command, args or {}, **options)

    def descendants(self) -> list[Identity]:
        """Every process below it, itself first."""
        below = psutil.Process(self.pid).children(recursive=True)
        return [Identity.of(pid) for pid in (self.pid, *(process.pid for process in below))]

    def send_signal(self, number: signal.Signals) -> None:
        """Stop it or wake it."""
        self._process.send_signal(number)

    async def kill(self) -> None:
        """SIGKILL; who waits for an answer is told. Answers that it had written before are still given."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        await asyncio.wait({self._reading})

    async def end(self) -> None:
        """Let it stop as it should; kill it when it does not. Of one that has ended nothing happens."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(START_TIMEOUT):
                await self._process.wait()
        finally:
            await self.kill()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            told = json.loads(line)
            answer = self._waiting.get(told["id"])
            if answer is None or answer.done():
                continue
            if "error" in told:
                answer.set_exception(errors.from_dict(told["error"]))
            else:
                answer.set_result(told["result"])
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ServiceGone(f"service {self.pid} ended"))


async def main() -> None:
    """The process: serve the lines of stdin until it is closed."""
    options = json.loads(sys.argv[1])
    if options["host"] is not None:
        socket.gethostname = lambda: options["host"]
    root = Path(options["root"])
    config = Config({"KernelPool": {"size": options["kernels"]}})
    store_url = f"sqlite:///{root / 'store.sqlite'}"
    service = SessionService(data_dir=str(root), store_url=store_url, config=config, **options["traits"])
    lines = asyncio.StreamReader(limit=LINE_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    try:
        async with service, asyncio.TaskGroup() as group:
            while line := await lines.readline():
                group.create_task(_answer(service, json.loads(line)))
    finally:
        transport.close()


async def _answer(service: SessionService, asked: dict[str, Any]) -> None:
    try:
        result = await getattr(service, asked["verb"])(*asked["args"], **asked["options"])
        told = {"id": asked["id"], "result": _plain(result)}
    except errors.DSPexError as failure:
        told = {"id": asked["id"], "error": failure.to_dict()}
    # In one write: a line that is out is whole, whatever comes next.
    os.write(sys.stdout.fileno(), json.dumps(told).encode() + b"\n")


def _plain(result: Any) -> Any:
    if hasattr(result, "model_dump"):
        return result.model_dump(mode="json")
    if isinstance(result, list):
        return [_plain(item) for item in result]
    return result.session_id if hasattr(result, "session_id") else result


if __name__ == "__main__":
    asyncio.run(main())
