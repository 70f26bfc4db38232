"""The types of a signature's fields, from a client's text or JSON Schema to annotations.

Text is parsed with ``ast`` and every word is looked up here: nothing is evaluated, and no module is imported
because a client named it, as DSPy's own string parser would do.
"""

from __future__ import annotations

import ast
import datetime
import types
import typing
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NoReturn, Union

import dspy

from dspex_kernels import errors
from dspex_kernels.kernel.programs.json_schemas import SchemaReader
from dspex_kernels.protocol.records import FieldSpec

MAX_TYPE_LENGTH = 2000
"""Characters of a type's text."""
MAX_TYPE_DEPTH = 20
"""Nesting of brackets in a type's text."""

_WORDS: Mapping[str, Any] = {
    "str": str, "int": int, "float": float, "bool": bool, "Any": Any, "None": types.NoneType,
    "list": list, "dict": dict, "tuple": tuple, "set": set,
    "date": datetime.date, "datetime": datetime.datetime, "time": datetime.time, "UUID": uuid.UUID,
    "Image": dspy.Image, "Audio": dspy.Audio, "File": dspy.File, "History": dspy.History,
    "Code": dspy.Code, "Reasoning": dspy.Reasoning,
}  # fmt: skip
_PREFIXES = {
    "dspy": {"Image", "Audio", "File", "History", "Code", "Reasoning"},
    "datetime": {"date", "datetime", "time"},
    "uuid": {"UUID"},
    "typing": {"Any", "List", "Dict", "Tuple", "Set", "Literal", "Optional", "Union"},
}
_SPELLINGS = {"List": "list", "Dict": "dict", "Tuple": "tuple", "Set": "set"}
_SPEAKABLE = (
    "str, int, float, bool, Any, None, list[T], dict[K, V], tuple[A, B], set[T], Literal['a', 'b'], Optional[T], "
    "Union[A, B], A | B, date, datetime, time, UUID, Image, Audio, File, History, Code, Reasoning"
)


def parse_type(text: str, *, field: str) -> Any:
    """The annotation that a type's text names.

    Args:
        text: A type expression, up to 2000 characters and 20 brackets deep: ``"list[dict[str, int]] | None"``.
        field: The field's name, for errors.

    Raises:
        InvalidType: The text is no type expression, or has a word outside the grammar.
    """
    if len(text) > MAX_TYPE_LENGTH:
        raise errors.InvalidType(
            f"The type of field {field!r} has {len(text):,} characters, more than {MAX_TYPE_LENGTH:,}; "
            "give a JSON Schema instead.",
            details={"field": field},
        )
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise errors.InvalidType(
            f"The type of field {field!r} is not a type expression: {_shown(text)}. There are: {_SPEAKABLE}.",
            details={"field": field, "type": text},
        ) from error
    try:
        return _TypeParser(field, text).annotation(tree.body, 0)
    except RecursionError:
        raise errors.InvalidType(
            f"The type of field {field!r} is nested too deep: {_shown(text)}; give a JSON Schema instead.",
            details={"field": field, "type": text},
        ) from None  # a thousand equal frames tell nothing


def schema_type(schema: dict[str, Any], *, name: str, field: str, used: Counter[str] | None = None) -> Any:
    """The annotation of a JSON Schema; objects become pydantic models.

    Args:
        schema: A JSON Schema object; references may only point into itself.
        name: What a model without a title is called after, in any case: ``"invoice_lines"``.
        field: The field's name, for errors.
        used: What other schemas of the signature have used of ``json_schemas.LIMITS``; counted on.

    Raises:
        InvalidType: The schema has a keyword that cannot be honoured, points outside itself, or is too large.
    """
    return SchemaReader(schema, field, used).annotation(name)


def annotation_of(spec: FieldSpec, used: Counter[str] | None = None) -> Any:
    """The annotation of a field, however its type is given: validate values with its ``TypeAdapter``.

    Args:
        spec: The field.
        used: As for ``schema_type``.

    Raises:
        InvalidType: The type is outside the grammar, or its JSON Schema cannot be honoured.
    """
    if isinstance(spec.type, str):
        return parse_type(spec.type, field=spec.name)
    return schema_type(spec.type, name=spec.name, field=spec.name, used=used)


def type_text(given: Any) -> str:
    """A short text of a type for people: ``"list[str]"``; of a JSON Schema its title, or what kind it is.

    Args:
        given: A FieldSpec or an annotation.
    """
    if not isinstance(given, FieldSpec):
        return _annotation_text(given)
    if isinstance(given.type, str):
        return given.type.strip()
    title, kind = given.type.get("title"), given.type.get("type", "object")
    if isinstance(title, str) and title:
        return title
    return " | ".join(str(word) for word in kind) if isinstance(kind, list) else str(kind)


