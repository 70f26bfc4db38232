"""How much memory this process holds."""

from __future__ import annotations

import os
import resource
import sys


def memory_bytes() -> int:
    """Resident memory of this process; where the system does not tell, the most it ever held."""
    try:
        with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123  # a path object costs more than the read
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
