"""Keys do not leave in texts or exceptions."""

from __future__ import annotations

from dspex_kernels.kernel.secrecy import PLACEHOLDER, environment_keys, scrub, scrub_exception

KEY = "sk-test-0123456789abcdef"


class _Frozen(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


def _told(failure: BaseException) -> str:
    links = [failure, failure.__cause__, failure.__context__]
    return str([(str(link), repr(link), vars(link)) for link in links if link is not None])


def test_a_text_loses_the_key_plain_and_as_json_writes_it() -> None:
    key = 'quote"d-secret'
    assert scrub(f'{key} and "quote\\"d-secret"', [key]) == f'{PLACEHOLDER} and "{PLACEHOLDER}"'


def test_a_short_key_is_no_secret() -> None:
    assert scrub("an x-ray", ["x"]) == "an x-ray"


def test_an_exception_loses_the_key_wherever_it_holds_it() -> None:
    failure = ValueError(f"refused {KEY}", {"headers": [f"Bearer {KEY}"]})
    failure.add_note(f"sent with {KEY}")
    failure.body = {"error": {"message": KEY}}  # type: ignore[attr-defined]  # as the SDKs' exceptions have one
    scrub_exception(failure, {KEY})
    assert KEY not in _told(failure)
    assert PLACEHOLDER in str(failure)


def test_cause_and_context_lose_it_both() -> None:
    failure = ValueError("refused")
    failure.__context__ = KeyError(f"context {KEY}")
    failure.__cause__ = RuntimeError(f"cause {KEY}")
    scrub_exception(failure, {KEY})
    assert KEY not in _told(failure)


def test_a_chain_that_is_a_ring_ends() -> None:
    one, two = ValueError(KEY), ValueError(KEY)
    one.__cause__, two.__cause__ = two, one
    scrub_exception(one, {KEY})
    assert KEY not in _told(one)


def test_an_exception_that_forbids_its_attributes_is_cleaned_too() -> None:
    failure = _Frozen("refused")
    vars(failure)["message"] = f"refused {KEY}"
    scrub_exception(failure, {KEY})
    assert KEY not in _told(failure)


def test_what_the_environment_calls_a_key_is_one() -> None:
    environ = {"OPENAI_API_KEY": KEY, "hub_token": "t" * 20, "HOME": "/home/somebody", "KEYBOARD": "qwerty"}
    assert environment_keys(environ) == {KEY, "t" * 20}
