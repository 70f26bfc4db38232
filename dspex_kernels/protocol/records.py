"""Program records, LM profiles, budgets and journal changes: what outlives a kernel, as JSON.

A program record holds all that is needed to build the same program elsewhere, and nothing secret: the language
model is held by the session's profile, tools and reward functions by name and schema hash. No pickle.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from dspex_kernels.protocol import limits
from dspex_kernels.protocol.names import ProgramId

RECORD_VERSION = 1

AdapterName = Literal["chat", "json", "xml", "two_step"]


class FieldSpec(BaseModel):
    """One field of a signature.

    ``type`` is a word of the type grammar (``"int"``, ``"list[str]"``, ``"Literal['a','b'] | None"``) or a JSON
    Schema object, from which pydantic models are made.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    name: str = Field(max_length=128)
    type: str | dict[str, Any] = Field("str", description="A type expression, or a JSON Schema.")
    description: str = Field("", max_length=20_000)


class SignatureSpec(BaseModel):
    """A signature as data; ``instructions`` of null lets DSPy write its default ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: list[FieldSpec] = Field(min_length=1, max_length=200)
    outputs: list[FieldSpec] = Field(min_length=1, max_length=200)
    instructions: str | None = Field(None, max_length=200_000)
    name: str | None = Field(None, max_length=128)


class ToolReference(BaseModel):
    """A tool by name; ``schema_hash`` tells whether it is still the tool the program was made with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    schema_hash: str
    portable: bool = True
    """False for a function of a notebook: it lives in that kernel only."""


class ProgramSpec(BaseModel):
    """What a program is made of, its learned state apart."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    module: str = Field("Predict", max_length=128)
    signature: SignatureSpec | None = Field(
        None, description="Null where the module brings its own (BestOfN, Refine, a pipeline)."
    )
    module_args: dict[str, Any] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict, description="Sampling defaults: temperature, n, …")
    tools: list[ToolReference] = Field(default_factory=list)
    adapter: AdapterName | None = None


class ProgramRecord(BaseModel):
    """A program as JSON: build it anywhere, it sends the same prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    record_version: Literal[1] = 1
    program_id: ProgramId
    version: int = Field(ge=1, le=2**31 - 1, description="What a store's integer column holds.")
    spec: ProgramSpec
    state: dict[str, Any] = Field(
        default_factory=dict, description="DSPy's `dump_state()`, each `lm` null; empty for a fresh program."
    )
    portable: bool = Field(True, description="False when it needs something that only this kernel has.")
    not_portable_because: list[str] = Field(default_factory=list)
    follows: str | None = Field(
        None, max_length=256, description='The alias in the program library that it follows: "qa@prod".'
    )
    library_version: int | None = Field(
        None, ge=1, le=2**31 - 1, description="Which version of the library's it is; null where it follows none."
    )
    dspy_version: str = ""
    created_at: str = Field("", description="UTC, ISO 8601.")


class Budget(BaseModel):
    """Limits on what may be spent; null is no limit. Counted per session, or per call where given with a call."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    usd: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    tokens: Annotated[int, Field(ge=0)] | None = None
    lm_calls: Annotated[int, Field(ge=0)] | None = Field(None, description="Requests sent to a provider.")


class OfflineOptions(BaseModel):
    """How the offline LM answers (``offline/echo`` and other ``offline/…`` models)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    latency_s: float = Field(0.0, ge=0, le=600)
    answers: list[dict[str, Any] | str] = Field(
        default_factory=list,
        max_length=10_000,
        description="Scripted answers in order: an object of output fields, or raw text; then sampled ones.",
    )
    failures: list[str | None] = Field(
        default_factory=list,
        max_length=10_000,
        description="For each request in order a DSPy error code to fail with, or null to answer.",
    )


def is_offline(model: str) -> bool:
    """Whether a model string names the offline LM."""
    return model == "offline" or model.startswith("offline/")


