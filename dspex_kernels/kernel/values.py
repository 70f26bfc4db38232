"""Python values become JSON values: what a program answers, and what a record holds.

Never by ``repr()``: an object's text may hold a secret. What has no JSON form becomes ``{"$unserialisable": its type's
name}``, so that a reader sees that something was there, and what.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any
from uuid import UUID

import dspy
import orjson
import pydantic
import pydantic_core

from dspex_kernels.protocol.limits import MAX_DEPTH

UNSERIALISABLE = "$unserialisable"
"""The one key of what stands for a value without a JSON form."""

BASE64 = "$base64"
"""The one key of what stands for bytes."""

_DEEPEST = MAX_DEPTH - 8  # a reply wraps what a program answers in a few levels of its own
_MAX_VALUES = 2_000_000  # a small structure that shares its parts may unfold to 2**60 values
_LARGEST_INT = 2**63 - 1  # beyond it JSON readers, orjson among them, fail or round


class NotJSON(Exception):
    """A value has no JSON form. Its text names the type and the place; raised by ``to_strict_json`` only."""


def to_json(value: Any) -> Any:
    """``value`` as JSON values: null, booleans, numbers, strings, arrays, objects with string keys.

    Predictions and pydantic models become objects, dates ISO 8601 strings, enum members their values, tuples and
    sets arrays (sets in a stable order), bytes ``{"$base64": …}``, ``nan`` and infinities null, integers beyond 64
    bits strings. Nesting is cut at 56 levels and at cycles.

    Args:
        value: Anything.

    Returns:
        A new value; what has no JSON form is ``{"$unserialisable": "type name"}``.
    """
    return _Conversion(_mark).convert(value, 0, "")


def to_strict_json(value: Any) -> Any:
    """``to_json`` for what must not be lost.

    Raises:
        NotJSON: Something in it has no JSON form, or it nests too deep.
    """
    return _Conversion(_refuse).convert(value, 0, "")


def _mark(what: str, _where: str) -> Any:
    return {UNSERIALISABLE: what}


def _refuse(what: str, where: str) -> Any:
    raise NotJSON(f"{where.lstrip('.') or 'the value'} is {what}, which has no JSON form")


class _Conversion:
    """One value's conversion.

    Args:
        unknown: Called with what a value without a JSON form is, and where it stands; its answer stands instead.
    """

    def __init__(self, unknown: Callable[[str, str], Any]) -> None:
        self._unknown = unknown
        self._values = 0
        self._open: set[int] = set()

    def convert(self, value: Any, depth: int, where: str) -> Any:
        self._values += 1
        match value:
            case None | bool():
                return value
            case Enum():
                return self.convert(value.value, depth, where)
            case str():
                return _text(value)
            case int():
                return int(value) if abs(value) <= _LARGEST_INT else str(int(value))
            case float():
                return float(value) if math.isfinite(value) else None
        if depth >= _DEEPEST or self._values > _MAX_VALUES:
            return self._unknown("nested too deep or too large", where)
        if id(value) in self._open:
            return self._unknown("a cycle", where)
        self._open.add(id(value))
        try:
            return self._compound(value, depth + 1, where)
        finally:
            self._open.discard(id(value))

    def _compound(self, value: Any, depth: int, where: str) -> Any:
        match value:
            case Mapping():
                return {_key(key): self.convert(item, depth, f"{where}.{_key(key)}") for key, item in value.items()}
            case list() | tuple():
                return [self.convert(item, depth, f"{where}[{index}]") for index, item in enumerate(value)]
            case AbstractSet():
                return sorted((self.convert(item, depth, where) for item in value), key=_order)
            case dspy.Example():
                # Read past the methods: a field may be called `items`.
                return {key: self.convert(item, depth, f"{where}.{key}") for key, item in value._store.items()}
            case pydantic.BaseModel():
                return self._model(value, depth, where)
        return self._leaf(value, depth, where)

    def _model(self, value: pydantic.BaseModel, depth: int, where: str) -> Any:
        if isinstance(value, dspy.Type):
            formatted = value.format()
            if not isinstance(formatted, list):  # code and reasoning are text
                return self.convert(formatted, depth, where)
            # An image's own serialiser writes a mark for DSPy's adapters, which means nothing to others.
            fields = {name: getattr(value, name) for name in type(value).model_fields}
            return self.convert({name: item for name, item in fields.items() if item is not None}, depth, where)
        try:
            data = value.model_dump(warnings=False)
        except (pydantic_core.PydanticSerializationError, ValueError, TypeError, AttributeError):
            return self._unknown(type(value).__qualname__, where)
        return self.convert(data, depth, where)

    def _leaf(self, value: Any, depth: int, where: str) -> Any:
        match value:
            case date() | time():
                return value.isoformat()
            case timedelta():
                return pydantic_core.to_jsonable_python(value)
            case UUID() | Decimal() | PurePath():
                return str(value)
            case bytes() | bytearray():
                return {BASE64: base64.b64encode(value).decode("ascii")}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return self.convert(fields, depth, where)
        if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
            return self.convert(value.tolist(), depth, where)
        return self._unknown(type(value).__qualname__, where)


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, as a model may write: no JSON writer takes it
        return value.encode("utf-8", "replace").decode()
    return str.__str__(value)


def _key(key: Any) -> str:
    match key:
        case str():
            return _text(key)
        case Enum():
            return _key(key.value)
        case None | bool():
            return {None: "null", True: "true", False: "false"}[key]
        case int() | float() | UUID() | Decimal():
            return str(key)
        case date() | time():
            return key.isoformat()
    return f"<{type(key).__qualname__}>"


def _order(value: Any) -> bytes:
    # The order of a set of strings differs from process to process: the same answer would read differently.
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
