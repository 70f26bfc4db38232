"""What the service knows of a session: the record it keeps, and what it tells about it."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from dspex_kernels.protocol.names import SessionId
from dspex_kernels.protocol.records import SessionContents
from dspex_kernels.protocol.states import SessionStatus

BackendName = Literal["dedicated", "pooled"]


class SessionRecord(BaseModel):
    """A session as the store keeps it: enough to bring it back after any death.

    ``contents`` is the record's own copy: changing it changes no store.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    session_id: SessionId
    owner: str = Field(max_length=256)
    backend: BackendName
    status: SessionStatus = Field(
        SessionStatus.STARTING, description="What it is meant to be; a service that comes back starts from here."
    )
    generation: int = Field(0, ge=0, description="How often it was given a kernel; 0 is never yet.")
    created_at: AwareDatetime
    last_activity: AwareDatetime
    directory: str | None = Field(
        None, description="Its own directory (journal, log); null where it has none, as in a pooled kernel."
    )
    journal_offset: int | None = Field(
        None, ge=0, description="How far its journal is folded in (`protocol.journal`); null is not at all."
    )
    contents: SessionContents = Field(default_factory=lambda: SessionContents())


class SessionInfo(BaseModel):
    """What ``get_session_info`` tells of a session."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    session_id: str
    owner: str
    backend: BackendName
    status: SessionStatus
    generation: int = Field(ge=0, description="How often it was given a kernel; 0 is never yet.")
    kernel_id: str | None = Field(None, description="Null while it has no kernel.")
    kernel_pid: int | None = None
    programs: list[str] = Field(default_factory=list, description="Their ids.")
    created_at: AwareDatetime
    last_activity: AwareDatetime
    cull_at: AwareDatetime | None = Field(None, description="Null when it will not be culled.")
