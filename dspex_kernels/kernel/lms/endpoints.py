"""Endpoints of providers: how a request passes the quota and the circuit that all kernels share for each.

An endpoint is a provider's own address, or the host that an ``api_base`` names. A quota counts what goes there with
one key; a circuit is open while the endpoint fails and nothing is sent. What they say is decided on the records
that the kernels share (``shared``); waiting happens here. Who waits in one kernel is served in the order of
arrival; between kernels chance decides.

An event loop and a thread wait differently, and differ in nothing else: an admission is a generator of pauses.
"""

from __future__ import annotations

import functools
import os
import random
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self
from weakref import WeakValueDictionary

from traitlets import TraitError

from dspex_kernels import config, errors, logs
from dspex_kernels.config import ProviderLimits, host_of
from dspex_kernels.kernel.ledger import MAX_TOKENS
from dspex_kernels.kernel.lms.shared import MAX_RETRY_AFTER, Circuit, Quota, Record, Records

log = logs.get_logger(__name__)

MAX_WAIT = 300.0
"""Longest wait for a quota, in seconds, of a request without a deadline: a cell's."""
MAX_PROBE = 120.0
"""Seconds after which a probe whose kernel was killed stands in nobody's way; a call's deadline may come before."""
RECHECK = 5.0
"""Longest sleep of who waits for a quota, in seconds: tokens that were not used come back before their time."""
JITTER = 0.1
"""Kernels that wait for the same moment come apart by up to so many seconds."""


class Pause(NamedTuple):
    """What a request waits for before it asks its quota again.

    Attributes:
        seconds: At most so long.
        turn: Done as soon as those before it in this kernel are through.
    """

    seconds: float
    turn: Future[None] | None


class Taken(NamedTuple):
    """What a quota says to a request.

    Attributes:
        second: In which it is counted; None when it does not fit yet.
        wait: Seconds until it fits at the earliest.
        limit: Which limit says so.
    """

    second: int | None
    wait: float
    limit: str


@dataclass(slots=True, eq=False)
class _Place:
    tokens: int
    turn: Future[None]


