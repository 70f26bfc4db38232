"""The words of types: a client's text becomes an annotation, and nothing else happens.

DSPy's own parser looks unknown words up in the caller's frames and then imports a module of that name, so that the
signature ``"q: this -> a"`` runs the module ``this``. Here a text is parsed, never evaluated, and a word is one of
``WORDS`` or refused. A type may also be a JSON Schema object: ``schema_types``.

Not here, for they take no JSON: ``dspy.Tool`` and ``dspy.ToolCalls`` (tools are given by name), documents and
citations.
"""

from __future__ import annotations

import ast
import datetime
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, NoneType
from typing import Any, Literal, NoReturn

import dspy
import orjson
import pydantic
from dspy.adapters.utils import get_annotation_name
from pydantic_core import PydanticUndefined

from dspex_kernels import errors
from dspex_kernels.kernel.schema_types import SchemaType, from_schema

MAX_TEXT = 10_000
"""Characters of a type."""

MAX_DEPTH = 16
"""Nesting of a type's brackets."""

MAX_WORDS = 1000
"""Words and values in one type."""

_SCALARS: dict[str, Any] = {
    "str": str, "int": int, "float": float, "bool": bool, "None": NoneType, "Any": Any,
    "date": datetime.date, "datetime": datetime.datetime, "time": datetime.time,
}  # fmt: skip
_DSPY = {name: getattr(dspy, name) for name in ("Image", "Audio", "File", "History", "Code", "Reasoning")}
_CONTAINERS: dict[str, Any] = {"list": list, "dict": dict, "tuple": tuple, "set": set}
_FORMS = ("Optional", "Union", "Literal")

_PLAIN = {**_SCALARS, **_DSPY, **_CONTAINERS}
_ALIASES = {
    **{f"datetime.{name}": name for name in ("date", "datetime", "time")},
    **{f"dspy.{name}": name for name in _DSPY},
    **{name.capitalize(): name for name in _CONTAINERS},
    **{f"typing.{name.capitalize()}": name for name in _CONTAINERS},
    **{f"typing.{name}": name for name in ("Any", *_FORMS)},
}

WORDS = (
    "str", "int", "float", "bool", "list[T]", "dict[K, V]", "tuple[…]", "set[T]", "Literal[…]", "Optional[T]",
    "Union[…]", "A | B", "None", "Any", "date", "datetime", "time", *(f"dspy.{name}" for name in _DSPY),
)  # fmt: skip
"""What a type's text may say."""

_NOT_JSON = {
    "Tool": "a tool is given by name, in the program's tools",
    "ToolCalls": "ReAct calls tools by itself",
    "bytes": "JSON has no bytes: use str",
    "object": "use dict[str, Any], or a JSON Schema object",
    "Enum": "use Literal[…]",
    "BaseModel": "use a JSON Schema object",
}
_HASHABLE = (str, int, float, bool, NoneType, datetime.date, datetime.datetime, datetime.time)


@dataclass(frozen=True)
class FieldType:
    """What a field takes.

    Attributes:
        given: As it stands in a record: canonical text, or the JSON Schema.
        annotation: What DSPy gets.
        constraints: pydantic's ``Field`` arguments that belong to the annotation (``ge``, ``max_length``, …). DSPy
            tells them to the model; it does not hold the model's answer to them.
        default: Used when the field is left out; ``PydanticUndefined`` is none.
        note: A constraint that DSPy has no words for: a pattern, a format.
    """

    given: str | dict[str, Any]
    annotation: Any
    constraints: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    default: Any = PydanticUndefined
    note: str = ""

    @functools.cached_property
    def adapter(self) -> pydantic.TypeAdapter[Any]:
        """Validates a value; built when it is first used, then kept."""
        if not self.constraints:
            return pydantic.TypeAdapter(self.annotation)
        return pydantic.TypeAdapter(typing.Annotated[self.annotation, pydantic.Field(**self.constraints)])

    @functools.cached_property
    def label(self) -> str:
        """A short text for people."""
        if isinstance(self.given, str):
            return self.given
        return str(self.given.get("title") or get_annotation_name(self.annotation))

    @property
    def may_be_left_out(self) -> bool:
        """Whether an input of this type may be missing: it has a default, or takes null."""
        return self.default is not PydanticUndefined or allows_none(self.annotation)


