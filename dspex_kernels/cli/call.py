"""`dspex-kernels call`: one command straight to a running kernel, by its connection file."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any

from traitlets import Bool, Float, Unicode

from dspex_kernels import errors
from dspex_kernels.cli.base import BASE_ALIASES, BASE_FLAGS, Subcommand, say
from dspex_kernels.protocol import limits
from dspex_kernels.protocol.commands import PUBLIC, get_command


def parse_arguments(words: Sequence[str]) -> dict[str, Any]:
    """A command's args from the words of a command line.

    Args:
        words: ``key=value`` each, where a value that is JSON is taken as such and any other as text, and a dotted
            key reaches into an object (``inputs.question=…``); or one JSON object.

    Raises:
        InvalidArguments: A word is neither, or two contradict each other.
    """
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        return _object(words[0], "the argument")
    args: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not all(key.split(".")):
            raise errors.InvalidArguments(f"{word!r} is not key=value: write inputs.question=… or one JSON object")
        *path, last = key.split(".")
        inner = args
        for name in path:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise errors.InvalidArguments(f"{key!r} reaches into {name!r}, which was given a value before")
        if last in inner:
            raise errors.InvalidArguments(f"{key!r} is given twice")
        inner[last] = _value(text)
    return args


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _object(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as failure:
        raise errors.InvalidArguments(f"{what} is not JSON: {failure}") from None  # the cause quotes it all
    if not isinstance(value, dict):
        raise errors.InvalidArguments(f"{what} is not a JSON object but {type(value).__name__}")
    return value


class CallApp(Subcommand):
    name = "jupyter-dspex-call"
    usage = "call (CONNECTION_FILE | --existing=NAME) COMMAND [key=value … | JSON | -]"
    description = (
        "Send one command straight to a running kernel and print its result as JSON. An argument of - reads a JSON "
        f"object from stdin: the place for a key. Commands: {', '.join(sorted(PUBLIC))}."
    )
    examples = """
    dspex-kernels call kernel-1234.json list_programs
    dspex-kernels call --existing=1234 create_program program_id=qa_bot signature="question -> answer"
    dspex-kernels call --existing=1234 execute_program program_id=qa_bot inputs.question="Why is the sky blue?"
    dspex-kernels call --existing=1234 configure - < settings.json
    """
    flags = BASE_FLAGS | {
        "compact": ({"CallApp": {"compact": True}}, "The result on one line."),
    }
    aliases = BASE_ALIASES | {"existing": "CallApp.existing", "timeout": "CallApp.timeout"}

    existing = Unicode("", help="A kernel's connection file, by its name or a part of it.").tag(config=True)
    timeout = Float(
        None, min=0.1, max=86400.0, allow_none=True, help="Longest wait, in seconds; the command's own by default."
    ).tag(config=True)
    compact = Bool(False, help="The result on one line.").tag(config=True)

    async def run(self) -> int:
        """Send the command and print its result."""
        words = list(self.extra_args)
        if not self.existing and not words:
            self.fail_usage("which kernel? Give its connection file, or --existing=NAME")
        kernel = self.existing or words.pop(0)
        if not words:
            self.fail_usage(f"which command? There are {', '.join(sorted(PUBLIC))}")
        command = get_command(words.pop(0))
        args = await asyncio.to_thread(_read_object) if words == ["-"] else parse_arguments(words)
        result = await self._send(kernel, command.name, args)
        say(json.dumps(result, ensure_ascii=False, indent=None if self.compact else 2, default=str))
        return 0

    async def _send(self, kernel: str, command: str, args: dict[str, Any]) -> Any:
        from dspex_kernels.sessions.direct import connect_kernel

        async with connect_kernel(kernel) as session:
            return await session.call(command, args, timeout=self.timeout)


def _read_object() -> dict[str, Any]:
    text = sys.stdin.read(limits.MAX_REQUEST_BYTES + 1)
    if len(text) > limits.MAX_REQUEST_BYTES:
        raise errors.TooLarge(f"stdin holds more than {limits.MAX_REQUEST_BYTES:,} characters: send less")
    return _object(text, "stdin")
