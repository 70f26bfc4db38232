"""How a command is asked, in one place for all who pass it on: handles, the service, backends, connections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypedDict

from dspex_kernels.sessions.watch import Watch

EventListener = Callable[[dict[str, Any]], None]
"""Takes an event's content; called on the event loop, so it must not block."""

ReplyListener = Callable[[dict[str, Any]], None]
"""Takes a ``dspex_reply``'s content; called on the event loop, so it must not block."""


class CallOptions(TypedDict, total=False):
    """What may be said of a call beside its command and arguments.

    Attributes:
        timeout: Seconds; None is the default.
        request_id: A name for the call, by which ``cancel`` finds it; None is none.
        stream: Whether tokens and status are reported on the way.
        on_event: Takes each event's content, on the event loop; it must not block.
    """

    timeout: float | None
    request_id: str | None
    stream: bool
    on_event: EventListener | None


@dataclass(frozen=True, slots=True)
class Call:
    """One command on its way to a session's place.

    Attributes:
        command: A name of the command table.
        args: Its arguments.
        timeout: Seconds that are left for it, above 0.
        request_id: The caller's name for the call; None lets the connection choose one.
        stream: Whether events shall be reported on the way.
        on_event: Takes each event's content; None is nobody.
        watch: Takes what is learned of it on the way.
    """

    command: str
    args: dict[str, Any] = field(repr=False)  # a key may be among them
    timeout: float
    request_id: str | None = None
    stream: bool = False
    on_event: EventListener | None = None
    watch: Watch = field(default_factory=Watch, repr=False)
