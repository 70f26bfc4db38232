"""Keeps the garbage collector from stopping a service of many sessions.

A full pass of CPython's collector goes through every object that there is, and all stands still meanwhile: 0.2 s
with ten thousand sessions, again and again while they come. So what has survived a pass is set aside
(``gc.freeze``), and each object is gone through once. Only what becomes garbage later, and in a cycle, stays behind
by that: now and then everything is gone through again.
"""

from __future__ import annotations

import gc
import time
from typing import Any

REVIEW_INTERVAL = 3600.0
"""Seconds after which the next full pass goes through everything again."""


class SurvivorsAside:
    """Sets aside what survives the collector, in this process, while anybody wants that.

    One who has frozen objects by himself finds them thawed when the last one has had enough.
    """

    def __init__(self) -> None:
        self._wanted = 0
        self._reviewed_at = 0.0

    def begin(self) -> None:
        """Set aside all that there is by now, at once, and what survives from now on; ``end`` it as often."""
        if not self._wanted:
            self._reviewed_at = time.monotonic()
            gc.callbacks.append(self._passed)
            gc.freeze()
        self._wanted += 1

    def end(self) -> None:
        """Have it no more; the last one gives the collector everything back."""
        self._wanted -= 1
        if not self._wanted:
            gc.callbacks.remove(self._passed)
            gc.unfreeze()

    def _passed(self, phase: str, info: dict[str, Any]) -> None:
        """Called by the collector before and after each pass, in whatever thread that is."""
        if phase != "stop" or info["generation"] < 2:  # 2 is the full one
            return
        now = time.monotonic()
        if now - self._reviewed_at >= REVIEW_INTERVAL:
            self._reviewed_at = now
            gc.unfreeze()
        else:
            gc.freeze()


SURVIVORS_ASIDE = SurvivorsAside()
"""The process's own: it has one collector."""
