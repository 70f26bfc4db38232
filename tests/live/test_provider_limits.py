"""Provider limits, seen from the wire: two kernels of one service share them, and a real HTTP server counts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dspex_kernels.config import ENV_LIMITS_DIR, ENV_PROVIDER_LIMITS, ProviderLimits
from tests.live.kernels import LiveKernel
from tests.lm_server import Answer, Hang, Hold, LMServer, Sequence, Status
from tests.waiting import wait_for

KEY = "sk-test-0123456789abcdef"
RPM = 4
FAILURES = 3
RESET = 1.0


@dataclass(frozen=True)
class Session:
    """A session in one of the kernels."""

    kernel: LiveKernel
    name: dict[str, str]

    def configure(self, server: LMServer, **profile: Any) -> None:
        lm = {"model": "openai/canary-model", "api_base": server.api_base, "api_key": KEY, "cache": False}
        self.kernel.result("configure", {"lm": {**lm, **profile}}, **self.name)
        program = {"id": "qa", "signature": "question -> answer", "replace": True}
        self.kernel.result("create_program", program, **self.name)

    def send(self, **content: Any) -> str:
        args = {"id": "qa", "inputs": {"question": "why?"}}
        return self.kernel.send("execute_program", args, **self.name, **content)

    def reply(self, call: str) -> dict[str, Any]:
        return self.kernel.reply(call)

    def ask(self, **content: Any) -> dict[str, Any]:
        return self.reply(self.send(**content))

    def spent(self) -> int:
        return int(self.kernel.result("get_stats", control=True, **self.name)["lm_calls"])


@contextmanager
def _service(directory: Path, limits: ProviderLimits) -> Iterator[tuple[Session, Session]]:
    """A dedicated and a pooled kernel as a service starts them, with a session in each."""
    shared = {ENV_LIMITS_DIR: str(directory / "limits"), ENV_PROVIDER_LIMITS: limits.to_json()}
    with ExitStack() as kernels:
        dedicated = kernels.enter_context(LiveKernel(env=shared))
        pooled = kernels.enter_context(LiveKernel(env={**shared, "DSPEX_BACKEND": "pooled"}))
        pooled.open_session("session-pooled")
        yield Session(dedicated, {}), Session(pooled, {"session_id": "session-pooled"})


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Session, Session]]:
    """Two kernels with a quota, and without a breaker, for the tests of a module."""
    limits = ProviderLimits(limits={"openai": {"requests_per_minute": RPM}}, breaker_failures=0)
    with _service(tmp_path_factory.mktemp("service"), limits) as sessions:
        yield sessions


def _codes(answers: list[dict[str, Any]]) -> list[str]:
    return sorted(answer["error"]["code"] if answer["status"] == "error" else "ok" for answer in answers)


def test_two_kernels_together_send_no_more_than_the_quota(
    limited: tuple[Session, Session], lm_server: LMServer
) -> None:
    for session in limited:
        session.configure(lm_server)
    before = [session.spent() for session in limited]
    calls = [(session, session.send()) for _ in range(RPM) for session in limited]
    answers = [session.reply(call) for session, call in calls]
    assert _codes(answers) == ["ok"] * RPM + ["rate_limit"] * RPM
    assert len(lm_server.requests) == RPM
    (refusal, *_) = [answer["error"] for answer in answers if answer["status"] == "error"]
    assert refusal["retryable"]
    assert refusal["retry_after"] > 30
    assert all(told in refusal["message"] for told in ("requests_per_minute", "127.0.0.1", "ProviderLimits"))
    # What was not sent is not counted.
    assert sum(session.spent() for session in limited) - sum(before) == RPM


SYNCHRONOUS = """
import dspy
try:
    dspy.Predict("question -> answer")(question="why?")
except BaseException as stopped:
    print(stopped.error.code)
"""

WITHOUT_ASYNC = """
import dspy
from dspex_kernels.errors import CallStopped

class Direct:
    sent = 0

    def complete(self, request):
        Direct.sent += 1
        print(Direct.sent, flush=True)
        raise dspy.LMServerError("the test asked for this error")

lm = dspy.LM("openai/direct", engine=Direct(), num_retries=0, cache=False)
ends = []
for _ in range({tries}):
    try:
        lm("why?")
    except dspy.LMServerError:
        ends.append("server")
    except CallStopped as stopped:
        ends.append(stopped.error.code)
        break
