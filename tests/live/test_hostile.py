"""A hostile or careless client: whatever it sends, a kernel answers once, with a known code, and lives."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dspex_kernels.config import LMPolicy
from dspex_kernels.errors import by_code
from dspex_kernels.protocol.commands import COMMANDS
from tests.live.kernels import LiveKernel
from tests.live.test_errors import DSPY_CODES
from tests.waiting import wait_for

QA = {"id": "qa", "signature": "question -> answer"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "items": {"$ref": "#"}}, "b": {"enum": [1, "x"]}}}
ATTEMPTS = {
    "module": {"module": "ChainOfThought", "signature": "question -> answer"},
    "N": 2,
    "reward": {"name": "regex", "args": {"field": "answer", "pattern": "^a"}},
    "threshold": 1.0,
}
SIGNATURE = {"inputs": [{"name": "q", "type": SCHEMA}], "outputs": [{"name": "a", "type": "list[int] | None"}]}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("create_program", {**QA, "replace": True, "config": {"temperature": 0.5}, "adapter": "json"}),
    ("create_program", {"id": "typed", "signature": SIGNATURE, "module": "ChainOfThought", "replace": True}),
    ("create_program", {"id": "best", "module": "BestOfN", "module_args": ATTEMPTS, "replace": True}),
    ("create_program", {"id": "agent", "signature": SIGNATURE, "module": "ReAct", "tools": [], "if_version": 0}),
    ("execute_program", {"id": "qa", "inputs": {"question": "?"}, "config": {"n": 1}, "budget": {"tokens": 9999}}),
    ("execute_program", {"id": "typed", "inputs": {"q": {"a": [{"a": []}], "b": 1}}, "version": 1}),
    ("get_program", {"id": "qa", "version": 1}),
    ("list_programs", {}),
    ("delete_program", {"id": "agent", "if_version": 1}),
    ("configure", {"adapter": "chat", "budget": {"usd": 5, "lm_calls": 10**6}}),
    ("configure", {"lm": {"model": "offline/echo", "temperature": 1, "max_tokens": 99, "cache": False}}),
    ("inspect_history", {"n": 2}),
    ("get_stats", {}),
    ("ping", {}),
    ("cancel", {"request_id": "r"}),
    ("reset", {}),
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**64 - 1, 10**30, float("nan"), float("inf"), -1e308,
    "", " ", "x", "5", "../../etc/passwd", "..", "\0", "\ud800", "\u202egnp.exe", "ﬁ", "é" * 200, "x" * 5000,
    "q -> a", "q: this -> a", "__import__('os').system('true')", "{{7*7}}", "%s%n", "(a+)+$", "a" + ".b" * 900,
    "list[" * 30 + "int" + "]" * 30, [], {}, [[]], [None], {"": None}, {"__class__": "x"}, {"$ref": "#"},
    {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, {"type": "string", "pattern": "("},
    {"type": "integer", "multipleOf": 0},
    {"enum": list(range(2000))}, [{"name": "q"}] * 3, {"name": "regex", "args": {"field": "a", "pattern": "["}},
]  # fmt: skip
CODES = set(by_code()) | DSPY_CODES
NEVER = {"internal_error", "program_failed"}
"""Codes that no mistake of a client may be answered with: they say that our code, or a user's, failed."""


@pytest.fixture(scope="module")
def guarded() -> Iterator[LiveKernel]:
    """A kernel whose sessions reach no provider, and whose client sends what other languages' clients can.

    That is NaN, half characters, integers of any size.
    """
    with LiveKernel(env={"DSPEX_LM_POLICY": LMPolicy(unrestricted=False).to_json()}) as kernel:
        kernel.client.session.pack = lambda content: json.dumps(content, default=str).encode()
        yield kernel


@pytest.fixture
def plain(guarded: LiveKernel) -> LiveKernel:
    """That kernel, reset, with the offline LM."""
    guarded.result("reset")
    guarded.result("configure", {"lm": {"model": "offline/echo", "cache": False}})
    return guarded


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value, with each of its keys."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _mutated(chance: random.Random, content: dict[str, Any]) -> dict[str, Any]:
    content = copy.deepcopy(content)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        holder, key = chance.choice(list(_places(content)))
        match chance.randrange(4):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[chance.choice(["x", "", "\ud800", "self", "signature", "__dict__", "lm"])] = copy.deepcopy(
                    chance.choice(ODD)
                )
            case 2 if isinstance(holder, list):
                holder.append(copy.deepcopy(holder[key]))
            case _:
                holder[key] = copy.deepcopy(chance.choice(ODD))
        if not list(_places(content)):
            break
    return content


