"""Busy and idle, told so that a front end's last word is the truth.

Cells and commands run side by side, each with a busy and an idle of its own parent. Front ends and Jupyter Server
keep only the last state they saw: a command's idle would mark a kernel idle whose cell still computes, and the
server would cull it. So an idle that leaves other work running is followed by busy again, in the name of that work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class StatusBoard:
    """Which requests are being worked on. Thread-safe.

    Args:
        publish: Sends a ``status`` message: the state, and the parent it belongs to.
    """

    def __init__(self, publish: Callable[[str, dict[str, Any]], None]) -> None:
        self._publish = publish
        # Guards the parents and the order in which states go out.
        self._lock = threading.RLock()
        self._parents: dict[str, dict[str, Any]] = {}

    def busy(self, parent: dict[str, Any]) -> None:
        """``parent`` is being worked on from now."""
        with self._lock:
            self._parents[_key(parent)] = parent
            self._publish("busy", parent)

    def idle(self, parent: dict[str, Any]) -> None:
        """``parent`` is done. Called again for the same parent it tells idle again, as stock kernels do."""
        with self._lock:
            self._parents.pop(_key(parent), None)
            self._publish("idle", parent)
            if self._parents:
                self._publish("busy", next(reversed(self._parents.values())))


def _key(parent: dict[str, Any]) -> str:
    return str((parent.get("header") or {}).get("msg_id", ""))
