"""The command table. A row names a command's arguments, result, channel and default deadline.

``COMMANDS[name]`` is the row; a handler of the same name stands in ``dspex_kernels.kernel.handlers``. Dispatch, the
schemas and every client's ``call`` work off this table; tests hold the README and the methods of sessions to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SecretStr,
    Tag,
    ValidationError,
)

from dspex_kernels import errors
from dspex_kernels.protocol.messages import AS_OBJECT, AS_TEXT, first_problem
from dspex_kernels.protocol.names import ProgramId, RequestId, SessionId
from dspex_kernels.protocol.records import (
    AdapterName,
    Budget,
    LMProfile,
    OfflineOptions,
    ProgramRecord,
    SessionContents,
    SessionSettings,
    SignatureSpec,
    Spent,
)


class Args(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Result(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _text_or_object(value: Any) -> str:
    # Chosen by shape, so that a finding names the field within the object and not each form in turn.
    return AS_TEXT if isinstance(value, str) else AS_OBJECT


class NoArgs(Args):
    """No arguments."""


class CreateProgramArgs(Args):
    program_id: ProgramId = Field(validation_alias=AliasChoices("program_id", "id"))
    signature: (
        Annotated[
            Annotated[str, Tag(AS_TEXT)] | Annotated[SignatureSpec, Tag(AS_OBJECT)], Discriminator(_text_or_object)
        ]
        | None
    ) = Field(None, description='"question -> answer", or fields as data; null where the module brings its own.')
    module: str = Field("Predict", max_length=128)
    module_args: dict[str, Any] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    tools: list[str] = Field(default_factory=list, max_length=200)
    adapter: AdapterName | None = None
    replace: bool = Field(False, description="Make a new version of a program that exists.")
    if_version: int | None = Field(None, ge=0, description="Only if the latest version is this; 0 is none yet.")
    library: str | None = Field(
        None,
        max_length=256,
        description='A published program instead of a signature: "qa@prod" follows the alias, "qa@3" stays.',
    )


class CreateProgramResult(Result):
    status: Literal["created"] = "created"
    program_id: str
    version: int
    signature: str


class ExecuteProgramArgs(Args):
    program_id: ProgramId = Field(validation_alias=AliasChoices("program_id", "id"))
    inputs: dict[str, Any] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict, description="Sampling parameters for this call only.")
    version: int | None = Field(None, ge=1, description="Null is the latest.")
    budget: Budget | None = Field(None, description="Limits for this call alone, besides the session's.")


class ExecuteProgramResult(Result):
    status: Literal["executed"] = "executed"
    program_id: str
    version: int
    outputs: dict[str, Any]
    usage: dict[str, dict[str, Any]] = Field(description="By model: prompt_tokens, completion_tokens, …")
    cost: float | None = Field(description="USD; null when a price is unknown.")
    lm_calls: int = Field(ge=0, description="Requests sent to a provider, retries and JSON fallback included.")
    duration_s: float


class ProgramArgs(Args):
    program_id: ProgramId = Field(validation_alias=AliasChoices("program_id", "id"))
    version: int | None = Field(None, ge=1)


class ProgramSummary(Result):
    program_id: str
    version: int
    versions: list[int]
    module: str
    signature: str
    inputs: dict[str, str] = Field(description="Input fields with their types.")
    outputs: dict[str, str]
    instructions: str | None = Field(description="Null in a list of programs.")
    tools: list[str]
    adapter: str | None
    portable: bool
    created_at: str


class ListProgramsResult(Result):
    programs: list[ProgramSummary]
    count: int


class DeleteProgramArgs(Args):
    program_id: ProgramId = Field(validation_alias=AliasChoices("program_id", "id"))
    if_version: int | None = Field(None, ge=1)


class DeleteProgramResult(Result):
    status: Literal["deleted"] = "deleted"
    program_id: str


class ExportProgramResult(Result):
    record: ProgramRecord


class ImportProgramArgs(Args):
    record: ProgramRecord
    program_id: ProgramId | None = Field(None, description="Another id than the record's; null keeps it.")
    replace: bool = False
    if_version: int | None = Field(None, ge=0)


class LMProfileArgs(Args):
    """An LM profile as it is given: with its key."""

    model: str = Field(min_length=1, max_length=256)
    api_base: str | None = Field(None, max_length=2048)
    api_key: SecretStr | None = Field(None, max_length=8192)
    api_key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")
    model_type: Literal["chat", "text", "responses"] = "chat"
    temperature: float | None = Field(None, ge=0, le=10)
    max_tokens: int | None = Field(None, ge=1)
    timeout_s: float = Field(120.0, gt=0, le=3600)
    max_retries: int = Field(3, ge=0, le=20)
    cache: bool = True
    json_fallback: bool = True
    params: dict[str, Any] = Field(default_factory=dict, description="Sampling parameters only.")
    offline: OfflineOptions | None = None

    def profile(self) -> LMProfile:
        """The profile that the session holds; ``key_given`` tells that a key came with it."""
        return LMProfile(**dict(self), key_given=self.api_key is not None)


class ConfigureArgs(Args):
    """Settings to change; what is absent stays. ``null`` drops the setting."""

    lm: (
        Annotated[
            Annotated[str, Tag(AS_TEXT)] | Annotated[LMProfileArgs, Tag(AS_OBJECT)], Discriminator(_text_or_object)
        ]
        | None
    ) = Field(None, description='A model string ("openai/gpt-5-mini") or a profile.')
    adapter: AdapterName | None = None
    budget: Budget | None = None


class ConfigureResult(Result):
    status: Literal["configured"] = "configured"
    settings: SessionSettings


class ResetResult(Result):
    status: Literal["reset"] = "reset"
    programs: int = Field(description="How many programs were dropped.")


class Counts(Result):
    """Calls of commands by outcome."""

    ok: int = 0
    error: int = 0
    aborted: int = 0
    running: int = 0


class LMUsage(Result):
    """What went to one model."""

    lm_calls: int = 0
    failed_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cost: float | None = Field(0.0, description="USD; null once a call of unknown price was made.")


class StatsResult(Result):
    session_id: str
    programs: int
    executions: int
    commands: Counts
    lm: dict[str, LMUsage] = Field(description="By model.")
    lm_calls: int
    cache_hits: int
    total_tokens: int
    cost: float | None
    budget: Budget
    kernel_memory_bytes: int = Field(description="Resident memory of the whole kernel process.")
    created_at: str
    last_activity: str


class InspectHistoryArgs(Args):
    n: int = Field(1, ge=1, le=1000)


class HistoryEntry(Result):
    """One LM call of the session, newest last."""

    timestamp: str
    model: str
    messages: list[dict[str, Any]]
    outputs: list[Any]
    usage: dict[str, Any]
    cost: float | None
    cache_hit: bool


class InspectHistoryResult(Result):
    entries: list[HistoryEntry]
    count: int


class CancelArgs(Args):
    request_id: RequestId


class CancelResult(Result):
    cancelled: bool = Field(description="False when no such call is running.")


class PingResult(Result):
    status: Literal["ok"] = "ok"
    kernel_id: str
    pid: int
    protocol_version: str
    sessions: int
    running: int = Field(description="Commands running now, of all sessions.")
    uptime_s: float
    memory_bytes: int
    stuck: int = Field(0, description="Calls that were answered, whose programs ignore their end and go on.")
    lag_s: float = Field(
        0.0, description="For how long the command loop has not come round; 0 where it was not asked before."
    )
    calls: int = Field(0, description="Commands answered since the kernel's start.")
    last_activity: str | None = Field(None, description="Of any session: its last command or cell, whoever asked.")
    busy: bool = Field(False, description="A cell runs.")
    clients: int | None = Field(
        None, description="Who listens to all of iopub, as notebooks do; null where unknown."
    )


class OpenSessionArgs(Args):
    """A session moves into a pooled kernel."""

    session_id: SessionId
    contents: SessionContents = Field(default_factory=SessionContents)
    generation: int = Field(ge=1)
    created_at: AwareDatetime


class OpenSessionResult(Result):
    status: Literal["opened"] = "opened"


class AdoptSessionArgs(Args):
    """A spare kernel becomes a session's own."""

    session_id: SessionId
    directory: str = Field(description="The session's own, where its journal is.")
    generation: int = Field(ge=1)
    connection_file: str = Field(description="What the kernel's is called from now on.")


