"""JSON Schemas of the messages, generated from the models: for clients in other languages."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from dspex_kernels.protocol import PROTOCOL_VERSION, messages
from dspex_kernels.protocol.commands import COMMANDS
from dspex_kernels.protocol.records import ProgramRecord

# As one type, so that what both forms refer to is defined where the references look: at the schema's root.
_REPLY: TypeAdapter[Any] = TypeAdapter(
    Annotated[messages.OkReply | messages.FailedReply, Field(discriminator="status")]
)


def json_schemas() -> dict[str, Any]:
    """Every message, command and record as JSON Schema (draft 2020-12).

    Returns:
        ``{"protocol_version", "messages": {name: schema}, "commands": {name: {"args", "result", "mutates",
        "control", "timeout_s"}}, "program_record": schema}``.
    """
    return {
        "protocol_version": PROTOCOL_VERSION,
        "messages": {
            messages.REQUEST: messages.Request.model_json_schema(),
            messages.REPLY: _REPLY.json_schema(),
            messages.EVENT: messages.Event.model_json_schema(),
        },
        "commands": {
            row.name: {
                "args": row.args.model_json_schema(),
                "result": row.result.model_json_schema(mode="serialization"),
                "mutates": row.mutates,
                "control": row.control,
                "timeout_s": row.timeout_s,
            }
            for row in COMMANDS.values()
        },
        "program_record": ProgramRecord.model_json_schema(),
    }
