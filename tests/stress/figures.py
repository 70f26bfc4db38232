"""How much the stress tests do, and how they tell what came out."""

from __future__ import annotations

import os

SCALE = float(os.environ.get("DSPEX_STRESS", "1"))
"""1 is the full size; the checks run a tenth of it with every change."""

TIMEOUT = 300 * max(SCALE, 1.0)
"""Seconds for one test: what hangs must fail, whatever the machine."""


def scaled(number: int) -> int:
    """So many at this scale, at least one."""
    return max(1, round(number * SCALE))


def tell(title: str, **figures: object) -> None:
    """Print the figures of a run in one line."""
    print(f"\n[stress] {title}: " + ", ".join(f"{name}={_short(value)}" for name, value in figures.items()))


def _short(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
