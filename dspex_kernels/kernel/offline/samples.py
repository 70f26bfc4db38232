"""Makes one value that fits a JSON Schema, the same one for the same draw: what the offline LM fills fields with.

Understood: types, ``enum``, ``const``, ``$ref`` (recursive too), ``anyOf``, ``oneOf``, ``allOf``, bounds, lengths,
``multipleOf``, ``uniqueItems``, ``prefixItems``, ``additionalProperties``, ``propertyNames``, the usual ``format``
words and ``pattern``. The first alternative of a union is taken, null last; a recursive schema is followed once
and then ended at its first chance (a null, an empty array, an optional property left out); so is a huge one.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

Schema = dict[str, Any]
Draw = Callable[[str], int]
"""The path of a value within its field → a non-negative integer, always the same one."""

# A client's schema may be wide, endless or ask for gigabytes; a kernel answers it all the same.
MAX_DEPTH = 40
AMPLE = 1_000  # values, after which only what is required is filled
MAX_VALUES = 20_000  # values in all, and items of one array
MAX_LENGTH = 100_000  # characters of one string
DEFAULT_ITEMS = 2

FORMATS: dict[str, Callable[[int], str]] = {
    "date": lambda n: f"2024-{n % 12 + 1:02d}-{n // 12 % 28 + 1:02d}",
    "date-time": lambda n: f"2024-{n % 12 + 1:02d}-{n // 12 % 28 + 1:02d}T{n % 24:02d}:{n // 24 % 60:02d}:00Z",
    "time": lambda n: f"{n % 24:02d}:{n // 24 % 60:02d}:00",
    "duration": lambda n: f"PT{n % 1000 + 1}S",
    "uuid": lambda n: f"{n % 16**8:08x}-0000-4000-8000-{n % 16**12:012x}",
    "email": lambda n: f"offline{n % 1000}@example.org",
    "uri": lambda n: f"https://offline.example.org/{n % 10_000}",
    "hostname": lambda n: f"offline{n % 1000}.example.org",
    "ipv4": lambda n: f"192.0.2.{n % 254 + 1}",
    "ipv6": lambda n: f"2001:db8::{n % 0xFFFF:x}",
    "ipv4network": lambda n: "192.0.2.0/24",
    "ipv6network": lambda n: "2001:db8::/32",
    "ipv4interface": lambda n: f"192.0.2.{n % 254 + 1}/24",
    "ipv6interface": lambda n: f"2001:db8::{n % 0xFFFF:x}/32",
}
FORMATS |= {
    "multi-host-uri": FORMATS["uri"],
    "ipvanyaddress": FORMATS["ipv4"],
    "ipvanyinterface": FORMATS["ipv4interface"],
    "ipvanynetwork": FORMATS["ipv4network"],
}


def sample(schema: Schema, draw: Draw, *, name: str, quote: str = "") -> Any:
    """A value that fits the schema.

    Args:
        schema: A JSON Schema as pydantic writes it; ``{}`` fits anything and gets a string.
        draw: The source of what is not fixed by the schema.
        name: What the value is called; strings carry it.
        quote: What the outermost string answers to; empty for nothing.

    Returns:
        JSON-able data. Best effort where nothing finite fits, or where a pattern is beyond Python's ``re``.
    """
    definitions = schema.get("$defs") or schema.get("definitions") or {}
    return _Sampler(definitions, draw, quote).value(schema, _Place(name, name))


def text(name: str, number: int, quote: str = "", *, shortest: int = 0, longest: int | None = None) -> str:
    """A string that says that it is offline, of a length within the bounds where they let it.

    Args:
        name: What the text is; underscores become spaces.
        number: Drawn; its last four digits are shown.
        quote: What the text answers to; empty for nothing.
        shortest: Characters at least.
        longest: Characters at most; None is no limit.
    """
    shortest = min(shortest, MAX_LENGTH)
    label = f"{name.replace('_', ' ')} #{number % 10_000:04d}"
    full = f"[offline] {label} to “{quote}”" if quote else f"[offline] {label}"
    if longest is None:
        return full.ljust(shortest, ".")
    fitting = (t for t in (full, f"[offline] {label}", f"offline #{number % 10_000:04d}") if len(t) <= longest)
    return next(fitting, "offline"[: max(longest, 0)]).ljust(min(shortest, longest), ".")


@dataclass(frozen=True)
class _Place:
    """Where in a field a value stands."""

    path: str
    name: str
    depth: int = 0
    entered: dict[str, int] = field(default_factory=dict)  # definitions on the way here → how often

    def child(self, name: str, called: str | None = None) -> _Place:
        return replace(self, path=f"{self.path}.{name}", name=called or name, depth=self.depth + 1)

    def enter(self, definition: str) -> _Place:
        return replace(self, entered={**self.entered, definition: self.entered.get(definition, 0) + 1})


@dataclass
class _Sampler:
    definitions: dict[str, Schema]
    draw: Draw
    quote: str
    made: int = 0

    def value(self, schema: Schema, at: _Place) -> Any:
        self.made += 1
        if at.depth > MAX_DEPTH or self.made > MAX_VALUES:
            return None
        schema, at = self._resolve(schema, at)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return schema["enum"][self.draw(at.path) % len(schema["enum"])]
        if alternatives := schema.get("anyOf") or schema.get("oneOf"):
            return self.value(self._choose(alternatives, at), at)
        match kind_of(schema):
            case "object":
                return self._object(schema, at)
            case "array":
                return self._array(schema, at)
            case "integer" | "number" as kind:
                return _number(schema, self.draw(at.path), whole=kind == "integer")
            case "boolean":
                return bool(self.draw(at.path) % 2)
            case "null":
                return None
        return self._string(schema, at)

    def _resolve(self, schema: Schema, at: _Place) -> tuple[Schema, _Place]:
        """The schema with its references and ``allOf`` merged in."""
        while "$ref" in schema or "allOf" in schema:
            merged: Schema = {}
            for part in schema.get("allOf", ()):
                resolved, at = self._resolve(part, at)
                merged |= resolved
            if reference := schema.get("$ref"):
                definition = str(reference).rsplit("/", 1)[-1]
                at = at.enter(definition)
                if at.entered[definition] > MAX_DEPTH:
                    return {"type": "null"}, at
                merged |= self.definitions.get(definition, {})
            schema = merged | {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
        return schema, at

    def _is_recursive(self, schema: Schema, at: _Place) -> bool:
        """Whether following it would enter a definition for a third time."""
        definition = str(schema.get("$ref", "")).rsplit("/", 1)[-1]
        if at.entered.get(definition, 0) > 1:
            return True
        nested = [schema.get("items"), schema.get("additionalProperties")]
        alternatives = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
        if alternatives:
            return all(self._is_recursive(s, at) for s in alternatives if kind_of(s) != "null")
        return any(isinstance(s, dict) and self._is_recursive(s, at) for s in nested)

    def _is_left_out(self, schema: Schema, at: _Place) -> bool:
        return self.made > AMPLE or self._is_recursive(schema, at)

    def _choose(self, alternatives: list[Schema], at: _Place) -> Schema:
        enough = self.made > AMPLE
        return min(alternatives, key=lambda s: (self._is_recursive(s, at), (kind_of(s) == "null") != enough))

    def _object(self, schema: Schema, at: _Place) -> dict[str, Any]:
        required = schema.get("required", ())
        found = {
            name: self.value(child, at.child(name))
            for name, child in schema.get("properties", {}).items()
            if name in required or not self._is_left_out(child, at)
        }
        extra = schema.get("additionalProperties")
        if found or "properties" in schema or extra in (None, False):
            return found
        extra = extra if isinstance(extra, dict) else {}
        least = 0 if self._is_left_out(extra, at) else 1
        for index in range(min(max(schema.get("minProperties", 0), least), MAX_VALUES)):
            # A mapping's key type shows only through propertyNames, and dict[int, …] not at all: "1" fits both.
            named = schema.get("propertyNames") or {"const": str(index + 1)}
            key = self.value({"type": "string", **named}, at.child(f"key {index + 1}"))
            found[str(key)] = self.value(extra, at.child(str(key), at.name))
        return found

    def _array(self, schema: Schema, at: _Place) -> list[Any]:
        fixed = schema.get("prefixItems", ())
        items = [self.value(child, at.child(str(i + 1), f"{at.name} {i + 1}")) for i, child in enumerate(fixed)]
        item, shortest = schema.get("items", {}), schema.get("minItems", 0)
        if item is False or (fixed and not item):
            return items
        count = max(shortest, 0 if self._is_left_out(item, at) else DEFAULT_ITEMS)
        count = min(count, schema.get("maxItems", count), MAX_VALUES)
        unique = schema.get("uniqueItems", False)
        for attempt in range(count * (20 if unique else 1)):
            if len(items) >= count:
                break
            made = self.value(item, at.child(str(attempt + 1), f"{at.name} {attempt + 1}"))
            if not unique or made not in items:
                items.append(made)
        return items

    def _string(self, schema: Schema, at: _Place) -> str:
        if schema.get("contentMediaType") == "application/json":
            return json.dumps(self.value(schema.get("contentSchema", {}), at.child("content")))
        number = self.draw(at.path)
        if write := FORMATS.get(schema.get("format", "")):
            return write(number)
        if (pattern := schema.get("pattern")) and (matching := _match(pattern, number)) is not None:
            return matching
        bounds = {"shortest": schema.get("minLength", 0), "longest": schema.get("maxLength")}
        return text(at.name, number, self.quote if at.depth == 0 else "", **bounds)


def kind_of(schema: Schema) -> str:
    """The schema's type, the one that is not null where it names several; "" when it names none."""
    named = schema.get("type", "object" if "properties" in schema else "")
    if isinstance(named, list):
        return next((str(kind) for kind in named if kind != "null"), "null")
    return str(named)


