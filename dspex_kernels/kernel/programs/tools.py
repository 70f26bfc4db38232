"""A session's toolbox: what its programs may name, from installed plugins and from its notebook.

Plugins are entry points, loaded when they are first named and kept for the process. A notebook's functions live in
one kernel only, so a program that uses one is not portable.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import re
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Self

import dspy
import orjson
from dspy.utils.callback import with_callbacks
from pydantic import PrivateAttr
from pydantic.errors import PydanticUserError

from dspex_kernels import errors, logs
from dspex_kernels.protocol.records import ToolReference, schema_hash

log = logs.get_logger(__name__)

TOOLS = "dspex_kernels.tools"
"""Entry-point group: name -> a function with type hints, or a ``dspy.Tool``."""

REWARDS = "dspex_kernels.rewards"
"""Entry-point group: name -> ``f(inputs: dict, prediction, **args) -> float``, or a class of such objects. One that
raises ends the call: its user is to learn why."""

MODULES = "dspex_kernels.modules"
"""Entry-point group: name -> a ``dspy.Module`` subclass, or a function of the module's args that returns one."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_\-]{0,63}")
_RESERVED = frozenset({"finish"})  # ReAct adds a tool of this name, silently over the given one


class SessionTool(dspy.Tool):
    """A tool that never blocks the event loop it is called on.

    ``dspy.Tool.acall`` runs a sync function on the loop: every other command of the kernel would wait for it.

    Args:
        func: The function; sync or async.
        executor: Runs a sync function's asynchronous calls.
        **given: ``name``, ``desc``, ``args``, ``arg_types``, ``arg_desc`` as for ``dspy.Tool``.
    """

    _executor: Executor = PrivateAttr()

    def __init__(self, func: Callable[..., Any], *, executor: Executor, **given: Any) -> None:
        super().__init__(func, **given)
        self._executor = executor

    def __deepcopy__(self, _memo: dict[int, Any] | None = None) -> Self:
        # A tool does not change, and an executor cannot be copied: without this, copies of ReAct come out shallow.
        return self

    @with_callbacks  # type: ignore[untyped-decorator]  # DSPy is untyped
    def __call__(self, **kwargs: Any) -> Any:
        """Run the tool and wait; an async function runs on a loop of its own."""
        result = self.func(**self._validate_and_parse_args(**kwargs))
        return self._wait(result) if inspect.iscoroutine(result) else result

    @with_callbacks  # type: ignore[untyped-decorator]  # DSPy is untyped
    async def acall(self, **kwargs: Any) -> Any:
        """Run the tool; a sync function runs in the executor, with the caller's DSPy settings."""
        arguments = self._validate_and_parse_args(**kwargs)
        if _is_async(self.func):
            return await self.func(**arguments)
        context = contextvars.copy_context()
        work = partial(context.run, _call, self.func, arguments)
        result = await asyncio.get_running_loop().run_in_executor(self._executor, work)
        return await result if inspect.isawaitable(result) else result

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(coroutine)
        # A cell's thread has a loop already, and a loop does not run inside another. A thread of its own: the
        # executor's may all be waiting, this one among them.
        context = contextvars.copy_context()
        with ThreadPoolExecutor(1, thread_name_prefix="dspex-tool") as own:
            return own.submit(context.run, asyncio.run, coroutine).result()


