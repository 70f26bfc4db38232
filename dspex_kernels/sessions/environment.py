"""What of the service's environment its kernels may see."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from dspex_kernels import config

SERVICE_SECRETS = (
    "JUPYTER*_TOKEN",
    "JUPYTER_TOKEN_FILE",
    "JUPYTERHUB_*SECRET*",
    "JUPYTERHUB_CRYPT_KEY",
    "JPY_*TOKEN",
    "CONFIGPROXY_AUTH_TOKEN",
    "DSPEX_CRYPT_KEY",
)
"""Variables that are the service's alone: no kernel gets them."""
LIKELY_SECRETS = (
    "*API_KEY*",
    "*_KEY",
    "*_KEY_ID",
    "*TOKEN*",
    "*SECRET*",
    "*PASSWORD*",
    "*PASSWD*",
    "*CREDENTIALS*",
    "DATABASE_URL",
)
"""Variables that a restricted LMPolicy withholds, unless its ``allowed_keys`` name them."""


def kernel_environment(source: Mapping[str, str], policy: config.LMPolicy) -> dict[str, str]:
    """What of the service's environment a kernel may see.

    Args:
        source: The service's environment.
        policy: Whose ``allowed_keys`` may pass; an unrestricted one lets everything pass but the service's own.
    """
    allowed = {variable for variable, _ in policy.allowed_keys}

    def passes(name: str) -> bool:
        if _matches(name, SERVICE_SECRETS):
            return False
        return policy.unrestricted or name in allowed or not _matches(name, LIKELY_SECRETS)

    return {name: value for name, value in source.items() if passes(name)}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name.upper(), pattern) for pattern in patterns)