def _number(schema: Schema, number: int, *, whole: bool) -> float:
    """A number within the bounds, as a multiple of the step where there is one."""
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    lowest = max((v for v in (low, above) if v is not None), default=None)
    highest = min((v for v in (high, below) if v is not None), default=None)
    if lowest is None:
        lowest = min(0, highest - 100) if highest is not None else 0
    if highest is None:
        highest = lowest + 100
    step = schema.get("multipleOf") or (1 if whole else None)
    if step is None:
        made: float = round(lowest + (highest - lowest) * (number % 899 + 50) / 1000, 3)
        return made if lowest < made < highest else (lowest + highest) / 2
    first, last = math.ceil(lowest / step), math.floor(highest / step)
    first += above is not None and first * step <= above
    last -= below is not None and last * step >= below
    chosen = (first + number % (max(last - first, 0) + 1)) * step
    return int(chosen) if whole else round(chosen, 10)


def _match(pattern: str, number: int) -> str | None:
    """A string that the pattern finds, or None when it is beyond this small generator."""
    parser = importlib.import_module(
        "re._parser"
    )  # the standard library's own reading of a pattern; no stub names it
    try:
        made = "".join(_generate(parser.parse(pattern), number))
        return made if re.search(pattern, made) else None
    except (re.error, NotImplementedError, OverflowError, RecursionError):
        return None


