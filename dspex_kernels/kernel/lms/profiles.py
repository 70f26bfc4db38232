"""Language models of a session: an LM profile becomes a ``dspy.LM``, an adapter's name an adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import dspy

from dspex_kernels import errors
from dspex_kernels.config import LMPolicy
from dspex_kernels.kernel.offline.engines import offline_engines
from dspex_kernels.protocol.records import AdapterName, LMProfile, OfflineOptions

RESERVED_PARAMS = frozenset(
    {
        "api_base", "api_key", "api_version", "azure_ad_token_provider", "base_url", "cache", "callbacks",
        "custom_llm_provider", "engine", "async_engine", "extra_body", "extra_headers", "extra_query", "headers",
        "launch_kwargs", "messages", "model", "model_list", "model_type", "num_retries", "organization", "project",
        "prompt", "provider", "rollout_id", "stream", "timeout", "train_kwargs",
    }
)  # fmt: skip
"""What ``params`` may not hold: they lead to another endpoint, carry secrets, or pass by the gate."""


class SessionLM(dspy.LM):
    """A session's language model. Its text tells the model and nothing else; pickling drops its key."""

    def __init__(self, profile: LMProfile, *, api_key: str | None, seed: str) -> None:
        settings: dict[str, Any] = {
            "temperature": profile.temperature,
            "max_tokens": profile.max_tokens,
            "cache": profile.cache,
            "model_type": profile.model_type,
            "num_retries": 0,  # the LM gate retries
            **profile.params,
        }
        if profile.is_offline:
            engine, async_engine = offline_engines(profile.offline or OfflineOptions(), seed)
            settings.update(engine=engine, async_engine=async_engine)
        else:
            settings["timeout"] = profile.timeout_s
            settings.update({k: v for k, v in (("api_key", api_key), ("api_base", profile.api_base)) if v})
        super().__init__(profile.model, **settings)
        self.max_retries = profile.max_retries
        self.is_free = profile.is_offline

    def __repr__(self) -> str:
        return f"SessionLM({self.model!r})"

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, "kwargs": {k: v for k, v in self.kwargs.items() if k != "api_key"}}


def build_lm(
    profile: LMProfile, *, session_id: str, policy: LMPolicy, environ: Mapping[str, str] | None = None
) -> SessionLM:
    """The language model that a profile describes. Starts nothing and sends nothing.

    Args:
        profile: As configured, with its key if one was given directly.
        session_id: Seeds the offline LM's answers.
        policy: What the profile may name.
        environ: Where ``api_key_env`` is read; None is the process's own.

    Raises:
        PolicyDenied: The policy does not allow it.
        LMCredentialsRequired: The key it was configured with is not there any more, or its variable is not set.
        InvalidLMProfile: DSPy refuses the combination.
    """
    key = profile.api_key.get_secret_value() if profile.api_key is not None else None
    policy.check(
        model=profile.model,
        api_base=profile.api_base,
        api_key_env=profile.api_key_env,
        has_key=key is not None or profile.key_given,
    )
    if profile.key_given and key is None:
        raise errors.LMCredentialsRequired(
            f"the key of {profile.model!r} was given directly and is gone with the kernel that held it: "
            "configure the LM again, or name a variable with api_key_env",
            details={"model": profile.model},
        )
    if key is None and profile.api_key_env is not None:
        key = (os.environ if environ is None else environ).get(profile.api_key_env)
        if not key:
            raise errors.LMCredentialsRequired(
                f"variable {profile.api_key_env!r} is not set where the kernel runs: set it there, or give api_key",
                details={"variable": profile.api_key_env, "model": profile.model},
            )
    refused = sorted(RESERVED_PARAMS.intersection(profile.params))
    if refused:
        raise errors.InvalidLMProfile(
            f"params may not hold {', '.join(refused)}: use the profile's own fields", details={"params": refused}
        )
    if profile.api_base is not None and urlsplit(profile.api_base).username is not None:
        raise errors.InvalidLMProfile(
            f"the api_base of {profile.model!r} holds a user name: it would be stored in clear; give the "
            "credentials as api_key"
        )
    if profile.offline is not None and not profile.is_offline:
        raise errors.InvalidLMProfile(f"offline options need an offline model, not {profile.model!r}")
    try:
        return SessionLM(profile, api_key=key, seed=f"{session_id}|{profile.model}")
    except (ValueError, TypeError, dspy.LMError) as refusal:
        raise errors.InvalidLMProfile(
            f"the profile of {profile.model!r} is refused: {refusal}", details={"model": profile.model}
        ) from None  # the cause's frames hold the key


def build_adapter(name: AdapterName | None, profile: LMProfile | None, lm: Any) -> Any:
    """The adapter of that name; None is DSPy's default, the chat adapter.

    Args:
        name: chat, json, xml or two_step.
        profile: Its ``json_fallback`` decides whether an unreadable answer may cost a second call.
        lm: Extracts the fields for ``two_step``.
    """
    fallback = profile.json_fallback if profile is not None else True
    match name:
        case "json":
            return dspy.JSONAdapter()
        case "xml":
            adapter = dspy.XMLAdapter()
            adapter.use_json_adapter_fallback = fallback
            return adapter
        case "two_step":
            return dspy.TwoStepAdapter(extraction_model=lm)
        case _:
            return dspy.ChatAdapter(use_json_adapter_fallback=fallback)
