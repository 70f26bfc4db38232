"""Quotas: what passes in a minute, over any window, from any number of kernels, however they end."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from traitlets import TraitError
from traitlets.config import Config

from dspex_kernels import errors
from dspex_kernels.config import ENV_LIMITS_DIR, ENV_PROVIDER_LIMITS, ProviderLimits
from dspex_kernels.kernel.lms import shared
from dspex_kernels.kernel.lms.endpoints import RECHECK, Admission, Endpoint, Endpoints, Pause
from dspex_kernels.kernel.lms.shared import SLOTS, WINDOW, Circuit, Quota, Records

KEY = "sk-test-0123456789abcdef"


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "directory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "limits" if request.param == "directory" else None


def _limits(requests: int | None = None, tokens: int | None = None) -> ProviderLimits:
    quota = {"requests_per_minute": requests, "tokens_per_minute": tokens}
    return ProviderLimits(limits={"openai": {name: n for name, n in quota.items() if n is not None}})


def _endpoint(directory: Path | None, clock: Clock, limits: ProviderLimits, key: str = KEY) -> Endpoint:
    return Endpoints(limits, directory, clock=clock).endpoint("openai", api_key=key)


def _asks(endpoint: Endpoint, tokens: int = 1, deadline: float | None = None) -> Pause | None:
    """What one request meets: nothing, it passed; or its first pause, after which it goes away."""
    with closing(endpoint.admission(tokens, deadline).steps()) as steps:
        return next(steps, None)


def _passing(endpoint: Endpoint, clock: Clock, seconds: float, draw: random.Random) -> Iterator[tuple[float, int]]:
    """Time and tokens of what passes while callers come at random moments with random needs."""
    end = clock.now + seconds
    while clock.now < end:
        tokens = draw.randint(1, 60)
        if _asks(endpoint, tokens) is None:
            yield clock.now, tokens
        clock.now += draw.expovariate(2.0)


@pytest.mark.parametrize("seed", range(3))
def test_no_window_of_a_minute_holds_more_than_the_quota(directory: Path | None, clock: Clock, seed: int) -> None:
    endpoint = _endpoint(directory, clock, _limits(requests=20, tokens=500))
    passed = list(_passing(endpoint, clock, 400.0, random.Random(seed)))
    for start, _ in passed:
        window = [tokens for at, tokens in passed if start <= at < start + WINDOW]
        assert len(window) <= 20
        assert sum(window) <= 500
    # And the quota is used: a limit that lets nothing through would hold as well.
    assert sum(tokens for _, tokens in passed) > 0.7 * 500 * 400 / SLOTS


def test_a_pause_tells_when_there_is_room_again(directory: Path | None, clock: Clock) -> None:
    endpoint = _endpoint(directory, clock, _limits(requests=2))
    assert _asks(endpoint) is None
    clock.now += 30
    assert _asks(endpoint) is None
    with pytest.raises(errors.ProviderFailure) as refusal:
        _asks(endpoint, deadline=clock.now + 20)
    assert refusal.value.retry_after == SLOTS - 30
    clock.now += SLOTS - 30
    assert _asks(endpoint) is None
    assert _asks(endpoint) is not None


def test_a_wait_past_the_deadline_is_refused_at_once_by_name(clock: Clock) -> None:
    endpoint = _endpoint(None, clock, _limits(requests=1))
    assert _asks(endpoint) is None
    with pytest.raises(errors.ProviderFailure) as refusal:
        _asks(endpoint, deadline=clock.now + 30)
    error = refusal.value
    assert (error.code, error.retryable, error.retry_after) == ("rate_limit", True, SLOTS)
    assert error.details["limit"] == "requests_per_minute"
    assert all(name in error.message for name in ("1 requests_per_minute", "openai", "ProviderLimits.limits"))


def test_a_refused_request_uses_nothing_up(clock: Clock) -> None:
    endpoint = _endpoint(None, clock, _limits(requests=1))
    assert _asks(endpoint) is None
    for _ in range(3):
        with pytest.raises(errors.ProviderFailure):
            _asks(endpoint, deadline=clock.now + 1)
        assert _asks(endpoint) is not None
    clock.now += SLOTS
    assert _asks(endpoint) is None


def _admitted(endpoint: Endpoint, tokens: int) -> Admission:
    admission = endpoint.admission(tokens, None)
    assert list(admission.steps()) == []
    return admission


def test_tokens_that_were_not_used_come_back_and_more_are_counted(directory: Path | None, clock: Clock) -> None:
    endpoint = _endpoint(directory, clock, _limits(tokens=100))
    first = _admitted(endpoint, 90)
    assert _asks(endpoint, 20) is not None
    first.answered(10)
    second = _admitted(endpoint, 20)
    second.answered(90)
    assert _asks(endpoint, 1) is not None


@pytest.mark.parametrize("nonsense", [None, 0, -5, 10**15])
def test_a_nonsensical_usage_leaves_the_estimate(clock: Clock, nonsense: int | None) -> None:
    endpoint = _endpoint(None, clock, _limits(tokens=100))
    _admitted(endpoint, 60).answered(nonsense)
    assert _asks(endpoint, 41) is not None
    assert _asks(endpoint, 40) is None


def test_tokens_that_are_told_after_their_minute_are_not_counted(clock: Clock) -> None:
    endpoint = _endpoint(None, clock, _limits(tokens=100))
    slow = _admitted(endpoint, 10)
    clock.now += 2 * SLOTS
    slow.answered(100)
    assert _asks(endpoint, 100) is None


def test_a_request_larger_than_a_minute_waits_for_an_empty_one(clock: Clock) -> None:
    endpoint = _endpoint(None, clock, _limits(tokens=100))
    assert _asks(endpoint, 1) is None
    assert _asks(endpoint, 5000) is not None
    clock.now += SLOTS
    assert _asks(endpoint, 5000) is None


def test_who_waits_in_a_kernel_is_served_in_the_order_of_arrival(clock: Clock) -> None:
    endpoint = _endpoint(None, clock, _limits(requests=2))
    assert [_asks(endpoint), _asks(endpoint)] == [None, None]
    waiting = [endpoint.admission(1, None).steps() for _ in range(4)]
    pauses = [next(steps) for steps in waiting]
    assert [pause.turn is None for pause in pauses] == [True, False, False, False]
    clock.now += SLOTS
    third = waiting[2]
    assert next(third).seconds == RECHECK  # there is room, but it is not its turn
    assert next(waiting[0], None) is None
    turn = pauses[1].turn
    assert turn is not None
    assert turn.done()
    assert next(waiting[1], None) is None
    assert next(third).turn is None  # the first now, and the minute is used up again
    waiting[3].close()
    third.close()


def test_who_gives_the_wait_up_lets_the_next_one_forward(clock: Clock) -> None:
    endpoint = _endpoint(None, clock, _limits(requests=1))
    assert _asks(endpoint) is None
    first, second = (endpoint.admission(1, None).steps() for _ in range(2))
    next(first)
    turn = next(second).turn
    assert turn is not None
    assert not turn.done()
    first.close()
    assert turn.done()
    second.close()


def test_a_place_far_back_in_the_line_is_refused_at_once(clock: Clock) -> None:
    endpoint = _endpoint(None, clock, _limits(requests=1))
    assert _asks(endpoint) is None
    waiting = endpoint.admission(1, None).steps()
    next(waiting)
    with pytest.raises(errors.ProviderFailure) as refusal:
        _asks(endpoint, deadline=clock.now + SLOTS + 30)
    assert refusal.value.retry_after == SLOTS + WINDOW
    waiting.close()


def test_a_providers_own_pause_holds_every_kernel_back(tmp_path: Path, clock: Clock) -> None:
    one, other = (_endpoint(tmp_path, clock, _limits(requests=100)) for _ in range(2))
    one.hold(12.0)
    with pytest.raises(errors.ProviderFailure, match="asked for a pause") as refusal:
        _asks(other, deadline=clock.now + 5)
    assert refusal.value.retry_after == pytest.approx(12.0)
    clock.now += 12.5
    assert _asks(other) is None
    other.hold(10**9)
    clock.now += shared.MAX_RETRY_AFTER
    assert _asks(one) is None


def test_each_key_and_each_host_has_a_quota_of_its_own(directory: Path | None, clock: Clock) -> None:
    quota = {"requests_per_minute": 1}
    limits = ProviderLimits(limits={"openai": quota, "llm.example.org": {"requests_per_minute": 2}, "*": quota})
    endpoints = Endpoints(limits, directory, clock=clock)
    base = "https://llm.example.org/v1"

    def passes(provider: str, **where: Any) -> int:
        endpoint = endpoints.endpoint(provider, **where)
        return [_asks(endpoint) for _ in range(4)].count(None)

    assert passes("openai", api_key=KEY) == 1
    assert passes("openai", api_key="sk-another") == 1
    assert passes("openai", api_key=KEY, api_base=base) == 2
    assert passes("anthropic", api_key=KEY) == 1


@pytest.mark.parametrize(
    "spelling", ["https://LLM.example.org/v2", "https://llm.example.org:443", "https://llm.example.org.:0443/v1"]
)
def test_another_spelling_of_a_host_is_no_other_endpoint(clock: Clock, spelling: str) -> None:
    endpoints = Endpoints(ProviderLimits(limits={"*": {"requests_per_minute": 1}}), clock=clock)
    assert _asks(endpoints.endpoint("openai", api_base="https://llm.example.org/v1", api_key=KEY)) is None
    assert _asks(endpoints.endpoint("openai", api_base=spelling, api_key=KEY)) is not None


def test_a_key_of_the_environment_counts_as_the_key_it_is(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoints = Endpoints(_limits(requests=1), clock=clock)
    assert _asks(endpoints.endpoint("openai")) is None
    assert _asks(endpoints.endpoint("openai", api_key=KEY)) is not None


def test_a_line_of_many_is_passed_whole_at_the_rate_of_the_quota(clock: Clock) -> None:
    endpoint = _endpoint(None, clock, _limits(requests=10))
    waiting = [endpoint.admission(1, clock.now + 1000).steps() for _ in range(35)]
    passed: list[float] = []
    for _ in range(400):
        waiting = [steps for steps in waiting if next(steps, None) is not None or passed.append(clock.now)]
        clock.now += 1
    assert len(passed) == 35
    assert passed == sorted(passed)
    assert [sum(at == then for at in passed) for then in sorted(set(passed))] == [10, 10, 10, 5]


def test_files_tell_nothing_of_endpoint_and_key_and_are_private(tmp_path: Path, clock: Clock) -> None:
    where = tmp_path / "limits"
    endpoints = Endpoints(_limits(requests=1), where, clock=clock)
    assert _asks(endpoints.endpoint("openai", api_base="https://llm.example.org", api_key=KEY)) is None
    admission = endpoints.endpoint("openai", api_key=KEY).admission(1, None)
    assert list(admission.steps()) == []
    admission.failed("server")
    files = list(where.iterdir())
    assert stat.S_IMODE(where.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    told = str(files).encode() + b"".join(file.read_bytes() for file in files)
    assert KEY.encode() not in told
    assert b"example" not in told
    other = Endpoints(_limits(requests=1), tmp_path / "other", clock=clock)
    assert _asks(other.endpoint("openai", api_base="https://llm.example.org", api_key=KEY)) is None
    assert not {file.name for file in files} & {file.name for file in (tmp_path / "other").iterdir()} - {"salt"}


@pytest.mark.parametrize(
    "damage", [b"", b"x", b"nonsense" * 500, None], ids=["empty", "short", "foreign", "one byte turned"]
)
def test_a_torn_or_foreign_record_counts_as_empty(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, damage: bytes | None
) -> None:
    endpoint = _endpoint(tmp_path, clock, _limits(requests=1))
    assert _asks(endpoint) is None
    (file,) = tmp_path.glob("quota-*")
    data = file.read_bytes()
    file.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:] if damage is None else damage)
    assert _asks(endpoint) is None
    assert _asks(endpoint) is not None
    assert ("torn" in caplog.text) == (damage != b"")


def test_a_record_of_another_boot_counts_as_empty(tmp_path: Path, clock: Clock) -> None:
    endpoint = _endpoint(tmp_path, clock, _limits(requests=1))
    endpoint.hold(20.0)
    clock.now += 20
    assert _asks(endpoint) is None
    clock.now = 5.0  # the machine was started anew
    assert _asks(endpoint) is None
    assert _asks(endpoint) is not None


@pytest.mark.parametrize("kind", [Quota, Circuit])
def test_a_record_that_is_packed_is_the_same_again(kind: Any) -> None:
    state = {
        Quota: Quota(7, tuple(range(SLOTS)), tuple(range(SLOTS, 2 * SLOTS)), 3.5),
        Circuit: Circuit((1.0, 2.5), 9.0, 2**63 - 1, 10.0, "server"),
    }[kind]
    assert kind.unpack(state.pack()) == state
    assert len(state.pack()) == len(kind().pack()) == kind.SIZE


def test_records_that_nobody_changed_for_long_are_swept(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "SWEEP_EVERY", 4)
    limits = _limits(requests=1)
    for n in range(3):
        assert _asks(_endpoint(tmp_path, clock, limits, f"key {n}")) is None
    old = list(tmp_path.glob("quota-*"))
    for file in old:
        os.utime(file, (0, 0))
    endpoints = Endpoints(limits, tmp_path, clock=clock)
    for n in range(4):
        assert _asks(endpoints.endpoint("openai", api_key=f"new key {n}")) is None
    assert not any(file.exists() for file in old)
    assert len(list(tmp_path.glob("quota-*"))) == 4
    assert (tmp_path / "salt").exists()


def test_records_in_memory_are_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "MAX_IN_MEMORY", 3)
    records = Records(None, clock=clock)
    counts = [records.record(Quota, str(n)) for n in range(4)]
    for count in counts:
        count.change(lambda state, now: (state.at(now).counted(int(now), requests=1), True))
    kept = [count.change(lambda state, _now: (state, sum(state.requests))) for count in reversed(counts)]
    assert kept == [1, 1, 1, 0]


def test_without_its_directory_requests_go_on_and_it_is_said_once(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    where = tmp_path / "limits"
    endpoint = _endpoint(where, clock, _limits(requests=1))
    (where / "salt").unlink()
    where.rmdir()
    assert [_asks(endpoint) for _ in range(3)] == [None] * 3
    assert caplog.text.count("do not hold") == 1


TAKES_ALL_IT_CAN = """
    import sys
    import time
    from pathlib import Path
    from dspex_kernels.config import ProviderLimits
    from dspex_kernels.kernel.lms.endpoints import Endpoints

    clock = lambda: time.monotonic() * 150  # a simulated minute takes 0.4 s, and is the same in all processes
    limits = ProviderLimits(limits={"openai": {"requests_per_minute": 50}})
    endpoint = Endpoints(limits, Path(sys.argv[1]), clock=clock).endpoint("openai", api_key="k")
    print("ready", flush=True)
    sys.stdin.readline()
    end = clock() + 180
    seconds = []
    while clock() < end:
        taken = endpoint.take(1, (0, 0))
        seconds += [] if taken.second is None else [taken.second]
    print(*seconds, flush=True)
