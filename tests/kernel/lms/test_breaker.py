"""Circuits: when nothing is sent to an endpoint that fails, and how it is found to be back."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

import pytest

from dspex_kernels import errors
from dspex_kernels.config import ProviderLimits
from dspex_kernels.kernel.lms.endpoints import MAX_PROBE, Admission, Endpoint, Endpoints

FAILURES, WINDOW, RESET = 3, 60.0, 30.0


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Kernel:
    """What one kernel knows of an endpoint, and what its requests meet there."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def sends(self, deadline: float | None = None) -> Admission:
        """A request on its way; raises what refuses it."""
        admission = self.endpoint.admission(1, deadline)
        with closing(admission.steps()) as steps:
            assert list(steps) == []
        return admission

    def fails(self, times: int = 1, reason: str = "server") -> None:
        for _ in range(times):
            self.sends().failed(reason)

    def refused(self) -> errors.ProviderUnavailable:
        with pytest.raises(errors.ProviderUnavailable) as refusal:
            self.sends()
        return refusal.value


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _limits(**traits: object) -> ProviderLimits:
    defaults = {"breaker_failures": FAILURES, "breaker_window": WINDOW, "breaker_reset": RESET}
    return ProviderLimits(**{**defaults, **traits})


@pytest.fixture
def kernels(tmp_path: Path, clock: Clock) -> tuple[Kernel, Kernel]:
    """Two kernels of one service."""
    limits = _limits()
    one, other = (Endpoints(limits, tmp_path / "limits", clock=clock) for _ in range(2))
    return Kernel(one.endpoint("openai", api_key="a key")), Kernel(other.endpoint("openai", api_key="another"))


def test_failures_in_a_row_from_any_kernel_refuse_requests_of_all(
    kernels: tuple[Kernel, Kernel], clock: Clock
) -> None:
    one, other = kernels
    one.fails(FAILURES - 1)
    other.fails(reason="transport")
    clock.now += 10
    for kernel in kernels:
        error = kernel.refused()
        assert (error.code, error.http_status, error.retryable) == ("provider_unavailable", 503, True)
        assert error.retry_after == pytest.approx(RESET - 10)
        assert error.details == {"endpoint": "openai", "failures": FAILURES, "last_error": "transport"}
        for told in ("openai", f"{FAILURES} times", "transport", "20.0 s"):
            assert told in error.message


def test_an_answer_in_between_ends_the_row(kernels: tuple[Kernel, Kernel]) -> None:
    one, other = kernels
    for _ in range(3):
        one.fails(FAILURES - 1)
        other.sends().answered(None)
    one.fails(FAILURES - 1)
    other.sends()


def test_failures_that_are_far_apart_are_no_row(kernels: tuple[Kernel, Kernel], clock: Clock) -> None:
    one, _ = kernels
    for _ in range(10):
        one.fails()
        clock.now += WINDOW / (FAILURES - 1)
    one.sends()
    one.fails(FAILURES - 1)
    one.refused()


def test_a_request_that_was_given_up_says_nothing(kernels: tuple[Kernel, Kernel]) -> None:
    one, other = kernels
    one.fails(FAILURES - 1)
    for _ in range(5):
        other.sends().given_up()
    one.fails()
    other.refused()


def test_after_the_reset_one_request_of_all_kernels_tries_and_its_answer_closes(
    kernels: tuple[Kernel, Kernel], clock: Clock
) -> None:
    one, other = kernels
    one.fails(FAILURES)
    clock.now += RESET
    probe = other.sends()
    for kernel in kernels:
        assert (kernel.refused().retry_after or 0) > 0
    probe.answered(10)
    for kernel in kernels:
        kernel.sends()
    one.fails(FAILURES - 1)
    other.sends()


def test_a_probe_that_fails_opens_again_for_a_whole_reset(kernels: tuple[Kernel, Kernel], clock: Clock) -> None:
    one, other = kernels
    one.fails(FAILURES)
    clock.now += 10 * RESET  # longer than the window: the row is old
    other.fails(reason="timeout")
    error = one.refused()
    assert error.retry_after == pytest.approx(RESET)
    assert error.details["last_error"] == "timeout"


