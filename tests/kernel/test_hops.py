"""DSPy's hops: what only computes is called on the loop, everything else where it may wait."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import dspy
import pytest
from dspy.clients import execution, model_metadata

from dspex_kernels.kernel import hops
from dspex_kernels.kernel.hops import CommandLoop
from dspex_kernels.kernel.lms import cache


def run(work: Any) -> Any:
    loop = CommandLoop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In which threads DSPy's functions were called, by name: each of them is replaced by one that notes it."""
    threads: dict[str, Any] = {}
    known = {}
    for name in ("prepare", "_cached", "_store", "_price_result"):
        original = getattr(execution, name)

        def noted(*_: Any, _name: str = name, **__: Any) -> str:
            threads[_name] = threading.current_thread()
            return _name

        known[noted] = hops._KNOWN[original]
        monkeypatch.setattr(execution, name, noted)
    monkeypatch.setattr(hops, "_KNOWN", known)
    monkeypatch.setattr(dspy, "cache", cache.SessionCache(), raising=False)
    return threads


def hop(name: str, *args: Any, **options: Any) -> Any:
    return run(asyncio.to_thread(getattr(execution, name), *args, **options))


def test_dspy_has_all_functions_that_are_known() -> None:
    assert [function.__name__ for function in hops._KNOWN] == ["prepare", "_cached", "_store", "_price_result"]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("prepare", (None, "a prompt", None, {"temperature": 0})),
        ("prepare", (None, None, [{"role": "user", "content": "?"}], {})),
        ("_cached", (None, None, True)),
        ("_store", (None, None, None, True)),
    ],
)
def test_what_only_computes_is_called_on_the_loop(called: dict[str, Any], name: str, args: tuple[Any, ...]) -> None:
    assert hop(name, *args) == name
    assert called == {name: threading.current_thread()}


def test_prices_are_looked_up_on_the_loop_once_they_are_there(
    called: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_metadata, "_data", None)
    hop("_price_result", None, None, None, None, None)
    assert called["_price_result"] is not threading.current_thread()
    monkeypatch.setattr(model_metadata, "_data", {})
    hop("_price_result", None, None, None, None, None)
    assert called["_price_result"] is threading.current_thread()


@pytest.mark.parametrize(
    ("prompt", "options"),
    [(None, {"request": "an lm15 request, with media in files"}), (object(), {})],
)
def test_a_request_whose_media_may_be_files_is_prepared_in_a_thread(
    called: dict[str, Any], prompt: Any, options: dict[str, Any]
) -> None:
    hop("prepare", None, prompt, None, options, asynchronous=True)
    assert called["prepare"] is not threading.current_thread()


def test_a_cache_of_a_cells_own_is_asked_in_a_thread(
    called: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dspy, "cache", type("OfACell", (cache.SessionCache,), {})())
    hop("_cached", None, None, True)
    assert called["_cached"] is not threading.current_thread()


@pytest.mark.parametrize("work", [threading.current_thread, lambda: threading.current_thread()])
def test_what_is_not_dspys_is_called_in_a_thread(work: Any) -> None:
    assert run(asyncio.to_thread(work)) is not threading.current_thread()


def test_an_unhashable_function_is_called_in_a_thread() -> None:
    class Unhashable:
        __hash__ = None

        def __call__(self) -> threading.Thread:
            return threading.current_thread()

    assert run(asyncio.to_thread(Unhashable())) is not threading.current_thread()


def test_an_executor_that_is_named_is_used(called: dict[str, Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor
    from functools import partial

    async def work() -> None:
        with ThreadPoolExecutor(1) as executor:
            bound = partial(execution._cached, None, None, True)
            await asyncio.get_running_loop().run_in_executor(executor, bound)

    run(work())
    assert called["_cached"] is not threading.current_thread()


def test_a_failure_is_raised_where_it_is_awaited(called: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    failure = RuntimeError("this one")
    seen = []

    def failing(*_: Any, **__: Any) -> None:
        seen.append(threading.current_thread())
        raise failure

    monkeypatch.setitem(hops._KNOWN, failing, lambda *_, **__: True)
    with pytest.raises(RuntimeError) as caught:
        run(asyncio.to_thread(failing))
    assert caught.value is failure
    assert seen == [threading.current_thread()]


def test_a_function_with_other_parameters_than_are_known_is_called_in_a_thread(called: dict[str, Any]) -> None:
    assert hop("prepare", None) == "prepare"
    assert called["prepare"] is not threading.current_thread()


def test_a_program_that_only_hops_lets_others_have_their_turn_and_can_be_cancelled(called: dict[str, Any]) -> None:
    async def hops_for_ever() -> None:
        while True:
            await asyncio.to_thread(execution._cached, None, None, True)

    async def work() -> None:
        endless = asyncio.create_task(hops_for_ever())
        await asyncio.sleep(0.01)  # a timer's turn comes
        endless.cancel()
        await asyncio.wait({endless}, timeout=10)
        assert endless.cancelled()

    run(work())
