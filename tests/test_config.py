"""What an LM profile may name: hosts, variables, models."""

from __future__ import annotations

import pytest
from traitlets import TraitError
from traitlets.config import Config

from dspex_kernels import errors
from dspex_kernels.config import LMPolicy, host_of

MODEL = "openai/gpt-5-mini"


def _policy(**traits: object) -> LMPolicy:
    return LMPolicy(unrestricted=False, allowed_models=["openai/gpt-5*"], **traits)


def _check(policy: LMPolicy, **named: object) -> None:
    policy.check(**{"model": MODEL, "api_base": None, "api_key_env": None, "has_key": True, **named})  # type: ignore[arg-type]  # a test's


def test_a_policy_that_is_misspelt_is_refused_wherever_it_comes_from() -> None:
    with pytest.raises(ValueError, match="unrestrictd"):
        LMPolicy.from_json('{"unrestrictd": false}')
    with pytest.raises(TraitError, match="unrestrictd"):
        LMPolicy(config=Config({"LMPolicy": {"unrestrictd": False}}))
    assert not LMPolicy(config=Config({"LMPolicy": {"unrestricted": False}})).unrestricted


@pytest.mark.parametrize(
    ("api_base", "host"),
    [
        (None, ""),
        ("", ""),
        ("https://LLM.Example.org/v1", "llm.example.org"),
        ("http://llm.example.org:8000", "llm.example.org:8000"),
        ("http://llm.example.org./v1", "llm.example.org."),
        ("http://[::1]:8000/v1", "[::1]:8000"),
        ("http://[::1:8000]/v1", "[::1:8000]"),
    ],
)
def test_a_host_is_told_with_its_port(api_base: str | None, host: str) -> None:
    assert host_of(api_base) == host


@pytest.mark.parametrize(
    "api_base",
    [
        "evil.example.org/v1",
        "//evil.example.org/v1",
        "http:evil.example.org/v1",
        "http:/evil.example.org/v1",
        "http:\\\\evil.example.org",
        "ftp://evil.example.org",
        "http://allowed.example.org@evil.example.org/v1",
        "http://user:password@allowed.example.org/v1",
        "http://allowed.example.org\\@evil.example.org/",
        "http://evil.example.org#@allowed.example.org/",
        "http://evil.example.org?@allowed.example.org/",
        "http://allowed.example.org:port/",
        "http://allowed.example.org/\n",
        " http://allowed.example.org/",
        "http://",
    ],
)
@pytest.mark.parametrize("unrestricted", [True, False])
def test_what_is_not_plainly_a_url_is_refused_without_being_told(api_base: str, unrestricted: bool) -> None:
    policy = LMPolicy(
        unrestricted=unrestricted, allowed_models=["*"], allowed_hosts=["allowed.example.org", "evil.example.org"]
    )
    with pytest.raises(errors.InvalidLMProfile if unrestricted else errors.PolicyDenied) as refusal:
        _check(policy, api_base=api_base)
    assert "password@" not in str(refusal.value)


def test_a_policy_of_many_owners_allows_the_offline_lm_alone() -> None:
    _check(LMPolicy(unrestricted=False), model="offline/echo")
    for model in (MODEL, "offline-looking/echo", "ollama/llama3", "azure/gpt-5"):
        with pytest.raises(errors.PolicyDenied, match="allowed_models"):
            _check(LMPolicy(unrestricted=False), model=model)


def test_a_profile_without_a_key_does_not_get_the_services_own() -> None:
    with pytest.raises(errors.PolicyDenied, match="names no key"):
        _check(_policy(), has_key=False)


def test_a_variable_goes_only_where_its_pair_says() -> None:
    policy = _policy(allowed_keys=[("TEAM_KEY", "llm.example.org")], allowed_hosts=["other.example.org"])
    _check(policy, api_base="https://llm.example.org/v1", api_key_env="TEAM_KEY")
    for api_base in (None, "https://other.example.org/v1", "https://llm.example.org:8443/v1"):
        with pytest.raises(errors.PolicyDenied):
            _check(policy, api_base=api_base, api_key_env="TEAM_KEY")
    with pytest.raises(errors.PolicyDenied, match="HOME"):
        _check(policy, api_base="https://llm.example.org/v1", api_key_env="HOME")


@pytest.mark.parametrize("host", ["llm.example.org.", "LLM.example.org:443", "[::1]", "127.0.0.1"])
def test_a_host_that_is_not_listed_is_refused(host: str) -> None:
    with pytest.raises(errors.PolicyDenied, match="allowed_hosts"):
        _check(_policy(allowed_hosts=["llm.example.org"]), api_base=f"https://{host}/v1")


def test_a_policy_survives_its_way_through_the_environment() -> None:
    policy = _policy(allowed_keys=[("TEAM_KEY", "")], allowed_hosts=["llm.example.org"])
    assert LMPolicy.from_json(policy.to_json()).trait_values() == policy.trait_values()