def field_type(name: str, given: str | Mapping[str, Any]) -> FieldType:
    """The type of a field.

    Args:
        name: The field's; named in errors, and in the names of the models that a schema makes.
        given: A text of the words ``WORDS``, or a JSON Schema object.

    Returns:
        The same object for the same arguments: models made of a schema are not made twice.

    Raises:
        InvalidType: It names the field, the bad word and the words there are.
    """
    if isinstance(given, str):
        return _from_text(name, given)
    try:
        # The order of the properties is the order in the prompt, so it is part of the key.
        return _from_schema(name, orjson.dumps(given))
    except (TypeError, orjson.JSONEncodeError) as failure:
        raise errors.InvalidType(
            f"field {name!r}: its JSON Schema is not JSON: {failure}", details={"field": name}
        ) from None


def allows_none(annotation: Any) -> bool:
    """Whether null fits."""
    return annotation in (None, NoneType, Any) or (
        typing.get_origin(annotation) is typing.Union and NoneType in typing.get_args(annotation)
    )


@functools.lru_cache(maxsize=256)
def _from_schema(name: str, schema: bytes) -> FieldType:
    data = orjson.loads(schema)
    made: SchemaType = from_schema(name, data)
    kept = FieldType(data, made.annotation, MappingProxyType(made.constraints), made.default, made.note)
    return kept


@functools.lru_cache(maxsize=1024)
def _from_text(name: str, text: str) -> FieldType:
    annotation, canonical = _Reader(name, text).read()
    return FieldType(canonical, annotation)


