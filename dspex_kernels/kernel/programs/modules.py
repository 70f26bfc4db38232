"""DSPy modules from data: one row per module, nested modules and rewards included.

A row names what the module's arguments may be (a pydantic model), whether it takes tools, and how it is built.
Whole pipelines come from plugins.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from inspect import Parameter as Argument
from inspect import signature as arguments_of
from typing import Annotated, Any, NamedTuple

import dspy
from dspy.predict.parameter import Parameter
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from dspex_kernels import errors, logs
from dspex_kernels.kernel.programs.rewards import FieldReward, Reward, RewardSpec, build_reward, reward_source
from dspex_kernels.kernel.programs.signatures import FILTERS, build_signature, signature_spec
from dspex_kernels.kernel.programs.tools import MODULES, SessionTool, Toolbox
from dspex_kernels.protocol.messages import AS_OBJECT, AS_TEXT, first_problem
from dspex_kernels.protocol.records import ProgramSpec, SignatureSpec, ToolReference
from dspex_kernels.protocol.sampling import Sampling

log = logs.get_logger(__name__)

MAX_NESTING = 5
"""Modules within modules: BestOfN(Refine(Predict)) is three."""

NOTEBOOK = "notebook"
"""The ``module`` of a record whose program is an object of a notebook."""

_LATER = frozenset(
    {"ProgramOfThought", "CodeAct", "RLM", "Flex", "ReActV2", "Parallel", "KNN", "KNNFewShot", "Embeddings"}
    | {"Retrieve", "Ensemble", "majority", "Avatar"}
)
_APPENDED = frozenset({"reasoning", "rationale", "trajectory"})
"""Outputs that modules add to their signature's."""


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _by_shape(value: Any) -> str:
    return AS_TEXT if isinstance(value, str) else AS_OBJECT


class NoArguments(_Arguments):
    """The module takes none."""


class ReActArguments(_Arguments):
    max_iters: int = Field(20, ge=1, le=200)


class MultiChainComparisonArguments(_Arguments):
    M: int = Field(3, ge=1, le=50)
    temperature: float | None = Field(None, ge=0, le=10, description="Null is the config's, or 0.7.")


class NestedModule(_Arguments):
    """A module within another, as data."""

    module: str = Field("Predict", max_length=128)
    signature: (
        Annotated[Annotated[str, Tag(AS_TEXT)] | Annotated[SignatureSpec, Tag(AS_OBJECT)], Discriminator(_by_shape)]
        | None
    ) = None
    module_args: dict[str, Any] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    tools: list[
        Annotated[Annotated[str, Tag(AS_TEXT)] | Annotated[ToolReference, Tag(AS_OBJECT)], Discriminator(_by_shape)]
    ] = Field(default_factory=list, max_length=200)


class AttemptsArguments(_Arguments):
    """Of BestOfN and Refine."""

    module: NestedModule
    N: int = Field(3, ge=1, le=100)
    reward: RewardSpec
    threshold: float = Field(1.0, allow_inf_nan=False)
    # DSPy takes 0 for "not given" and would allow N failures.
    fail_count: int | None = Field(None, ge=1, le=100, description="Failures allowed; null is N.")


class Built(NamedTuple):
    """A module and the signature that its inputs are checked against; None where it has none of its own."""

    module: dspy.Module
    signature: type[dspy.Signature] | None


class _Parts(NamedTuple):
    """What a row builds from."""

    signature: type[dspy.Signature] | None
    args: Any
    config: dict[str, Any]
    tools: list[SessionTool]
    nested: Built | None
    reward: Reward | None


