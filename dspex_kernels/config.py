"""Traits and names that more than one layer reads."""

from __future__ import annotations

import fnmatch
import functools
import json
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from traitlets import Bool, Dict, Float, Int, List, TraitError, Tuple, Unicode, validate
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
ENV_LEAN = "DSPEX_LEAN"
"""``1``: nobody attaches a notebook to the kernel, so it does without what only notebooks expect (history
database, debugger, heartbeat, parent poller, capture of descriptors, IPython's config files and startup files)."""
ENV_SPARE = "DSPEX_SPARE"
"""``1``: a dedicated kernel that is no session's yet; its service tells it whose it is (``adopt_session``)."""
ENV_ALLOW_CODE = "DSPEX_ALLOW_CODE"
"""``0``: the session takes data only, no cells. A pooled kernel never takes code."""
ENV_LM_POLICY = "DSPEX_LM_POLICY"
"""An LMPolicy as JSON."""
ENV_PROVIDER_LIMITS = "DSPEX_PROVIDER_LIMITS"
"""The ProviderLimits as JSON."""
ENV_LIMITS_DIR = "DSPEX_LIMITS_DIR"
"""Where the kernels of a service share what they count for the provider limits (0700)."""
ENV_ROAD = "DSPEX_ROAD"
"""The socket of the kernel's own channel over ipc (``road_path``); who names it removes it, as the others."""

ENV_FORK = "DSPEX_FORK"
"""``0``: kernels are started anew instead of being forked, in any application that starts them."""


def road_path(ip: str) -> str:
    """Where a kernel's own channel has its socket over ipc: beside the others, which are ``IP-PORT``.

    Args:
        ip: Of its connection file.
    """
    return f"{ip}-dspex"


HOST_SECRETS = (
    "JUPYTER*_TOKEN",
    "JUPYTER_TOKEN_FILE",
    "JUPYTERHUB_*SECRET*",
    "JUPYTERHUB_CRYPT_KEY",
    "JPY_*TOKEN",
    "CONFIGPROXY_AUTH_TOKEN",
    "DSPEX_CRYPT_KEY",
)
"""Variables that belong to whoever starts kernels: no kernel gets them."""


def host_secrets(names: Iterable[str]) -> list[str]:
    """Those of the variables that no kernel gets."""
    return [name for name in names if _is_host_secret(name)]


@functools.lru_cache(1000)  # asked twice for each kernel, of the same forty names
def _is_host_secret(name: str) -> bool:
    return matches(name, HOST_SECRETS)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a variable's name, in capitals, is one of the patterns' (``fnmatch``)."""
    return any(fnmatch.fnmatchcase(name.upper(), pattern) for pattern in patterns)


class Strict(Configurable):
    """Settings that refuse a name they do not know: misspelt, it would restrict nothing."""

    def _load_config(self, cfg: Any, section_names: Any = None, traits: Any = None) -> None:
        """Called by traitlets with the configuration. It only warns of a name it does not know."""
        known = sorted(self.trait_names(config=True))
        unknown = [name for name in self._find_my_config(cfg) if name not in known and not name[0].isupper()]
        if unknown:
            raise TraitError(
                f"{type(self).__name__} has no {', '.join(unknown)}: there are {', '.join(known)}; a setting that "
                "is misspelt would restrict nothing"
            )
        super()._load_config(cfg, section_names, traits)


def _read_told(text: str, variable: str, names: tuple[str, ...]) -> dict[str, Any]:
    """What a service told its kernel in a variable, as JSON.

    Raises:
        ValueError: It is no object, or holds another name.
    """
    data = json.loads(text)
    unknown = sorted(set(data) - set(names)) if isinstance(data, dict) else ["no object"]
    if unknown:
        raise ValueError(f"{variable} holds {', '.join(unknown)}: there are {', '.join(names)}")
    return dict(data)


class LMPolicy(Strict):
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
        return cls(**_read_told(text, ENV_LM_POLICY, _POLICY_TRAITS))


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


QUOTAS = ("requests_per_minute", "tokens_per_minute")
"""What ProviderLimits may limit."""
MAX_QUOTA = 10**9
"""The largest number a minute may be limited to."""


class ProviderLimits(Strict):
    """What all kernels of a service together may ask of a provider, and when they leave a failing one alone.

    A quota holds for each endpoint and key by itself, in any 60 seconds: a provider's own address is one endpoint,
    each host that an ``api_base`` names is another. The circuit breaker holds for an endpoint, whoever's the key.
    """

    limits = Dict(
        help='Per host of an api_base ("llm.example.org", "127.0.0.1:8000"), per provider ("openai") or for all '
        'others ("*"): {"openai": {"requests_per_minute": 500, "tokens_per_minute": 200000}}; the narrowest name '
        "counts, alone.",
    ).tag(config=True)
    breaker_failures = Int(
        5,
        min=0,
        max=32,
        help="After so many failures in a row (not reached, no answer in time, a server's error) requests to an "
        "endpoint are refused at once; 0 never refuses.",
    ).tag(config=True)
    breaker_window = Float(60.0, min=0.001, max=3600.0, help="Seconds within which those failures must come.").tag(
        config=True
    )
    breaker_reset = Float(
        30.0, min=0.001, max=3600.0, help="Seconds after which one request may try the endpoint again."
    ).tag(config=True)

    def quota_of(self, host: str, provider: str) -> tuple[str, dict[str, int]]:
        """The quota for an endpoint: under which name it stands, and its numbers; ("", {}) when there is none.

        Args:
            host: Host and port of its ``api_base``; "" is the provider's own address.
            provider: The model string's first part.
        """
        bare = re.sub(r":[0-9]+$", "", host)
        for name in (host, bare, provider.lower(), "*"):
            if name and name in self.limits:
                return name, self.limits[name]
        return "", {}

    def to_json(self) -> str:
        """The limits for a kernel's environment (``DSPEX_PROVIDER_LIMITS``)."""
        return json.dumps({name: getattr(self, name) for name in _LIMIT_TRAITS})

    @classmethod
    def from_json(cls, text: str) -> ProviderLimits:
        """The limits that ``to_json`` wrote.

        Raises:
            ValueError: It holds a name that is not known, which could have been meant as a limit.
            TraitError: A limit is none.
        """
        return cls(**_read_told(text, ENV_PROVIDER_LIMITS, _LIMIT_TRAITS))

    @validate("limits")
    def _check_limits(self, proposal: Any) -> dict[str, dict[str, int]]:
        return {_limited_name(name): _checked_quota(name, quota) for name, quota in proposal["value"].items()}


_LIMIT_TRAITS = ("limits", "breaker_failures", "breaker_window", "breaker_reset")


def _limited_name(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(
        r"\*|[A-Za-z0-9._-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?", name
    ):
        raise TraitError(
            f'ProviderLimits.limits: {name!r} is no name of an endpoint: give a host ("llm.example.org:8000"), a '
            'provider ("openai"), or "*"; no scheme and no path'
        )
    return name.lower()


def _checked_quota(name: str, quota: Any) -> dict[str, int]:
    if not isinstance(quota, dict) or not quota or set(quota) - set(QUOTAS):
        raise TraitError(f"ProviderLimits.limits[{name!r}] is {quota!r}: give {' or '.join(QUOTAS)}, or both")
    for what, number in quota.items():
        if type(number) is not int or not 1 <= number <= MAX_QUOTA:
            raise TraitError(
                f"ProviderLimits.limits[{name!r}]: {what} is {number!r}: give a whole number from 1 to {MAX_QUOTA}"
            )
    return dict(quota)
