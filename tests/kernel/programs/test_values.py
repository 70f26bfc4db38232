import dataclasses
import datetime
import decimal
import enum
import uuid

import dspy
import orjson
import pydantic
import pytest

from dspex_kernels import errors
from dspex_kernels.kernel.programs.types import schema_type
from dspex_kernels.kernel.programs.values import to_json


class Colour(enum.Enum):
    RED = "red"


class Point(pydantic.BaseModel):
    x: int
    when: datetime.date | None = None
    ratio: float = 0.0


@dataclasses.dataclass
class Pair:
    left: object
    right: object


class Secretive:
    def __repr__(self):
        return "key=sk-canary"


class Scalar:
    dtype = "float32"

    def item(self):
        return 1.5

    def tolist(self):
        return 1.5


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (3, 3),
        (1.5, 1.5),
        ("é", "é"),
        ([1, (2, 3)], [1, [2, 3]]),
        ({3, 1, 2}, [1, 2, 3]),
        (frozenset({"b", "a"}), ["a", "b"]),
        ({2: "a", None: "b", True: "c", Colour.RED: 1}, {"2": "a", "null": "b", "true": "c", "red": 1}),
        (Colour.RED, "red"),
        (Point(x=1, when=datetime.date(2024, 1, 2)), {"x": 1, "when": "2024-01-02", "ratio": 0.0}),
        (Pair(Colour.RED, {"a": (1,)}), {"left": "red", "right": {"a": [1]}}),
        (datetime.datetime(2024, 1, 2, 3, 4), "2024-01-02T03:04:00"),
        (datetime.time(3, 4), "03:04:00"),
        (datetime.timedelta(seconds=90), 90.0),
        (decimal.Decimal("1.10"), "1.10"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (b"\x00\xff", {"$bytes": "AP8="}),
        (float("nan"), {"$float": "NaN"}),
        (float("-inf"), {"$float": "-Infinity"}),
        (Point(x=1, ratio=float("inf")), {"x": 1, "when": None, "ratio": {"$float": "Infinity"}}),
        (2**64 - 1, 2**64 - 1),
        (2**64, {"$int": "18446744073709551616"}),
        ("cut \ud83d", "cut ?"),
        ({(1, 2): "a"}, {"$pairs": [[[1, 2], "a"]]}),
        ({1: "a", "1": "b"}, {"$pairs": [[1, "a"], ["1", "b"]]}),
        (Scalar(), 1.5),
        (
            dspy.Prediction(answer="x", point=Point(x=2)),
            {"answer": "x", "point": {"x": 2, "when": None, "ratio": 0.0}},
        ),
        (dspy.Example(q="x").with_inputs("q"), {"q": "x"}),
        (dspy.Prediction.from_completions([{"a": 1}, {"a": 2}]), {"a": 1}),
        (dspy.Image("https://example.org/a.png"), {"url": "https://example.org/a.png"}),
        (dspy.Reasoning(content="because"), "because"),
        (Secretive, {"$unserialisable": f"{__name__}.Secretive"}),
        ([Secretive()], [{"$unserialisable": f"{__name__}.Secretive"}]),
    ],
)
def test_a_value_becomes_json(value, expected):
    result = to_json(value)
    assert result == expected
    orjson.dumps(result)


def test_what_cannot_be_told_never_shows_its_repr():
    class Holder(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
        inner: Secretive

    told = to_json({"a": Secretive(), "b": Holder(inner=Secretive()), "c": Pair(Secretive(), 1)})
    assert "canary" not in str(told)
    assert told["b"]["inner"] == {"$unserialisable": f"{__name__}.Secretive"}


def test_a_model_of_a_schema_is_told_under_its_own_property_names():
    schema = {"type": "object", "properties": {"first-name": {"type": "string"}}, "required": ["first-name"]}
    model = schema_type(schema, name="x", field="x")
    assert to_json([model.model_validate({"first-name": "Ada"})]) == [{"first-name": "Ada"}]


def test_a_value_that_contains_itself_is_too_large():
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(errors.TooLarge, match="contains itself"):
        to_json(loop)


def test_depth_and_size_are_bounded():
    with pytest.raises(errors.TooLarge, match="2 levels"):
        to_json([[[1]]], depth=2)
    assert to_json([[1]], depth=2) == [[1]]
    with pytest.raises(errors.TooLarge, match="parts"):
        to_json([0] * 1_000_001)
    with pytest.raises(errors.TooLarge, match="characters"):
        to_json(["x" * 1_000_000] * 9)
