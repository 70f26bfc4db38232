"""The error tree: its drawing is true, its codes are unique, and each error survives the wire."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dspex_kernels import errors
from dspex_kernels.errors import DSPexError

CODED = sorted(errors.by_code().values(), key=lambda cls: cls.__name__)
ALL = list(dict.fromkeys(DSPexError._subclasses()))


def _drawn() -> dict[str, tuple[str | None, str | None]]:
    """The docstring's tree: name -> (parent, code)."""
    rows: dict[str, tuple[str | None, str | None]] = {}
    above: list[tuple[int, str]] = []
    lines = re.findall(r"^    ([│├└─ ]*)([A-Z]\w+)(?:  +(\S.*))?$", errors.__doc__ or "", re.MULTILINE)
    for branch, name, rest in lines:
        above = [(depth, parent) for depth, parent in above if depth < len(branch)]
        code = re.match(r"[a-z_]+", rest)
        rows[name] = (above[-1][1] if above else None, code.group() if code else None)
        above.append((len(branch), name))
    return rows


def _real() -> dict[str, tuple[str | None, str | None]]:
    rows: dict[str, tuple[str | None, str | None]] = {
        cls.__name__: (cls.__base__.__name__ if cls is not DSPexError else None, vars(cls).get("code"))
        for cls in ALL
    }
    rows["ProviderFailure"] = ("LMFailure", None)  # its code is DSPy's, one for each instance
    return rows


def _sample(cls: type[DSPexError]) -> DSPexError:
    if cls is errors.ProgramFailed:
        return cls("it failed", details={"n": [1, None]})
    return cls("it failed", details={"n": [1, None]}, retry_after=1.5)


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    drawn = _drawn()
    drawn.pop("CallStopped", None)

    assert drawn == _real()


def test_call_stopped_is_drawn_and_is_no_exception_that_dspy_would_catch() -> None:
    assert "CallStopped" in (errors.__doc__ or "")
    assert issubclass(errors.CallStopped, BaseException)
    assert not issubclass(errors.CallStopped, Exception)


def test_every_class_of_the_module_is_in_the_tree() -> None:
    found = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }

    assert found == {cls.__name__ for cls in ALL} | {"CallStopped"}


def test_no_two_classes_share_a_code() -> None:
    codes = [vars(cls)["code"] for cls in ALL if "code" in vars(cls)]

    assert sorted(codes) == sorted(set(codes))
    assert all(re.fullmatch(r"[a-z][a-z_]*", code) for code in codes)


def test_every_class_that_can_be_raised_has_a_code_of_its_own() -> None:
    leaves = [cls for cls in ALL if not cls.__subclasses__()]

    assert [cls.__name__ for cls in leaves if "code" not in vars(cls)] == []


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_class_has_an_http_status_and_a_reply_status(cls: type[DSPexError]) -> None:
    assert 400 <= cls.http_status <= 599
    assert cls.status in ("error", "aborted")


@pytest.mark.parametrize("cls", CODED, ids=lambda cls: cls.__name__)
def test_an_error_survives_the_wire(cls: type[DSPexError]) -> None:
    sent = _sample(cls)

    told = sent.to_dict()
    arrived = errors.from_dict(told)

    assert type(arrived) is cls
    assert (arrived.code, arrived.message, str(arrived)) == (sent.code, "it failed", "it failed")
    assert (arrived.details, arrived.retryable, arrived.retry_after) == (
        sent.details,
        sent.retryable,
        sent.retry_after,
    )
    assert arrived.to_dict() == told


@pytest.mark.parametrize(
    "code", ["rate_limit", "auth", "server", "transport", "adapter_parse_error", "of_tomorrow"]
)
def test_dspys_own_codes_pass_through(code: str) -> None:
    sent = errors.ProviderFailure("no", code=code, retryable=True, details={"model": "m"}, retry_after=2.0)

    arrived = errors.from_dict(sent.to_dict())

    assert type(arrived) is errors.ProviderFailure
    assert (arrived.code, arrived.retryable, arrived.retry_after) == (code, True, 2.0)
    assert arrived.details == {"model": "m"}


def test_dspys_timeout_is_not_taken_for_a_commands_timeout() -> None:
    sent = errors.ProviderFailure("slow", code="timeout", retryable=True, details={"dspy_error": "LMTimeoutError"})

    assert type(errors.from_dict(sent.to_dict())) is errors.ProviderFailure
    assert type(errors.from_dict(errors.CommandTimeout("late").to_dict())) is errors.CommandTimeout


def test_whether_a_dead_kernels_call_may_be_repeated_belongs_to_the_call() -> None:
    for retryable in (True, False):
        assert errors.from_dict(errors.KernelDied("gone", retryable=retryable).to_dict()).retryable is retryable


def test_a_users_failure_keeps_its_name_and_frames() -> None:
    data: dict[str, Any] = {"code": "program_failed", "message": "ZeroDivisionError: division by zero"}
    reply = {**data, "ename": "ZeroDivisionError", "evalue": "division by zero", "traceback": ["line 1", "line 2"]}

    failed = errors.from_dict(reply)

    assert isinstance(failed, errors.ProgramFailed)
    assert (failed.ename, failed.evalue, failed.traceback) == (
        "ZeroDivisionError",
        "division by zero",
        ["line 1", "line 2"],
    )


def test_an_error_that_tells_next_to_nothing_is_still_an_error() -> None:
    assert type(errors.from_dict({})) is DSPexError
    assert errors.from_dict({"code": "session_not_found", "details": None}).message == "session_not_found"


def test_an_errors_details_are_its_own() -> None:
    details = {"a": 1}
    error = errors.StoreError("no", details=details)
    details["a"] = 2
    error.to_dict()["details"]["a"] = 3

    assert error.details == {"a": 1}
