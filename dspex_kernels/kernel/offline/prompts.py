"""Reads back from a DSPy prompt what it asks for: the adapter's form, the output fields, their types.

Only what the adapters of DSPy 3.4 write is read, anchored at line starts, the last user message's reminder first:
a question that quotes a marker does not mislead it. One thing is not in the prompt: XMLAdapter writes nested
fields as empty tags, without their types; those are taken from the signature of the calling Predict.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import dspy
from pydantic import TypeAdapter

from dspex_kernels.kernel.offline.samples import Schema, kind_of

Form = Literal["chat", "json", "xml", "text"]

QUOTE_LENGTH = 60  # characters of an input that an answer repeats

_REMINDERS: dict[str, tuple[Form, str]] = {
    "Respond with the corresponding output fields, starting with the field ": ("chat", r"`\[\[ ## (\w+) ## \]\]`"),
    "Respond with a JSON object in the following order of fields: ": ("json", r"(?:^|, then )`(\w+)`"),
    "Respond with the corresponding output fields wrapped in XML tags ": ("xml", r"`<(\w+)>`"),
}
_STRUCTURE = "All interactions will be structured in the following way"
_NOTE = "# note: the value you produce "
_PLAIN_TYPES: dict[str, Schema] = {
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "str": {"type": "string"},
}
_CONSTRAINTS = {
    "greater than": "exclusiveMinimum",
    "greater than or equal to": "minimum",
    "less than": "exclusiveMaximum",
    "less than or equal to": "maximum",
    "minimum length": "minLength",
    "maximum length": "maxLength",
    "a multiple of the given number": "multipleOf",
}
_ARRAY_BOUNDS = {"minLength": "minItems", "maxLength": "maxItems"}


@dataclass(frozen=True)
class OutputField:
    """A field that the prompt wants filled.

    Attributes:
        schema: What fits, as a JSON Schema.
        is_json: Whether DSPy reads it as JSON where the adapter writes text: a string then needs its quotes.
        is_code: Whether it is a ``dspy.Code``.
    """

    schema: Schema
    is_json: bool = False
    is_code: bool = False


@dataclass(frozen=True)
class Prompt:
    """What a request asks for.

    Attributes:
        form: The adapter's, "text" where none asks for fields.
        fields: Output fields by name, in order.
        quote: The start of the first input's value; empty when there is none.
        tools: ReAct's tools by name, in order, ``finish`` among them: argument name → JSON Schema. Else empty.
        has_observation: Whether a tool of this trajectory has answered already.
        user: The last user message.
        characters: The length of the whole request.
    """

    form: Form
    fields: dict[str, OutputField]
    quote: str
    tools: dict[str, dict[str, Schema]]
    has_observation: bool
    user: str
    characters: int


def read_prompt(request: Any) -> Prompt:
    """What an lm15 ``Request`` asks for."""
    system = _text_of(request.system)
    users = [_text_of(message.parts) for message in request.messages if message.role == "user"]
    user = users[-1] if users else ""
    characters = len(system) + sum(len(_text_of(message.parts)) for message in request.messages)
    position, form, names = _reminder(user)
    inputs = user[:position]
    fields = _output_fields(system, form, names)
    trajectory = re.split(r"^(?:\[\[ ## trajectory ## \]\]|<trajectory>)$", inputs, flags=re.MULTILINE)
    return Prompt(
        form=form,
        fields=fields,
        quote=_quote(system, inputs),
        tools=_tools(system) if {"next_tool_name", "next_tool_args"} <= fields.keys() else {},
        has_observation=len(trajectory) > 1
        and bool(re.search(r"^(?:\[\[ ## |<)observation_\d", trajectory[-1], re.M)),
        user=user,
        characters=characters,
    )


def _text_of(parts: Any) -> str:
    """The text of a message or system prompt; images and other media are left out."""
    if parts is None or isinstance(parts, str):
        return parts or ""
    return "".join(getattr(part, "text", None) or "" for part in parts)


def _reminder(user: str) -> tuple[int, Form, list[str]]:
    """Where the adapter's reminder starts, whose it is, and the fields that it names."""
    found = [(user.rfind(words), form, pattern, words) for words, (form, pattern) in _REMINDERS.items()]
    position, form, pattern, words = max(found)
    if position < 0:
        return len(user), "text", []
    names = re.findall(pattern, user[position + len(words) :])
    return position, form, list(dict.fromkeys(name for name in names if form != "chat" or name != "completed"))


def _quote(system: str, inputs: str) -> str:
    """The start of the first input's text, on one line; images and histories have none and are passed over."""
    listed = re.search(r"^Your input fields are:\n(.*?)\nYour output fields are:$", system, re.S | re.M)
    names = re.findall(r"^\d+\. `(\w+)` \(", listed[1], re.M) if listed else []
    values = (_input_value(name, inputs) for name in names) if names else iter([inputs])
    line = next((line for value in values if (line := " ".join(value[: QUOTE_LENGTH * 20].split()))), "")
    return line if len(line) <= QUOTE_LENGTH else line[: QUOTE_LENGTH - 1].rstrip() + "…"