class LMProfile(BaseModel):
    """Which language model a session uses. ``api_key`` stays in memory: dumps leave it out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, max_length=256)
    api_base: str | None = Field(None, max_length=2048)
    api_key: SecretStr | None = Field(None, exclude=True, max_length=8192)
    api_key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")
    model_type: Literal["chat", "text", "responses"] = "chat"
    temperature: float | None = Field(None, ge=0, le=10)
    max_tokens: int | None = Field(None, ge=1)
    timeout_s: float = Field(120.0, gt=0, le=3600, description="Longest wait for the provider's next byte.")
    max_retries: int = Field(3, ge=0, le=20)
    cache: bool = True
    json_fallback: bool = Field(
        True, description="Whether DSPy may ask a second time, in JSON, when an answer cannot be parsed."
    )
    params: dict[str, Any] = Field(default_factory=dict, description="More sampling parameters: top_p, seed, …")
    offline: OfflineOptions | None = None
    key_given: bool = Field(False, description="A key was given directly; it is not in this record.")

    @property
    def is_offline(self) -> bool:
        """Whether it is answered inside the kernel, without a network."""
        return is_offline(self.model)


class SessionSettings(BaseModel):
    """What a session has configured, without secrets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lm: LMProfile | None = None
    adapter: AdapterName | None = None
    budget: Budget = Field(default_factory=Budget)


class ProgramPut(BaseModel):
    """Journal: a program came to be, or got a new version."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    change: Literal["program_put"] = "program_put"
    record: ProgramRecord


class ProgramDeleted(BaseModel):
    """Journal: a program and its versions are gone."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    change: Literal["program_deleted"] = "program_deleted"
    program_id: ProgramId


class SettingsChanged(BaseModel):
    """Journal: the session's settings are now these."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    change: Literal["settings_changed"] = "settings_changed"
    settings: SessionSettings


class SessionReset(BaseModel):
    """Journal: programs and settings were dropped together."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    change: Literal["session_reset"] = "session_reset"


class ModelSpent(BaseModel):
    """What went to one model, as a total."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    lm_calls: int = Field(0, ge=0)
    failed_calls: int = Field(0, ge=0)
    prompt_tokens: int = Field(0, ge=0)
    completion_tokens: int = Field(0, ge=0)
    total_tokens: int = Field(0, ge=0)
    usd: float = Field(0.0, ge=0, allow_inf_nan=False)
    unpriced: bool = Field(False, description="A call of unknown price was made.")


class Spent(BaseModel):
    """Journal: what the session has used so far, as totals. Statistics, not a change of state.

    ``lm_calls``, ``tokens`` and ``usd`` are what budgets stand on: estimated where nothing was reported.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    change: Literal["spent"] = "spent"
    lm_calls: int = Field(0, ge=0)
    tokens: int = Field(0, ge=0)
    # JSON has no infinity: it would be written as null, and the session could never be read again.
    usd: float = Field(0.0, ge=0, allow_inf_nan=False)
    models: dict[str, ModelSpent] = Field(default_factory=dict, description="By model string.")
    cache_hits: int = Field(0, ge=0)
    executions: int = Field(0, ge=0)
    ok: int = Field(0, ge=0, description="Commands that were answered so.")
    error: int = Field(0, ge=0)
    aborted: int = Field(0, ge=0)


Change = Annotated[
    ProgramPut | ProgramDeleted | SettingsChanged | SessionReset | Spent, Field(discriminator="change")
]


class SessionContents(BaseModel):
    """What a session holds: the fold of its changes."""

    programs: dict[str, list[ProgramRecord]] = Field(default_factory=dict)
    """By id, versions ascending."""
    settings: SessionSettings = Field(default_factory=SessionSettings)
    spent: Spent = Field(default_factory=Spent)

    def apply(self, change: Change) -> None:
        """Take one change in. Changes commute with nothing: apply them in the order they were made."""
        match change:
            case ProgramPut(record=record):
                versions = self.programs.setdefault(record.program_id, [])
                versions[:] = [v for v in versions if v.version != record.version] + [record]
                versions.sort(key=lambda v: v.version)
                del versions[: -limits.MAX_VERSIONS_KEPT]
            case ProgramDeleted(program_id=program_id):
                self.programs.pop(program_id, None)
            case SettingsChanged(settings=settings):
                self.settings = settings
            case SessionReset():
                self.programs.clear()
                self.settings = SessionSettings()
            case Spent():
                self.spent = change


def schema_hash(schema: Any) -> str:
    """A short, stable fingerprint of a JSON value: 16 hexadecimal digits."""
    return hashlib.sha256(orjson.dumps(schema, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]
