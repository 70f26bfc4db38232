"""Reward functions by name and arguments, so that BestOfN and Refine travel as data."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints, TypeAdapter, ValidationError
from pydantic_core import SchemaError

from dspex_kernels import errors
from dspex_kernels.kernel.programs.tools import REWARDS, Toolbox
from dspex_kernels.kernel.programs.values import to_json
from dspex_kernels.protocol import limits
from dspex_kernels.protocol.messages import first_problem

Reward = Callable[[dict[str, Any], Any], float]

MAX_PATTERN = 1000
"""Characters of a regular expression."""

MAX_TEXT = 100_000
"""Characters of an output that a regular expression looks at; the rest is left out."""


class RewardSpec(BaseModel):
    """A reward function as data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(max_length=128)
    args: dict[str, Any] = Field(default_factory=dict)


class FieldReward(BaseModel):
    """1.0 when an output field is as wanted, else 0.0.

    Classes of this module, not closures: Refine shows a reward's source to the model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    reward_name: ClassVar[str]
    field: str = Field(min_length=1, max_length=128)

    def __call__(self, inputs: dict[str, Any], prediction: Any) -> float:
        return _told(self.reward_name, lambda: self.is_wanted(prediction[self.field]))

    def is_wanted(self, value: Any) -> bool:
        raise NotImplementedError

    @staticmethod
    def text_of(value: Any) -> str:
        """A field's value as text."""
        return value if isinstance(value, str) else orjson.dumps(to_json(value)).decode()


class FieldEquals(FieldReward):
    """The field has this value; texts are compared without the white space around them."""

    reward_name = "field_equals"
    value: Any

    def is_wanted(self, value: Any) -> bool:
        found = to_json(value)
        if isinstance(found, str) and isinstance(self.value, str):
            return found.strip() == self.value.strip()
        return bool(found == self.value)


class Contains(FieldReward):
    """The field contains this text."""

    reward_name = "contains"
    text: str = Field(min_length=1, max_length=10_000)

    def is_wanted(self, value: Any) -> bool:
        return self.text in self.text_of(value)


class Regex(FieldReward):
    """The field matches this pattern somewhere."""

    reward_name = "regex"
    pattern: str = Field(min_length=1, max_length=MAX_PATTERN)
    _matcher: TypeAdapter[str] = PrivateAttr()

    def model_post_init(self, _context: Any) -> None:
        # Pydantic's engine is Rust's: linear in the text. Python's own could be made to compute for ever.
        try:
            self._matcher = TypeAdapter(Annotated[str, StringConstraints(pattern=self.pattern)])
        except SchemaError as failure:
            raise ValueError(
                f"not a pattern (look-around and back references are not offered): {_last_line(failure)}"
            ) from None

    def is_wanted(self, value: Any) -> bool:
        try:
            self._matcher.validate_python(self.text_of(value)[:MAX_TEXT])
        except ValidationError:
            return False
        return True


class MaxLength(FieldReward):
    """The field has at most so many characters."""

    reward_name = "max_length"
    characters: int = Field(ge=0)

    def is_wanted(self, value: Any) -> bool:
        return len(self.text_of(value)) <= self.characters


class OneWord(FieldReward):
    """The field is exactly one word."""

    reward_name = "one_word"

    def is_wanted(self, value: Any) -> bool:
        return len(self.text_of(value).split()) == 1


class JSONValid(FieldReward):
    """The field is valid JSON; what is not a text was parsed already."""

    reward_name = "json_valid"

    def is_wanted(self, value: Any) -> bool:
        try:
            orjson.loads(self.text_of(value))
        except orjson.JSONDecodeError:
            return False
        return True


class InList(FieldReward):
    """The field's value is one of these."""

    reward_name = "in_list"
    values: list[Any] = Field(min_length=1, max_length=10_000)

    def is_wanted(self, value: Any) -> bool:
        return to_json(value) in self.values