@pytest.mark.parametrize("seed", range(4))
def test_every_mutated_request_is_answered_once_with_a_known_code(plain: LiveKernel, seed: int) -> None:
    chance = random.Random(seed)
    plain.result("create_program", QA)
    record = plain.result("export_program", {"id": "qa"})["record"]
    good = [*GOOD, ("import_program", {"record": record, "replace": True}), ("export_program", {"id": "qa"})]
    before = plain.result("ping", control=True)
    sent: dict[str, dict[str, Any]] = {}
    seen: Counter[str] = Counter()
    for _ in range(250):
        command, args = chance.choice(good)
        content = _mutated(chance, {"command": command, "args": args, "timeout_s": 10.0})
        control = command in COMMANDS and COMMANDS[command].control
        message = plain.send_raw(content, control=control)
        sent[message] = content
        reply = plain.reply(message, deadline=5)
        seen[reply["status"]] += 1
        if reply["status"] != "ok":
            code = reply["error"]["code"]
            assert code in CODES - NEVER, (content, reply)
            assert len(json.dumps(reply)) < 20_000, (content, reply)
        if plain.ask("get_program", {"id": "qa"})["status"] != "ok":
            plain.ask("configure", {"lm": {"model": "offline/echo", "cache": False}})
            plain.ask("create_program", QA)
    assert min(seen["ok"], seen["error"]) > 5, seen
    assert all(len(plain.replies[message]) == 1 for message in sent)
    after = plain.result("ping", control=True)
    assert after["running"] == 0
    assert after["pid"] == before["pid"]
    assert after["memory_bytes"] - before["memory_bytes"] < 150_000_000


def test_a_version_that_no_reply_can_hold_is_answered(plain: LiveKernel) -> None:
    message = plain.send("ping", protocol_version="\ud800", control=True)
    assert plain.reply(message, deadline=3)["error"]["code"] == "invalid_message"


def test_a_record_cannot_make_a_notebooks_tool_travel(offline: LiveKernel) -> None:
    offline.run("def weigh(thing: str) -> float:\n    'Weighs.'\n    return 2.5\n%dspex add weigh")
    tool = {"name": "weigh", "schema_hash": "0" * 16, "portable": False}
    spec = {
        "module": "ReAct",
        "signature": {"inputs": [{"name": "q"}], "outputs": [{"name": "a"}]},
        "tools": [tool],
    }
    record = {"program_id": "lie", "version": 1, "spec": spec, "portable": True}
    assert offline.error("import_program", {"record": record})["code"] == "invalid_record"
    tool["portable"] = True
    assert offline.error("import_program", {"record": record})["code"] == "tool_not_found"


LINEAR: list[Callable[[random.Random], tuple[str, dict[str, Any]]]] = [
    lambda _: ("create_program", {**QA, "if_version": 0}),
    lambda _: ("create_program", {**QA, "replace": True}),
    lambda c: ("create_program", {**QA, "if_version": c.randrange(1, 6)}),
    lambda c: ("delete_program", {"id": "qa", "if_version": c.randrange(1, 6)}),
    lambda _: ("delete_program", {"id": "qa"}),
]


@pytest.mark.parametrize("seed", range(3))
def test_writes_of_one_program_at_once_take_effect_in_the_order_they_came(offline: LiveKernel, seed: int) -> None:
    chance = random.Random(seed)
    asked = [chance.choices(LINEAR, [2, 6, 6, 2, 1])[0](chance) for _ in range(200)]
    messages = [offline.send(command, args) for command, args in asked]
    wait_for(lambda: offline.pump() or all(offline.replies.get(m) for m in messages), what="all replies")

    latest = 0
    for (command, args), message in zip(asked, messages, strict=True):
        reply = offline.reply(message)
        wanted = args.get("if_version")
        if command == "delete_program" and not latest:
            assert reply["error"]["code"] == "program_not_found"
        elif wanted not in (None, latest):
            assert reply["error"]["code"] == "version_conflict", (args, reply)
        elif command == "delete_program":
            assert reply["status"] == "ok"
            latest = 0
        else:
            latest += 1
            assert reply["result"]["version"] == latest
    there = offline.ask("get_program", {"id": "qa"})
    assert (there["result"]["version"] if latest else 0) == latest
