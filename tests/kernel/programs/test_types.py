import datetime
import sys
from typing import Any, Literal, Optional, Union

import dspy
import pydantic
import pytest

from dspex_kernels import errors
from dspex_kernels.kernel.programs.types import annotation_of, parse_type, schema_type, type_text
from dspex_kernels.protocol.records import FieldSpec

PERSON = {
    "type": "object",
    "title": "Person",
    "description": "Somebody.",
    "properties": {
        "first-name": {"type": "string", "minLength": 2, "description": "Given name."},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 150},
        "born": {"type": "string", "format": "date"},
        "schema": {"enum": ["a", "b"], "default": "a"},
        "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 3},
        "home": {"$ref": "#/$defs/address"},
        "scores": {"type": "object", "additionalProperties": {"type": "number"}},
        "nick": {"type": ["string", "null"]},
    },
    "required": ["first-name"],
    "additionalProperties": False,
    "$defs": {"address": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
}


@pytest.mark.parametrize(
    ("text", "annotation"),
    [
        ("str", str),
        (" list[str] ", list[str]),
        ("dict[str, list[int]]", dict[str, list[int]]),
        ("tuple[int, str]", tuple[int, str]),
        ("tuple[int, ...]", tuple[int, ...]),
        ("set[int]", set[int]),
        ("list", list),
        ("List[int]", list[int]),
        ("typing.Dict[str, Any]", dict[str, Any]),
        ("Literal['a,b', '->', -1, True, None]", Literal["a,b", "->", -1, True, None]),
        ("Optional[int]", Optional[int]),  # noqa: UP045  # what is tested
        ("Union[int, str]", Union[int, str]),  # noqa: UP007  # what is tested
        ("int | str | None", Union[int, str, None]),  # noqa: UP007  # what is tested
        ("None", type(None)),
        ("Any", Any),
        ("date", datetime.date),
        ("datetime", datetime.datetime),
        ("datetime.date", datetime.date),
        ("datetime.datetime", datetime.datetime),
        ("time", datetime.time),
        ("dspy.Image", dspy.Image),
        ("list[Image]", list[dspy.Image]),
    ],
)
def test_a_type_is_read_from_its_text(text, annotation):
    assert parse_type(text, field="x") == annotation


@pytest.mark.parametrize(
    "text",
    [
        "", "object", "this", "os.system", "__import__('os')", "list[this]", "lambda: 1",
        "int()", "list[int][0]", "1",
        "'str'",
        "dict[str]", "list[int, str]", "Literal", "Literal[x]", "Literal[1.5]", "Optional[int, str]", "tuple[()]",
        "int[str]", "dspy.Tool", "dspy.settings", "datetime.timedelta", "int &", "a\0b", "list[...]", "Code[5]",
        "int | 5",
        "dspy.dspy.Image", "conint(gt=1)", "*int", "x := int",
    ],
)  # fmt: skip
def test_what_is_no_type_is_refused_with_the_fields_name(text):
    with pytest.raises(errors.InvalidType, match="'score'") as caught:
        parse_type(text, field="score")
    assert caught.value.details["field"] == "score"


def test_an_unknown_word_is_named_together_with_the_words_there_are():
    with pytest.raises(errors.InvalidType, match=r"unknown word 'strng'.*list\[T\]"):
        parse_type("list[strng]", field="x")


def test_a_type_never_imports_the_module_it_names():
    sys.modules.pop("this", None)
    for text in ("this", "this.s", "list[this]"):
        with pytest.raises(errors.InvalidType):
            parse_type(text, field="q")
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "text", ["list[" * 30 + "int" + "]" * 30, "int | " * 300 + "(" * 150, "x" * 2001, "(" * 1000]
)
def test_a_type_is_bounded_in_depth_and_length(text):
    with pytest.raises(errors.InvalidType):
        parse_type(text, field="x")


def test_a_long_union_is_not_a_deep_one():
    assert parse_type(" | ".join(["int", "str", "None"] * 60), field="x") == Union[int, str, None]  # noqa: UP007  # what is tested


