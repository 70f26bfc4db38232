"""Language models of a session: an LM profile becomes a ``dspy.LM``, an adapter's name an adapter."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Self

import dspy
from pydantic import ValidationError

from dspex_kernels import errors, logs
from dspex_kernels.config import LMPolicy
from dspex_kernels.kernel.lms.gate import Connections
from dspex_kernels.kernel.offline.engines import offline_engines
from dspex_kernels.protocol.messages import first_problem
from dspex_kernels.protocol.records import AdapterName, LMProfile, OfflineOptions
from dspex_kernels.protocol.sampling import Sampling

log = logs.get_logger(__name__)

PARAMS = frozenset(
    {
        *Sampling.model_fields, "chat_template_kwargs", "enable_thinking", "modalities", "parallel_tool_calls",
        "prediction", "prompt_cache_key", "reasoning", "response_format", "safety_identifier", "service_tier",
        "store", "thinking", "use_developer_role", "user",
    }
)  # fmt: skip
"""What ``params`` may hold. What is not known stays out: LiteLLM takes hosts, keys, prices and whole fallback
models as parameters, and sends to those by itself, past the gate."""


CLOSING = 1.0
"""Seconds that closing an LM waits for its connections."""


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
        # In the cache's key: another script gives other answers.
        self.script = profile.offline.model_dump_json() if profile.offline is not None else ""
        self.connections: Connections | None = Connections(self._close_pools)
        self._closing: list[tuple[asyncio.AbstractEventLoop, Future[None]]] = []

    def __repr__(self) -> str:
        return f"SessionLM({self.model!r})"

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        kwargs = {k: v for k, v in self.kwargs.items() if k != "api_key"}
        return {**state, "kwargs": kwargs, "connections": None, "_closing": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # By default it would go through the state above, and a copied program would have lost the key.
        copied: Self = self.copy()
        return copied

    async def aclose(self) -> None:
        """Close the connections, once no request uses them: a call goes on with the LM that it began with."""
        if self.connections is None:
            await super().aclose()
            return
        self.connections.retire()
        here = asyncio.get_running_loop()
        # Not for those of other loops: a cell may block the main thread's.
        mine = [asyncio.wrap_future(closing) for loop, closing in self._closing if loop is here]
        if mine:
            await asyncio.wait(mine, timeout=CLOSING)

    def _close_pools(self) -> None:
        with self._engine_lock:
            self._reap_closed_loops()
            engines = [(key[0], engine) for key, engine in self._engine_store.items()]
            self._engine_store.clear()
        for _, engine in (pair for pair in engines if pair[0] is None):
            engine.close()
        # A cell's `await` has its pool on the main thread's loop, a synchronous call on the gate's.
        self._closing = [
            (loop, asyncio.run_coroutine_threadsafe(_close_engine(engine), loop))
            for loop, engine in engines
            if loop
        ]


async def _close_engine(engine: Any) -> None:
    try:
        await engine.aclose()
    except Exception:
        log.warning("connections of %r did not close", engine, exc_info=True)


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
    if key is not None and not key.strip():
        # DSPy would take it for none given, and read the provider's variable.
        raise errors.InvalidLMProfile(f"the api_key of {profile.model!r} is empty: give the key, or leave it out")
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
        if not key or not key.strip():
            raise errors.LMCredentialsRequired(
                f"variable {profile.api_key_env!r} is not set where the kernel runs: set it there, or give api_key",
                details={"variable": profile.api_key_env, "model": profile.model},
            )
    refused = sorted(name[:64] for name in set(profile.params) - PARAMS)[:20]
    if refused:
        raise errors.InvalidLMProfile(
            f"params may not hold {', '.join(refused)}: use the profile's own fields; params takes "
            f"{', '.join(sorted(PARAMS))}",
            details={"params": refused},
        )
    try:
        Sampling.model_validate({k: v for k, v in profile.params.items() if k in Sampling.model_fields})
    except ValidationError as failure:
        raise errors.InvalidLMProfile(f"params: {first_problem(failure)}") from None  # it would carry the values
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
