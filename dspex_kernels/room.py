"""Whether the machine has memory for what nobody needs yet."""

from __future__ import annotations

import contextlib
from pathlib import Path

MIN_AVAILABLE_BYTES = 512 << 20
"""Memory that must be available for kernels to be started ahead: those that are wanted come first."""


def is_there() -> bool:
    """Whether there is; also where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 >= MIN_AVAILABLE_BYTES
    return True