class _TypeParser:
    """Turns the syntax tree of one field's type into its annotation."""

    def __init__(self, field: str, text: str) -> None:
        self._field = field
        self._text = text

    def annotation(self, node: ast.expr, depth: int) -> Any:
        if depth > MAX_TYPE_DEPTH:
            self._refuse(f"is nested more than {MAX_TYPE_DEPTH} levels deep; give a JSON Schema instead.")
        match node:
            case ast.Constant(value=None):
                return types.NoneType
            case ast.Name() | ast.Attribute():
                return self._word(self._name(node))
            case ast.BinOp(op=ast.BitOr()):
                return _union(self.annotation(part, depth + 1) for part in _union_parts(node))
            case ast.Subscript():
                return self._generic(node, depth)
        return self._unknown(ast.unparse(node))

    def _word(self, name: str) -> Any:
        if name in _WORDS:
            return _WORDS[name]
        if name in ("Literal", "Optional", "Union"):
            self._refuse(f"says {name} without its arguments; write {name}[…].")
        return self._unknown(name)

    def _name(self, node: ast.expr) -> str:
        match node:
            case ast.Name(id=name):
                return _SPELLINGS.get(name, name)
            case ast.Attribute(value=ast.Name(id=prefix), attr=name) if name in _PREFIXES.get(prefix, ()):
                return _SPELLINGS.get(name, name)
        return self._unknown(ast.unparse(node))

    def _generic(self, node: ast.Subscript, depth: int) -> Any:
        name = self._name(node.value)
        arguments = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name == "Literal":
            return Literal[tuple(self._constant(argument) for argument in arguments)]
        if name == "Code":
            return dspy.Code[self._language(arguments)]
        if name not in ("list", "set", "dict", "tuple", "Optional", "Union"):
            self._word(name)
            self._refuse(f"gives arguments to {name}, which takes none.")
        if name == "tuple":
            return self._tuple(arguments, depth)
        given = [self.annotation(argument, depth + 1) for argument in arguments]
        wanted = {"list": 1, "set": 1, "dict": 2, "Optional": 1}.get(name, len(given))
        if len(given) != wanted or not given:
            self._refuse(f"gives {name} {len(given)} arguments; it takes {wanted or 'at least one'}.")
        match name:
            case "list":
                return list[given[0]]  # type: ignore[valid-type]  # made at run time
            case "set":
                return set[given[0]]  # type: ignore[valid-type]  # made at run time
            case "dict":
                return dict[given[0], given[1]]  # type: ignore[valid-type]  # made at run time
            case "Optional":
                return _union([*given, types.NoneType])
        return _union(given)

    def _tuple(self, arguments: list[ast.expr], depth: int) -> Any:
        match arguments:
            case [one, ast.Constant(value=rest)] if rest is ...:
                return tuple.__class_getitem__((self.annotation(one, depth + 1), ...))
            case []:
                return self._refuse("says tuple[()]; name the types of its items, or write tuple.")
        return tuple[tuple(self.annotation(argument, depth + 1) for argument in arguments)]  # type: ignore[misc]  # made at run time

    def _constant(self, node: ast.expr) -> str | int | bool | None:
        match node:
            case ast.Constant(value=str() as text) if not _is_unicode(text):
                return self._refuse("has half a character (a lone surrogate) in Literal[…]; write the whole one.")
            case ast.Constant(value=str() | int() | bool() | None as value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as number)):
                return -number
        return self._refuse(
            f"has {_shown(ast.unparse(node))} in Literal[…], which takes texts, integers, True, False and None."
        )

    def _language(self, arguments: list[ast.expr]) -> str:
        match arguments:
            case [ast.Constant(value=str() as language)] if language.isprintable() and language:
                return language
        return self._refuse("gives Code something else than one quoted language; write Code['python'].")

    def _unknown(self, word: str) -> NoReturn:
        raise errors.InvalidType(
            f"The type of field {self._field!r} has an unknown word {_shown(word)}. There are: {_SPEAKABLE}; "
            "for objects give a JSON Schema.",
            details={"field": self._field, "type": self._text, "word": word},
        )

    def _refuse(self, what: str) -> NoReturn:
        raise errors.InvalidType(
            f"The type of field {self._field!r} {what}", details={"field": self._field, "type": self._text}
        )


def _union_parts(node: ast.expr) -> list[ast.expr]:
    # A chain of `|` leans left as deep as it is long: walked, not recursed into.
    parts: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        parts.append(node.right)
        node = node.left
    return [node, *reversed(parts)]


def _union(members: Iterable[Any]) -> Any:
    return Union[tuple(members)]  # noqa: UP007  # the members are known at run time only


def _is_unicode(text: str) -> bool:
    # An escape in the type's text makes what the message itself could not hold, and no prompt can.
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "…")


def _annotation_text(annotation: Any) -> str:
    if annotation is types.NoneType or annotation is None:
        return "None"
    if annotation is ...:
        return "..."
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is None:
        return getattr(annotation, "__name__", None) or str(annotation)
    if origin is Annotated:
        return _annotation_text(arguments[0])
    if origin is Literal:
        return f"Literal[{', '.join(repr(value) for value in arguments)}]"
    if origin in (Union, types.UnionType):
        return " | ".join(_annotation_text(argument) for argument in arguments)
    return f"{_annotation_text(origin)}[{', '.join(_annotation_text(argument) for argument in arguments)}]"
