"""Ids: how they look, how they are made, and what a given one must match."""

from __future__ import annotations

import re
import secrets
from typing import Annotated

from pydantic import StringConstraints

SESSION_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}$"
PROGRAM_ID_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}$"
REQUEST_ID_PATTERN = r"^[\x21-\x7e]{1,128}$"

_SESSION_ID = re.compile(SESSION_ID_PATTERN)

SessionId = Annotated[str, StringConstraints(pattern=SESSION_ID_PATTERN)]
ProgramId = Annotated[str, StringConstraints(pattern=PROGRAM_ID_PATTERN)]
RequestId = Annotated[str, StringConstraints(pattern=REQUEST_ID_PATTERN)]


def new_session_id() -> str:
    """``session_`` and 16 hexadecimal digits from the system's random source."""
    return f"session_{secrets.token_hex(8)}"


def is_session_id(value: str) -> bool:
    """Whether ``value`` may be a session's id; such an id is safe as a directory name."""
    return _SESSION_ID.fullmatch(value) is not None
