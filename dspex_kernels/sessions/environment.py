"""What of the service's environment its kernels may see."""

from __future__ import annotations

from collections.abc import Mapping

from dspex_kernels import config

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
        return policy.unrestricted or name in allowed or not config.matches(name, LIKELY_SECRETS)

    withheld = set(config.host_secrets(source))
    return {name: value for name, value in source.items() if name not in withheld and passes(name)}