"""

HOLDS_A_LOCK = """
    import sys
    from pathlib import Path
    from dspex_kernels.kernel.lms.shared import Quota, Records

    def held(state, now):
        print("locked", flush=True)
        sys.stdin.readline()
        return state, True

    Records(Path(sys.argv[1])).record(Quota, "openai", "k").change(held)
"""


def _process(code: str, directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_several_processes_together_take_what_one_may_take(tmp_path: Path) -> None:
    processes = [_process(TAKES_ALL_IT_CAN, tmp_path) for _ in range(3)]
    try:
        assert [_line(process) for process in processes] == ["ready"] * 3
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        taken = [int(second) for process in processes for second in _line(process).split()]
        windows = [sum(start <= second <= start + WINDOW for second in taken) for start in taken]
        assert max(windows) == 50
    finally:
        for process in processes:
            _end(process)


def test_a_child_that_is_forked_under_the_lock_does_not_keep_it(tmp_path: Path) -> None:
    count = Records(tmp_path).record(Quota, "openai", "k")
    children: list[int] = []

    def copied(state: Quota, _now: float) -> tuple[Quota, str]:
        # A copied descriptor shares the lock, as a forked child's does.
        children.extend(os.dup(int(fd.name)) for fd in Path("/proc/self/fd").iterdir() if _is_in(fd, tmp_path))
        return state, "changed"

    try:
        assert count.change(copied) == "changed"
        assert children
        assert count.change(lambda state, _now: (state, "changed")) == "changed"
    finally:
        for child in children:
            os.close(child)


def _is_in(fd: Path, directory: Path) -> bool:
    try:
        return fd.readlink().is_relative_to(directory)
    except FileNotFoundError:  # the listing's own
        return False


def test_a_process_that_is_killed_with_the_lock_takes_nothing_along(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    count = Records(tmp_path).record(Quota, "openai", "k")
    holder = _process(HOLDS_A_LOCK, tmp_path)
    try:
        assert _line(holder) == "locked"
        taken = [count.change(lambda state, _now: (state, "changed")) for _ in range(3)]
        assert taken == [None] * 3  # nobody waits for it long, and requests go on without the limit
        assert caplog.text.count("a stopped process") == 1
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert count.change(lambda state, _now: (state, "changed")) == "changed"
    finally:
        _end(holder)


def test_limits_survive_their_way_through_the_environment() -> None:
    limits = ProviderLimits(
        limits={"OpenAI": {"requests_per_minute": 500}, "*": {"tokens_per_minute": 9}}, breaker_failures=0
    )
    again = ProviderLimits.from_json(limits.to_json())
    assert again.trait_values() == limits.trait_values()
    assert again.limits["openai"] == {"requests_per_minute": 500}


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"openai": {"request_per_minute": 5}}, "request_per_minute"),
        ({"openai": {}}, "requests_per_minute or tokens_per_minute"),
        ({"openai": 5}, "requests_per_minute or tokens_per_minute"),
        ({"openai": {"requests_per_minute": 0}}, "whole number from 1"),
        ({"openai": {"requests_per_minute": True}}, "whole number from 1"),
        ({"openai": {"requests_per_minute": 0.5}}, "whole number from 1"),
        ({"openai": {"tokens_per_minute": 10**12}}, "whole number from 1"),
        ({"https://llm.example.org/v1": {"requests_per_minute": 5}}, "no scheme"),
        ({"": {"requests_per_minute": 5}}, "no name of an endpoint"),
    ],
)
def test_limits_that_are_none_are_refused_by_name(limits: Any, told: str) -> None:
    with pytest.raises(TraitError, match=told):
        ProviderLimits(limits=limits)
    with pytest.raises(errors.InvalidLMProfile, match=told):
        Endpoints.from_environment({ENV_PROVIDER_LIMITS: json.dumps({"limits": limits})})


def test_limits_that_are_misspelt_are_refused_wherever_they_come_from() -> None:
    with pytest.raises(ValueError, match="breaker_failure:"):
        ProviderLimits.from_json('{"breaker_failure": 3}')
    with pytest.raises(TraitError, match="breaker_failure:"):
        ProviderLimits(config=Config({"ProviderLimits": {"breaker_failure": 3}}))
    assert ProviderLimits(config=Config({"ProviderLimits": {"breaker_failures": 3}})).breaker_failures == 3


def test_a_directory_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(errors.StoreError, match=ENV_LIMITS_DIR):
        Endpoints.from_environment({ENV_LIMITS_DIR: str(tmp_path / "not there" / "limits")})


def test_a_salt_that_is_none_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "salt").write_bytes(b"short")
    names = {Records(tmp_path).record(Quota, "k").name for _ in range(2)}
    assert len(names) == 1
    assert "no salt" in caplog.text