class _Line:
    """Who waits for one quota in this kernel, in the order of arrival. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: deque[_Place] = deque()

    @contextmanager
    def joined(self, tokens: int) -> Iterator[_Place]:
        place = _Place(tokens, Future())
        with self._lock:
            self._places.append(place)
            self._call_first()
        try:
            yield place
        finally:
            with self._lock:
                self._places.remove(place)
                self._call_first()

    def before(self, place: _Place) -> tuple[int, int]:
        """Requests and tokens that are waited for before it."""
        with self._lock:
            tokens = [other.tokens for other in self._places]
            ahead = self._places.index(place)
        return ahead, sum(tokens[:ahead])

    def _call_first(self) -> None:
        if self._places and not self._places[0].turn.done():
            self._places[0].turn.set_result(None)


class Endpoint:
    """Where one request goes, with which key; made by ``Endpoints.endpoint``."""

    def __init__(
        self,
        name: str,
        *,
        limited_as: str,
        quota: Mapping[str, int],
        limits: ProviderLimits,
        counts: Record[Quota],
        circuit: Record[Circuit],
        line: _Line,
        clock: Callable[[], float],
    ) -> None:
        self.name = name
        self.limits = limits
        self.quota = quota
        self.line = line
        self.clock = clock
        self._limited_as = limited_as
        self._counts = counts
        self._circuit = circuit

    def admission(self, tokens: int, deadline: float | None) -> Admission:
        """A request's admission, not yet given.

        Args:
            tokens: About how many it will use.
            deadline: On the monotonic clock; None waits ``MAX_WAIT`` at most.
        """
        return Admission(self, tokens, deadline)

    def refusal(self) -> errors.ProviderUnavailable | None:
        """Why nothing may be sent now; None when something may."""
        if not self.limits.breaker_failures:
            return None

        def looked(state: Circuit, now: float) -> tuple[Circuit, errors.ProviderUnavailable | None]:
            state = state.at(now, self.limits)
            return state, self._unavailable(state, state.refusal(now))

        return self._circuit.change(looked)

    def hold(self, seconds: float) -> None:
        """Send nothing with this key for a while, from no kernel: its provider asked for that."""
        if not self.quota:
            return

        def held(state: Quota, now: float) -> tuple[Quota, bool]:
            return state.at(now).held(now + min(seconds, MAX_RETRY_AFTER)), True

        self._counts.change(held)

    def take(self, tokens: int, ahead: tuple[int, int]) -> Taken | None:
        """Count a request, if it fits and nobody is before it.

        Args:
            tokens: Its tokens.
            ahead: Requests and tokens before it in this kernel's line.

        Returns:
            None when the quota cannot be had: it does not hold then, and that was logged.
        """

        def taken(state: Quota, now: float) -> tuple[Quota, Taken]:
            state = state.at(now)
            wait, what = state.wait(now, self.quota, 1 + ahead[0], tokens + ahead[1])
            if wait > 0 or ahead[0]:
                return state, Taken(None, wait, what)
            return state.counted(state.newest, requests=1, tokens=tokens), Taken(state.newest, 0.0, "")

        return self._counts.change(taken)

    def correct(self, second: int, *, requests: int = 0, tokens: int = 0) -> None:
        """Count so much more, or less, in a second in which a request was taken."""

        def corrected(state: Quota, now: float) -> tuple[Quota, bool]:
            return state.at(now).counted(second, requests=requests, tokens=tokens), True

        self._counts.change(corrected)

    def enter(self, probe: int, until: float) -> int:
        """Pass the circuit.

        Args:
            probe: The number under which the request may try whether the endpoint is back.
            until: When such a probe stands in nobody's way any more; on the monotonic clock.

        Returns:
            ``probe`` when it is one, else 0.

        Raises:
            ProviderUnavailable: The circuit is open.
        """
        if not self.limits.breaker_failures:
            return 0

        def entered(state: Circuit, now: float) -> tuple[Circuit, int | errors.ProviderUnavailable]:
            state = state.at(now, self.limits)
            refusal = self._unavailable(state, state.refusal(now))
            if refusal is not None or not state.open_until:
                return state, refusal or 0
            return state.probed(probe, until), probe

        result = self._circuit.change(entered)
        if isinstance(result, errors.ProviderUnavailable):
            raise result
        return result or 0

    def report(self, change: Callable[[Circuit, float], Circuit]) -> None:
        """Change the circuit by how a request ended."""
        if not self.limits.breaker_failures:
            return

        def reported(state: Circuit, now: float) -> tuple[Circuit, tuple[bool, Circuit]]:
            before = state.at(now, self.limits)
            after = change(before, now)
            return after, (after.open_until > before.open_until, after)

        opened, state = self._circuit.change(reported) or (False, Circuit())
        if opened:
            log.warning(
                "%s failed %d times in a row (%s): nothing is sent there for %g s",
                *(self.name, len(state.failures), state.reason, self.limits.breaker_reset),
            )

    def too_late(self, seconds: float, what: str) -> errors.ProviderFailure:
        """The error of a request that its quota leaves no room for in time."""
        if what == "retry-after":
            said = f"{self.name} asked for a pause"
        else:
            said = (
                f"the {self.quota[what]} {what} of {self.name} are used up "
                f"(ProviderLimits.limits[{self._limited_as!r}])"
            )
        return errors.ProviderFailure(
            f"{said}: the next request fits in {seconds:.1f} s at the earliest, later than the call can wait: "
            "try again then, or give a larger timeout",
            code="rate_limit",
            retryable=True,
            details={"endpoint": self.name, "limit": what, "limited_as": self._limited_as},
            retry_after=seconds,
        )

    def _unavailable(self, circuit: Circuit, seconds: float | None) -> errors.ProviderUnavailable | None:
        if seconds is None:
            return None
        failures = len(circuit.failures)
        return errors.ProviderUnavailable(
            f"{self.name} failed {failures} times in a row, the last time with {circuit.reason!r}: nothing is sent "
            f"there for {seconds:.1f} s; try again then, or configure another lm",
            details={"endpoint": self.name, "failures": failures, "last_error": circuit.reason},
            retry_after=seconds,
        )


class Admission:
    """One request's way past its endpoint's quota and circuit: asked for, given, and told how the request ended."""

    def __init__(self, endpoint: Endpoint, tokens: int, deadline: float | None) -> None:
        self._endpoint = endpoint
        # More than a minute's tokens fit beside no others: such a request waits for an empty window.
        self._tokens = min(tokens, endpoint.quota.get("tokens_per_minute", tokens))
        self._deadline = deadline
        self._second: int | None = None
        self._probe = 0

    def steps(self) -> Generator[Pause, None, None]:
        """Ask until it is given; wait for the pause between two steps. Close it when the wait is given up.

        Raises:
            ProviderUnavailable: The circuit is open.
            ProviderFailure: ``rate_limit``: the quota leaves no room before the deadline.
        """
        endpoint = self._endpoint
        if endpoint.quota:
            if (refusal := endpoint.refusal()) is not None:
                raise refusal
            yield from self._quota_steps()
        lease = MAX_PROBE if self._deadline is None else min(MAX_PROBE, self._deadline - endpoint.clock())
        try:
            # After the wait, for it may have opened meanwhile: a probe is on its way as soon as it is counted.
            self._probe = endpoint.enter(secrets.randbits(63) | 1, endpoint.clock() + lease)
        except errors.ProviderUnavailable:
            self._correct(requests=-1, tokens=-self._tokens)
            raise

    def _quota_steps(self) -> Generator[Pause, None, None]:
        endpoint = self._endpoint
        deadline = endpoint.clock() + MAX_WAIT if self._deadline is None else self._deadline
        with endpoint.line.joined(self._tokens) as place:
            while (taken := endpoint.take(self._tokens, endpoint.line.before(place))) is not None:
                self._second = taken.second
                if taken.second is not None:
                    return
                if endpoint.clock() + taken.wait >= deadline:
                    raise endpoint.too_late(taken.wait, taken.limit)
                if not place.turn.done():
                    yield Pause(RECHECK, place.turn)
                else:
                    jitter = JITTER * random.random()  # noqa: S311  # not a secret
                    yield Pause(min(taken.wait + jitter, RECHECK), None)

    def answered(self, tokens: int | None) -> None:
        """The endpoint answered, be it with a refusal.

        Args:
            tokens: What the request used; None is unknown, for which the estimate stands in.
        """
        if tokens is not None and 0 < tokens < MAX_TOKENS:
            self._correct(tokens=tokens - self._tokens)
        self._endpoint.report(lambda state, _now: state.answered(self._probe))

    def failed(self, reason: str) -> None:
        """The endpoint could not be reached, did not answer in time, or answered that it failed."""
        limits = self._endpoint.limits
        self._endpoint.report(lambda state, now: state.failed(now, self._probe, reason, limits))

    def given_up(self) -> None:
        """It ended in a way that says nothing of the endpoint."""
        if self._probe:
            self._endpoint.report(lambda state, _now: state.given_up(self._probe))

    def _correct(self, *, requests: int = 0, tokens: int = 0) -> None:
        if self._second is not None and (requests or tokens):
            self._endpoint.correct(self._second, requests=requests, tokens=tokens)


@functools.cache  # a kernel that stands by reads ahead what it will be told
def read_limits(text: str) -> ProviderLimits:
    """The limits that a service told.

    Raises:
        ValueError, TraitError: They are none.
    """
    return ProviderLimits.from_json(text)


class Endpoints:
    """The endpoints that a kernel sends to.

    Args:
        limits: Their quotas, and when their circuits open.
        directory: Shared by the kernels of a service; None holds the limits within this process.
        clock: ``time.monotonic``, which all processes of one boot share.

    Raises:
        OSError: The directory cannot be used.
    """

    def __init__(
        self,
        limits: ProviderLimits,
        directory: Path | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._records = Records(directory, clock=clock)
        self._clock = clock
        self._lock = threading.Lock()
        self._lines: WeakValueDictionary[str, _Line] = WeakValueDictionary()

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Self:
        """As the service told it to its kernels (``DSPEX_PROVIDER_LIMITS``, ``DSPEX_LIMITS_DIR``).

        Args:
            environ: None is the process's own.

        Raises:
            InvalidLMProfile: The limits are none.
            StoreError: The directory cannot be used.
        """
        variables = os.environ if environ is None else environ
        directory = variables.get(config.ENV_LIMITS_DIR)
        try:
            limits = read_limits(variables.get(config.ENV_PROVIDER_LIMITS) or "{}")
            return cls(limits, Path(directory) if directory else None)
        except (ValueError, TypeError, TraitError) as failure:
            raise errors.InvalidLMProfile(
                f"{config.ENV_PROVIDER_LIMITS} holds no provider limits ({failure}): give what "
                "ProviderLimits.to_json writes"
            ) from failure
        except OSError as failure:
            raise errors.StoreError(
                f"{config.ENV_LIMITS_DIR}={directory!r} cannot be used: {failure.strerror}; make it writable"
            ) from failure

    def endpoint(self, provider: str, *, api_base: str | None = None, api_key: str | None = None) -> Endpoint:
        """Where a request goes.

        Args:
            provider: The model string's first part.
            api_base: Another endpoint than the provider's own; None is the provider's own.
            api_key: None or "" is the one in the provider's variable (``OPENAI_API_KEY``), if there is one.
        """
        host = _address(api_base)
        limited_as, quota = self._limits.quota_of(host, provider)
        where = host or provider.lower()
        key = api_key or os.environ.get(f"{provider.upper()}_API_KEY") or ""
        counts = self._records.record(Quota, where, key)
        with self._lock:
            line = self._lines.get(counts.name) or self._lines.setdefault(counts.name, _Line())
        return Endpoint(
            host_of(api_base) or provider,
            limited_as=limited_as,
            quota=quota,
            limits=self._limits,
            counts=counts,
            circuit=self._records.record(Circuit, where),
            line=line,
            clock=self._clock,
        )


def _address(api_base: str | None) -> str:
    """Host and port of a URL, written in one way: another spelling must not be another endpoint."""
    host = host_of(api_base)
    if not host:
        return ""
    if not re.search(r":[0-9]+$", host):
        host += ":443" if api_base and api_base.lower().startswith("https") else ":80"
    name, _, port = host.rpartition(":")
    return f"{name.rstrip('.')}:{int(port)}"
