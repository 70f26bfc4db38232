"""Traits and names that more than one layer reads."""

from __future__ import annotations

import fnmatch
import json
import re
from typing import Any
from urllib.parse import urlsplit

from traitlets import Bool, List, TraitError, Tuple, Unicode
from traitlets.config import Configurable

from dspex_kernels import errors
from dspex_kernels.protocol.records import is_offline

KERNEL_NAME = "dspex"
"""The kernelspec's name."""

ENV_SESSION_ID = "DSPEX_SESSION_ID"
"""The one session of a dedicated kernel."""
ENV_SESSION_DIR = "DSPEX_SESSION_DIR"
"""Where a dedicated kernel journals its session's changes (0700)."""
ENV_BACKEND = "DSPEX_BACKEND"
"""``dedicated`` (default) or ``pooled``: whether the kernel takes any session id."""
ENV_GENERATION = "DSPEX_GENERATION"
"""How often the session has been given a kernel; 1 is the first."""
ENV_KERNEL_ID = "DSPEX_KERNEL_ID"
"""The kernel's id at its service; absent, it is read off the connection file's name."""
ENV_LM_POLICY = "DSPEX_LM_POLICY"
"""An LMPolicy as JSON."""


class LMPolicy(Configurable):
    """Which models, hosts and environment variables an LM profile may name.

    A service with many owners starts from nothing allowed but the offline LM; one owner may do all. Without
    the pairs, a client could name any variable of the service together with its own ``api_base`` and be
    sent the secret.
    """

    unrestricted = Bool(True, help="Allow every model, host and variable: for a single owner.").tag(config=True)
    allowed_models = List(
        Unicode(), help='Model strings that may be named, as shell patterns: "openai/gpt-5*".'
    ).tag(config=True)
    allowed_hosts = List(
        Unicode(),
        help='Hosts that a profile\'s api_base may name ("llm.example.org", "127.0.0.1:8000"); none by default.',
    ).tag(config=True)
    allowed_keys = List(
        Tuple(Unicode(), Unicode()),
        help='Pairs of (environment variable, host) that may be used together; the host "" is the provider\'s own.',
    ).tag(config=True)

    def check(self, *, model: str, api_base: str | None, api_key_env: str | None, has_key: bool) -> None:
        """Refuse a profile that names what it may not.

        Args:
            model: The model string.
            api_base: Another endpoint than the provider's own; None is the provider's own.
            api_key_env: The variable that holds the key; None is none named.
            has_key: Whether a key was given directly.

        Raises:
            PolicyDenied: The message names what was refused and the trait that would allow it.
            InvalidLMProfile: ``api_base`` is not the URL of an endpoint.
        """
        try:
            host = host_of(api_base)
        except errors.InvalidLMProfile as refusal:
            if self.unrestricted:
                raise
            raise errors.PolicyDenied(f"{refusal.message}; LMPolicy allows no other") from None
        if self.unrestricted or is_offline(model):
            return
        if not any(fnmatch.fnmatchcase(model, pattern) for pattern in self.allowed_models):
            raise errors.PolicyDenied(
                f"model {model!r} is not allowed here: LMPolicy.allowed_models does not list it",
                details={"model": model},
            )
        if host and host not in self.allowed_hosts and not any(h == host for _, h in self.allowed_keys):
            raise errors.PolicyDenied(
                f"host {host!r} is not allowed here: LMPolicy.allowed_hosts does not list it",
                details={"host": host},
            )
        if api_key_env is not None and (api_key_env, host) not in [tuple(pair) for pair in self.allowed_keys]:
            raise errors.PolicyDenied(
                f"variable {api_key_env!r} may not be used with {host or 'the provider itself'}: "
                "LMPolicy.allowed_keys does not list the pair",
                details={"variable": api_key_env, "host": host},
            )
        if api_key_env is None and not has_key:
            raise errors.PolicyDenied(
                f"the profile for {model!r} names no key: the service's own environment is not used by "
                "default; give api_key, or an api_key_env that LMPolicy.allowed_keys lists",
                details={"model": model},
            )

    def to_json(self) -> str:
        """The policy for a kernel's environment (``DSPEX_LM_POLICY``); it holds no secret."""
        return json.dumps({name: _plain(getattr(self, name)) for name in _POLICY_TRAITS})

    @classmethod
    def from_json(cls, text: str) -> LMPolicy:
        """The policy that ``to_json`` wrote.

        Raises:
            ValueError: It is not one; a name that is not known could have been meant as a restriction.
        """
        data = json.loads(text)
        unknown = sorted(set(data) - set(_POLICY_TRAITS)) if isinstance(data, dict) else ["no object"]
        if unknown:
            raise ValueError(f"{ENV_LM_POLICY} holds {', '.join(unknown)}: there are {', '.join(_POLICY_TRAITS)}")
        return cls(**data)

    def _load_config(self, cfg: Any, section_names: Any = None, traits: Any = None) -> None:
        """Called by traitlets with the configuration. It only warns of a name it does not know."""
        known = set(self.trait_names(config=True))
        unknown = [name for name in self._find_my_config(cfg) if name not in known and not name[0].isupper()]
        if unknown:
            raise TraitError(
                f"LMPolicy has no {', '.join(unknown)}: there are {', '.join(_POLICY_TRAITS)}; a policy that is "
                "misspelt would allow everything"
            )
        super()._load_config(cfg, section_names, traits)


_POLICY_TRAITS = ("unrestricted", "allowed_models", "allowed_hosts", "allowed_keys")


def _plain(value: Any) -> Any:
    return [list(v) if isinstance(v, tuple) else v for v in value] if isinstance(value, list) else value


_ENDPOINT = re.compile(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?(/[^\s\\]*)?", re.IGNORECASE)


def host_of(api_base: str | None) -> str:
    """``host`` or ``host:port`` of a URL, lower case; "" where there is none.

    Raises:
        InvalidLMProfile: It is not plainly an HTTP URL. What parsers read differently (no scheme, a user before
            the host, backslashes) could be checked as one host and sent to another.
    """
    if not api_base:
        return ""
    if not _ENDPOINT.fullmatch(api_base):
        # Its text is not told: it may hold a password.
        raise errors.InvalidLMProfile(
            "api_base is not the URL of an endpoint: give http:// or https://, a host, a port and a path "
            '("https://llm.example.org/v1"), without user name or password: credentials are the api_key'
        )
    return urlsplit(api_base).netloc.lower()
