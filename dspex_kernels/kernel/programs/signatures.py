"""Signatures as data: read from a client's text, checked, and built into DSPy's own."""

from __future__ import annotations

import keyword
import re
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn, get_args, get_origin

import dspy
import pydantic
from dspy.utils.constants import IS_TYPE_UNDEFINED

from dspex_kernels import errors
from dspex_kernels.kernel.programs.types import annotation_of, type_text
from dspex_kernels.protocol.records import FieldSpec, SignatureSpec

MAX_SIGNATURE_LENGTH = 50_000
"""Characters of a signature's text."""

RESERVED_NAMES = frozenset({
    "fields", "input_fields", "instructions", "output_fields", "signature",
    "model_config", "model_dump", "model_dump_json",
    "model_validate", "model_validate_json", "model_validate_strings",
})  # fmt: skip
"""Names that no field can have: they break the signature's class."""

RESERVED_INPUTS = frozenset({
    "self", "instance",
    "signature", "new_signature", "demos", "config", "lm", "prediction",
    "max_iters", "completions", "interpreter_factory",
})  # fmt: skip
"""Names that no input can have: DSPy's modules take them for themselves, some without a word."""

FILTERS = threading.Lock()
"""Guards Python's warning filters, which belong to the process, while one of them is ours."""

_BOUNDS = ("gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length", "pattern")
_FIELD_NAME = re.compile(r"[^\W\d_]\w{0,127}")


def signature_spec(given: str | SignatureSpec) -> SignatureSpec:
    """A signature as data, its names checked; its types are checked when it is built.

    Args:
        given: ``"question, context: list[str] -> answer: float"``, up to 50,000 characters, or a spec already.

    Raises:
        InvalidSignature: It is no signature, or a field's name cannot be used; the message names the field.
    """
    spec = _parse(given) if isinstance(given, str) else given
    _check_names(spec)
    return spec


def build_signature(spec: SignatureSpec) -> type[dspy.Signature]:
    """DSPy's signature class: the same spec gives the same prompts, here and elsewhere.

    Raises:
        InvalidSignature: A field's name cannot be used.
        InvalidType: A field's type cannot be used.
    """
    _check_names(spec)
    fields = {}
    used: Counter[str] = Counter()
    for side, field_of in ((spec.inputs, dspy.InputField), (spec.outputs, dspy.OutputField)):
        for field in side:
            full = annotation_of(field, used)
            annotation, bounds = _without_bounds(full)
            # DSPy need not compare the inputs again: it would write what does not fit into the log.
            checked = {IS_TYPE_UNDEFINED: True} if field_of is dspy.InputField else {}
            arguments = {**_said(field), **bounds, **checked, **_default(field, full)}
            fields[field.name] = (annotation, field_of(**arguments))
    try:
        with FILTERS, warnings.catch_warnings():
            # A field may be called `schema` or `copy`: pydantic only remarks that its class has such a method.
            warnings.filterwarnings("ignore", message="Field name .* shadows an attribute", category=UserWarning)
            built: type[dspy.Signature] = dspy.make_signature(
                fields, _instructions(spec), spec.name or "StringSignature"
            )
    except (TypeError, ValueError, pydantic.errors.PydanticUserError) as error:
        raise errors.InvalidSignature(
            f"The signature {signature_text(spec)!r} cannot be built: {str(error).splitlines()[0]}"
        ) from error
    return built


def signature_text(spec: SignatureSpec) -> str:
    """The signature on one line, as people type it: ``"question, context: list[str] -> answer: float"``."""
    return f"{_side_text(spec.inputs)} -> {_side_text(spec.outputs)}"


def _side_text(side: list[FieldSpec]) -> str:
    return ", ".join(field.name if field.type == "str" else f"{field.name}: {type_text(field)}" for field in side)


def _said(field: FieldSpec) -> dict[str, str]:
    # DSPy writes its own description into the prompt where none is given, but not where it is empty.
    return {"desc": field.description} if field.description else {}


def _default(field: FieldSpec, annotation: Any) -> dict[str, Any]:
    """The default that a field's JSON Schema gives, as a field's argument."""
    if not isinstance(field.type, dict) or "default" not in field.type:
        return {}
    try:
        return {"default": pydantic.TypeAdapter(annotation).validate_python(field.type["default"])}
    except pydantic.ValidationError as failure:
        problem = failure.errors(include_url=False, include_input=False)[0]["msg"]
        raise errors.InvalidType(
            f"The JSON Schema of field {field.name!r} has a default that does not fit it: {problem}; mend either.",
            details={"field": field.name},
        ) from None  # the failure would carry the value


