"""Keys are taken out of texts: a provider may echo the key that it refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

MIN_SECRET = 6
"""Characters of the shortest key that is looked for in texts: a shorter one is no secret, and a common word."""

PLACEHOLDER = "«secret»"

MAX_CHAIN = 20
"""Causes of an exception that are looked into."""


def scrub(text: str, secrets: Iterable[str]) -> str:
    """``text`` without the secrets, as they are and as JSON writes them."""
    for secret in secrets:
        if isinstance(secret, str) and len(secret) >= MIN_SECRET:
            text = text.replace(secret, PLACEHOLDER).replace(orjson.dumps(secret).decode()[1:-1], PLACEHOLDER)
    return text


def scrub_exception(failure: BaseException, secrets: Iterable[str]) -> None:
    """Take the secrets out of an exception and its causes, in place."""
    known = [secret for secret in secrets if isinstance(secret, str) and len(secret) >= MIN_SECRET]
    link: BaseException | None = failure
    for _ in range(MAX_CHAIN):
        if link is None or not known:
            return
        link.args = tuple(_scrubbed(arg, known) for arg in link.args)
        for name, value in list(vars(link).items()):
            if isinstance(value, str):
                setattr(link, name, scrub(value, known))
        link = link.__cause__ or link.__context__


def _scrubbed(value: Any, secrets: list[str]) -> Any:
    return scrub(value, secrets) if isinstance(value, str) else value