class AdoptSessionResult(Result):
    status: Literal["adopted"] = "adopted"


class CloseSessionResult(Result):
    status: Literal["closed"] = "closed"
    spent: Spent | None = Field(None, description="The session's last totals; null where it was not there.")


class InterruptResult(Result):
    interrupted: int = Field(description="How many commands were stopped.")


class CollectSpentResult(Result):
    spent: dict[str, Spent] = Field(description="By session: totals that moved since they were last told.")


DEFAULT_TIMEOUT_S = 30.0
"""Seconds for a command whose row and whose caller name none."""


@dataclass(frozen=True, slots=True)
class Command:
    """A row of the table.

    Attributes:
        name: As it travels.
        args: Its arguments.
        result: Its result.
        mutates: Whether it changes the session's programs or settings: such commands of one session run one
            after another and are durable before their reply.
        control: Whether it travels on the control channel: answered while everything computes, counted neither
            as activity nor as status.
        reaches_lm: Whether it may send requests to a provider.
        internal: Whether only a kernel's own service asks it, never a caller.
        kernel_wide: Whether it is asked of the kernel itself: in a pooled one it names no session that is there.
        timeout_s: Its own default deadline, in seconds; None is the service's ``command_timeout``, and
            ``DEFAULT_TIMEOUT_S`` in a kernel that is asked without a service.
    """

    name: str
    args: type[Args]
    result: type[Result]
    mutates: bool = False
    control: bool = False
    reaches_lm: bool = False
    internal: bool = False
    kernel_wide: bool = False
    timeout_s: float | None = None

    @property
    def repeatable(self) -> bool:
        """Whether it may be sent again after its kernel died: it changes nothing and reaches no LM."""
        return not self.mutates and not self.reaches_lm

    def parse(self, args: Mapping[str, Any]) -> Any:
        """The arguments as this command's model.

        Raises:
            InvalidArguments: They do not fit; the message names the field.
        """
        try:
            return self.args.model_validate(dict(args))
        except ValidationError as failure:
            raise errors.InvalidArguments(
                f"{self.name}: {first_problem(failure)}", details={"command": self.name}
            ) from None  # the cause would carry the rejected values, a key among them