class Toolbox:
    """What the programs of a session may name.

    Args:
        executor: Runs sync tools, so that they do not block the event loop.
    """

    __slots__ = ("_added", "_executor", "_plugged")

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._added: dict[str, SessionTool] = {}
        self._plugged: dict[str, SessionTool] = {}

    def add(self, function: Callable[..., Any], name: str | None = None) -> str:
        """Make a notebook's function a tool of this session; one of the same name is replaced.

        Args:
            function: With type hints; its docstring tells the model what it does. Or a ``dspy.Tool``.
            name: None takes the function's own.

        Returns:
            The tool's name.

        Raises:
            InvalidArguments: It cannot be called, or the name cannot be a tool's.
            InvalidType: An argument's type has no JSON Schema.
        """
        tool = self._make(function, name)
        self._added[tool.name] = tool
        return str(tool.name)

    def get(self, name: str) -> SessionTool:
        """The tool of that name; a notebook's comes before a plugin's.

        Raises:
            ToolNotFound: There is none; the message lists those there are.
        """
        return self._added.get(name) or self._plugin_tool(name)

    def _plugin_tool(self, name: str) -> SessionTool:
        if name not in self._plugged:
            function = self.plugin(TOOLS, name)
            if function is None:
                raise errors.ToolNotFound(
                    f"no tool {name!r}: there are {_listed(self.names())}; more come from the entry-point group "
                    f"{TOOLS!r}, or from a notebook's functions (%dspex add)",
                    details={"tool": name[:128]},
                )
            self._plugged[name] = self._make(function, name)
        return self._plugged[name]

    def names(self) -> list[str]:
        """The tools there are, by name."""
        return sorted({*self._added, *_plugins(TOOLS)})

    def has_added(self, name: str) -> bool:
        """Whether the notebook made a tool of that name."""
        return name in self._added

    def reference(self, name: str) -> ToolReference:
        """How a record names the tool.

        Raises:
            ToolNotFound: There is none.
        """
        tool = self.get(name)
        return ToolReference(name=name, schema_hash=_fingerprint(tool), portable=name not in self._added)

    def resolve(self, reference: ToolReference) -> SessionTool:
        """The tool that a record names: an installed one where it is portable, else the notebook's.

        Raises:
            ToolNotFound: There is none of that name.
            ToolChanged: Its name, description or arguments are not those that the program was made with.
        """
        # A record that calls the notebook's tool portable would travel, and be the notebook's no more.
        tool = self._plugin_tool(reference.name) if reference.portable else self.get(reference.name)
        found = _fingerprint(tool)
        if found != reference.schema_hash:
            raise errors.ToolChanged(
                f"tool {reference.name!r} has changed since the program was made: its schema was "
                f"{reference.schema_hash}, now it is {found}; create the program again, or bring the tool back",
                details={"tool": reference.name, "expected": reference.schema_hash, "found": found},
            )
        return tool

    def plugin(self, group: str, name: str) -> Any:
        """What a plugin registered under that name; None when there is nothing.

        Raises:
            DependencyMissing: It is installed and does not import.
        """
        entry = _plugins(group).get(name)
        return None if entry is None else _load(entry)

    def plugin_names(self, group: str) -> list[str]:
        """The names that plugins registered in a group."""
        return sorted(_plugins(group))

    def _make(self, function: Any, name: str | None) -> SessionTool:
        given: dict[str, Any] = {}
        if isinstance(function, dspy.Tool):
            given = {key: getattr(function, key) for key in ("name", "desc", "args", "arg_types", "arg_desc")}
            function = function.func
        if not callable(function):
            raise errors.InvalidArguments(f"a tool is a function or a dspy.Tool, not {type(function).__name__}")
        known = str(name or given.get("name") or getattr(function, "__name__", type(function).__name__))
        if not _NAME.fullmatch(known) or known in _RESERVED:
            raise errors.InvalidArguments(
                f"{known[:64]!r} cannot be a tool's name: give one of letters, digits, - and _ (at most 64), "
                f"not {_listed(_RESERVED)}"
            )
        try:
            tool = SessionTool(function, executor=self._executor, **{**given, "name": known})
            _fingerprint(tool)
        except RecursionError:
            raise errors.InvalidType(
                f"tool {known!r} has an argument whose type contains itself, which DSPy cannot describe to a "
                "model: take a flat type, or a dict",
                details={"tool": known},
            ) from None  # thousands of equal frames tell nothing
        except (TypeError, ValueError, NameError, PydanticUserError) as failure:
            raise errors.InvalidType(
                f"tool {known!r} has an argument without a JSON Schema: {str(failure).splitlines()[0][:300]}",
                details={"tool": known},
            ) from failure
        return tool


@cache
def _plugins(group: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}


@cache
def _load(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as failure:  # a plugin's module may fail in any way when it is imported
        log.warning("plugin %s of %s does not load", entry.name, entry.group, exc_info=True)
        raise errors.DependencyMissing(
            f"{entry.name!r} of the entry-point group {entry.group!r} does not load from {entry.value!r}: "
            f"{type(failure).__name__}: {failure}"
        ) from failure


def _call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return function(**arguments)
    except StopIteration as failure:
        # A future refuses StopIteration: the call would wait for ever.
        raise RuntimeError(f"the tool raised StopIteration: {failure}") from failure


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004  # the method itself is wanted


def _fingerprint(tool: dspy.Tool) -> str:
    args = orjson.loads(orjson.dumps(tool.args, option=orjson.OPT_NON_STR_KEYS))
    return schema_hash({"name": tool.name, "description": tool.desc, "args": args})


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)[:50]) or "none"
