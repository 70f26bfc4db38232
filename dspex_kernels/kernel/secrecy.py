"""Keys are taken out of texts: a provider may echo the key that it refused."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

MIN_SECRET = 6
"""Characters of the shortest key that is looked for in texts: a shorter one is no secret, and a common word."""

PLACEHOLDER = "«secret»"

MAX_CHAIN = 20
"""Causes and contexts of an exception that are looked into."""

_SECRET_NAMES = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")


def scrub(text: str, secrets: Iterable[str]) -> str:
    """``text`` without the secrets, as they are and as JSON writes them."""
    for secret in secrets:
        if isinstance(secret, str) and len(secret) >= MIN_SECRET:
            text = text.replace(secret, PLACEHOLDER).replace(orjson.dumps(secret).decode()[1:-1], PLACEHOLDER)
    return text


def environment_keys(environ: Mapping[str, str] | None = None) -> set[str]:
    """Values of the variables whose names say that they are keys: DSPy reads a provider's by itself.

    Args:
        environ: None is the process's own.
    """
    variables = os.environ if environ is None else environ
    return {value for name, value in variables.items() if name.upper().endswith(_SECRET_NAMES)}


def scrub_exception(failure: BaseException, secrets: Iterable[str]) -> None:
    """Take the secrets out of an exception and of what it came from, in place."""
    known = [secret for secret in secrets if isinstance(secret, str) and len(secret) >= MIN_SECRET]
    left: list[BaseException | None] = [failure]
    seen: set[int] = set()
    while left and known and len(seen) < MAX_CHAIN:
        link = left.pop(0)
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        # Past the class's own __setattr__, which may forbid it (a frozen dataclass).
        BaseException.__setattr__(link, "args", _scrubbed(link.args, known))
        told = vars(link)
        told.update({name: _scrubbed(value, known) for name, value in told.items()})
        left += [link.__cause__, link.__context__]


def _scrubbed(value: Any, secrets: list[str]) -> Any:
    match value:
        case str():
            return scrub(value, secrets)
        case list() | tuple() if type(value) in (list, tuple):
            return type(value)(_scrubbed(item, secrets) for item in value)
        case dict():
            return {key: _scrubbed(item, secrets) for key, item in value.items()}
    return value