_ROWS = (
    Command("create_program", CreateProgramArgs, CreateProgramResult, mutates=True),
    Command("execute_program", ExecuteProgramArgs, ExecuteProgramResult, reaches_lm=True),
    Command("list_programs", NoArgs, ListProgramsResult),
    Command("get_program", ProgramArgs, ProgramSummary),
    Command("delete_program", DeleteProgramArgs, DeleteProgramResult, mutates=True),
    Command("export_program", ProgramArgs, ExportProgramResult),
    Command("import_program", ImportProgramArgs, CreateProgramResult, mutates=True),
    Command("configure", ConfigureArgs, ConfigureResult, mutates=True),
    Command("reset", NoArgs, ResetResult, mutates=True),
    Command("inspect_history", InspectHistoryArgs, InspectHistoryResult),
    Command("get_stats", NoArgs, StatsResult, control=True, timeout_s=10.0),
    Command("cancel", CancelArgs, CancelResult, control=True, timeout_s=10.0),
    Command("ping", NoArgs, PingResult, control=True, kernel_wide=True, timeout_s=10.0),
    Command("open_session", OpenSessionArgs, OpenSessionResult, internal=True, kernel_wide=True),
    Command("adopt_session", AdoptSessionArgs, AdoptSessionResult, internal=True, kernel_wide=True),
    Command("close_session", NoArgs, CloseSessionResult, internal=True),
    Command("follow_program", ImportProgramArgs, CreateProgramResult, mutates=True, internal=True),
    Command("interrupt", NoArgs, InterruptResult, control=True, internal=True, timeout_s=10.0),
    Command(
        "collect_spent",
        NoArgs,
        CollectSpentResult,
        control=True,
        internal=True,
        kernel_wide=True,
        timeout_s=10.0,
    ),
)

COMMANDS: Mapping[str, Command] = MappingProxyType({row.name: row for row in _ROWS})

PUBLIC: Mapping[str, Command] = MappingProxyType({row.name: row for row in _ROWS if not row.internal})
"""What callers may ask: the rest is between a kernel and its service."""


def get_command(name: str) -> Command:
    """The row of a command.

    Raises:
        UnknownCommand: There is none of that name; the message lists those there are.
    """
    try:
        return COMMANDS[name]
    except KeyError:
        raise errors.UnknownCommand(
            f"no command {name!r}: there are {', '.join(sorted(PUBLIC))}", details={"command": name[:128]}
        ) from None
