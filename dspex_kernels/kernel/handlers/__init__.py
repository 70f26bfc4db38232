"""What each command does: ``HANDLERS`` and ``AT_ONCE`` are the command table's other half.

A handler takes the dispatcher, the call and the parsed arguments, and returns the command's result or raises an
error of ours. It runs on the command loop; what a session may change it changes under ``namespace.changing``.
A handler of ``AT_ONCE`` takes the dispatcher, the namespace (None where the command is asked of the kernel itself)
and the arguments; it runs in the thread that received the message, so it is quick: it reads, stops calls, or lets a
session in.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any

from dspex_kernels.kernel.handlers import control, execution, programs, sessions, settings

HANDLERS: Mapping[str, Callable[..., Awaitable[Any]]] = MappingProxyType(
    {
        "create_program": programs.create_program,
        "execute_program": execution.execute_program,
        "list_programs": programs.list_programs,
        "get_program": programs.get_program,
        "delete_program": programs.delete_program,
        "export_program": programs.export_program,
        "import_program": programs.import_program,
        "follow_program": programs.import_program,
        "configure": settings.configure,
        "reset": settings.reset,
        "inspect_history": settings.inspect_history,
        "close_session": sessions.close_session,
    }
)

AT_ONCE: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "get_stats": control.get_stats,
        "cancel": control.cancel,
        "interrupt": control.interrupt,
        "ping": control.ping,
        "open_session": sessions.open_session,
        "adopt_session": sessions.adopt_session,
        "collect_spent": sessions.collect_spent,
    }
)