def _without_bounds(annotation: Any) -> tuple[Any, dict[str, Any]]:
    """A type and its outermost bounds, as a field's arguments.

    Pydantic takes them off the annotation anyway; given to the field, DSPy also writes them into the prompt.
    """
    if get_origin(annotation) is not Annotated:
        return annotation, {}
    plain, *metadata = get_args(annotation)
    bounds = {
        bound: getattr(item, bound)
        for item in metadata
        for bound in _BOUNDS
        if getattr(item, bound, None) is not None
    }
    return plain, bounds


def _instructions(spec: SignatureSpec) -> str:
    # DSPy would write the same, but build the whole class a second time for it.
    if spec.instructions is not None:
        return spec.instructions
    inputs, outputs = (", ".join(f"`{field.name}`" for field in side) for side in (spec.inputs, spec.outputs))
    return f"Given the fields {inputs}, produce the fields {outputs}."


def _parse(text: str) -> SignatureSpec:
    if len(text) > MAX_SIGNATURE_LENGTH:
        raise errors.InvalidSignature(
            f"The signature has {len(text):,} characters, more than {MAX_SIGNATURE_LENGTH:,}; give it as an object."
        )
    sides = list(_split(text, "->"))
    if len(sides) != 2:
        raise errors.InvalidSignature(
            f"The signature {_shown(text)} has {len(sides) - 1} arrows; write one: 'question -> answer'."
        )
    inputs, outputs = (_fields(side, text) for side in sides)
    for side, what in ((inputs, "input"), (outputs, "output")):
        if not side:
            raise errors.InvalidSignature(
                f"The signature {_shown(text)} has no {what}; write at least one: 'question -> answer'."
            )
        if len(side) > 200:
            raise errors.InvalidSignature(f"The signature has {len(side)} {what}s, more than 200.")
    return SignatureSpec(inputs=inputs, outputs=outputs)


def _fields(side: str, text: str) -> list[FieldSpec]:
    if not side.strip():
        return []
    fields = []
    for part in _split(side, ","):
        name, *types = (word.strip() for word in _split(part, ":"))
        if not name:
            raise errors.InvalidSignature(
                f"The signature {_shown(text)} has a field without a name; mind the commas."
            )
        if len(types) > 1 or types == [""]:
            raise errors.InvalidSignature(
                f"Field {_shown(name)} has no type after its colon; write one, such as 'score: float'."
            )
        _check_name(name)
        fields.append(FieldSpec(name=name, type=types[0] if types else "str"))
    return fields


def _split(text: str, separator: str) -> Iterator[str]:
    """The parts between separators, those inside brackets and quotes apart."""
    start = position = depth = 0
    quote = ""
    while position < len(text):
        character = text[position]
        if quote:
            if character == "\\":
                position += 1
            elif character == quote:
                quote = ""
        elif character in "'\"":
            quote = character
        elif character in "[({":
            depth += 1
        elif character in "])}":
            depth -= 1
        elif depth == 0 and text.startswith(separator, position):
            yield text[start:position]
            position += len(separator)
            start = position
            continue
        position += 1
    if quote or depth:
        raise errors.InvalidSignature(
            f"The signature has an unclosed quote or bracket in {_shown(text)}; close it."
        )
    yield text[start:]


def _check_names(spec: SignatureSpec) -> None:
    seen: set[str] = set()
    for field in (*spec.inputs, *spec.outputs):
        _check_name(field.name)
        if field.name in seen:
            _refuse(field.name, "is there twice; give each field, input or output, a name of its own.")
        seen.add(field.name)
    for field in spec.inputs:
        if field.name in RESERVED_INPUTS:
            _refuse(
                field.name, f"cannot be an input: DSPy's modules take {field.name!r} for themselves; rename it."
            )
    if spec.name is not None and (not spec.name.isidentifier() or keyword.iskeyword(spec.name)):
        raise errors.InvalidSignature(f"The signature's name {_shown(spec.name)} is no Python name; rename it.")


def _check_name(name: str) -> None:
    if not _FIELD_NAME.fullmatch(name) or not name.isidentifier():
        reason = "starts with an underscore" if name.startswith("_") else "is no Python name"
        _refuse(name, f"{reason}; use up to 128 letters, digits and underscores, a letter first.")
    if keyword.iskeyword(name):
        _refuse(name, "is a Python keyword; rename it.")
    if name.startswith("dspy_"):
        _refuse(name, "would be hidden: DSPy keeps names that start with dspy_ to itself; rename it.")
    if name in RESERVED_NAMES:
        _refuse(name, "would hide a part of the signature itself; rename it.")


def _refuse(name: str, why: str) -> NoReturn:
    raise errors.InvalidSignature(f"Field {_shown(name)} {why}", details={"field": name[:128]})


def _shown(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:117]}…")