def _generate(parsed: Any, number: int) -> list[str]:
    made = []
    for index, (operation, argument) in enumerate(parsed):
        drawn = (number >> (index * 3 % 40)) + index
        match str(operation):
            case "LITERAL":
                made.append(chr(argument))
            case "ANY":
                made.append("offline"[drawn % 7])
            case "IN":
                made.append(_one_of(argument, drawn))
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                least, most, repeated = argument
                count = min(max(least, 1), most)
                for repetition in range(count):
                    made += _generate(repeated, drawn + repetition * 7)
                    if len(made) > MAX_LENGTH:
                        raise NotImplementedError("a string that long")
            case "SUBPATTERN":
                made += _generate(argument[-1], drawn)
            case "BRANCH":
                made += _generate(argument[1][drawn % len(argument[1])], drawn)
            case "AT":
                pass
            case other:
                raise NotImplementedError(other)
    return made


def _one_of(members: list[tuple[Any, Any]], number: int) -> str:
    """A character of a class such as ``[a-z0-9_]``; categories stand for their plainest member."""
    if str(members[0][0]) == "NEGATE":
        excluded = members[1:]
        plain = (c for c in "offline0_ -.ABC" if not any(_is_member(c, member) for member in excluded))
        return next(plain, "")
    operation, argument = members[number % len(members)]
    match str(operation):
        case "LITERAL":
            return chr(argument)
        case "RANGE":
            first, last = argument
            return chr(first + number % (last - first + 1))
    return {"CATEGORY_DIGIT": str(number % 10), "CATEGORY_SPACE": " ", "CATEGORY_NOT_DIGIT": "o"}.get(
        str(argument), "o"
    )


def _is_member(character: str, member: tuple[Any, Any]) -> bool:
    operation, argument = member
    match str(operation):
        case "LITERAL":
            return bool(ord(character) == argument)
        case "RANGE":
            return bool(argument[0] <= ord(character) <= argument[1])
    classes = {"DIGIT": r"\d", "SPACE": r"\s", "WORD": r"\w"}
    inverted = "NOT_" in str(argument)
    found = re.match(classes[str(argument).rsplit("_", 1)[-1]], character) is not None
    return found != inverted
