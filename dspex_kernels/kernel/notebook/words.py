"""From what is typed after a magic to words and values, without executing any of it twice.

A line is split first and variables are put in afterwards, word by word: the content of a variable is never taken
for syntax. Values are JSON or Python literals where they are such, else they are text.
"""

from __future__ import annotations

import ast
import functools
import json
import math
import re
import shlex
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr
from pydantic_core import PydanticSerializationError, to_jsonable_python

from dspex_kernels import errors, logs

log = logs.get_logger(__name__)

_ASSIGNMENT = re.compile(r"([^\W\d][\w.]*)=(.*)", re.DOTALL)
_REFERENCE = re.compile(r"[@$]([^\W\d]\w*)|\{\s*([^\W\d]\w*)\s*\}")
# Unlike IPython's own formatter: a price ($5), an apostrophe and braces around other things stay as they are.
_INSERTION = re.compile(r"\$([^\W\d]\w*)|\{(\s*([^\W\d]\w*)[^{}]*)\}")
_QUOTED = r'"(?:[^"\\]|\\.)*"|' + r"'(?:[^'\\]|\\.)*'"
_SHELL_WORD = re.compile(r"""(?:[^\s"'\\]|\\.|"(?:[^"\\]|\\.)*"|'[^']*')+""", re.DOTALL)
_BRACKETED_TOKEN = re.compile(_QUOTED + r"|.", re.DOTALL)
_OPENING = re.compile(r"[^\W\d][\w.]*=(?=[\[{])")


def split_words(line: str) -> list[str]:
    """The words of a line: shell quoting, and ``name=[…]`` or ``name={…}`` as one word with its own quotes.

    Raises:
        InvalidArguments: A quote is not closed.
    """
    words = []
    rest = line.strip()
    while rest:
        word = _bracketed(rest)
        if word is not None:
            words.append(word)
        else:
            match = _SHELL_WORD.match(rest)
            word = match.group() if match else ""
            if not word or (len(word) < len(rest) and not rest[len(word)].isspace()):
                raise errors.InvalidArguments("a quote is not closed on this line: close it, or write \\\" or \\'")
            words.append("".join(shlex.split(word)))
        rest = rest[len(word) :].lstrip()
    return words


def _bracketed(text: str) -> str | None:
    """The leading ``name=[…]`` of ``text``, brackets balanced; None when it does not start with one."""
    opening = _OPENING.match(text)
    if opening is None:
        return None
    depth = 0
    for token in _BRACKETED_TOKEN.finditer(text, opening.end()):
        depth += (token.group() in "[{(") - (token.group() in "]})")
        if depth == 0:
            end = token.end()
            return text[:end] if end == len(text) or text[end].isspace() else None
    return None


def assignments(words: Iterable[str], *, what: str) -> dict[str, str]:
    """``name=value`` words by name.

    Raises:
        InvalidArguments: A word is no assignment, or a name comes twice; the value is not repeated in the message,
            it may be a secret.
    """
    found: dict[str, str] = {}
    for word in words:
        match = _ASSIGNMENT.fullmatch(word)
        if match is None:
            raise errors.InvalidArguments(
                f'write {what} as name=value, with quotes around spaces: name="two words"'
            )
        name, value = match.groups()
        if name in found:
            raise errors.InvalidArguments(f"{name!r} is given twice")
        found[name] = value
    return found


def literal(text: str) -> Any:
    """``text`` as a JSON or Python literal; the text itself where it is none."""
    try:
        return _json(text)
    except (ValueError, RecursionError):
        pass  # not JSON: perhaps Python
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    if text[:1] not in ("[", "{", "(", "'", '"'):
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # an odd escape in a person's text is no news
            warnings.simplefilter("ignore", DeprecationWarning)
            value = ast.literal_eval(text)
            return json.loads(json.dumps(value, allow_nan=False))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _json(text: str) -> Any:
    """``text`` as strict JSON: NaN and infinity, which Python reads, cannot travel."""
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not JSON")
    return number


@dataclass(frozen=True, slots=True)
class Value:
    """What a word stands for.

    Attributes:
        value: JSON-able data.
        text: The word as text; a field of type ``str`` takes it where ``value`` was read from a literal. None where
            the value came from a variable.
    """

    value: Any
    text: str | None


