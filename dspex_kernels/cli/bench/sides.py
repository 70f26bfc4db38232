"""The sides that make the same call: in process, by a command, by ``execute_request``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Protocol

from dspex_kernels.cli.bench import clock
from dspex_kernels.cli.bench.in_process import DSPY, EXECUTE, in_process
from dspex_kernels.cli.bench.measurement import Bench
from dspex_kernels.cli.bench.stock import SAME_CALLS, WITHOUT_IRI, stock_kernel
from dspex_kernels.cli.bench.ways import FORKED, OWNER, call_program, make_program, service_of

COMMAND = "command"
"""Through ``SessionService.call``."""
DIRECT = "command, no service"
"""Through ``connect_kernel``, to the same kernel."""
EXECUTE_REQUEST = "execute_request"
"""To a stock kernel, over a bare socket; answer and usage come back with the reply."""

NOTE = (
    f"{COMMAND}: SessionService.call to a dedicated kernel. {DIRECT}: connect_kernel to the same one. "
    f"{EXECUTE_REQUEST}: a cell that calls the same program in a stock kernel, history of cells off; counted to "
    "its reply, which carries answer and usage, not to what it publishes."
)


class Side(Protocol):
    """Makes calls, and times them itself."""

    async def one_by_one(self, count: int) -> list[float]:
        """Seconds of each of so many calls, one after another."""
        ...

    async def per_second(self, *, concurrency: int, seconds: float) -> float:
        """Calls per second, so many side by side."""
        ...


class Here:
    """A side whose calls leave from this process.

    Args:
        call: Makes one.
    """

    def __init__(self, call: Callable[[], Awaitable[object]]) -> None:
        self._call = call

    async def one_by_one(self, count: int) -> list[float]:
        return await clock.one_by_one(self._call, count)

    async def per_second(self, *, concurrency: int, seconds: float) -> float:
        return await clock.per_second(self._call, concurrency=concurrency, seconds=seconds)


@contextlib.asynccontextmanager
async def all_sides(bench: Bench) -> AsyncIterator[Mapping[str, Side]]:
    """Every side, each ready and called once, by name."""
    from dspex_kernels.sessions.direct import connect_kernel

    async with contextlib.AsyncExitStack() as stack:
        dspy_alone = await stack.enter_async_context(in_process("dspy", bench.directory))
        execute = await stack.enter_async_context(in_process("execute", bench.directory))
        service = await stack.enter_async_context(service_of(bench, FORKED))
        session = await stack.enter_async_context(service.session(OWNER))
        await make_program(session)
        connection_file = await service.get_connection_file(session.session_id)
        assert connection_file is not None
        direct = await stack.enter_async_context(connect_kernel(connection_file))
        stock = await stack.enter_async_context(stock_kernel())
        await stock.execute(WITHOUT_IRI + SAME_CALLS)
        sides: dict[str, Side] = {
            DSPY: dspy_alone,
            EXECUTE: execute,
            COMMAND: Here(lambda: call_program(session)),
            DIRECT: Here(lambda: call_program(direct)),
            EXECUTE_REQUEST: Here(stock.call),
        }
        for side in sides.values():
            await side.one_by_one(1)
        yield sides
