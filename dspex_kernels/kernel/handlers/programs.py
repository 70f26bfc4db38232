"""Programs are made, read, deleted, and travel as records."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import dspy

from dspex_kernels import errors
from dspex_kernels.kernel.calls import Call
from dspex_kernels.kernel.namespaces import Namespace
from dspex_kernels.kernel.programs.live import LiveProgram, check_record, new_program, record_of
from dspex_kernels.protocol.commands import (
    CreateProgramArgs,
    CreateProgramResult,
    DeleteProgramArgs,
    DeleteProgramResult,
    ExportProgramResult,
    ImportProgramArgs,
    ListProgramsResult,
    NoArgs,
    ProgramArgs,
    ProgramSummary,
)
from dspex_kernels.protocol.records import ProgramDeleted, ProgramPut, ProgramRecord

if TYPE_CHECKING:
    from dspex_kernels.kernel.dispatch import Dispatcher


async def create_program(_dispatcher: Dispatcher, call: Call, args: CreateProgramArgs) -> CreateProgramResult:
    """Make a program, or a new version of one."""
    if args.library is not None:
        raise errors.InvalidArguments(
            "create_program: a kernel has no program library: ask a session of a SessionService for "
            f"{args.library!r}, or import the record",
            details={"command": "create_program"},
        )
    namespace = call.namespace
    async with namespace.changing:
        version = namespace.next_version(args.program_id, replace=args.replace, if_version=args.if_version)
        return await _put(call, new_program(args, version, namespace.toolbox, created_at=_now()))


async def import_program(_dispatcher: Dispatcher, call: Call, args: ImportProgramArgs) -> CreateProgramResult:
    """Take a program record in, as a new version of the id it gets here."""
    namespace = call.namespace
    async with namespace.changing:
        program_id = args.program_id or args.record.program_id
        version = namespace.next_version(program_id, replace=args.replace, if_version=args.if_version)
        _require_portable(args.record)
        update = {"program_id": program_id, "version": version, "created_at": _now()}
        record = args.record.model_copy(update={**update, "dspy_version": dspy.__version__})
        check_record(record)
        return await _put(call, LiveProgram.build(record, namespace.toolbox))


async def add_module(call: Call, program_id: str, module: dspy.Module) -> CreateProgramResult:
    """Take a module of the notebook in as a program of this kernel. Called by the magics, not by messages."""
    namespace = call.namespace
    async with namespace.changing:
        version = namespace.next_version(program_id, replace=True, if_version=None)
        program = LiveProgram.from_module(program_id, module, version, created_at=_now())
        await namespace.commit(call, ProgramPut(record=program.record), lambda: namespace.keep(program))
        return _created(program)


async def list_programs(_dispatcher: Dispatcher, call: Call, _args: NoArgs) -> ListProgramsResult:
    """The latest version of each program, by id."""
    namespace = call.namespace
    # Without their instructions, which may be long: a thousand of them pass the limit of a result.
    summaries = [
        _summary(namespace, program_id, None).model_copy(update={"instructions": None})
        for program_id in sorted(namespace.contents.programs)
    ]
    return ListProgramsResult(programs=summaries, count=len(summaries))


async def get_program(_dispatcher: Dispatcher, call: Call, args: ProgramArgs) -> ProgramSummary:
    """What a program is."""
    return _summary(call.namespace, args.program_id, args.version)


async def export_program(_dispatcher: Dispatcher, call: Call, args: ProgramArgs) -> ExportProgramResult:
    """The record from which the program is built again anywhere."""
    record = call.namespace.record(args.program_id, args.version)
    _require_portable(record)
    # With its state written out: a record without would leave the instructions to the other side's DSPy.
    return ExportProgramResult(record=record_of(call.namespace.live(record)))


async def delete_program(_dispatcher: Dispatcher, call: Call, args: DeleteProgramArgs) -> DeleteProgramResult:
    """Delete a program with all its versions."""
    namespace = call.namespace
    async with namespace.changing:
        latest = namespace.record(args.program_id).version
        namespace.check_version(args.program_id, latest, args.if_version)
        await namespace.commit(call, ProgramDeleted(program_id=args.program_id))
    return DeleteProgramResult(program_id=args.program_id)


async def _put(call: Call, program: LiveProgram) -> CreateProgramResult:
    namespace = call.namespace
    await namespace.commit(call, ProgramPut(record=program.record), lambda: namespace.keep(program))
    return _created(program)


def _created(program: LiveProgram) -> CreateProgramResult:
    record = program.record
    return CreateProgramResult(
        program_id=record.program_id, version=record.version, signature=program.summary().signature
    )


def _summary(namespace: Namespace, program_id: str, version: int | None) -> ProgramSummary:
    record = namespace.record(program_id, version)
    versions = [other.version for other in namespace.contents.programs[program_id]]
    return LiveProgram.summarise(record, versions)


def _require_portable(record: ProgramRecord) -> None:
    if not record.portable:
        raise errors.NotPortable(
            f"program {record.program_id!r} lives in its notebook's kernel only: "
            f"{'; '.join(record.not_portable_because) or 'it was made there'}",
            details={"program_id": record.program_id, "because": record.not_portable_because},
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
