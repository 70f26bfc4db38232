"""DSPy programs in isolated sessions, the Jupyter way.

The public names, resolved when they are first used: importing us inside a kernel costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "DSPexError": "dspex_kernels.errors",
    "LMPolicy": "dspex_kernels.config",
    "ProviderLimits": "dspex_kernels.config",
    "Program": "dspex_kernels.sessions.session",
    "Session": "dspex_kernels.sessions.session",
    "SessionService": "dspex_kernels.sessions.service",
    "connect_kernel": "dspex_kernels.sessions.direct",
    "DSPexKernelClient": "dspex_kernels.sessions.kernel_client",
}

__all__ = ["__version__", *sorted(_NAMES)]

if TYPE_CHECKING:
    from dspex_kernels.config import LMPolicy as LMPolicy
    from dspex_kernels.config import ProviderLimits as ProviderLimits
    from dspex_kernels.errors import DSPexError as DSPexError
    from dspex_kernels.sessions.direct import connect_kernel as connect_kernel
    from dspex_kernels.sessions.kernel_client import DSPexKernelClient as DSPexKernelClient
    from dspex_kernels.sessions.service import SessionService as SessionService
    from dspex_kernels.sessions.session import Program as Program
    from dspex_kernels.sessions.session import Session as Session


def __getattr__(name: str) -> Any:
    try:
        module = _NAMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