class PluginReward:
    """A plugin's reward function with its arguments.

    Args:
        name: As programs name it.
        function: ``f(inputs, prediction, **args) -> float``.
        args: Its further arguments.
    """

    def __init__(self, name: str, function: Callable[..., Any], args: Mapping[str, Any]) -> None:
        self.name = name
        self.function = function
        self.args = dict(args)

    def __call__(self, inputs: dict[str, Any], prediction: Any) -> float:
        return _told(self.name, lambda: self.function(inputs, prediction, **self.args))


_BUILT_IN: Mapping[str, type[FieldReward]] = {
    cls.reward_name: cls for cls in (FieldEquals, Contains, Regex, MaxLength, OneWord, JSONValid, InList)
}


def build_reward(spec: RewardSpec | Mapping[str, Any], toolbox: Toolbox) -> Reward:
    """The reward function that a specification names.

    Args:
        spec: ``{"name", "args"}``.
        toolbox: Where plugins' rewards come from.

    Raises:
        RewardNotFound: There is none of that name; the message lists those there are.
        InvalidModule: The arguments do not fit it.
    """
    try:
        given = spec if isinstance(spec, RewardSpec) else RewardSpec.model_validate(spec)
    except ValidationError as failure:
        raise errors.InvalidModule(f"reward: {first_problem(failure)}") from None  # it would carry the values
    if cls := _BUILT_IN.get(given.name):
        try:
            return cls.model_validate(given.args)
        except ValidationError as failure:
            raise errors.InvalidModule(f"reward {given.name!r}: {first_problem(failure)}") from None  # as above
    plugin = toolbox.plugin(REWARDS, given.name)
    if plugin is None:
        known = sorted({*_BUILT_IN, *toolbox.plugin_names(REWARDS)})
        raise errors.RewardNotFound(
            f"no reward {given.name!r}: there are {', '.join(known)}; more come from the entry-point group "
            f"{REWARDS!r}",
            details={"reward": given.name},
        )
    return _plugged(given, plugin)


def reward_source(reward: Reward) -> str:
    """The reward's source and arguments, as Refine shows them to the model."""
    if isinstance(reward, PluginReward):
        shown: Any = reward.function if inspect.isroutine(reward.function) else type(reward.function)
        args = reward.args
    else:
        shown = type(reward)
        args = reward.model_dump() if isinstance(reward, BaseModel) else {}
    try:
        source = inspect.getsource(shown)
    except (OSError, TypeError):
        source = inspect.getdoc(shown) or repr(shown)  # compiled code has no source
    return f"{source}\n# with {orjson.dumps(to_json(args)).decode()}" if args else source


def _plugged(spec: RewardSpec, plugin: Any) -> Reward:
    try:
        if inspect.isclass(plugin):
            made: Any = plugin
            return PluginReward(spec.name, made(**spec.args), {})
        inspect.signature(plugin).bind({}, None, **spec.args)
    except (TypeError, ValueError) as failure:
        raise errors.InvalidModule(f"reward {spec.name!r} does not take these args: {failure}") from failure
    return PluginReward(spec.name, plugin, spec.args)


def _told(name: str, reward: Callable[[], Any]) -> float:
    """What a reward gives.

    Raises:
        CallStopped: It failed, or gave no number. BestOfN and Refine print an ``Exception``, go on to the next
            attempt and in the end answer nothing: nobody would learn why.
    """
    try:
        return _number(reward())
    except errors.DSPexError as failure:
        raise errors.CallStopped(failure) from failure
    except Exception as failure:  # a plugin's own code, which may fail in any way
        what = traceback.format_exception_only(failure)[-1].strip()[:2000]  # str() of it may fail, too
        frames = traceback.format_tb(failure.__traceback__)[2:]  # without this function and its caller
        stopped = errors.ProgramFailed(
            f"the reward {name!r} failed: {' '.join(what.split())}; it should give a number for every answer",
            ename=type(failure).__name__,
            evalue=what.partition(": ")[2],
            traceback=[line.rstrip("\n") for line in frames][-limits.MAX_TRACEBACK_LINES :],
        )
        raise errors.CallStopped(stopped) from failure


def _number(given: Any) -> float:
    number = float(given)
    if math.isnan(number):
        raise ValueError("it gave NaN, which is neither above nor below a threshold")
    return number


def _last_line(failure: Exception) -> str:
    return str(failure).strip().splitlines()[-1][:200]