@dataclass(frozen=True, slots=True)
class _Row:
    args: type[_Arguments]
    build: Callable[[_Parts], dspy.Module]
    takes_tools: bool = False
    own_inputs: frozenset[str] = frozenset()
    """Names that its inputs cannot have: it has fields or arguments of these names, and would lose the input."""
    own_outputs: frozenset[str] = frozenset()


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters as they may be given with a program or a call; nulls are left out.

    Where requests go, with which key, and what is cached belongs to the session: it cannot be set here.

    Raises:
        InvalidArguments: Something else is in it, or a value does not fit; the message names it.
    """
    if unknown := sorted(str(name)[:64] for name in config if name not in Sampling.model_fields):
        raise errors.InvalidArguments(
            f"config may not hold {', '.join(unknown[:20])}: it takes {', '.join(sorted(Sampling.model_fields))}; "
            "the model, its endpoint and key are the session's (configure)",
            details={"config": unknown[:20]},
        )
    try:
        Sampling.model_validate(dict(config))
    except ValidationError as failure:
        raise errors.InvalidArguments(f"config: {first_problem(failure)}") from None  # it would carry the values
    return {name: value for name, value in config.items() if value is not None}


def normalise(spec: ProgramSpec, toolbox: Toolbox, *, depth: int = 1) -> ProgramSpec:
    """The specification with every default written out: nested signatures as fields, tools by name and hash.

    Args:
        spec: As given.
        toolbox: Where tools are looked up.
        depth: How deep it is nested; 1 is the program itself.

    Raises:
        UnknownModule: No such module.
        ModuleNotAvailable: A module that comes later.
        InvalidModule: Its arguments do not fit; the message names the field.
    """
    row = _row(spec.module, toolbox)
    if depth > MAX_NESTING:
        raise errors.InvalidModule(f"modules are nested more than {MAX_NESTING} deep: {spec.module} is too far in")
    update: dict[str, Any] = {"config": check_config(spec.config)}
    if row is not None:
        args = _arguments(spec, row)
        update["module_args"] = args.model_dump(mode="json")
        if isinstance(args, AttemptsArguments):
            nested = normalise(nested_spec(args.module, toolbox), toolbox, depth=depth + 1)
            update["module_args"]["module"] = nested.model_dump(mode="json", exclude={"adapter"})
    return spec.model_copy(update=update)


def nested_spec(nested: NestedModule, toolbox: Toolbox) -> ProgramSpec:
    """A nested module as a specification of its own."""
    return ProgramSpec(
        module=nested.module,
        signature=None if nested.signature is None else signature_spec(nested.signature),
        module_args=nested.module_args,
        config=nested.config,
        tools=[toolbox.reference(tool) if isinstance(tool, str) else tool for tool in nested.tools],
    )


def build_module(spec: ProgramSpec, toolbox: Toolbox, *, depth: int = 1) -> Built:
    """A fresh module.

    Args:
        spec: What it is made of.
        toolbox: Tools, rewards and pipelines that it may name.
        depth: How deep it is nested; 1 is the program itself.

    Raises:
        UnknownModule: No such module; the message lists those there are.
        ModuleNotAvailable: A module that comes later.
        InvalidModule: Signature, arguments or tools do not fit it; the message names the field.
        ToolNotFound: A tool is not there.
        ToolChanged: A tool is not the one that the program was made with.
        RewardNotFound: A reward is not there.
    """
    row = _row(spec.module, toolbox)
    if depth > MAX_NESTING:
        raise errors.InvalidModule(f"modules are nested more than {MAX_NESTING} deep: {spec.module} is too far in")
    config = check_config(spec.config)
    signature = None if spec.signature is None else build_signature(spec.signature)
    tools = _tools(spec, toolbox, allowed=row is None or row.takes_tools)
    if row is None:
        built = Built(_build_pipeline(spec, signature, tools, toolbox), signature)
    else:
        args = _arguments(spec, row)
        nested = reward = None
        if isinstance(args, AttemptsArguments):
            _refuse_signature(spec)
            nested = build_module(nested_spec(args.module, toolbox), toolbox, depth=depth + 1)
            reward = _build_reward(spec, args, nested, toolbox)
        elif signature is None:
            raise errors.InvalidModule(f'{spec.module} needs a signature, for instance "question -> answer"')
        else:
            _refuse_own_names(spec.module, row, signature)
        module = row.build(_Parts(signature, args, config, tools, nested, reward))
        built = Built(module, nested.signature if nested else signature)
    for _, predictor in named_predictors(built.module):
        predictor.config = {**config, **predictor.config}
    return built


def named_predictors(module: dspy.Module) -> list[tuple[str, dspy.Predict]]:
    """Every predictor by DSPy's own name for it, those of compiled modules included, which DSPy leaves out."""
    found: list[tuple[str, dspy.Predict]] = []
    seen: set[int] = set()

    def add(name: str, value: Any) -> None:
        if id(value) in seen or not isinstance(value, Parameter | dspy.Module):
            return
        seen.add(id(value))
        if isinstance(value, dspy.Predict):
            found.append((name, value))
        elif isinstance(value, dspy.Module):
            for child, item in _children(value):
                add(f"{name}.{child}", item)

    if isinstance(module, Parameter):
        add("self", module)
    for child, item in _children(module):
        add(child, item)
    return found


