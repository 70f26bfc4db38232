"""What the fork server forks: it has a past of its own, and a life that imports something.

What it does while it is built is told by variables that it can read then: they begin with ``LC_``.
"""

from __future__ import annotations

import importlib
import os
import random
import uuid
from collections.abc import Callable
from pathlib import Path

HELD: dict[str, object] = {}
"""What a template keeps that it should not."""


class Template:
    """Runs the code of a file, which finds ``ready``, and ``parked``: how many steps it went while it stood by."""

    def __init__(self) -> None:
        self.sources: list[str] = [os.environ["LC_SOURCE"]] if "LC_SOURCE" in os.environ else []
        self.past = random.Random(1)
        self.parked = 0
        self.warmed = False

    def rehearse(self) -> None:
        import colorsys  # noqa: F401  # that is what is to be learnt

        exec(os.environ.get("LC_REHEARSAL", ""))

        uuid.uuid4()

    def warm(self) -> None:
        exec(os.environ.get("LC_WARM", ""))
        self.warmed = True

    def park(self, is_wanted: Callable[[], bool]) -> None:
        for _ in range(2):
            self.parked += not is_wanted()
        if "LC_PARKED" in os.environ:
            Path(os.environ["LC_PARKED"]).write_text(str(Path.cwd()))

    def serve(self, connection_file: str, bound: Callable[[], None], serving: Callable[[], None]) -> None:
        told = {"bound": bound, "serving": serving, "parked": self.parked, "warmed": self.warmed}
        exec(Path(connection_file).read_text(), told)


def build() -> Template:
    if "LC_REFUSE" in os.environ:
        raise RuntimeError(os.environ["LC_REFUSE"])
    if "LC_PRELOAD" in os.environ:
        importlib.import_module(os.environ["LC_PRELOAD"])
    if "LC_RUN" in os.environ:
        exec(os.environ["LC_RUN"], HELD)
    return Template()
