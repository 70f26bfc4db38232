"""What a caller may expect of its session: what was acknowledged to it, and what may have happened besides."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import Any

from dspex_kernels import errors
from dspex_kernels.protocol.limits import MAX_VERSIONS_KEPT

STEADY = "steady"
"""The program whose versions are counted; it is never deleted."""
PROGRAMS = 12
"""Other programs that come and go."""
BUDGET = 10**6
"""Requests that a session's budget allows at least: it is told, and never reached."""

Ask = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
"""Asks a session a command with its arguments."""


class Account:
    """Changes one session, one change after another, and knows what must be there afterwards.

    A change that was not answered may have happened or not: both are right, until the next one says more.

    Attributes:
        name: In the texts that it writes: no other session may ever show them.
        acknowledged: Changes that were answered.
        uncertain: Changes that were not.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.acknowledged = 0
        self.uncertain = 0
        self._numbers = itertools.count(1)
        self._possible: dict[str, set[object]] = {}
        self._versions: dict[int, str] = {}

    def next_text(self) -> str:
        """A text that was never written before."""
        return f"Change {next(self._numbers)} of {self.name}."

    async def change(self, ask: Ask) -> None:
        """Make the next change.

        Raises:
            DSPexError: It was not acknowledged.
        """
        text = self.next_text()
        number = int(text.split()[1])
        if number % 4 == 0:
            await self._make(ask, "budget", BUDGET + number, "configure", {"budget": {"lm_calls": BUDGET + number}})
        elif number % 4 == 2:
            await self._change_program(ask, f"p{number // 4 % PROGRAMS}", text, delete=number // 4 % 3 == 0)
        else:
            await self.change_steady(ask, text)

    async def change_steady(self, ask: Ask, text: str) -> None:
        """Write a text into the next version of the steady program."""
        told = await self._make(ask, STEADY, text, "create_program", program(STEADY, text))
        assert told["version"] not in self._versions, f"{self.name}: version {told['version']} was given twice"
        self._versions[told["version"]] = text

    async def find_lost(self, ask: Ask) -> list[str]:
        """Look at all that the session holds: a line for each thing that must not be so.

        Raises:
            DSPexError: The session could not be asked.
        """
        listed = {told["program_id"]: told for told in (await ask("list_programs", {}))["programs"]}
        found: dict[str, object] = {
            program_id: (await ask("get_program", {"program_id": program_id}))["instructions"]
            for program_id in listed
            if program_id in self._possible
        }
        found["budget"] = (await ask("get_stats", {}))["budget"]["lm_calls"]
        lost = [
            f"{self.name}: {key} is {found.get(key)!r}, expected one of {possible!r}"
            for key, possible in self._possible.items()
            if found.get(key) not in possible
        ]
        return lost + await self._find_lost_versions(ask, listed.get(STEADY, {}).get("versions", []))

    async def _find_lost_versions(self, ask: Ask, versions: list[int]) -> list[str]:
        lost = []
        newest = max([*versions, *self._versions], default=0)
        for version in sorted(self._versions)[-5:]:
            if version <= newest - MAX_VERSIONS_KEPT:
                continue
            if version not in versions:
                lost.append(f"{self.name}: version {version} is gone, there are {versions}")
                continue
            told = await ask("get_program", {"program_id": STEADY, "version": version})
            if told["instructions"] != self._versions[version]:
                lost.append(f"{self.name}: version {version} is {told['instructions']!r}")
        return lost

    async def _change_program(self, ask: Ask, program_id: str, text: str, *, delete: bool) -> None:
        if not delete:
            await self._make(ask, program_id, text, "create_program", program(program_id, text))
            return
        may_be_absent = None in self._possible.get(program_id, {None})
        try:
            await self._make(ask, program_id, None, "delete_program", {"program_id": program_id})
        except errors.ProgramNotFound:
            assert may_be_absent, f"{self.name}: {program_id} was not there to be deleted"
            self.uncertain -= 1
            self._possible[program_id] = {None}

    async def _make(self, ask: Ask, key: str, value: object, command: str, args: dict[str, Any]) -> dict[str, Any]:
        self._possible.setdefault(key, {None}).add(value)
        self.uncertain += 1
        told = await ask(command, args)
        self.uncertain -= 1
        self.acknowledged += 1
        self._possible[key] = {value}
        return told


def program(program_id: str, text: str) -> dict[str, Any]:
    """The arguments that put a text into a program, as its instructions."""
    fields = {"inputs": [{"name": "question"}], "outputs": [{"name": "answer"}], "instructions": text}
    return {"program_id": program_id, "signature": fields, "replace": True}