def test_a_probe_that_is_given_up_leaves_the_try_to_the_next(kernels: tuple[Kernel, Kernel], clock: Clock) -> None:
    one, other = kernels
    one.fails(FAILURES)
    clock.now += RESET
    one.sends().given_up()
    probe = other.sends()
    one.refused()
    probe.answered(None)
    one.sends()


@pytest.mark.parametrize(("timeout", "lease"), [(5.0, 5.0), (None, MAX_PROBE), (10_000.0, MAX_PROBE)])
def test_a_probe_whose_kernel_was_killed_is_not_waited_for_beyond_its_call(
    kernels: tuple[Kernel, Kernel], clock: Clock, timeout: float | None, lease: float
) -> None:
    one, other = kernels
    one.fails(FAILURES)
    clock.now += RESET
    late = one.sends(None if timeout is None else clock.now + timeout)
    clock.now += lease - 0.1
    other.refused()
    clock.now += 0.2
    probe = other.sends()
    late.answered(None)  # it was alive after all, but is not the probe any more
    one.refused()
    probe.answered(None)
    one.sends()


def test_what_was_sent_before_it_opened_changes_nothing_any_more(
    kernels: tuple[Kernel, Kernel], clock: Clock
) -> None:
    one, other = kernels
    early = [other.sends() for _ in range(3)]
    one.fails(FAILURES)
    clock.now += 5
    early[0].answered(None)
    early[1].failed("server")
    early[2].given_up()
    assert one.refused().retry_after == pytest.approx(RESET - 5)


def test_a_refusal_gives_its_permit_back(clock: Clock) -> None:
    limits = _limits(limits={"openai": {"requests_per_minute": FAILURES + 2, "tokens_per_minute": 100}})
    kernel = Kernel(Endpoints(limits, clock=clock).endpoint("openai"))
    waiting = kernel.endpoint.admission(1, None)
    early = [kernel.sends() for _ in range(FAILURES)]
    opening = iter(early)

    def opens_meanwhile(tokens: int, ahead: tuple[int, int]) -> object:
        for admission in opening:
            admission.failed("server")
        return taking(tokens, ahead)

    taking = kernel.endpoint.take
    kernel.endpoint.take = opens_meanwhile  # type: ignore[assignment, method-assign]  # the race, made certain
    with pytest.raises(errors.ProviderUnavailable):
        list(waiting.steps())
    kernel.endpoint.take = taking  # type: ignore[method-assign]  # see above
    clock.now += RESET
    kernel.sends().answered(1)
    kernel.sends().answered(1)
    with pytest.raises(errors.ProviderFailure, match="requests_per_minute"):
        kernel.sends(clock.now + 1)


def test_endpoints_fail_each_for_itself(tmp_path: Path, clock: Clock) -> None:
    endpoints = Endpoints(_limits(), tmp_path / "limits", clock=clock)
    failing = Kernel(endpoints.endpoint("openai", api_base="https://llm.example.org/v1"))
    failing.fails(FAILURES)
    assert "llm.example.org" in failing.refused().message
    Kernel(endpoints.endpoint("openai")).sends()
    Kernel(endpoints.endpoint("openai", api_base="https://llm.example.org:8443/v1")).sends()
    Kernel(endpoints.endpoint("anthropic")).sends()


def test_switched_off_it_never_refuses(clock: Clock) -> None:
    kernel = Kernel(Endpoints(_limits(breaker_failures=0), clock=clock).endpoint("openai"))
    kernel.fails(100)
    kernel.sends()


def test_opening_is_logged_once(kernels: tuple[Kernel, Kernel], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    one, other = kernels
    early = other.sends()
    one.fails(FAILURES)
    one.refused()
    early.failed("server")
    assert [record.message for record in caplog.records] == [
        f"openai failed {FAILURES} times in a row (server): nothing is sent there for {RESET:g} s"
    ]


def test_a_circuit_of_another_boot_is_closed(kernels: tuple[Kernel, Kernel], clock: Clock) -> None:
    one, other = kernels
    one.fails(FAILURES)
    clock.now = 5.0  # the machine was started anew
    other.sends()
    other.fails(FAILURES)
    one.refused()