class _Reader:
    """Reads one type's text. Each step gives the annotation and its canonical text."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._text = text

    def read(self) -> tuple[Any, str]:
        if len(self._text) > MAX_TEXT:
            self._refuse(f"its type has {len(self._text):,} characters, the limit is {MAX_TEXT:,}")
        try:
            tree = ast.parse(self._text.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            self._refuse(f"{self._short()} is not a type", hint=True)
        if sum(1 for _ in ast.walk(tree)) > MAX_WORDS:
            self._refuse(f"its type has more than {MAX_WORDS} words and values")
        return self._type(tree.body, 0)

    def _type(self, node: ast.expr, depth: int) -> tuple[Any, str]:
        if depth > MAX_DEPTH:
            self._refuse(f"its type nests deeper than {MAX_DEPTH} levels")
        match node:
            case ast.Name() | ast.Attribute():
                return self._word(self._dotted(node))
            case ast.Constant(value=None):
                return NoneType, "None"
            case ast.BinOp(op=ast.BitOr()):
                return self._union([self._type(part, depth + 1) for part in _alternatives(node)], " | ")
            case ast.Subscript(value=value, slice=inner):
                parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
                return self._generic(_ALIASES.get(word := self._dotted(value), word), parts, depth + 1)
        return self._refuse(f"{ast.unparse(node)[:80]!r} is not a type", hint=True)

    def _word(self, word: str) -> tuple[Any, str]:
        name = _ALIASES.get(word, word)
        if name in _PLAIN:
            return _PLAIN[name], f"dspy.{name}" if name in _DSPY else name
        if name in _FORMS:
            self._refuse(f"{name} needs its types in brackets: {name}[…]")
        reason = _NOT_JSON.get(word.rpartition(".")[2])
        return self._refuse(f"there is no type {word[:80]!r}" + (f" ({reason})" if reason else ""), hint=True)

    def _generic(self, word: str, parts: list[ast.expr], depth: int) -> tuple[Any, str]:
        match word:
            case "Literal":
                return self._literal(parts)
            case "Code":
                return self._code(parts)
            case "tuple":
                return self._tuple(parts, depth)
            case "list" | "set" | "dict" | "Optional" | "Union":
                inner = [self._type(part, depth) for part in parts]
            case _:
                self._word(word)  # refuses a word that there is not
                self._refuse(f"{word} takes no brackets")
        wanted = {"list": 1, "set": 1, "Optional": 1, "dict": 2}.get(word, len(inner))
        if len(inner) != wanted:
            self._refuse(f"{word} takes {wanted} in its brackets, not {len(inner)}")
        if word == "Union":
            return self._union(inner, ", ")
        if word in ("set", "dict") and not _is_hashable(inner[0][0]):
            self._refuse(f"{inner[0][1]} cannot be {'a key' if word == 'dict' else 'in a set'}: use str, int, …")
        annotations = tuple(annotation for annotation, _ in inner)
        text = f"{word}[{', '.join(text for _, text in inner)}]"
        if word == "Optional":
            return typing.Optional[annotations[0]], text  # noqa: UP045  # made at run time
        return _CONTAINERS[word][annotations if word == "dict" else annotations[0]], text

    def _union(self, inner: list[tuple[Any, str]], joint: str) -> tuple[Any, str]:
        text = joint.join(text for _, text in inner)
        # typing.Union, not `|`: DSPy's own parser makes it, so the prompts are the same.
        return typing.Union[tuple(a for a, _ in inner)], text if joint == " | " else f"Union[{text}]"  # noqa: UP007

    def _tuple(self, parts: list[ast.expr], depth: int) -> tuple[Any, str]:
        if len(parts) == 2 and isinstance(parts[1], ast.Constant) and parts[1].value is Ellipsis:
            annotation, text = self._type(parts[0], depth)
            return tuple[annotation, ...], f"tuple[{text}, ...]"
        if not parts:
            self._refuse("tuple needs its types: tuple[int, str], tuple[int, ...]")
        inner = [self._type(part, depth) for part in parts]
        return tuple[tuple(a for a, _ in inner)], f"tuple[{', '.join(text for _, text in inner)}]"

    def _literal(self, parts: list[ast.expr]) -> tuple[Any, str]:
        values = [self._value(part) for part in parts]
        if not values:
            self._refuse("Literal needs its values: Literal['yes', 'no']")
        return Literal[tuple(values)], f"Literal[{', '.join(map(repr, values))}]"

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=str() | int() | None as value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as value)):
                return -value
        return self._refuse(f"{ast.unparse(node)[:80]} cannot be in Literal: use strings, whole numbers, booleans")

    def _code(self, parts: list[ast.expr]) -> tuple[Any, str]:
        match parts:
            case [ast.Constant(value=str() as language)] | [ast.Name(id=language)]:
                if language.isidentifier() and len(language) <= 32:
                    return code_in(language), f"dspy.Code[{language!r}]"
        return self._refuse('Code takes one language: Code["python"]')

    def _dotted(self, node: ast.expr) -> str:
        match node:
            case ast.Name(id=name):
                return name
            case ast.Attribute(value=ast.Name(id=prefix), attr=name):
                return f"{prefix}.{name}"
        return self._refuse(f"{ast.unparse(node)[:80]!r} is not a type", hint=True)

    def _short(self) -> str:
        return repr(self._text if len(self._text) <= 80 else self._text[:80] + "…")

    def _refuse(self, problem: str, *, hint: bool = False) -> NoReturn:
        words = f": there are {', '.join(WORDS)}; or give a JSON Schema object" if hint else ""
        raise errors.InvalidType(
            f"field {self._name!r}: {problem}{words}",
            details={"field": self._name, "type": self._text[:200], "words": list(WORDS)},
        ) from None  # the parser's own complaint is about text it was given, not about types


@functools.lru_cache(maxsize=64)
def code_in(language: str) -> Any:
    """``dspy.Code`` of a language; one class a language, for DSPy makes a new one each time."""
    return dspy.Code[language]


def _alternatives(node: ast.expr) -> list[ast.expr]:
    """The parts of ``a | b | c``, without recursion: a hostile chain is as deep as it is long."""
    parts: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        parts.append(node.right)
        node = node.left
    return [node, *reversed(parts)]


def _is_hashable(annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin in (tuple, typing.Union):
        return all(_is_hashable(part) for part in typing.get_args(annotation) if part is not Ellipsis)
    return origin is Literal or annotation in _HASHABLE
