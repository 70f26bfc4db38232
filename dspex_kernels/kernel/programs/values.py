"""What a program computed, as JSON: every Python value becomes data, nothing is shown by its ``repr``."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import decimal
import enum
import math
import uuid
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import dspy
import orjson
import pydantic
import pydantic_core

from dspex_kernels import errors
from dspex_kernels.protocol import limits

MAX_NODES = 1_000_000
"""Values in one result, containers counted too."""

_INT64_MIN, _UINT64_MAX = -(2**63), 2**64 - 1
_MAX_INT_BITS = 10_000  # Python refuses the decimal text of much longer ones


def to_json(value: Any, *, depth: int = limits.MAX_DEPTH) -> Any:
    """The JSON form of any value, as dict, list, str, int, float, bool and None.

    What JSON has no word for becomes an object with one key: ``{"$bytes": base64}``,
    ``{"$float": "NaN" | "Infinity" | "-Infinity"}``, ``{"$int": decimal}`` beyond 64 bits,
    ``{"$pairs": [[key, value], …]}`` for a mapping whose keys are no distinct texts, and
    ``{"$unserialisable": "module.Type"}`` for everything else: a ``repr`` could hold a secret.

    Args:
        value: Anything. Predictions and Examples give their fields; sets are sorted, so that equal sets look
            alike; a timedelta becomes seconds.
        depth: Nesting that is allowed, 1 to ``limits.MAX_DEPTH``.

    Raises:
        TooLarge: The value is nested more deeply (or contains itself), or is larger than a result may be.
    """
    return _Walk(depth).json(value, 0)


class _Walk:
    """One pass over one value, with what it has used of its bounds."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._nodes = 0
        self._characters = 0

    def json(self, value: Any, level: int) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise errors.TooLarge(f"The value has more than {MAX_NODES:,} parts; return less of it.")
        if level > self._depth:
            raise errors.TooLarge(
                f"The value is nested more than {self._depth} levels deep or contains itself; return a flatter one."
            )
        if value is None or value is True or value is False:
            return value
        if isinstance(value, enum.Enum):
            return self.json(value.value, level + 1)
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, int):
            return _integer(int(value))
        if isinstance(value, float):
            return _number(float(value))
        if isinstance(value, Mapping):
            return self._mapping(value.items(), level)
        if isinstance(value, list | tuple):
            return [self.json(item, level + 1) for item in value]
        if isinstance(value, set | frozenset):
            return sorted((self.json(item, level + 1) for item in value), key=_sort_key)
        return self._object(value, level)

    def _object(self, value: Any, level: int) -> Any:
        match value:
            case datetime.date() | datetime.time():  # a datetime is a date
                return value.isoformat()
            case datetime.timedelta():
                return value.total_seconds()
            case decimal.Decimal() | uuid.UUID() | PurePath():
                return self._text(str(value))
            case bytes() | bytearray() | memoryview():
                return {"$bytes": self._text(base64.b64encode(value).decode("ascii"))}
            case dspy.Example():  # a Prediction is one; `items` leaves its completions out
                return self._mapping(value.items(), level)
            case dspy.Reasoning():
                return self._text(value.content)
            case dspy.Type():
                # Its own serialiser writes markup for prompts.
                return self._mapping(((name, getattr(value, name)) for name in type(value).model_fields), level)
            case pydantic.BaseModel():
                return self._model(value, level)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._mapping(((f.name, getattr(value, f.name)) for f in dataclasses.fields(value)), level)
        if _is_array_like(value):
            return self.json(value.tolist(), level + 1)
        return _unserialisable(value)

    def _model(self, model: pydantic.BaseModel, level: int) -> Any:
        try:
            dumped = pydantic_core.to_jsonable_python(
                model, by_alias=True, inf_nan_mode="constants", bytes_mode="base64", fallback=_unserialisable
            )
        except (ValueError, TypeError, RecursionError, AttributeError):  # its own serialiser failed, or a cycle
            return _unserialisable(model)
        return self.json(dumped, level)

    def _mapping(self, items: Iterable[tuple[Any, Any]], level: int) -> dict[str, Any]:
        pairs = [(key, self.json(value, level + 1)) for key, value in items]
        by_text = {text: value for key, value in pairs if (text := _key_text(key)) is not None}
        if len(by_text) == len(pairs):
            for text in by_text:
                self._count(len(text))
            return by_text
        return {"$pairs": [[self.json(key, level + 2), value] for key, value in pairs]}

    def _text(self, value: str) -> str:
        self._count(len(value))
        return _clean(value)

    def _count(self, length: int) -> None:
        self._characters += length
        if self._characters > limits.MAX_RESULT_BYTES:
            raise errors.TooLarge(
                f"The value has more than {limits.MAX_RESULT_BYTES:,} characters of text; return less of it."
            )


def _integer(value: int) -> Any:
    if _INT64_MIN <= value <= _UINT64_MAX:
        return value
    if value.bit_length() > _MAX_INT_BITS:
        raise errors.TooLarge(
            f"An integer has {value.bit_length():,} bits, more than {_MAX_INT_BITS:,}; return a shorter one."
        )
    return {"$int": str(value)}


def _number(value: float) -> Any:
    if math.isfinite(value):
        return value
    return {"$float": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}


def _clean(text: str) -> str:
    # Lone surrogates (an undecodable file name, a cut emoji) have no UTF-8 and would fail the whole reply.
    plain = str.__str__(text)
    return plain if plain.isascii() else plain.encode("utf-8", "replace").decode("utf-8")


def _key_text(key: Any) -> str | None:
    """The text of a mapping's key; None where there is none that says what it was."""
    if isinstance(key, enum.Enum):
        return _key_text(key.value)
    if isinstance(key, str):
        return _clean(key)
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    if isinstance(key, int):
        return str(key) if key.bit_length() <= _MAX_INT_BITS else None
    if isinstance(key, float | decimal.Decimal | uuid.UUID | PurePath):
        return str(key)
    if isinstance(key, datetime.date | datetime.time):
        return key.isoformat()
    return None


def _is_array_like(value: Any) -> bool:
    kind = type(value)  # asked of the class: an object that answers to every name must not pass
    return hasattr(kind, "dtype") and all(callable(getattr(kind, word, None)) for word in ("tolist", "item"))


def _unserialisable(value: Any) -> dict[str, str]:
    kind = value if isinstance(value, type) else type(value)
    return {"$unserialisable": f"{kind.__module__}.{kind.__qualname__}"}


def _sort_key(value: Any) -> tuple[str, Any]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return ("0", value) if number else ("1", orjson.dumps(value, option=orjson.OPT_SORT_KEYS))