def modules_in(module: dspy.Module) -> list[dspy.Module]:
    """The module and every module within it."""
    found = [module]
    seen = {id(module)}
    for outer in found:
        for _, inner in _children(outer):
            if isinstance(inner, dspy.Module) and id(inner) not in seen:
                seen.add(id(inner))
                found.append(inner)
    return found


def _children(module: dspy.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if isinstance(value, Parameter | dspy.Module):
            yield name, value
        elif isinstance(value, list | tuple):
            yield from ((f"{name}[{index}]", item) for index, item in enumerate(value))
        elif isinstance(value, dict):
            yield from ((f"{name}['{key}']", item) for key, item in value.items())


def _row(module: str, toolbox: Toolbox) -> _Row | None:
    """The module's row; None for a pipeline."""
    if row := _ROWS.get(module):
        return row
    if module in toolbox.plugin_names(MODULES):
        return None
    known = ", ".join([*_ROWS, *toolbox.plugin_names(MODULES)])
    if module in _LATER:
        raise errors.ModuleNotAvailable(
            f"module {module!r} comes later: there are {known}", details={"module": module}
        )
    raise errors.UnknownModule(
        f"no module {module!r}: there are {known}; your own pipelines come from the entry-point group {MODULES!r}",
        details={"module": module},
    )


def _arguments(spec: ProgramSpec, row: _Row) -> _Arguments:
    try:
        return row.args.model_validate(spec.module_args)
    except ValidationError as failure:
        # The failure would carry the values.
        raise errors.InvalidModule(
            f"{spec.module}: module_args.{first_problem(failure)}", details={"module": spec.module}
        ) from None


def _tools(spec: ProgramSpec, toolbox: Toolbox, *, allowed: bool) -> list[SessionTool]:
    if spec.tools and not allowed:
        raise errors.InvalidModule(f"{spec.module} takes no tools: ReAct does", details={"module": spec.module})
    names = [reference.name for reference in spec.tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise errors.InvalidModule(f"tools given twice: {', '.join(twice)}")
    return [toolbox.resolve(reference) for reference in spec.tools]


def _refuse_signature(spec: ProgramSpec) -> None:
    if spec.signature is not None:
        raise errors.InvalidModule(
            f"{spec.module} takes no signature: give it to the nested module (module_args.module.signature)",
            details={"module": spec.module},
        )


def _refuse_own_names(module: str, row: _Row, signature: type[dspy.Signature]) -> None:
    for what, own, given in (
        ("input", row.own_inputs, signature.input_fields),
        ("output", row.own_outputs, signature.output_fields),
    ):
        if taken := sorted(own.intersection(given)):
            raise errors.InvalidSignature(
                f"Field {taken[0]!r} cannot be an {what} of {module}, which has its own; rename it.",
                details={"field": taken[0], "module": module},
            )


def _build_reward(spec: ProgramSpec, args: AttemptsArguments, nested: Built, toolbox: Toolbox) -> Reward:
    reward = build_reward(args.reward, toolbox)
    if isinstance(reward, FieldReward) and nested.signature is not None:
        outputs = {*nested.signature.output_fields, *_APPENDED}
        if reward.field not in outputs:
            raise errors.InvalidModule(
                f"{spec.module}: reward {args.reward.name!r} looks at the field {reward.field!r}, which is not an "
                f"output: there are {', '.join(nested.signature.output_fields)}",
                details={"field": reward.field},
            )
    return reward


def _build_predict(parts: _Parts) -> dspy.Module:
    return dspy.Predict(parts.signature, **parts.config)


def _build_chain_of_thought(parts: _Parts) -> dspy.Module:
    return dspy.ChainOfThought(parts.signature, **parts.config)


def _build_react(parts: _Parts) -> dspy.Module:
    return dspy.ReAct(parts.signature, tools=parts.tools, max_iters=parts.args.max_iters)


def _build_multi_chain_comparison(parts: _Parts) -> dspy.Module:
    config = dict(parts.config)
    temperature = config.pop("temperature", 0.7)
    if parts.args.temperature is not None:
        temperature = parts.args.temperature
    with FILTERS, warnings.catch_warnings():
        # DSPy 3.4's own constructor gives the deprecated `prefix`.
        warnings.filterwarnings("ignore", message=".*prefix", category=DeprecationWarning)
        return dspy.MultiChainComparison(parts.signature, M=parts.args.M, temperature=temperature, **config)


def _build_best_of_n(parts: _Parts) -> dspy.Module:
    assert parts.nested is not None
    args = parts.args
    return dspy.BestOfN(parts.nested.module, args.N, parts.reward, args.threshold, args.fail_count)


def _build_refine(parts: _Parts) -> dspy.Module:
    assert parts.nested is not None
    assert parts.reward is not None
    args = parts.args
    module = dspy.Refine(parts.nested.module, args.N, parts.reward, args.threshold, args.fail_count)
    # The model is to see what the reward wants, not only how it looks.
    module.reward_fn_code = reward_source(parts.reward)
    return module


def _build_pipeline(
    spec: ProgramSpec, signature: type[dspy.Signature] | None, tools: list[SessionTool], toolbox: Toolbox
) -> dspy.Module:
    factory = toolbox.plugin(MODULES, spec.module)
    given: dict[str, Any] = dict(spec.module_args)
    for name, value in (("signature", signature), ("tools", tools)):
        if value and not _accepts(factory, name):
            raise errors.InvalidModule(f"{spec.module} brings its own {name}: give none", details={"field": name})
        if value:
            given[name] = value
    try:
        module = factory(**given)
    except errors.DSPexError:
        raise
    except Exception as failure:  # a plugin's own code, which may fail in any way
        log.warning("pipeline %s could not be built", spec.module, exc_info=True)
        raise errors.InvalidModule(
            f"{spec.module} could not be built from module_args: {type(failure).__name__}: {str(failure)[:500]}",
            details={"module": spec.module},
        ) from failure
    if not isinstance(module, dspy.Module):
        raise errors.InvalidModule(f"{spec.module} gave a {type(module).__name__}, not a dspy.Module")
    return module


def _accepts(factory: Any, name: str) -> bool:
    # A Module's metaclass takes anything: its own constructor says what it takes.
    callee = getattr(factory, "__init__") if isinstance(factory, type) else factory  # noqa: B009  # mypy fears it
    parameters = arguments_of(callee).parameters
    return name in parameters or any(p.kind is Argument.VAR_KEYWORD for p in parameters.values())


_ROWS: Mapping[str, _Row] = {
    "Predict": _Row(NoArguments, _build_predict),
    "ChainOfThought": _Row(NoArguments, _build_chain_of_thought, own_inputs=frozenset({"reasoning"})),
    "ReAct": _Row(
        ReActArguments,
        _build_react,
        takes_tools=True,
        own_inputs=frozenset(
            {"module", "next_thought", "next_tool_args", "next_tool_name", "reasoning", "trajectory"}
        ),
        own_outputs=frozenset({"base", "self", "trajectory"}),
    ),
    "MultiChainComparison": _Row(
        MultiChainComparisonArguments,
        _build_multi_chain_comparison,
        own_inputs=frozenset({"rationale", *(f"reasoning_attempt_{number}" for number in range(1, 51))}),
    ),
    "BestOfN": _Row(AttemptsArguments, _build_best_of_n),
    "Refine": _Row(AttemptsArguments, _build_refine),
}
