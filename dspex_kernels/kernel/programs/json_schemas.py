"""JSON Schema read as Python annotations: objects become pydantic models, the same ones each time."""

from __future__ import annotations

import datetime
import keyword
import re
import types
import typing
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ForwardRef, Literal, NoReturn, Union

import pydantic
import pydantic_core
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen, MultipleOf

from dspex_kernels import errors
from dspex_kernels.protocol import limits

MAX_SCHEMA_DEPTH = 20
"""Nesting of schemas in a schema, references followed."""
LIMITS: Mapping[str, int] = {"parts": 2000, "objects": 200, "enum values": 5000, "patterns": 20}
"""Of all schemas of one signature together, references followed: building them holds up the kernel's other
commands. Measured: 2000 parts take 0.4 s; a pattern takes up to 20 MB."""
MAX_VALUES = 1000
"""Values of one ``enum``."""
MAX_PATTERN = 1000
"""Characters of one ``pattern``."""
MAX_WAYS = 10_000
"""Ways in which one value may be read: pydantic tries every member of a choice, again at every level."""

_ANNOTATIONS = frozenset({
    "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly",
    "discriminator", "$schema", "$id", "$comment", "$defs", "definitions", "contentEncoding", "contentMediaType",
})  # fmt: skip


def _pattern(pattern: str) -> pydantic.StringConstraints:
    return pydantic.StringConstraints(pattern=pattern)


_BOUNDS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "string": {"minLength": MinLen, "maxLength": MaxLen, "pattern": _pattern},
    "number": {
        "minimum": Ge, "maximum": Le, "exclusiveMinimum": Gt, "exclusiveMaximum": Lt, "multipleOf": MultipleOf,
    },
    "array": {"minItems": MinLen, "maxItems": MaxLen},
    "object": {"minProperties": MinLen, "maxProperties": MaxLen},
}  # fmt: skip
_BOUNDS["integer"] = _BOUNDS["number"]
_WORDS: Mapping[str, frozenset[str]] = {
    "string": frozenset({*_BOUNDS["string"], "format"}),
    "integer": frozenset({*_BOUNDS["number"], "format"}),
    "number": frozenset({*_BOUNDS["number"], "format"}),
    "boolean": frozenset(),
    "null": frozenset(),
    "array": frozenset({*_BOUNDS["array"], "items", "prefixItems", "uniqueItems"}),
    "object": frozenset({*_BOUNDS["object"], "properties", "required", "additionalProperties"}),
}
_FORMATS = {"date": datetime.date, "date-time": datetime.datetime, "time": datetime.time, "uuid": uuid.UUID}
_SCALARS = {"integer": int, "number": float, "boolean": bool, "null": types.NoneType}


