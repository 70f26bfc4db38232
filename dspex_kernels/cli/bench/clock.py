"""Times how long things take, and how many are done in a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable


async def one_by_one(call: Callable[[], Awaitable[object]], count: int) -> list[float]:
    """Seconds of each of so many calls, one after another."""
    took = []
    for _ in range(count):
        began = time.perf_counter()
        await call()
        took.append(time.perf_counter() - began)
    return took


LOOK_S = 0.005
"""Seconds between two looks at what nothing tells of."""


async def until(condition: Callable[[], bool], *, timeout: float) -> bool:
    """Wait for something that only looking tells; False when it is not so after ``timeout`` seconds."""
    deadline = time.perf_counter() + timeout
    while True:
        if condition():
            return True
        if time.perf_counter() >= deadline:
            return False
        await asyncio.sleep(LOOK_S)


async def per_second(call: Callable[[], Awaitable[object]], *, concurrency: int, seconds: float) -> float:
    """Calls per second, so many side by side for at least so long; all that were begun are counted to their end."""
    done = 0
    began = time.perf_counter()

    async def keep_calling() -> None:
        nonlocal done
        while True:
            await call()
            done += 1
            if time.perf_counter() - began >= seconds:
                return

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(keep_calling())
    return done / (time.perf_counter() - began)
