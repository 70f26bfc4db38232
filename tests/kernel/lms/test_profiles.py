"""Profiles become LMs: what they may hold, and what their copies, texts and pickles tell."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import dspy
import pytest
from pydantic import SecretStr

from dspex_kernels import errors
from dspex_kernels.config import LMPolicy
from dspex_kernels.kernel.lms.profiles import SessionLM, build_lm
from dspex_kernels.protocol.records import LMProfile, OfflineOptions

KEY = "sk-test-0123456789abcdef"
RESTRICTED = LMPolicy(unrestricted=False, allowed_models=["openai/*"], allowed_keys=[("TEAM_KEY", "")])


def _build(policy: LMPolicy | None = None, environ: dict[str, str] | None = None, **profile: Any) -> SessionLM:
    if "api_key" in profile:
        profile.update(api_key=SecretStr(profile["api_key"]), key_given=True)
    described = LMProfile(model=profile.pop("model", "openai/gpt-4o-mini"), **profile)
    return build_lm(described, session_id="s", policy=policy or LMPolicy(), environ=environ or {})


@pytest.mark.parametrize("key", ["", " ", "\t\n"])
def test_an_empty_key_does_not_open_the_services_own(key: str) -> None:
    with pytest.raises(errors.InvalidLMProfile, match="empty"):
        _build(RESTRICTED, api_key=key)


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_variable_does_not_open_the_services_own(value: str) -> None:
    with pytest.raises(errors.LMCredentialsRequired, match="TEAM_KEY"):
        _build(RESTRICTED, {"TEAM_KEY": value, "OPENAI_API_KEY": KEY}, api_key_env="TEAM_KEY")


@pytest.mark.parametrize(
    "name",
    [
        *(
            "api_base",
            "base_url",
            "api_key",
            "extra_body",
            "extra_headers",
            "headers",
            "extra_query",
            "api_version",
        ),
        *("fallbacks", "context_window_fallback_dict", "max_retries", "num_retries", "model_list", "mock_response"),
        *("aws_secret_access_key", "vertex_credentials", "input_cost_per_token", "custom_llm_provider", "engine"),
        *("cache", "rollout_id", "stream", "callbacks", "client", "API_BASE"),
    ],
)
def test_parameters_hold_sampling_and_nothing_else(name: str) -> None:
    with pytest.raises(errors.InvalidLMProfile, match=name):
        _build(api_key=KEY, params={name: "x"})


@pytest.mark.parametrize("params", [{"top_p": "x"}, {"temperature": True}, {"n": 0}, {"seed": 1.5}])
def test_a_sampling_parameter_that_does_not_fit_is_refused_when_it_is_configured(params: dict[str, object]) -> None:
    with pytest.raises(errors.InvalidLMProfile, match=next(iter(params))):
        _build(api_key=KEY, params=params)


def test_sampling_parameters_reach_the_lm() -> None:
    lm = _build(api_key=KEY, params={"top_p": 0.5, "seed": 7})
    assert (lm.kwargs["top_p"], lm.kwargs["seed"], lm.num_retries) == (0.5, 7, 0)


def test_an_lm_tells_its_model_and_never_its_key() -> None:
    lm = _build(api_key=KEY)
    told = repr(lm) + str(lm) + str(lm.dump_state()) + str(pickle.dumps(lm)) + str(vars(lm.connections))
    assert KEY not in told
    assert "gpt-4o-mini" in repr(lm)


def test_copies_keep_the_key_and_share_the_connections() -> None:
    lm = _build(api_key=KEY)
    predict = dspy.Predict("question -> answer")
    predict.set_lm(lm)
    for copied in (copy.deepcopy(lm), lm.copy(rollout_id=1, temperature=1.0), predict.deepcopy().lm):
        assert copied.kwargs["api_key"] == KEY
        assert copied.connections is lm.connections


def test_an_lm_that_comes_out_of_a_pickle_can_be_closed() -> None:
    lm = pickle.loads(pickle.dumps(_build(api_key=KEY)))
    assert "api_key" not in lm.kwargs
    lm.close()


def test_offline_options_need_an_offline_model() -> None:
    with pytest.raises(errors.InvalidLMProfile, match="offline"):
        _build(api_key=KEY, offline=OfflineOptions())