class SchemaReader:
    """Reads one JSON Schema, with the models it has made so far.

    Args:
        schema: The schema; references may only point into it.
        field: The field's name, for errors.
        used: What other schemas of the signature have used of ``LIMITS``; counted on.
    """

    def __init__(self, schema: dict[str, Any], field: str, used: Counter[str] | None = None) -> None:
        self._root = schema
        self._field = field
        self._used = Counter[str]() if used is None else used
        self._models: dict[str, type[pydantic.BaseModel] | None] = {}
        self._names: dict[str, str] = {}
        self._open: list[str] = []

    def annotation(self, name: str) -> Any:
        """The annotation of the whole schema.

        Args:
            name: What a model without a title is called after.

        Raises:
            InvalidType: The schema cannot be honoured; the message names the keyword.
        """
        result = self._read(self._root, name, 0, "#")
        models = {key: model for key, model in self._models.items() if model is not None}
        try:
            for model in models.values():
                model.model_rebuild(_types_namespace=models)
            if isinstance(result, ForwardRef):
                result = models[result.__forward_arg__]
            pydantic.TypeAdapter(result)
        except (pydantic.errors.PydanticUserError, pydantic_core.SchemaError, TypeError, ValueError) as error:
            self._refuse(f"cannot be turned into a type: {str(error).splitlines()[0]}", error)
        if _ways(result, models.values()) > MAX_WAYS:
            self._refuse(
                f"can be read in more than {MAX_WAYS:,} ways: its choices (anyOf) between objects contain such "
                "choices again, level by level; write one object with the properties of all."
            )
        return result

    def _read(self, schema: Any, name: str, depth: int, pointer: str) -> Any:
        """The annotation of the schema at ``pointer``; ``name`` is what its model is called after."""
        self._count("parts")
        if depth > MAX_SCHEMA_DEPTH:
            self._refuse(f"is nested more than {MAX_SCHEMA_DEPTH} levels deep; make it flatter.")
        if schema is True or schema == {}:
            return Any
        if not isinstance(schema, dict):
            self._refuse(f"has {type(schema).__name__} at {pointer} where a schema should be.")
        for composed, reader in (("$ref", self._reference), ("allOf", self._all), ("anyOf", self._any)):
            if composed in schema:
                return reader(schema, name, depth, pointer)
        if "oneOf" in schema:
            return self._any(schema, name, depth, pointer)
        if "enum" in schema or "const" in schema:
            return self._values(schema, pointer)
        return self._typed(schema, name, depth, pointer)

    def _reference(self, schema: dict[str, Any], name: str, depth: int, pointer: str) -> Any:
        self._only(schema, {"$ref"}, pointer)
        target = schema["$ref"]
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            self._refuse(f"has $ref {_shown(target)} at {pointer}; only references inside the schema are followed.")
        if target in self._names:
            return self._model_or_reference(self._names[target])
        if target in self._open:
            self._refuse(f"has $ref {_shown(target)}, which contains itself without an object between.")
        self._open.append(target)
        found = self._read(
            self._find(target), target.rsplit("/", 1)[-1] if target != "#" else name, depth + 1, target
        )
        self._open.remove(target)
        return found

    def _find(self, target: str) -> Any:
        found: Any = self._root
        for raw in target.split("/")[1:]:
            part = raw.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, dict) and part in found:
                found = found[part]
            else:
                self._refuse(f"has $ref {_shown(target)}, and there is no {_shown(part)}.")
        return found

    def _model_or_reference(self, model_name: str) -> Any:
        model = self._models[model_name]
        return ForwardRef(model_name) if model is None else model

    def _all(self, schema: dict[str, Any], name: str, depth: int, pointer: str) -> Any:
        self._only(schema, {"allOf"}, pointer)
        parts = self._list(schema, "allOf", pointer)
        if len(parts) != 1:
            self._refuse(f"has allOf of {len(parts)} schemas at {pointer}; write one schema that says it all.")
        return self._read(parts[0], name, depth + 1, f"{pointer}/allOf/0")

    def _any(self, schema: dict[str, Any], name: str, depth: int, pointer: str) -> Any:
        word = "anyOf" if "anyOf" in schema else "oneOf"
        self._only(schema, {word, "type"}, pointer)
        parts = self._list(schema, word, pointer)
        members = [
            self._read(
                part, name if _is_only_object(parts) else f"{name}_{index}", depth + 1, f"{pointer}/{word}/{index}"
            )
            for index, part in enumerate(parts, start=1)
        ]
        return _union(members)

    def _values(self, schema: dict[str, Any], pointer: str) -> Any:
        self._only(schema, {"enum", "const", "type"}, pointer)
        values = [schema["const"]] if "const" in schema else self._list(schema, "enum", pointer)
        self._count("enum values", len(values))
        if len(values) > MAX_VALUES:
            self._refuse(f"has an enum of {len(values)} values at {pointer}, more than {MAX_VALUES}.")
        for value in values:
            if not isinstance(value, str | int | None):
                self._refuse(
                    f"has {_shown(value)} in enum or const at {pointer}; texts, integers, booleans and null can be."
                )
        return Literal[tuple(values)]

    def _typed(self, schema: dict[str, Any], name: str, depth: int, pointer: str) -> Any:
        given = schema.get("type", _guess(schema))
        if given is None:
            self._only(schema, set(), pointer)
            return Any
        kinds: list[str] = given if isinstance(given, list) else [given]
        if not kinds or not all(isinstance(kind, str) and kind in _WORDS for kind in kinds):
            self._refuse(f"has type {_shown(given)} at {pointer}; there are {', '.join(_WORDS)}.")
        allowed = {"type"}.union(*(_WORDS[kind] for kind in kinds))
        self._only(schema, allowed, pointer)
        return _union([self._kind(kind, schema, name, depth, pointer) for kind in kinds])

    def _kind(self, kind: str, schema: dict[str, Any], name: str, depth: int, pointer: str) -> Any:
        match kind:
            case "string":
                return self._string(schema, pointer)
            case "array":
                return self._array(schema, name, depth, pointer)
            case "object":
                return self._object(schema, name, depth, pointer)
        return self._bounded(_SCALARS[kind], kind, schema, pointer)

    def _string(self, schema: dict[str, Any], pointer: str) -> Any:
        word = schema.get("format")
        if word is None:
            return self._bounded(str, "string", schema, pointer)
        if isinstance(word, str) and word in _FORMATS:
            for bound in _BOUNDS["string"]:
                if bound in schema:
                    self._refuse(f"has {bound} beside format {_shown(word)} at {pointer}; leave one of them out.")
            return _FORMATS[word]
        # Other formats are annotations in JSON Schema too: the language model is told, nothing is checked.
        bounded = self._bounded(str, "string", schema, pointer)
        said = {key: schema[key] for key in (*_BOUNDS["string"], "format") if key in schema}
        return Annotated[bounded, pydantic.WithJsonSchema({**said, "type": "string"})]

    def _bounded(self, annotation: Any, kind: str, schema: dict[str, Any], pointer: str) -> Any:
        bounds = [word for word in _BOUNDS.get(kind, {}) if word in schema]
        for word in bounds:
            value = schema[word]
            wanted = str if word == "pattern" else int | float if kind in ("integer", "number") else int
            if not isinstance(value, wanted) or isinstance(value, bool):
                self._refuse(f"has {word} {_shown(value)} at {pointer}, which is no bound.")
            if isinstance(value, str):
                self._check_pattern(value, pointer)
            annotation = Annotated[annotation, _BOUNDS[kind][word](value)]
        return annotation

    def _check_pattern(self, pattern: str, pointer: str) -> None:
        self._count("patterns")
        if len(pattern) > MAX_PATTERN:
            self._refuse(f"has a pattern of {len(pattern):,} characters at {pointer}, more than {MAX_PATTERN:,}.")
        try:
            pydantic.TypeAdapter(Annotated[str, _pattern(pattern)])
        except pydantic_core.SchemaError as error:
            self._refuse(
                f"has pattern {_shown(pattern)} at {pointer}, which cannot be used: look-around and "
                "back-references are not known.",
                error,
            )

    def _array(self, schema: dict[str, Any], name: str, depth: int, pointer: str) -> Any:
        items = schema.get("items", True)
        if "prefixItems" in schema or isinstance(items, list):
            return self._tuple(schema, name, depth, pointer)
        item = Any if items is True else self._read(items, f"{name}_item", depth + 1, f"{pointer}/items")
        if schema.get("uniqueItems"):
            if item is not Any and not _is_hashable(item):
                self._refuse(f"has uniqueItems at {pointer}, which only arrays of plain values can have.")
            return self._bounded(set[item], "array", schema, pointer)  # type: ignore[valid-type]  # made at run time
        return self._bounded(list if item is Any else list[item], "array", schema, pointer)  # type: ignore[valid-type]  # made at run time

    def _tuple(self, schema: dict[str, Any], name: str, depth: int, pointer: str) -> Any:
        word = "prefixItems" if "prefixItems" in schema else "items"
        parts = self._list(schema, word, pointer)
        if word == "prefixItems" and schema.get("items", False) is not False:
            self._refuse(f'has items beside prefixItems at {pointer}; say "items": false.')
        for bound in ("minItems", "maxItems"):
            if schema.get(bound, len(parts)) != len(parts):
                self._refuse(f"has {bound} {schema[bound]} beside {len(parts)} {word} at {pointer}; leave it out.")
        if schema.get("uniqueItems"):
            self._refuse(f"has uniqueItems beside {word} at {pointer}; leave it out.")
        members = tuple(
            self._read(part, f"{name}_item_{index}", depth + 1, f"{pointer}/{word}/{index - 1}")
            for index, part in enumerate(parts, start=1)
        )
        return tuple[members]  # type: ignore[valid-type]  # made at run time

    def _object(self, schema: dict[str, Any], name: str, depth: int, pointer: str) -> Any:
        properties = schema.get("properties", {})
        more = schema.get("additionalProperties", True)
        if not isinstance(properties, dict):
            self._refuse(f"has properties that are no object at {pointer}.")
        if not properties and more is not False:
            if schema.get("required"):
                self._refuse(f"has required without properties at {pointer}; describe them under properties.")
            value = self._read(more, f"{name}_value", depth + 1, f"{pointer}/additionalProperties")
            return self._bounded(dict[str, value], "object", schema, pointer)  # type: ignore[valid-type]  # made at run time
        for bound in _BOUNDS["object"]:
            if bound in schema:
                self._refuse(f"has {bound} beside properties at {pointer}; use required instead.")
        if not isinstance(more, bool):
            self._refuse(f"has properties beside an additionalProperties schema at {pointer}; keep one of them.")
        return self._model(schema, name, depth, pointer)

    def _model(self, schema: dict[str, Any], name: str, depth: int, pointer: str) -> Any:
        self._count("objects")
        title = schema.get("title")
        model_name = self._free_name(_camel(title if isinstance(title, str) else name))
        self._models[model_name] = None
        self._names[pointer] = model_name
        required = schema.get("required", [])
        properties = schema.get("properties", {})
        if not isinstance(required, list) or not all(isinstance(w, str) and w in properties for w in required):
            self._refuse(f"has required {_shown(required)} at {pointer}, which are not all among its properties.")
        fields: dict[str, Any] = {}
        for key, part in properties.items():
            below = f"{pointer}/properties/{key.replace('~', '~0').replace('/', '~1')}"
            annotation = self._read(part, f"{model_name}_{key}", depth + 1, below)
            attribute = _attribute(key, fields)
            alias = None if attribute == key else key
            fields[attribute] = _member(annotation, part if isinstance(part, dict) else {}, key in required, alias)
        extra: Literal["allow", "forbid", "ignore"] = "ignore"
        if "additionalProperties" in schema:
            extra = "allow" if schema["additionalProperties"] else "forbid"
        description = schema.get("description")
        config = pydantic.ConfigDict(
            extra=extra,
            populate_by_name=True,
            serialize_by_alias=True,
            protected_namespaces=(),
            title=model_name,
        )
        try:
            base = type("SchemaModel", (pydantic.BaseModel,), {"model_config": config, "__module__": __name__})
            model: type[pydantic.BaseModel] = pydantic.create_model(
                model_name,
                __base__=base,
                __module__=__name__,
                __doc__=description if isinstance(description, str) else "",
                **fields,
            )
        except (
            pydantic.errors.PydanticUserError,
            pydantic_core.SchemaError,
            TypeError,
            ValueError,
            NameError,
        ) as error:
            self._refuse(f"cannot be turned into a model at {pointer}: {str(error).splitlines()[0]}", error)
        self._models[model_name] = model
        return model

    def _free_name(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self._models:
            number += 1
            name = f"{wanted}{number}"
        return name

    def _count(self, what: str, number: int = 1) -> None:
        self._used[what] += number
        if self._used[what] > LIMITS[what]:
            self._refuse(
                f"has too many {what}: all schemas of a signature together may have {LIMITS[what]:,}; "
                "make them smaller."
            )

    def _only(self, schema: dict[str, Any], allowed: set[str], pointer: str) -> None:
        for word in schema:
            if word not in allowed and word not in _ANNOTATIONS and not word.startswith("x-"):
                self._refuse(
                    f"has the keyword {_shown(word)} at {pointer}, which cannot be honoured here; leave it out."
                )

    def _list(self, schema: dict[str, Any], word: str, pointer: str) -> list[Any]:
        parts = schema[word]
        if not isinstance(parts, list) or not parts:
            self._refuse(f"has {word} at {pointer}, which should be an array with something in it.")
        return parts

    def _refuse(self, what: str, cause: BaseException | None = None) -> NoReturn:
        raise errors.InvalidType(
            f"The JSON Schema of field {self._field!r} {what}", details={"field": self._field}
        ) from cause


def _guess(schema: dict[str, Any]) -> str | None:
    """The type that a schema without one speaks of; None where anything is meant."""
    return next(
        (kind for kind in ("object", "array", "string", "number") if _WORDS[kind] & schema.keys() - {"format"}),
        None,
    )


def _member(annotation: Any, schema: dict[str, Any], required: bool, alias: str | None) -> tuple[Any, Any]:
    """A model's field as pydantic's ``create_model`` takes it."""
    said: dict[str, Any] = {
        word: schema[word] for word in ("title", "description") if isinstance(schema.get(word), str)
    }
    if alias is not None:
        said["alias"] = alias
    if "default" in schema and not required:
        return annotation, pydantic.Field(schema["default"], validate_default=True, **said)
    if required:
        return annotation, pydantic.Field(..., **said)
    return _union([annotation, types.NoneType]), pydantic.Field(None, **said)


def _attribute(key: str, taken: Iterable[str]) -> str:
    """The Python name of a property: its own, where Python and pydantic can bear it."""
    name = re.sub(r"\W", "_", key).lstrip("_") or "field"
    if name[0].isdigit():
        name = f"field_{name}"
    if keyword.iskeyword(name) or hasattr(pydantic.BaseModel, name):
        name = f"{name}_"
    while name in taken:
        name = f"{name}_"
    return name


def _camel(text: str) -> str:
    """A class name made of a text's words: ``"invoice lines"`` becomes ``InvoiceLines``."""
    words = re.findall(r"[^\W_]+", text)
    name = "".join(word[0].upper() + word[1:] for word in words)[:100] or "Object"
    return name if name.isidentifier() and not keyword.iskeyword(name) else f"Type{name}"


def _union(members: Iterable[Any]) -> Any:
    return Union[tuple(members)]  # noqa: UP007  # the members are known at run time only


def _ways(annotation: Any, models: Iterable[type[pydantic.BaseModel]]) -> int:
    """How often pydantic may look at the innermost part of one value; counted no further than it matters."""
    fields = {model: [field.annotation for field in model.model_fields.values()] for model in models}
    ways: dict[Any, int] = dict.fromkeys(fields, 1)
    for _ in range(limits.MAX_DEPTH):  # a value's level each: deeper ones do not come in
        before = ways
        ways = {
            model: max((_ways_of(part, before) for part in parts), default=1) for model, parts in fields.items()
        }
        if ways == before or max(ways.values()) > MAX_WAYS:
            break
    return max([_ways_of(annotation, ways), *ways.values()])


def _ways_of(annotation: Any, models: Mapping[Any, int]) -> int:
    """``_ways`` of an annotation, where those of the models are known for one level less."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _ways_of(arguments[0], models)
    if origin is Union:
        # Of members that are objects, arrays or plain, only those of the value's own kind are looked into.
        tried: Counter[str] = Counter()
        for member in arguments:
            tried[_kind_of(member)] += _ways_of(member, models)
        return max(tried.values())
    if origin in (list, set, tuple, dict):
        return max((_ways_of(part, models) for part in arguments), default=1)
    return models.get(annotation, 1) if isinstance(annotation, type) else 1


def _kind_of(annotation: Any) -> str:
    if typing.get_origin(annotation) is Annotated:
        return _kind_of(typing.get_args(annotation)[0])
    plain = typing.get_origin(annotation) or annotation
    if plain in (list, set, tuple):
        return "array"
    return "object" if plain is dict or (isinstance(plain, type) and issubclass(plain, pydantic.BaseModel)) else ""


def _is_only_object(parts: list[Any]) -> bool:
    return len([part for part in parts if not (isinstance(part, dict) and part.get("type") == "null")]) == 1


def _is_hashable(annotation: Any) -> bool:
    plain = getattr(annotation, "__origin__", annotation)
    return plain in (str, int, float, bool, Literal, *_FORMATS.values())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