def test_an_object_of_a_json_schema_becomes_a_model_that_validates():
    person = schema_type(PERSON, name="who", field="who")
    assert issubclass(person, pydantic.BaseModel)
    assert person.__name__ == "Person"
    given = {
        "first-name": "Ada",
        "age": 36,
        "born": "1815-12-10",
        "children": [{"first-name": "Byron"}],
        "home": {"city": "London"},
        "scores": {"maths": 1},
    }
    ada = person.model_validate(given)
    dumped = ada.model_dump(mode="json", by_alias=True)
    assert dumped["first-name"] == "Ada"
    assert dumped["schema"] == "a"
    assert isinstance(ada.children[0], person)
    assert ada.born == datetime.date(1815, 12, 10)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"first-name": "A"},
        {"first-name": "Ada", "age": 150},
        {"first-name": "Ada", "age": -1},
        {"first-name": "Ada", "schema": "c"},
        {"first-name": "Ada", "home": {}},
        {"first-name": "Ada", "children": [{"first-name": "Bo"}] * 4},
        {"first-name": "Ada", "scores": {"x": "high"}},
        {"first-name": "Ada", "unknown": 1},
    ],
)
def test_a_schemas_model_refuses_what_the_schema_refuses(wrong):
    person = schema_type(PERSON, name="who", field="who")
    with pytest.raises(pydantic.ValidationError):
        person.model_validate(wrong)


def test_a_schema_read_again_gives_the_same_schema():
    first, second = (
        pydantic.TypeAdapter(schema_type(PERSON, name="who", field="who")).json_schema() for _ in range(2)
    )
    assert first == second
    assert list(first["$defs"]) == list(second["$defs"])


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 3}, 2, 4),
        ({"type": "number", "multipleOf": 0.5}, 1.5, 1.6),
        ({"type": "string", "pattern": "^a+$", "maxLength": 3}, "aa", "b"),
        ({"enum": ["x", 1, None]}, None, "y"),
        ({"const": "x"}, "x", "y"),
        ({"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}]}, ("a", 1), ("a",)),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 1}, [1], []),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, {1, 2}, {"x"}),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, None, "x"),
        ({"oneOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}]}, ["x"], "x"),
        ({"type": ["integer", "null"], "minimum": 2}, 2, 1),
        ({"allOf": [{"$ref": "#/definitions/n"}], "definitions": {"n": {"type": "integer"}}}, 1, "x"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, {"a": 1}, {"a": "x"}),
        ({"type": "boolean"}, True, "perhaps"),
    ],
)
def test_each_keyword_of_a_schema_is_honoured(schema, good, bad):
    adapter = pydantic.TypeAdapter(schema_type(schema, name="x", field="x"))
    assert adapter.validate_python(good) == good
    with pytest.raises(pydantic.ValidationError):
        adapter.validate_python(bad)


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"allOf": [{"type": "string"}, {"minLength": 2}]}, "allOf"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "object", "if": {}}, "if"),
        ({"type": "object", "patternProperties": {}}, "patternProperties"),
        ({"$ref": "https://example.org/x.json"}, "only references inside"),
        ({"$ref": "other.json#/x"}, "only references inside"),
        ({"$ref": "#/$defs/none"}, "there is no"),
        ({"$ref": "#"}, "contains itself"),
        ({"type": "array", "items": {"$ref": "#"}}, "contains itself"),
        ({"enum": [1.5]}, "enum"),
        ({"enum": []}, "enum"),
        ({"type": "strin"}, "strin"),
        ({"type": "string", "pattern": "(?=a)"}, "pattern"),
        ({"type": "string", "minLength": "3"}, "minLength"),
        ({"type": "string", "minimum": 3}, "minimum"),
        ({"type": "array", "items": "string"}, "str"),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, "required"),
        ({"type": "object", "properties": {"a": {}}, "required": [{}]}, "required"),
        ({"type": "string", "pattern": "a" * 1001}, "1,001"),
    ],
)
def test_a_schema_that_cannot_be_honoured_is_refused_with_the_reason(schema, word):
    with pytest.raises(errors.InvalidType, match="'invoice'") as caught:
        schema_type(schema, name="x", field="invoice")
    assert word in caught.value.message