def _input_value(name: str, inputs: str) -> str:
    chat = re.search(rf"^\[\[ ## {name} ## \]\]\n(.*?)(?=\n\n\[\[ ## \w+ ## \]\]|\Z)", inputs, re.S | re.M)
    tagged = re.search(rf"^<{name}>\n(.*?)\n</{name}>", inputs, re.S | re.M)
    found = chat or tagged
    return found[1] if found else ""


def _output_fields(system: str, form: Form, names: list[str]) -> dict[str, OutputField]:
    described, _, structure = system.partition(f"\n{_STRUCTURE}")
    described = described.rpartition("Your output fields are:\n")[2]
    slots = _slots(structure, form, names)
    return {name: _output_field(name, described, names, slots.get(name)) for name in names}


def _slots(structure: str, form: Form, names: list[str]) -> dict[str, str]:
    """What stands in each output field's place in the structure: ``{name}``, perhaps with a note on its type."""
    if form == "json":
        start = structure.find("{", structure.find("Outputs will be a JSON object with the following fields."))
        try:
            slots, _ = json.JSONDecoder().raw_decode(structure[start:])
        except ValueError:
            return {}
        return {name: slot for name, slot in slots.items() if isinstance(slot, str)}
    lines = {name: re.search(rf"^\{{{name}\}}(?: +# note: .*)?$", structure, re.M) for name in names}
    return {name: line[0] for name, line in lines.items() if line}


def _output_field(name: str, described: str, names: list[str], slot: str | None) -> OutputField:
    others = "|".join(map(re.escape, names))
    entry = re.search(rf"^\d+\. `{name}` \((.*?)(?=\n\d+\. `(?:{others})` \(|\Z)", described, re.S | re.M)
    words = entry[1] if entry else "str): "
    named = words.partition("):")[0]
    note = (slot or "").partition(_NOTE)[2]
    stated = slot is None or note.startswith("must adhere to the JSON schema: ")
    if slot is None:
        schema = _signature_schema(name)
    else:
        schema = _stated_schema(note) if stated else _noted_schema(note, named, words)
    schema = _constrained(schema, words.rpartition("\nConstraints: ")[2] if "\nConstraints: " in words else "")
    return OutputField(schema, is_json=stated and not _is_optional_text(schema), is_code=named.startswith("Code"))


def _stated_schema(note: str) -> Schema:
    found = json.loads(note.partition("JSON schema: ")[2])
    return found if isinstance(found, dict) else {}


def _noted_schema(note: str, named: str, words: str) -> Schema:
    """The schema of a type that DSPy tells in words."""
    options = note.partition(" one of: ")[2].split("; ") if " one of: " in note else []
    if words.startswith("Literal["):
        # The note joins the options with "; ", which an option may contain; the type's name quotes them.
        try:
            literals = ast.literal_eval(words[len("Literal") : words.index("]):") + 1])
        except (ValueError, SyntaxError):
            literals = options
        return {"enum": list(literals)}
    if options:
        # An enum's values are told without their types: when all are integers, DSPy reads integers only.
        numbers = all(re.fullmatch(r"-?\d+", option) for option in options)
        return {"enum": [int(option) for option in options] if numbers else options}
    return _PLAIN_TYPES.get(named, _PLAIN_TYPES["str"])


def _constrained(schema: Schema, constraints: str) -> Schema:
    """The schema with the field's own bounds, which DSPy tells in words, on its first alternative."""
    bounds: Schema = {}
    for words, key in _CONSTRAINTS.items():
        if found := re.search(rf"(?:^|, ){words}: (-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?=,|$)", constraints):
            bounds[key] = json.loads(found[1])
    if not bounds:
        return schema
    if "anyOf" in schema:
        first, *rest = sorted(schema["anyOf"], key=lambda alternative: kind_of(alternative) == "null")
        return {**schema, "anyOf": [_constrained(first, constraints), *rest]}
    if kind_of(schema) == "array":
        bounds = {_ARRAY_BOUNDS.get(key, key): bound for key, bound in bounds.items()}
    return {**schema, **bounds}


def _is_optional_text(schema: Schema) -> bool:
    """Whether DSPy takes the text as it is: ``parse_value`` does for a union of ``str`` and ``None``."""
    alternatives = [
        {k: v for k, v in s.items() if k == "type"} for s in schema.get("anyOf", ()) if "format" not in s
    ]
    return {"type": "string"} in alternatives and {"type": "null"} in alternatives


def _signature_schema(name: str) -> Schema:
    """The schema of a field whose type XMLAdapter leaves out, from the Predict that is calling."""
    callers = dspy.settings.get("caller_modules") or [None]
    field = getattr(getattr(callers[-1], "signature", None), "output_fields", {}).get(name)
    schema: Schema = {} if field is None else TypeAdapter(field.annotation).json_schema(by_alias=False)
    return schema


def _tools(system: str) -> dict[str, dict[str, Schema]]:
    """ReAct's tools as its instructions list them."""
    listed = re.findall(
        r"^\s*\(\d+\) (\w+)(?:, whose description is .*|\.) It takes arguments (\{.*\})\.$", system, re.M
    )
    return {name: _arguments(written) for name, written in listed}


def _arguments(written: str) -> dict[str, Schema]:
    """Argument schemas from the ``repr`` that DSPy prints; those with a default are left to it."""
    try:
        schemas = ast.literal_eval(written)
    except (ValueError, SyntaxError):
        return {}
    return {name: schema for name, schema in schemas.items() if "default" not in schema}
