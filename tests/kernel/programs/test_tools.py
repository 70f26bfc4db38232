"""Tools: found by name, held by schema hash, and never in the way of the event loop."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM
from pydantic import BaseModel

from dspex_kernels import errors
from dspex_kernels.kernel.programs import tools
from dspex_kernels.kernel.programs.tools import Toolbox

PLUGIN = '''
import dspy

def shout(text: str) -> str:
    """Shouts."""
    return text.upper()

ready = dspy.Tool(lambda n: n + 1, name="other", desc="Counts.", args={"n": {"type": "integer"}})

def near(inputs, prediction, wanted=1.0):
    return 1.0 - abs(float(prediction.answer) - wanted)

def raises(inputs, prediction):
    return 1 / 0

def no_number(inputs, prediction):
    return float("nan")

class Fixed:
    def __init__(self, score):
        self.score = score
    def __call__(self, inputs, prediction):
        return self.score

class TwoSteps(dspy.Module):
    def __init__(self, steps=2):
        super().__init__()
        if steps > 9:
            raise ValueError("too many steps")
        self.steps = [dspy.Predict("question -> answer") for _ in range(steps)]
    def forward(self, question):
        return self.steps[0](question=question)

def react(signature, tools, max_iters=2):
    return dspy.ReAct(signature, tools=tools, max_iters=max_iters)

def nothing():
    return 7
'''
ENTRY_POINTS = """
[dspex_kernels.tools]
shout = PLUGIN:shout
ready = PLUGIN:ready
broken = PLUGIN:missing

[dspex_kernels.rewards]
near = PLUGIN:near
fixed = PLUGIN:Fixed
raises = PLUGIN:raises
no_number = PLUGIN:no_number

