"""Pages of a long list: their bounds, and the cursors between them."""

from __future__ import annotations

from dspex_kernels import errors
from dspex_kernels.sessions.store import MAX_PAGE


def check_limit(limit: int) -> None:
    """Refuse a page that is empty or too long.

    Raises:
        InvalidArguments: It is.
    """
    if not 1 <= limit <= MAX_PAGE:
        raise errors.InvalidArguments(f"limit {limit} is out of range: give 1 to {MAX_PAGE}")


def make_cursor(created_at: str, session_id: str) -> str:
    """Where the page after this session begins."""
    return f"{created_at}~{session_id}"


def parse_cursor(cursor: str) -> tuple[str, str]:
    """What ``make_cursor`` was given.

    Raises:
        InvalidArguments: It is no cursor of ours.
    """
    created_at, found, session_id = cursor.partition("~")
    if not found:
        raise errors.InvalidArguments(f"{cursor[:128]!r} is no cursor of a page: give a page's next_cursor")
    return created_at, session_id
