"""Answers any DSPy prompt in the format it asks for, with the asker's canary in every text.

It reads nothing but the request's body, as a provider does: the adapter from the last user message, the output
fields from its closing reminder, their types from the system message (or from a ``response_format`` schema).
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

ECHO_LENGTH = 40
"""How many characters of the question an answer repeats."""

_NOTE = "# note: the value you produce "
_SIMPLE_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string"}
_BOUNDS = (
    ("greater than or equal to", "minimum"),
    ("less than or equal to", "maximum"),
    ("greater than", "exclusiveMinimum"),
    ("less than", "exclusiveMaximum"),
)
_FORMATS = {"date": "2024-01-02", "date-time": "2024-01-02T03:04:05Z", "time": "03:04:05"}
_DEEPEST = 5  # levels at which a recursive schema is ended


def canary(api_key: str) -> str:
    """The text that tells whose key an answer was paid with: ``canary-`` and 12 hexadecimal digits."""
    return f"canary-{hashlib.sha256(api_key.encode()).hexdigest()[:12]}"


def text_value(api_key: str, question: str) -> str:
    """What every text field of an answer says: the canary, and the question's first 40 characters."""
    echo = " ".join(question.split())[:ECHO_LENGTH]
    return f"{canary(api_key)} answers: {echo}"


@dataclass(frozen=True)
class Prompt:
    """What a chat-completions body asks for.

    Attributes:
        kind: "chat", "json", "xml", or "text" where no adapter is recognised.
        question: The first input field's value, or the whole last user message.
        schemas: A JSON Schema per output field, in the order asked for.
        tools: A ReAct prompt's tools: the arguments' schemas by tool name.
        observed: Whether a ReAct trajectory has an observation already.
    """

    kind: str
    question: str
    schemas: dict[str, dict[str, Any]] = field(default_factory=dict)
    tools: dict[str, dict[str, Any]] = field(default_factory=dict)
    observed: bool = False


def read_prompt(body: dict[str, Any]) -> Prompt:
    """The prompt of a parsed request body."""
    messages = body.get("messages", [])
    system = "\n".join(_text(m) for m in messages if m.get("role") in ("system", "developer"))
    user = next((_text(m) for m in reversed(messages) if m.get("role") == "user"), "")
    if "[[ ## completed ## ]]" in user:
        reminder = user.rpartition("Respond with the corresponding output fields")[2]
        kind, names = "chat", re.findall(r"`\[\[ ## (\w+) ## \]\]`", reminder)
    elif "Respond with a JSON object in the following order of fields" in user:
        reminder = user.rpartition("Respond with a JSON object")[2]
        kind, names = "json", re.findall(r"(?:fields: |then )`(\w+)`", reminder)
    elif "wrapped in XML tags" in user:
        reminder = user.rpartition("Respond with the corresponding")[2]
        kind, names = "xml", re.findall(r"`<(\w+)>`", reminder)
    else:
        return Prompt("text", user)
    names = [name for name in names if name != "completed"]
    return Prompt(
        kind,
        _question(kind, user),
        {name: _field_schema(name, kind, system, body) for name in names},
        _tools(system) if "next_tool_name" in names else {},
        "observation_" in user,
    )


def compose(api_key: str, prompt: Prompt, overrides: dict[str, Any] | None = None) -> str:
    """An answer to a prompt as the model's text.

    Args:
        api_key: Whose canary the answer carries; numbers and choices follow from it too.
        prompt: What was asked.
        overrides: Values for some output fields; names that are not asked for are left out.
    """
    sampler = _Sampler(api_key, prompt.question)
    if prompt.kind == "text":
        return text_value(api_key, prompt.question)
    values = {name: sampler.value(schema, name) for name, schema in prompt.schemas.items()}
    if "next_tool_name" in values:
        tool = "finish" if prompt.observed else next(iter(prompt.tools), "finish")
        args = {name: sampler.value(schema, name) for name, schema in prompt.tools.get(tool, {}).items()}
        values |= {"next_tool_name": tool, "next_tool_args": args}
    values |= {name: value for name, value in (overrides or {}).items() if name in values}
    if prompt.kind == "json":
        return json.dumps(values)
    texts = {name: v if isinstance(v, str) else json.dumps(v) for name, v in values.items()}
    if prompt.kind == "xml":
        return "\n".join(f"<{name}>\n{text}\n</{name}>" for name, text in texts.items())
    sections = [f"[[ ## {name} ## ]]\n{text}" for name, text in texts.items()]
    return "\n\n".join([*sections, "[[ ## completed ## ]]"])


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, dict))


def _question(kind: str, user: str) -> str:
    if kind == "xml":
        found = re.search(r"<(\w+)>\n?(.*?)\n?</\1>", user, re.S)
        return found[2] if found else user
    found = re.search(r"\[\[ ## \w+ ## \]\]\n(.*?)(?=\n\n\[\[ ## |\n\nRespond with |\Z)", user, re.S)
    return found[1] if found else user