[dspex_kernels.modules]
two_steps = PLUGIN:TwoSteps
agent = PLUGIN:react
nothing = PLUGIN:nothing
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed distribution with entry points."""
    name = "dspex_plugin_for_tools"
    (tmp_path / f"{name}.py").write_text(PLUGIN)
    info = tmp_path / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS.replace("PLUGIN", name))
    monkeypatch.syspath_prepend(str(tmp_path))
    _forget()
    yield
    sys.modules.pop(name, None)
    _forget()


def _forget() -> None:
    tools._plugins.cache_clear()
    tools._load.cache_clear()


@pytest.fixture
def toolbox() -> Iterator[Toolbox]:
    with ThreadPoolExecutor(2) as executor:
        yield Toolbox(executor)


def look_up(subject: str, depth: int = 1) -> str:
    """Looks a subject up."""
    return f"nothing about {subject}" * depth


async def fetch(subject: str) -> str:
    """Fetches."""
    await asyncio.sleep(0)
    return f"fetched {subject}"


def test_a_notebooks_function_is_a_tool_of_its_own_name(toolbox: Toolbox) -> None:
    assert toolbox.add(look_up) == "look_up"
    assert toolbox.get("look_up")(subject="a", depth=2) == "nothing about a" * 2
    assert toolbox.add(look_up, name="search") == "search"
    assert toolbox.names() == ["look_up", "search"]
    assert not toolbox.reference("search").portable


def test_a_plugins_tools_are_found_by_name(plugin: None, toolbox: Toolbox) -> None:
    assert toolbox.get("shout")(text="a") == "A"
    assert toolbox.get("ready").name == "ready"
    assert toolbox.get("ready")(n=1) == 2
    assert toolbox.reference("shout").portable
    toolbox.add(look_up, name="shout")
    assert toolbox.get("shout").desc == "Looks a subject up."


def test_a_missing_tool_is_told_with_those_there_are(plugin: None, toolbox: Toolbox) -> None:
    toolbox.add(look_up)
    with pytest.raises(errors.ToolNotFound, match="no tool 'x': there are broken, look_up, ready, shout"):
        toolbox.get("x")


def test_a_plugin_that_does_not_load_says_why(plugin: None, toolbox: Toolbox) -> None:
    with pytest.raises(errors.DependencyMissing, match=r"'broken'.*does not load.*missing"):
        toolbox.get("broken")


def test_a_tool_that_changed_is_refused_with_both_hashes(toolbox: Toolbox) -> None:
    toolbox.add(look_up)
    reference = toolbox.reference("look_up")
    assert toolbox.resolve(reference) is toolbox.get("look_up")

    def changed(subject: str) -> str:
        """Looks a subject up."""
        return subject

    toolbox.add(changed, name="look_up")
    now = toolbox.reference("look_up").schema_hash
    with pytest.raises(errors.ToolChanged) as failure:
        toolbox.resolve(reference)
    assert now in failure.value.message
    assert reference.schema_hash in failure.value.message


class Tree(BaseModel):
    branches: list[Tree] = []


def test_a_recursive_argument_is_an_invalid_type(toolbox: Toolbox) -> None:
    def climb(tree: Tree) -> str:
        """Climbs."""
        return "up"

    with pytest.raises(errors.InvalidType, match="tool 'climb' has an argument whose type contains itself"):
        toolbox.add(climb)


def test_an_argument_without_a_schema_is_an_invalid_type(toolbox: Toolbox) -> None:
    def wait(lock: threading.Event) -> str:
        """Waits."""
        return "done"

    with pytest.raises(errors.InvalidType, match="tool 'wait' has an argument without a JSON Schema"):
        toolbox.add(wait)


@pytest.mark.parametrize("name", ["finish", "a b", "", "x" * 65])
def test_a_name_that_a_tool_cannot_have_is_refused(name: str, toolbox: Toolbox) -> None:
    if name:
        with pytest.raises(errors.InvalidArguments, match="cannot be a tool's name"):
            toolbox.add(look_up, name=name)
    with pytest.raises(errors.InvalidArguments, match="cannot be a tool's name"):
        toolbox.add(lambda a: a)
    with pytest.raises(errors.InvalidArguments, match="not int"):
        toolbox.add(7, name="seven")  # type: ignore[arg-type]  # the mistake


def test_a_sync_tool_in_react_leaves_the_event_loop_free(toolbox: Toolbox) -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    def wait_for_the_loop() -> str:
        """Waits."""
        reached = threading.Event()
        loops[0].call_soon_threadsafe(reached.set)
        return "free" if reached.wait(5) else "blocked"

    toolbox.add(wait_for_the_loop)
    react = dspy.ReAct("question -> answer", tools=[toolbox.get("wait_for_the_loop")])
    steps = [
        {"next_thought": "t", "next_tool_name": "wait_for_the_loop", "next_tool_args": "{}"},
        {"next_thought": "t", "next_tool_name": "finish", "next_tool_args": "{}"},
        {"reasoning": "r", "answer": "a"},
    ]

    async def run() -> Any:
        loops.append(asyncio.get_running_loop())
        with dspy.context(lm=DummyLM(steps)):
            return await react.acall(question="q")

    assert asyncio.run(run()).trajectory["observation_0"] == "free"


def test_a_tool_sees_its_callers_dspy_settings(toolbox: Toolbox) -> None:
    def model() -> str:
        """Tells the model."""
        return f"{dspy.settings.lm.model} {threading.current_thread() is threading.main_thread()}"

    toolbox.add(model)

    async def run() -> Any:
        with dspy.context(lm=DummyLM([{}])):
            return await toolbox.get("model").acall()

    assert asyncio.run(run()) == "dummy False"
    with dspy.context(lm=DummyLM([{}])):
        assert toolbox.get("model")() == "dummy True"


def test_an_async_tool_runs_in_async_and_sync_calls_and_within_a_loop(toolbox: Toolbox) -> None:
    toolbox.add(fetch)
    tool = toolbox.get("fetch")

    async def run() -> tuple[Any, Any]:
        return await tool.acall(subject="a"), tool(subject="b")

    assert asyncio.run(run()) == ("fetched a", "fetched b")
    assert tool(subject="c") == "fetched c"


def test_an_async_tool_called_within_a_loop_sees_the_callers_context(toolbox: Toolbox) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")

    async def read() -> str:
        """Reads."""
        return variable.get()

    toolbox.add(read)

    async def run() -> Any:
        variable.set("mine")
        return toolbox.get("read")()

    assert asyncio.run(run()) == "mine"


def test_a_tool_that_raises_stop_iteration_fails_and_does_not_hang(toolbox: Toolbox) -> None:
    def exhausted() -> str:
        """Takes the next."""
        return next(iter([]))

    toolbox.add(exhausted)

    async def run() -> None:
        async with asyncio.timeout(10):
            await toolbox.get("exhausted").acall()

    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(run())


def test_a_stopped_call_passes_through_a_tool(toolbox: Toolbox) -> None:
    def stop() -> str:
        """Stops."""
        raise errors.CallStopped(errors.CommandCancelled("cancelled"))

    toolbox.add(stop)
    with pytest.raises(errors.CallStopped):
        asyncio.run(toolbox.get("stop").acall())


def test_a_react_with_tools_is_copied_whole(toolbox: Toolbox) -> None:
    toolbox.add(look_up)
    react = dspy.ReAct("question -> answer", tools=[toolbox.get("look_up")])
    twin = copy.deepcopy(react)
    assert twin.react is not react.react
    assert twin.tools["look_up"] is react.tools["look_up"]


def test_an_async_tool_called_on_a_loop_waits_for_no_thread_of_the_executor() -> None:
    async def later() -> str:
        return "done"

    with ThreadPoolExecutor(1) as only:
        toolbox = Toolbox(only)
        toolbox.add(later)

        async def on_a_loop() -> Any:
            return toolbox.get("later")()

        assert only.submit(asyncio.run, on_a_loop()).result(timeout=10) == "done"


def test_a_reference_that_calls_a_notebooks_tool_portable_finds_none(toolbox: Toolbox) -> None:
    toolbox.add(look_up)
    honest = toolbox.reference("look_up")
    assert toolbox.resolve(honest) is toolbox.get("look_up")
    with pytest.raises(errors.ToolNotFound):
        toolbox.resolve(honest.model_copy(update={"portable": True}))


def test_a_program_of_an_installed_tool_keeps_it_when_a_notebook_makes_one_of_that_name(
    plugin: None, toolbox: Toolbox
) -> None:
    reference = toolbox.reference("shout")
    installed = toolbox.resolve(reference)
    toolbox.add(look_up, name="shout")
    assert toolbox.resolve(reference) is installed
    assert toolbox.get("shout") is not installed