def test_a_schema_is_bounded_in_depth_and_size():
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(40):
        deep = {"type": "array", "items": deep}
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}
    for schema, why in ((deep, "more than"), (wide, "too many parts")):
        with pytest.raises(errors.InvalidType, match=why):
            schema_type(schema, name="x", field="x")


def test_a_model_without_a_title_is_called_after_its_place():
    schema = {"type": "object", "properties": {"post_address": {"type": "object", "properties": {"zip": {}}}}}
    model = schema_type(schema, name="invoice_head", field="x")
    assert model.__name__ == "InvoiceHead"
    assert "InvoiceHeadPostAddress" in model.model_json_schema()["$defs"]


def test_a_type_is_told_in_short():
    assert type_text(FieldSpec(name="a", type="list[str]")) == "list[str]"
    assert type_text(FieldSpec(name="a", type=PERSON)) == "Person"
    assert type_text(FieldSpec(name="a", type={"type": "object", "properties": {"a": {}}})) == "object"
    assert type_text(dict[str, Optional[int]]) == "dict[str, int | None]"  # noqa: UP045  # what is tested
    assert type_text(tuple[int, ...]) == "tuple[int, ...]"
    assert type_text(annotation_of(FieldSpec(name="a", type={"type": "integer", "minimum": 1}))) == "int"


@pytest.mark.parametrize(
    "text",
    [
        "-" * 1900 + "1",
        "a" + ".b" * 900,
        "not " * 400 + "x",
        "+".join("1" * 900),
        "x" + "()" * 900,
        "list" + "[int]" * 380,
    ],
    ids=["minus", "attribute", "not", "plus", "call", "subscript"],
)
def test_a_type_that_python_parses_and_cannot_walk_is_refused(text):
    with pytest.raises(errors.InvalidType, match="'q'"):
        parse_type(text, field="q")


def test_a_literal_with_half_a_character_is_refused():
    with pytest.raises(errors.InvalidType, match="lone surrogate"):
        parse_type(r"Literal['\ud800']", field="q")


def _choice(*names):
    return {"anyOf": [*({"$ref": f"#/$defs/{name}"} for name in names), {"type": "null"}]}


def test_a_schema_whose_values_take_for_ever_to_read_is_refused():
    """Pydantic tries each object of a choice, again at each level: 2**n times, and holds the GIL meanwhile."""
    recursive = {
        "$defs": {name: {"type": "object", "properties": {"next": _choice("A", "B")}} for name in ("A", "B")},
        **_choice("A", "B"),
    }
    levels = {f"{name}{n}": {"type": "object", "properties": {"next": _choice(f"A{n - 1}", f"B{n - 1}")}}
              for n in range(1, 40) for name in ("A", "B")}  # fmt: skip
    ends = {f"{name}0": {"type": "object", "properties": {"end": {}}} for name in ("A", "B")}
    # Innermost first: each is read once, and none of them deep.
    flat = {
        "$defs": {**ends, **levels},
        "type": "object",
        "properties": {name: {"$ref": f"#/$defs/{name}"} for name in (*ends, *levels)},
    }
    for schema in (recursive, flat):
        with pytest.raises(errors.InvalidType, match="more than 10,000 ways"):
            schema_type(schema, name="x", field="x")


def test_a_tree_with_leaves_is_read():
    sides = {side: _choice("Branch", "Leaf") for side in ("left", "right")}
    branch = {"type": "object", "properties": sides, "additionalProperties": False}
    leaf = {"type": "object", "properties": {"value": {"type": "integer"}}, "required": ["value"]}
    tree = schema_type({"$defs": {"Branch": branch, "Leaf": leaf}, "$ref": "#/$defs/Branch"}, name="x", field="x")
    value: dict[str, Any] = {"value": 7}
    for _ in range(40):
        value = {"left": value}
    read = pydantic.TypeAdapter(tree).validate_python(value)
    for _ in range(40):
        read = read.left
    assert read.value == 7
