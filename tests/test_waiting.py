"""Waiting gives the value when it comes, and says what it waited for when it does not."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from tests.waiting import wait_for, wait_until


def test_the_awaited_value_is_returned():
    values: list[str] = []
    threading.Timer(0.05, values.append, ["here"]).start()
    assert wait_for(lambda: values and values[0]) == "here"


def test_what_never_comes_fails_by_name_at_the_deadline():
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"waited 0.1 s for a kernel; its last value was None"):
        wait_for(lambda: None, deadline=0.1, what="a kernel")
    assert time.monotonic() - started < 1


def test_a_loop_goes_on_running_meanwhile():
    async def main() -> str:
        values: list[str] = []
        asyncio.get_running_loop().call_later(0.05, values.append, "here")
        return await wait_until(lambda: values and values[0])

    assert asyncio.run(main()) == "here"
    with pytest.raises(AssertionError, match="for a kernel"):
        asyncio.run(wait_until(lambda: None, deadline=0.05, what="a kernel"))
