"""The command loop, which makes DSPy's hops in place where nothing in them waits.

DSPy's async path sends short computations of its own through a thread, four times a prediction, for the cases in
which they read a file or a database. A hop costs two wake-ups, and a fight for the interpreter's lock: a quarter of
a prediction by an offline LM, and most of what concurrent ones lose. So what only computes is called on the loop,
which still takes a turn then: a program whose answers are all cached waits for nothing else, and must not keep
cancels, deadlines and other sessions from theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import Executor
from types import FunctionType
from typing import Any

import dspy
from dspy.clients import execution, model_metadata

from dspex_kernels.kernel.lms.cache import SessionCache


class CommandLoop(asyncio.SelectorEventLoop):
    """An event loop that calls at once what it is asked to call in its default executor, and only computes."""

    def run_in_executor(  # type: ignore[override]  # the stub's type variables
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Called by ``asyncio.to_thread``, with a context's ``run``, bound to the function and its arguments."""
        if executor is not None or not _only_computes(func):
            return super().run_in_executor(executor, func, *args)
        answer = self.create_future()
        self.call_soon(_settle, answer, func(*args))
        return answer


def _settle(answer: asyncio.Future[Any], value: Any) -> None:
    if not answer.done():  # else it was cancelled in this turn
        answer.set_result(value)


def _only_computes(func: Callable[..., Any]) -> bool:
    match func:
        case functools.partial(args=(FunctionType() as function, *args)):
            condition = _KNOWN.get(function)
            with contextlib.suppress(TypeError):  # another DSPy has other parameters: then it hops
                return condition is not None and condition(*args, **func.keywords)
    return False


def _prepares_text(_: Any, prompt: Any, __: Any, options: dict[str, Any], **___: Any) -> bool:
    """Whether no lm15 request comes with it: the files of its media are read when a call is prepared."""
    return (prompt is None or isinstance(prompt, str)) and "request" not in options


def _cache_is_ours(*_: Any) -> bool:
    """Whether the answer cache is in memory: a cell may have put another one in its place."""
    return type(dspy.cache) is SessionCache


def has_prices(*_: Any) -> bool:
    """Whether DSPy's catalogue of models has been read."""
    return getattr(model_metadata, "_data", None) is not None


_KNOWN: dict[Callable[..., Any], Callable[..., bool]] = {
    function: condition
    for name, condition in (
        ("prepare", _prepares_text),
        ("_cached", _cache_is_ours),
        ("_store", _cache_is_ours),
        ("_price_result", has_prices),
    )
    if (function := getattr(execution, name, None)) is not None  # DSPy's own names: without one, it hops
}
"""DSPy's functions, and when they only compute."""
