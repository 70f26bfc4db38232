"""Programs: from what a client asks to a record, from a record to a module that runs, and back."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, Self

import dspy
from dspy.adapters.utils import annotation_allows_none
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from dspex_kernels import errors
from dspex_kernels.kernel.programs.modules import (
    NOTEBOOK,
    build_module,
    modules_in,
    named_predictors,
    normalise,
)
from dspex_kernels.kernel.programs.signatures import signature_spec, signature_text
from dspex_kernels.kernel.programs.tools import Toolbox
from dspex_kernels.kernel.programs.types import type_text
from dspex_kernels.kernel.programs.values import to_json
from dspex_kernels.protocol.commands import CreateProgramArgs, ProgramSummary
from dspex_kernels.protocol.messages import cut
from dspex_kernels.protocol.records import (
    RECORD_VERSION,
    FieldSpec,
    ProgramRecord,
    ProgramSpec,
    SignatureSpec,
    ToolReference,
)

__all__ = ["LiveProgram", "check_record", "dump_state", "new_program", "record_of"]


class _FieldState(BaseModel):
    model_config = ConfigDict(extra="forbid")
    prefix: str
    description: str


class _SignatureState(BaseModel):
    model_config = ConfigDict(extra="forbid")
    instructions: str
    fields: list[_FieldState]


class _PredictorState(BaseModel):
    """What DSPy dumps of a predictor. It sets whatever else it finds as an attribute, methods included."""

    model_config = ConfigDict(extra="forbid")
    traces: list[Any] = Field(default_factory=list, max_length=0)
    train: list[Any] = Field(default_factory=list, max_length=0)
    demos: list[dict[str, Any]]
    signature: _SignatureState
    fields: dict[str, Any] = Field(default_factory=dict)
    lm: None


class _Input(NamedTuple):
    annotation: Any
    required: bool


class _Inputs(NamedTuple):
    """What a program takes: its fields, and whether it takes others too."""

    fields: dict[str, _Input]
    takes_others: bool = False


class LiveProgram:
    """A program that can run: its record and its module.

    The module is shared by all calls of the program; nothing may change it.

    Attributes:
        record: What it was built from.
        module: The DSPy module.
        has_acall: Whether it runs natively async, all of it; else it belongs on a thread.
    """

    def __init__(
        self, record: ProgramRecord, module: dspy.Module, signature: type[dspy.Signature] | None = None
    ) -> None:
        self.record = record
        self.module = module
        self.has_acall = all(_is_async(type(inner)) for inner in modules_in(module))
        self._inputs = _inputs_of(module, signature)
        self._adapters: dict[str, TypeAdapter[Any]] = {}

    @classmethod
    def build(cls, record: ProgramRecord, toolbox: Toolbox) -> Self:
        """Build the program that a record tells of.

        Raises:
            NotPortable: It lives in a notebook's kernel, and that kernel does not hold it now.
            InvalidRecord: Its state does not belong to its module.
            ProgramError: As ``build_module``.
        """
        if record.spec.module == NOTEBOOK:
            raise errors.NotPortable(
                f"program {record.program_id!r} is a module of its notebook, which does not hold it now: run the "
                f"cell that defines it, then `%dspex add {record.program_id}`",
                details={"program_id": record.program_id},
            )
        _require_notebook_tools(record, toolbox)
        # Always a fresh module: loading into one again and again nests DSPy's fields until Python gives up (140th).
        module, signature = build_module(record.spec, toolbox)
        _load_state(record, module)
        return cls(record, module, signature)

    @classmethod
    def from_module(cls, program_id: str, module: dspy.Module, version: int, created_at: str) -> Self:
        """Make a module of the notebook a program of this kernel.

        Raises:
            InvalidModule: It is not a ``dspy.Module``.
        """
        if not isinstance(module, dspy.Module):
            raise errors.InvalidModule(
                f"{program_id!r} is a {type(module).__name__}, not a dspy.Module",
                details={"program_id": program_id},
            )
        signature = _own_signature(module)
        inputs = _inputs_of(module, signature)
        spec = ProgramSpec(
            module=NOTEBOOK,
            signature=_spec_of(signature) if signature is not None else None,
            module_args={"class": type(module).__name__, "inputs": list(inputs.fields)},
        )
        record = ProgramRecord(
            program_id=program_id,
            version=version,
            spec=spec,
            portable=False,
            not_portable_because=[f"it is a {type(module).__name__} made in the notebook"],
            dspy_version=dspy.__version__,
            created_at=created_at,
        )
        return cls(record, module, signature)

    def check_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs as the program's types.

        Args:
            inputs: By field; JSON values, or values of the types themselves.

        Raises:
            MissingInput: A field is not there.
            InvalidInput: A value is not of its type, or a field is unknown.
        """
        fields = dict(self._inputs.fields)
        comparison = isinstance(self.module, dspy.MultiChainComparison)
        checked: dict[str, Any] = {}
        if comparison:
            checked["completions"] = self._check_completions(inputs)
            inputs = {name: value for name, value in inputs.items() if name != "completions"}
        for name in inputs:
            if name not in fields and not self._inputs.takes_others:
                there = [*fields, *(["completions"] if comparison else [])]
                raise errors.InvalidInput(
                    f"{self._name} has no input {str(name)[:64]!r}: there are {', '.join(there) or 'none'}",
                    details={"field": str(name)[:64]},
                )
        for name, field in fields.items():
            if name not in inputs and field.required:
                raise errors.MissingInput(
                    f"{self._name} needs the input {name!r} ({type_text(field.annotation)})",
                    details={"field": name},
                )
        checked.update((name, self._check(name, value)) for name, value in inputs.items())
        return checked

    def outputs(self, prediction: Any) -> dict[str, Any]:
        """A prediction's fields as JSON values, ``reasoning`` and ``trajectory`` included.

        Args:
            prediction: What the module returned; what is no prediction becomes the one field ``output``.
        """
        if isinstance(prediction, dspy.Example | Mapping):
            return {str(name): to_json(value) for name, value in prediction.items()}
        return {"output": to_json(prediction)}

    def summary(self) -> ProgramSummary:
        """What the program is; ``versions`` has this one only."""
        return self.summarise(self.record, [self.record.version])

    @staticmethod
    def summarise(record: ProgramRecord, versions: list[int]) -> ProgramSummary:
        """What a record's program is, without building it.

        Args:
            record: The program.
            versions: Of the program, ascending.
        """
        spec = record.spec
        signature = _shown_signature(spec)
        inputs: dict[str, str] = dict.fromkeys(spec.module_args.get("inputs", []), "Any")
        if spec.module != NOTEBOOK:
            inputs = {}
        return ProgramSummary(
            program_id=record.program_id,
            version=record.version,
            versions=versions,
            module=spec.module,
            signature=signature_text(signature) if signature else ", ".join(inputs),
            inputs={field.name: type_text(field) for field in signature.inputs} if signature else inputs,
            outputs={field.name: type_text(field) for field in signature.outputs} if signature else {},
            instructions=signature.instructions if signature else None,
            tools=[reference.name for reference in _tools_of(spec)],
            adapter=spec.adapter,
            portable=record.portable,
            created_at=record.created_at,
        )

    @property
    def _name(self) -> str:
        return f"program {self.record.program_id!r}"

    def _check(self, name: str, value: Any) -> Any:
        field = self._inputs.fields.get(name)
        if field is None or field.annotation is Any:
            return value
        if name not in self._adapters:
            self._adapters[name] = TypeAdapter(field.annotation)
        try:
            return _in_order(self._adapters[name].validate_python(value))
        except ValidationError as failure:
            problem = failure.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join([name, *(str(part) for part in problem["loc"])])[:200]
            what = cut(problem["msg"])
            # The failure would carry the value.
            raise errors.InvalidInput(
                f"{self._name}: input {where!r}: {what}; {name} is a "
                f"{cut(type_text(field.annotation))}, and it got {_shown(value)}",
                details={"field": name, "problem": what},
            ) from None

    def _check_completions(self, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        wanted, answer = self.module.M, self.module.last_key
        shape = f"{wanted} objects with `reasoning` (or `rationale`) and `{answer}`"
        if "completions" not in inputs:
            raise errors.MissingInput(
                f"{self._name} compares: it needs the input 'completions', {shape}",
                details={"field": "completions"},
            )
        given = inputs["completions"]
        if not isinstance(given, list | tuple) or len(given) != wanted:
            raise errors.InvalidInput(
                f"{self._name}: 'completions' must be {shape}; it got {_shown(given)}",
                details={"field": "completions"},
            )
        for index, completion in enumerate(given):
            known = dict(completion.items()) if isinstance(completion, dspy.Example | Mapping) else {}
            if not isinstance(known.get("rationale", known.get("reasoning")), str) or answer not in known:
                raise errors.InvalidInput(
                    f"{self._name}: 'completions.{index}' must have a text `reasoning` (or `rationale`) and "
                    f"`{answer}`; it got {_shown(completion)}",
                    details={"field": f"completions.{index}"},
                )
        return [dict(completion.items()) for completion in given]


def new_program(args: CreateProgramArgs, version: int, toolbox: Toolbox, created_at: str) -> LiveProgram:
    """The program that a client asks for; its record is complete.

    Args:
        args: What was asked for.
        version: Which it will be.
        toolbox: Tools, rewards and pipelines that it may name.
        created_at: UTC, ISO 8601.

    Raises:
        InvalidSignature: The signature does not parse.
        ProgramError: As ``build_module``.
    """
    spec = ProgramSpec(
        module=args.module,
        signature=None if args.signature is None else signature_spec(args.signature),
        module_args=args.module_args,
        config=args.config,
        tools=[toolbox.reference(name) for name in args.tools],
        adapter=args.adapter,
    )
    spec = normalise(spec, toolbox)
    module, signature = build_module(spec, toolbox)
    local = [reference.name for reference in _tools_of(spec) if not reference.portable]
    record = ProgramRecord(
        program_id=args.program_id,
        version=version,
        spec=spec,
        portable=not local,
        not_portable_because=[f"its tool {name!r} is a function of the notebook" for name in local],
        dspy_version=dspy.__version__,
        created_at=created_at,
    )
    return LiveProgram(record, module, signature)


def record_of(program: LiveProgram, *, version: int | None = None, created_at: str | None = None) -> ProgramRecord:
    """The program's record with what its module has learned since it was built.

    Args:
        program: Its module may hold other demos and instructions than its record.
        version: None keeps the record's.
        created_at: UTC, ISO 8601; None keeps the record's.
    """
    record = program.record
    update = {
        "state": dump_state(program.module),
        "version": record.version if version is None else version,
        "created_at": record.created_at if created_at is None else created_at,
        "dspy_version": dspy.__version__,
    }
    return record.model_copy(update=update)


def dump_state(module: dspy.Module) -> dict[str, Any]:
    """What the module has learned, as JSON: demos and instructions of every predictor, by DSPy's names.

    Compiled submodules are in it, which DSPy's own ``dump_state`` leaves out; language models and the traces of
    training are not.
    """
    state = {}
    for name, predictor in named_predictors(module):
        bare = copy.copy(predictor)  # an LM's own dump may fail, and tells more than a record may hold
        bare.lm, bare.traces, bare.train = None, [], []
        state[name] = to_json(bare.dump_state())
    return state


def check_record(record: ProgramRecord) -> None:
    """Check what can be told of a record without building it; ``LiveProgram.build`` checks the rest.

    Raises:
        InvalidRecord: Its version is unknown, it says two things of being portable, or its state holds what a
            predictor's state does not.
    """
    if record.record_version != RECORD_VERSION:
        raise errors.InvalidRecord(
            f"record version {record.record_version} of {record.program_id!r}: this kernel reads {RECORD_VERSION}"
        )
    local = [reference.name for reference in _tools_of(record.spec) if not reference.portable]
    if record.portable and local:
        raise errors.InvalidRecord(
            f"record of {record.program_id!r} says that it is portable, and that its tool {local[0]!r} is a "
            "notebook's: it is one or the other",
            details={"tool": local[0]},
        )
    for name, state in record.state.items():
        if isinstance(state, dict) and state.get("lm") is not None:
            raise errors.InvalidRecord(
                f"state of {name[:128]!r} holds an `lm`: a record holds none, the session's is used; set it to null"
            )
        try:
            _PredictorState.model_validate(state)
        except ValidationError as failure:
            problem = failure.errors(include_url=False, include_input=False)[0]
            where = ".".join([name[:128], *(str(part) for part in problem["loc"])])
            # The failure would carry the values.
            raise errors.InvalidRecord(f"state: {where}: {problem['msg']}") from None


def _load_state(record: ProgramRecord, module: dspy.Module) -> None:
    if not record.state:
        return
    check_record(record)
    predictors = dict(named_predictors(module))
    if predictors.keys() != record.state.keys():
        raise errors.InvalidRecord(
            f"state of {record.program_id!r} is of the predictors {', '.join(sorted(record.state)) or 'none'}; "
            f"its module {record.spec.module} has {', '.join(sorted(predictors)) or 'none'}"
        )
    for name, predictor in predictors.items():
        state = record.state[name]
        there, given = len(predictor.signature.fields), len(state["signature"]["fields"])
        if there != given:  # DSPy pairs them by position and says nothing
            raise errors.InvalidRecord(
                f"state of {record.program_id!r}: predictor {name!r} has {there} fields, its state {given}"
            )
        try:
            predictor.load_state(copy.deepcopy({"fields": {}, **state}))
        except (TypeError, ValueError, KeyError) as failure:
            raise errors.InvalidRecord(
                f"state of {record.program_id!r}: predictor {name!r} does not take it: {str(failure)[:300]}"
            ) from failure


def _require_notebook_tools(record: ProgramRecord, toolbox: Toolbox) -> None:
    for reference in _tools_of(record.spec):
        if not reference.portable and not toolbox.has_added(reference.name):
            raise errors.NotPortable(
                f"program {record.program_id!r} uses the notebook's tool {reference.name!r}, which is gone: "
                f"run the cell that defines it, then `%dspex add {reference.name}`",
                details={"program_id": record.program_id, "tool": reference.name},
            )


def _tools_of(spec: ProgramSpec) -> list[ToolReference]:
    """The tools of a program and of the modules nested in it."""
    inner = _nested(spec)
    return [*spec.tools, *(_tools_of(inner) if inner else [])]


def _nested(spec: ProgramSpec) -> ProgramSpec | None:
    nested = spec.module_args.get("module")
    if not isinstance(nested, dict):
        return None
    try:
        return ProgramSpec.model_validate(nested)
    except ValidationError:
        return None  # not normalised, or not ours: a pipeline's own argument


def _shown_signature(spec: ProgramSpec) -> SignatureSpec | None:
    if spec.signature is not None:
        return spec.signature
    inner = _nested(spec)
    return _shown_signature(inner) if inner else None


def _is_async(cls: type[dspy.Module]) -> bool:
    """Whether the class that says how it runs says it for async too: a subclass may override ``forward`` alone."""
    for base in cls.__mro__:
        if "aforward" in vars(base):
            return True
        if "forward" in vars(base):
            return False
    return False


def _own_signature(module: dspy.Module) -> type[dspy.Signature] | None:
    """The signature that a module's caller fills in, where it is plain; None elsewhere."""
    if isinstance(module, dspy.BestOfN | dspy.Refine):
        return _own_signature(module.module)
    if isinstance(module, dspy.MultiChainComparison):
        return None
    own: Any = getattr(module, "signature", None)
    if not (isinstance(own, type) and issubclass(own, dspy.Signature)):
        predictors = named_predictors(module)
        own = predictors[0][1].signature if len(predictors) == 1 else None
    if own is None:
        return None
    names, takes_others = _forward_arguments(module)
    fits = set(names) == set(own.input_fields) or (not names and takes_others)
    return own if fits else None


def _inputs_of(module: dspy.Module, signature: type[dspy.Signature] | None) -> _Inputs:
    signature = signature if signature is not None else _own_signature(module)
    if signature is None:
        names, takes_others = _forward_arguments(module)
        if isinstance(module, dspy.MultiChainComparison):
            names.pop("completions", None)
        return _Inputs({name: _Input(Any, required) for name, required in names.items()}, takes_others)
    fields = {}
    for name, field in signature.input_fields.items():
        required = field.default is PydanticUndefined and not annotation_allows_none(field.annotation)
        annotation = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        fields[name] = _Input(annotation, required)
    return _Inputs(fields)


def _forward_arguments(module: dspy.Module) -> tuple[dict[str, bool], bool]:
    """The arguments of the module's ``forward`` with whether each is required, and whether it takes others."""
    cls = type(module)  # reading it from the instance makes DSPy warn
    function = getattr(cls, "forward", None) or getattr(cls, "aforward", None)
    if function is None:
        return {}, True
    _, *parameters = inspect.signature(function).parameters.values()
    named = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    names = {p.name: p.default is inspect.Parameter.empty for p in parameters if p.kind in named}
    return names, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _spec_of(signature: type[dspy.Signature]) -> SignatureSpec:
    """A signature class as data, to be shown: types of a notebook's own are there by name only."""

    def spec(name: str, field: Any) -> FieldSpec:
        described = (field.json_schema_extra or {}).get("desc") or ""
        description = "" if described == f"${{{name}}}" else str(described)[:20_000]
        return FieldSpec(name=name[:128], type=type_text(field.annotation), description=description)

    return SignatureSpec(
        inputs=[spec(name, field) for name, field in signature.input_fields.items()],
        outputs=[spec(name, field) for name, field in signature.output_fields.items()],
        instructions=signature.instructions[:200_000],
        name=signature.__name__[:128],
    )


def _in_order(value: Any) -> Any:
    """``value`` with sets as sorted lists: their own order differs by process, and so would the prompts."""
    match value:
        case set() | frozenset():
            return to_json(value)
        case list():
            return [_in_order(item) for item in value]
        case tuple():
            return tuple(_in_order(item) for item in value)
        case dict():
            return {key: _in_order(item) for key, item in value.items()}
    return value


def _shown(value: Any) -> str:
    """What came: its type, and for a text or a collection its length; never the value, which may be a secret."""
    kind = type(value).__name__
    if isinstance(value, str | bytes | list | tuple | dict | set):
        return f"{kind} of length {len(value)}"
    return kind