print(ends[-1])
"""


@pytest.mark.parametrize("way", ["command", "stream", "cell"])
def test_every_way_to_the_provider_passes_the_quota(
    limited: tuple[Session, Session], lm_server: LMServer, way: str
) -> None:
    dedicated, pooled = limited
    for session in limited:
        session.configure(lm_server)
    for _ in range(RPM):
        if way == "cell":
            dedicated.kernel.run(SYNCHRONOUS)
        else:
            assert dedicated.ask(stream=way == "stream")["status"] == "ok"
    assert len(lm_server.requests) == RPM
    assert pooled.ask()["error"]["code"] == "rate_limit"
    assert dedicated.ask(stream=way == "stream")["error"]["code"] == "rate_limit"
    assert len(lm_server.requests) == RPM


def test_another_key_has_a_quota_of_its_own(limited: tuple[Session, Session], lm_server: LMServer) -> None:
    dedicated, pooled = limited
    dedicated.configure(lm_server)
    pooled.configure(lm_server, api_key="sk-another-0123456789")
    answers = [session.ask() for _ in range(RPM + 1) for session in limited]
    assert _codes(answers) == ["ok"] * 2 * RPM + ["rate_limit"] * 2
    assert len(lm_server.requests) == 2 * RPM


def test_a_providers_retry_after_holds_both_kernels_back_and_then_they_go_on(
    limited: tuple[Session, Session], lm_server: LMServer
) -> None:
    dedicated, pooled = limited
    for session in limited:
        session.configure(lm_server, max_retries=0)
    pause = 1.5
    lm_server.behaviour = Sequence([Status(429, retry_after=pause), Answer()])
    assert dedicated.ask()["error"]["code"] == "rate_limit"
    held_at = lm_server.requests[0].arrived_at
    assert pooled.ask()["status"] == "ok"
    assert lm_server.requests[1].arrived_at >= held_at + pause


@pytest.mark.parametrize("stream", [False, True])
def test_a_wait_for_the_quota_can_be_cancelled_and_counts_nothing(
    limited: tuple[Session, Session], lm_server: LMServer, stream: bool
) -> None:
    dedicated, pooled = limited
    for session in limited:
        session.configure(lm_server, max_retries=0)
    lm_server.behaviour = Status(429, retry_after=25)
    dedicated.ask()
    before = pooled.spent()
    pooled.kernel.result("configure", {"budget": {"lm_calls": before + 1}}, **pooled.name)
    call = pooled.send(request_id="waits", timeout_s=60.0, stream=stream)

    def told() -> str:
        """What one more call is told at once: it has no time to wait."""
        return str(pooled.ask(timeout_s=5.0)["error"]["code"])

    # The budget's last request is set aside for the one that waits.
    wait_for(lambda: told() == "budget_exceeded", what="the call to wait")
    assert pooled.kernel.result("cancel", {"request_id": "waits"}, control=True, **pooled.name)["cancelled"]
    assert pooled.reply(call)["error"]["code"] == "cancelled"
    assert told() == "rate_limit"
    assert pooled.spent() == before
    assert len(lm_server.requests) == 1
    pooled.kernel.result("configure", {"budget": None}, **pooled.name)


def test_a_stream_that_waited_can_still_be_cancelled(limited: tuple[Session, Session], lm_server: LMServer) -> None:
    dedicated, _ = limited
    dedicated.configure(lm_server, max_retries=0)
    lm_server.behaviour = Sequence([Status(429, retry_after=1.0), Hang(after_events=3)])
    dedicated.ask()
    call = dedicated.send(request_id="streams", stream=True)
    lm_server.wait_for_request(2)
    assert dedicated.kernel.result("cancel", {"request_id": "streams"}, control=True)["cancelled"]
    assert dedicated.reply(call)["error"]["code"] == "cancelled"
    lm_server.wait_for_disconnect(2)


def test_a_wait_in_a_cell_can_be_interrupted(limited: tuple[Session, Session], lm_server: LMServer) -> None:
    dedicated, _ = limited
    dedicated.configure(lm_server, max_retries=0)
    lm_server.behaviour = Status(429, retry_after=25)
    dedicated.ask()
    cell = dedicated.kernel.execute(
        "import dspy; print('asks'); dspy.Predict('question -> answer')(question='and in a cell?')"
    )
    wait_for(lambda: dedicated.kernel.output(cell), what="the cell to ask")
    dedicated.kernel.interrupt()
    assert dedicated.reply(cell)["status"] == "error"
    assert len(lm_server.requests) == 1


def test_an_lm_that_sends_from_its_own_thread_waits_for_the_quota(limited: tuple[Session, Session]) -> None:
    dedicated, _ = limited
    cell = dedicated.kernel.execute(WITHOUT_ASYNC.format(tries=2 * RPM))
    sent = [str(n + 1) for n in range(RPM)]
    wait_for(lambda: dedicated.kernel.output(cell).split() == sent, what="the quota to be used up")
    dedicated.kernel.interrupt()
    assert dedicated.reply(cell)["ename"] == "KeyboardInterrupt"
    assert dedicated.kernel.output(cell).split() == sent


@pytest.fixture
def broken(tmp_path: Path, lm_server: LMServer) -> Iterator[tuple[Session, Session]]:
    """Two kernels whose circuits open after ``FAILURES``, and a provider that has failed as often."""
    limits = ProviderLimits(breaker_failures=FAILURES, breaker_reset=600.0)
    with _service(tmp_path, limits) as sessions:
        for session in sessions:
            session.configure(lm_server)
        lm_server.behaviour = Status(503)
        yield sessions


def test_a_provider_that_fails_gets_no_request_from_either_kernel(
    broken: tuple[Session, Session], lm_server: LMServer
) -> None:
    dedicated, pooled = broken
    # Its retries end with the circuit's opening, and tell what the provider said.
    assert dedicated.ask()["error"]["code"] == "server"
    assert len(lm_server.requests) == FAILURES
    for session in (*broken, *broken):
        for stream in (False, True):
            error = session.ask(stream=stream)["error"]
            assert (error["code"], error["retryable"]) == ("provider_unavailable", True)
            assert 0 < error["retry_after"] <= 600
            assert all(told in error["message"] for told in ("127.0.0.1", f"{FAILURES} times", "server"))
    printed = dedicated.kernel.execute(SYNCHRONOUS)
    assert dedicated.reply(printed)["status"] == "ok"
    assert wait_for(lambda: dedicated.kernel.output(printed), what="the cell's output") == "provider_unavailable\n"
    assert len(lm_server.requests) == FAILURES
    # The offline LM has no provider.
    pooled.kernel.result("configure", {"lm": {"model": "offline/echo"}}, **pooled.name)
    assert pooled.ask()["status"] == "ok"


def test_an_lm_that_sends_from_its_own_thread_passes_the_breaker(broken: tuple[Session, Session]) -> None:
    dedicated, _ = broken
    printed = dedicated.kernel.execute(WITHOUT_ASYNC.format(tries=2 * FAILURES))
    assert dedicated.reply(printed)["status"] == "ok"
    told = wait_for(lambda: "_" in (text := dedicated.kernel.output(printed)) and text, what="the cell's output")
    assert str(told).split() == [*(str(n + 1) for n in range(FAILURES)), "provider_unavailable"]


def test_what_is_not_the_providers_failure_opens_nothing(
    broken: tuple[Session, Session], lm_server: LMServer
) -> None:
    dedicated, pooled = broken
    for status in (401, 400, 429):
        lm_server.behaviour = Status(status)
        for _ in range(FAILURES):
            dedicated.configure(lm_server, max_retries=0)
            dedicated.ask()
    assert len(lm_server.requests) == 3 * FAILURES
    # Nor does a session's own tiny timeout close the provider to others.
    lm_server.behaviour = Hang()
    dedicated.configure(lm_server, max_retries=0, timeout_s=0.1)
    assert [dedicated.ask()["error"]["code"] for _ in range(FAILURES)] == ["transport"] * FAILURES
    lm_server.behaviour = Answer()
    assert pooled.ask()["status"] == "ok"


def test_after_the_reset_one_probe_of_both_kernels_arrives_and_its_answer_closes(
    tmp_path: Path, lm_server: LMServer
) -> None:
    limits = ProviderLimits(breaker_failures=FAILURES, breaker_reset=RESET)
    with _service(tmp_path, limits) as sessions:
        for session in sessions:
            session.configure(lm_server)
        lm_server.behaviour = Status(503)
        sessions[1].ask()
        open_until = time.monotonic() + RESET
        assert len(lm_server.requests) == FAILURES
        hold = Hold()
        lm_server.behaviour = hold
        wait_for(lambda: time.monotonic() > open_until, what="the reset")
        calls = [(session, session.send()) for _ in range(3) for session in sessions]
        lm_server.wait_for_request(FAILURES + 1)
        # The probe is held until all others are refused: they did not wait for it, and sent nothing.
        wait_for(
            lambda: (
                [session.kernel.pump() for session in sessions]
                and sum(bool(session.kernel.replies.get(call)) for session, call in calls) == len(calls) - 1
            ),
            what="all calls but the probe to be answered",
        )
        assert len(lm_server.requests) == FAILURES + 1
        hold.release()
        answers = [session.reply(call) for session, call in calls]
        assert _codes(answers) == ["ok"] + ["provider_unavailable"] * (len(calls) - 1)
        assert [session.ask()["status"] for session in sessions] == ["ok", "ok"]