class Scope:
    """The notebook's variables, as words may name them.

    Args:
        names: The variables a word may name.
    """

    def __init__(self, names: Mapping[str, Any]) -> None:
        self.names = names

    def value(self, word: str) -> Value:
        """What a word stands for.

        ``@name``, ``$name`` and ``{name}`` alone are the variable's value as it is; within other text ``$name`` and
        ``{expression}`` are put in as text; ``@@name`` is the text ``@name``.

        Raises:
            InvalidArguments: There is no such variable, or it is no data.
        """
        found, value = self._referenced(word)
        if found:
            return Value(as_data(value, word), None)
        value = literal(word)
        if not isinstance(value, str):
            return Value(value, word)
        text = self.text(word)
        return Value(value if text == word else text, text)

    def text(self, word: str) -> str:
        """A word as text, the variables put in.

        Raises:
            InvalidArguments: ``@name`` names no variable.
        """
        found, value = self._referenced(word)
        if found:
            return value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        if word.startswith("@@"):
            return word[1:]
        return _INSERTION.sub(self._inserted, word)

    def _inserted(self, match: re.Match[str]) -> str:
        name = match.group(1) or match.group(3)
        if name not in self.names:
            return match.group()
        try:
            # The notebook's owner typed it into a cell of that notebook, where all is executed.
            return str(eval((match.group(2) or name).strip(), {}, dict(self.names)))  # noqa: S307  # the notebook's own words
        except Exception as failure:  # noqa: BLE001  # the user's own code: as in IPython, the text then stays
            log.debug("kept the text of a word: its expression raised %s", type(failure).__name__)
            return match.group()

    def get(self, name: str) -> Any:
        """The variable of that name.

        Raises:
            InvalidArguments: There is none.
        """
        try:
            return self.names[name]
        except KeyError:
            raise errors.InvalidArguments(
                f"the notebook has no variable {name!r}: assign it first (the text @{name} is written @@{name})"
            ) from None

    def _referenced(self, word: str) -> tuple[bool, Any]:
        match = _REFERENCE.fullmatch(word)
        if match is None:
            return False, None
        name = match.group(1) or match.group(2)
        if word.startswith("@") or name in self.names:
            return True, self.get(name)
        return False, None


def as_data(value: Any, word: str) -> Any:
    """A variable's value as JSON-able data.

    Raises:
        InvalidArguments: It cannot be written as JSON; the message names the variable and its type.
    """
    to_dict = getattr(value, "toDict", None)
    try:
        return to_jsonable_python(to_dict() if to_dict is not None else value, inf_nan_mode="constants")
    except (PydanticSerializationError, ValueError) as failure:
        raise errors.InvalidArguments(
            f"{word}: a {type(value).__name__} is not data: give text, numbers, lists, dicts or pydantic models"
        ) from failure


def mapping(cell: str, *, what: str) -> dict[str, Value]:
    """A cell's JSON or YAML mapping.

    YAML's scalars are those of YAML 1.2: ``yes`` is text, ``2026-11-23`` is text, ``010`` is text.

    Raises:
        InvalidArguments: It is neither; the message names the line.
    """
    try:
        data = _json(cell)
        texts: Any = {}
    except (ValueError, RecursionError):
        data, texts = _yaml(cell, what=what)
    if not isinstance(data, dict):
        raise errors.InvalidArguments(
            f"the cell holds no {what}: write a mapping, one `name: value` a line, or JSON"
        )
    return {
        str(name): Value(as_data(value, str(name)), text if isinstance(text := texts.get(str(name)), str) else None)
        for name, value in data.items()
    }


def _yaml(cell: str, *, what: str) -> tuple[Any, Any]:
    """The cell's values, and the same with every scalar as its text."""
    import yaml  # loaded when the first such cell runs

    try:
        # Both loaders are safe ones: they build plain data only.
        return yaml.load(cell, _scalar_loader()), yaml.load(cell, yaml.BaseLoader)  # noqa: S506  # both make plain data only
    except (yaml.YAMLError, ValueError, RecursionError) as failure:
        mark = getattr(failure, "problem_mark", None)
        where = f" (line {mark.line + 1}: {getattr(failure, 'problem', '')})" if mark else ""
        raise errors.InvalidArguments(
            f"the cell is neither JSON nor YAML{where}: write {what} as `name: value`; text with a colon or a "
            "quote goes in quotes or below `name: |`"
        ) from failure


@functools.cache
def _scalar_loader() -> Any:
    """A safe loader whose plain scalars are YAML 1.2's: 1.1 turns ``no``, ``12:30`` and dates into other things."""
    import yaml

    kept = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
    resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag in kept]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    loader = type("ScalarLoader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": resolvers})
    for kind, pattern, first in (
        ("bool", r"(?:true|True|false|False)$", "tTfF"),
        ("int", r"[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
        ("float", r"[-+]?(?:0|[1-9][0-9]*)\.[0-9]+(?:[eE][-+]?[0-9]+)?$", "-+0123456789"),
    ):
        yaml.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(pattern), list(first), Loader=loader)
    return loader
