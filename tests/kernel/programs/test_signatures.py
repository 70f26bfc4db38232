import time

import dspy
import pytest

from dspex_kernels import errors
from dspex_kernels.kernel.programs.signatures import (
    RESERVED_INPUTS,
    RESERVED_NAMES,
    build_signature,
    signature_spec,
    signature_text,
)
from dspex_kernels.protocol.records import FieldSpec, SignatureSpec


def prompt(signature, adapter):
    return adapter.format(signature, [], dict.fromkeys(signature.input_fields, "x"))


def test_a_signature_is_read_from_its_text():
    spec = signature_spec("question, context: list[str] -> answer: float")
    assert [(field.name, field.type) for field in spec.inputs] == [("question", "str"), ("context", "list[str]")]
    assert [(field.name, field.type) for field in spec.outputs] == [("answer", "float")]
    assert signature_text(spec) == "question, context: list[str] -> answer: float"


def test_commas_colons_and_arrows_inside_brackets_and_quotes_belong_to_the_type():
    spec = signature_spec("q: dict[str, int], k: Literal['a,b', '->', \"it's: [\"] -> a: tuple[int, str]")
    assert [field.type for field in spec.inputs] == ["dict[str, int]", "Literal['a,b', '->', \"it's: [\"]"]
    assert signature_spec(signature_text(spec)) == spec


@pytest.mark.parametrize(
    "text",
    [
        "", "q", "q ->", "-> a", "->", "q -> a -> b", "q, q -> a", "q -> q", "q,, r -> a", "q, -> a", "q: -> a",
        "q: int: str -> a",
        "q: list[str -> a", "q: Literal['x] -> a", "_q -> a", "1q -> a", "a b -> c", "class -> a", "q -> import",
        "q -> a = 3",
        "fields -> a", "q -> instructions", "q -> model_dump", "self -> a", "demos -> a", "lm, q -> a",
        "é́ -> a" * 30000,
    ],
)  # fmt: skip
def test_what_is_no_signature_is_refused(text):
    with pytest.raises(errors.InvalidSignature):
        build_signature(signature_spec(text))


@pytest.mark.filterwarnings("ignore:Field name")
@pytest.mark.parametrize("name", sorted(RESERVED_NAMES))
def test_a_reserved_name_is_refused_for_both_sides_because_dspy_cannot_bear_it(name):
    for text in (f"{name} -> a", f"q -> {name}"):
        with pytest.raises(errors.InvalidSignature, match=name):
            signature_spec(text)
        with pytest.raises((TypeError, ValueError)):
            dspy.make_signature(
                {
                    text.split(" -> ")[0]: (str, dspy.InputField()),
                    text.split(" -> ")[1]: (str, dspy.OutputField()),
                }
            )


@pytest.mark.parametrize("name", sorted(RESERVED_INPUTS - RESERVED_NAMES))
def test_a_name_that_modules_take_for_themselves_is_refused_as_an_input_only(name):
    with pytest.raises(errors.InvalidSignature, match=name):
        signature_spec(f"{name} -> a")
    assert build_signature(signature_spec(f"q -> {name}")).output_fields.keys() == {name}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["schema", "copy", "json", "items", "keys", "register", "validate"])
def test_a_field_may_bear_the_name_of_a_harmless_method(name):
    assert list(build_signature(signature_spec(f"{name} -> a")).input_fields) == [name]
    assert list(build_signature(signature_spec(f"q -> {name}")).output_fields) == [name]


def test_every_method_name_that_is_not_reserved_can_be_a_field():
    for name in dir(dspy.Signature):
        if not name.startswith("_") and name not in RESERVED_NAMES:
            assert list(build_signature(signature_spec(f"q -> {name}")).output_fields) == [name]


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter()])
@pytest.mark.parametrize(
    "text", ["question -> answer", "q, n: int -> a: list[str], ok: bool, k: Literal['x', 'y']"]
)
def test_the_prompt_is_the_one_that_dspys_own_string_gives(text, adapter):
    assert prompt(build_signature(signature_spec(text)), adapter) == prompt(dspy.Signature(text), adapter)


def test_descriptions_and_instructions_reach_the_prompt():
    spec = SignatureSpec(
        inputs=[FieldSpec(name="q", description="What is asked.")],
        outputs=[FieldSpec(name="a", description="In one word.")],
        instructions="Be brief.",
        name="Brief",
    )
    signature = build_signature(spec)
    said = prompt(signature, dspy.ChatAdapter())[0]["content"]
    assert signature.__name__ == "Brief"
    assert all(words in said for words in ("What is asked.", "In one word.", "Be brief."))


def test_a_bound_of_a_field_is_told_in_the_prompt():
    spec = SignatureSpec(
        inputs=[FieldSpec(name="q")],
        outputs=[FieldSpec(name="n", type={"type": "integer", "minimum": 1, "maximum": 7})],
    )
    assert "greater than or equal to: 1" in prompt(build_signature(spec), dspy.ChatAdapter())[0]["content"]


def test_a_signature_of_schemas_gives_the_same_prompt_when_built_again():
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"$ref": "#"}}}, "title": "Tree"}
    spec = SignatureSpec(inputs=[FieldSpec(name="q")], outputs=[FieldSpec(name="t", type=schema)])
    first, second = (prompt(build_signature(spec), dspy.JSONAdapter()) for _ in range(2))
    assert first == second
    assert "Tree" in str(first)


def test_a_bad_type_is_told_with_its_field():
    with pytest.raises(errors.InvalidType, match="'score'"):
        build_signature(signature_spec("q -> score: flot"))


def test_a_name_of_the_signature_that_is_no_python_name_is_refused():
    with pytest.raises(errors.InvalidSignature, match="no such"):
        signature_spec(SignatureSpec(inputs=[FieldSpec(name="q")], outputs=[FieldSpec(name="a")], name="no such"))


def test_building_a_signature_costs_about_a_millisecond():
    spec = signature_spec("question, context: list[str] -> answer: float")

    def once():
        start = time.perf_counter()
        build_signature(spec)
        return time.perf_counter() - start

    assert min(once() for _ in range(50)) < 0.003


def test_a_name_that_dspy_would_hide_is_refused():
    for text in ("question -> dspy_answer", "dspy_question -> answer"):
        with pytest.raises(errors.InvalidSignature, match="dspy_"):
            signature_spec(text)


def test_a_default_that_does_not_fit_its_schema_is_refused():
    inputs = [FieldSpec(name="count", type={"type": "integer", "minimum": 5, "default": 3})]
    with pytest.raises(errors.InvalidType, match="count"):
        build_signature(SignatureSpec(inputs=inputs, outputs=[FieldSpec(name="answer")]))


def test_the_schemas_of_a_signature_are_bounded_together():
    """Building them holds up the kernel: twenty of 190 objects each took ten seconds."""
    row = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
    table = {"type": "object", "properties": {f"row{n}": row for n in range(50)}}
    words = {"enum": [f"word {n}" for n in range(1000)]}
    pattern = {"type": "string", "pattern": r"\\w{100}"}
    for given, allowed, what in ((table, 3, "objects"), (words, 5, "enum values"), (pattern, 20, "patterns")):
        fields = [FieldSpec(name=f"q{n}", type=given) for n in range(allowed + 1)]
        answer = [FieldSpec(name="answer")]
        build_signature(SignatureSpec(inputs=fields[:-1], outputs=answer))
        with pytest.raises(errors.InvalidType, match=f"too many {what}"):
            build_signature(SignatureSpec(inputs=fields, outputs=answer))