def _field_schema(name: str, kind: str, system: str, body: dict[str, Any]) -> dict[str, Any]:
    wanted = (body.get("response_format") or {}).get("json_schema", {}).get("schema", {})
    if name in wanted.get("properties", {}):
        return {"$defs": wanted.get("$defs", {}), **wanted["properties"][name]}
    outputs = system.partition("Your output fields are:")[2].partition("All interactions will be")[0]
    row = re.search(
        rf"^\d+\. `{name}` \((.*?)\):(?: |$).*?(?:\nConstraints: (.*?))?(?=\n\d+\. `|\Z)", outputs, re.S | re.M
    )
    type_, constraints = (row[1], row[2] or "") if row else ("str", "")
    note = _note(name, kind, system)
    if note.startswith("must adhere to the JSON schema: "):
        return dict(json.loads(note.partition(": ")[2]))
    if type_.startswith("Literal["):
        return {"enum": list(ast.literal_eval(type_.removeprefix("Literal")))}
    if note.startswith("must be one of: "):
        return {"enum": note.partition(": ")[2].split("; ")}
    schema: dict[str, Any] = {"type": _SIMPLE_TYPES.get(type_, "string")}
    for words, key in _BOUNDS:
        if bound := re.search(rf"(?:^|, ){words}: (-?[\d.]+)", constraints):
            schema[key] = float(bound[1])
    return schema


def _note(name: str, kind: str, system: str) -> str:
    found = re.search(rf"\{{{name}\}} *{_NOTE}(.*)$", system, re.M)
    if found is None:
        return ""
    if kind == "json":  # the note stands inside a JSON string
        return str(json.loads('"' + found[1].removesuffix(",").removesuffix('"') + '"'))
    return found[1]


def _tools(system: str) -> dict[str, dict[str, Any]]:
    rows = re.findall(r"^\s*\(\d+\) (\w+).*? It takes arguments (\{.*\})\.$", system, re.M)
    return {name: ast.literal_eval(args) for name, args in rows}


class _Sampler:
    """JSON Schema to a value: the same for the same key, question and field."""

    def __init__(self, api_key: str, question: str) -> None:
        self._text = text_value(api_key, question)

    def value(self, schema: dict[str, Any], name: str) -> Any:
        return self._value(schema, name, schema.get("$defs", {}), 0)

    def _number(self, name: str) -> int:
        return int(hashlib.sha256(f"{name}|{self._text}".encode()).hexdigest()[:8], 16)

    def _value(self, schema: dict[str, Any], name: str, defs: dict[str, Any], depth: int) -> Any:
        if "$ref" in schema:
            schema = {**defs.get(schema["$ref"].rpartition("/")[2], {}), **schema}
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return schema["enum"][self._number(name) % len(schema["enum"])]
        for options in (schema.get("anyOf"), schema.get("oneOf"), schema.get("allOf")):
            if options:
                chosen = next((o for o in options if o.get("type") != "null"), options[0])
                return None if depth > _DEEPEST else self._value(chosen, name, defs, depth + 1)
        match schema.get("type"):
            case "object":
                return self._object(schema, name, defs, depth)
            case "array":
                return self._array(schema, name, defs, depth)
            case "integer" | "number":
                return self._in_range(schema, name)
            case "boolean":
                return bool(self._number(name) % 2)
            case "null":
                return None
        text = _FORMATS.get(schema.get("format", ""), self._text)
        return text[: schema.get("maxLength", len(text))]

    def _object(self, schema: dict[str, Any], name: str, defs: dict[str, Any], depth: int) -> dict[str, Any]:
        properties = schema.get("properties", {})
        shown = properties if depth < _DEEPEST else {n: properties[n] for n in schema.get("required", ())}
        if shown:
            return {n: self._value(child, n, defs, depth + 1) for n, child in shown.items()}
        extra = schema.get("additionalProperties")
        return {"key": self._value(extra, name, defs, depth + 1)} if isinstance(extra, dict) else {}

    def _array(self, schema: dict[str, Any], name: str, defs: dict[str, Any], depth: int) -> list[Any]:
        if "prefixItems" in schema:
            items = enumerate(schema["prefixItems"])
            return [self._value(child, f"{name}{i}", defs, depth + 1) for i, child in items]
        count = 0 if depth > _DEEPEST else max(schema.get("minItems", 0), min(2, schema.get("maxItems", 2)))
        child = schema.get("items", {"type": "string"})
        return [self._value(child, f"{name}{i}", defs, depth + 1) for i in range(count)]

    def _in_range(self, schema: dict[str, Any], name: str) -> int | float:
        whole = schema["type"] == "integer"
        low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + (1 if whole else 0.001))
        high = schema.get("maximum", schema.get("exclusiveMaximum", low + 101) - (1 if whole else 0.001))
        if whole:
            return int(low) + self._number(name) % max(1, int(high - low) + 1)
        return round(float(low + (high - low) * (self._number(name) % 1000) / 1000), 3)
