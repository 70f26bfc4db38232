"""A session's settings change: its language model, adapter and budget."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from dspex_kernels.kernel.calls import Call
from dspex_kernels.kernel.hops import has_prices
from dspex_kernels.kernel.lms import history
from dspex_kernels.protocol.commands import (
    ConfigureArgs,
    ConfigureResult,
    InspectHistoryArgs,
    InspectHistoryResult,
    LMProfileArgs,
    NoArgs,
    ResetResult,
)
from dspex_kernels.protocol.records import Budget, LMProfile, SessionReset, SessionSettings, SettingsChanged

if TYPE_CHECKING:
    from dspex_kernels.kernel.dispatch import Dispatcher
    from dspex_kernels.kernel.lms.profiles import SessionLM
    from dspex_kernels.kernel.namespaces import Namespace


async def configure(_dispatcher: Dispatcher, call: Call, args: ConfigureArgs) -> ConfigureResult:
    """Change what is given; null drops a setting, what is absent stays."""
    namespace = call.namespace
    async with namespace.changing:
        changes: dict[str, Any] = {}
        lm = None
        if "lm" in args.model_fields_set:
            profile = _profile(args.lm)
            lm = await _prepare_lm(namespace, profile) if profile is not None else None
            changes["lm"] = profile
        if "adapter" in args.model_fields_set:
            changes["adapter"] = args.adapter
        if "budget" in args.model_fields_set:
            changes["budget"] = args.budget or Budget()
        settings = namespace.contents.settings.model_copy(update=changes)
        await namespace.change_settings(call, SettingsChanged(settings=settings), lm, changed=changes)
        return ConfigureResult(settings=_without_secrets(settings))


async def _prepare_lm(namespace: Namespace, profile: LMProfile) -> SessionLM:
    if has_prices():
        return namespace.prepare_lm(profile)
    return await asyncio.to_thread(namespace.prepare_lm, profile)  # some refusals read DSPy's model catalogue


def _without_secrets(settings: SessionSettings) -> SessionSettings:
    if settings.lm is None or settings.lm.api_key is None:
        return settings
    return settings.model_copy(update={"lm": settings.lm.model_copy(update={"api_key": None})})


def _profile(given: str | LMProfileArgs | None) -> LMProfile | None:
    match given:
        case None:
            return None
        case str():
            return LMProfile(model=given)
        case LMProfileArgs():
            return given.profile()


async def reset(_dispatcher: Dispatcher, call: Call, _args: NoArgs) -> ResetResult:
    """Drop the session's programs, settings and history; what was spent stays counted."""
    namespace = call.namespace
    async with namespace.changing:
        programs = len(namespace.contents.programs)
        await namespace.change_settings(call, SessionReset(), None, changed=("lm", "adapter"))
        namespace.history.clear()
        return ResetResult(programs=programs)


async def inspect_history(_dispatcher: Dispatcher, call: Call, args: InspectHistoryArgs) -> InspectHistoryResult:
    """The session's last LM calls, newest last."""
    entries = [history.entry_to_data(entry) for entry in call.namespace.history.entries()[-args.n :]]
    return InspectHistoryResult(entries=entries, count=len(entries))
