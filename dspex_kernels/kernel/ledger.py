"""What a session or a call has spent on language models, and the limits it may not pass."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from dspex_kernels import errors
from dspex_kernels.protocol import limits
from dspex_kernels.protocol.commands import LMUsage
from dspex_kernels.protocol.records import Budget, ModelSpent, Spent

MAX_TOKENS = 10**12
"""A count of tokens that a provider may report; more is nonsense."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one request is expected to use, before it is sent.

    Attributes:
        tokens: Prompt tokens, and the completion's where its length is limited.
        usd: Their price; None when the model's price is unknown.
    """

    tokens: int
    usd: float | None


class Reserved(NamedTuple):
    """What requests that are on their way may use."""

    lm_calls: int = 0
    tokens: int = 0
    usd: float = 0.0


OTHER_MODELS = "(others)"
"""Under which name the statistics tell of models beyond ``limits.MAX_MODELS``."""


@dataclass(slots=True)
class _ModelTotals:
    lm_calls: int = 0
    failed_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    usd: float = 0.0
    unpriced: bool = False


class Ledger:
    """Counts requests, tokens and dollars against a budget. Thread-safe.

    A request is reserved before it is sent and settled after: concurrent requests cannot pass the limit on
    ``lm_calls`` together, and pass one on tokens or dollars by no more than what the running answers exceed
    their estimates.

    Args:
        budget: The limits.
        of: Whose budget, for messages: "session 'x'".
    """

    def __init__(self, budget: Budget, *, of: str) -> None:
        self.budget = budget
        self._of = of
        self._lock = threading.Lock()
        self._models: dict[str, _ModelTotals] = {}
        self._lm_calls = 0
        self._tokens = 0
        self._usd = 0.0
        self._reserved = Reserved()
        self.cache_hits = 0
        self.moved: Callable[[], None] = _nobody
        """Called when more was spent, from any thread. Set by who writes it down."""

    def carry_over(self, spent: Spent) -> None:
        """Take over what was spent before this kernel was there: it counts, and counts against the budget."""
        self._lm_calls, self._tokens, self._usd = spent.lm_calls, spent.tokens, spent.usd
        self._models = {model: _ModelTotals(**dict(totals)) for model, totals in spent.models.items()}
        self.cache_hits = spent.cache_hits

    def reserve(self, estimate: Estimate) -> Estimate:
        """Set aside what a request may use.

        Raises:
            BudgetExceeded: It would pass a limit; nothing is set aside.
            BudgetUnpriced: There is a limit in dollars and the model's price is unknown.
        """
        with self._lock:
            held = self._reserved
            self._refuse_over("lm_calls", self.budget.lm_calls, self._lm_calls + held.lm_calls, 1)
            self._refuse_over("tokens", self.budget.tokens, self._tokens + held.tokens, estimate.tokens)
            if self.budget.usd is not None and estimate.usd is None:
                raise errors.BudgetUnpriced(
                    f"the budget of {self._of} is in US dollars and the price of this model is unknown: "
                    "limit tokens or lm_calls instead",
                    details={"limit": "usd"},
                )
            usd = estimate.usd or 0.0
            self._refuse_over("usd", self.budget.usd, self._usd + held.usd, usd)
            self._reserved = Reserved(held.lm_calls + 1, held.tokens + estimate.tokens, held.usd + usd)
            return estimate

    def release(self, estimate: Estimate) -> None:
        """Give back a reservation whose request was never sent."""
        with self._lock:
            self._release(estimate)

    def settle(
        self, estimate: Estimate, model: str, usage: dict[str, Any], cost: float | None, *, failed: bool = False
    ) -> None:
        """Count one request that was sent, in the place of its reservation.

        Args:
            estimate: What was reserved for it.
            model: The model string.
            usage: ``prompt_tokens``, ``completion_tokens``, ``total_tokens`` as far as reported.
            cost: USD; None when unknown, which makes the model's total unknown.
            failed: It ended in an error; what it used is unknown and counted as nothing.
        """
        if cost is not None and not 0 <= cost < math.inf:
            cost = None  # a provider's nonsense must not lower what was spent, nor stop the count
        with self._lock:
            # In one step: between the two a request of another thread would find neither.
            self._release(estimate)
            totals = self._totals_of(model)
            self._lm_calls += 1
            totals.lm_calls += 1
            totals.failed_calls += failed
            prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
            totals.prompt_tokens += prompt
            totals.completion_tokens += completion
            total = _count(usage, "total_tokens") or prompt + completion
            totals.total_tokens += total
            self._tokens += total
            usd = cost or 0.0
            if not failed:
                # A provider that reports nothing must not be free of the budget: the estimate stands in.
                self._tokens += estimate.tokens if not total else 0
                if cost is None:
                    totals.unpriced = True
                    usd = estimate.usd or 0.0
            totals.usd += usd
            self._usd += usd
        self.moved()

    def record_cache_hit(self) -> None:
        """Count an answer that came from the cache: no request was sent."""
        with self._lock:
            self.cache_hits += 1
        self.moved()

    def reserved(self) -> Reserved:
        """What is set aside now."""
        with self._lock:
            return self._reserved

    def spent(self) -> Spent:
        """All that was used, earlier kernels of the session included; estimated where it was not reported."""
        with self._lock:
            return self._spent()

    def by_model(self) -> dict[str, LMUsage]:
        """What went to each model."""
        with self._lock:
            return {
                model: LMUsage(
                    lm_calls=t.lm_calls,
                    failed_calls=t.failed_calls,
                    prompt_tokens=t.prompt_tokens,
                    completion_tokens=t.completion_tokens,
                    total_tokens=t.total_tokens,
                    cost=None if t.unpriced else t.usd,
                )
                for model, t in self._models.items()
            }

    def cost(self) -> float | None:
        """USD; None once a request of unknown price was answered."""
        with self._lock:
            totals = list(self._models.values())
            return None if any(t.unpriced for t in totals) else sum(t.usd for t in totals)

    def lm_calls(self) -> int:
        """Requests sent, failed ones and retries included."""
        with self._lock:
            return self._lm_calls

    def _totals_of(self, model: str) -> _ModelTotals:
        if model not in self._models and len(self._models) >= limits.MAX_MODELS:
            model = OTHER_MODELS
        return self._models.setdefault(model, _ModelTotals())

    def _spent(self) -> Spent:
        return Spent(
            lm_calls=self._lm_calls,
            tokens=self._tokens,
            usd=self._usd,
            models={model: ModelSpent(**_fields(totals)) for model, totals in self._models.items()},
            cache_hits=self.cache_hits,
        )

    def _release(self, estimate: Estimate) -> None:
        held = self._reserved
        left = held.lm_calls - 1
        # The last one takes all: sums of floats do not come back to zero.
        usd = max(0.0, held.usd - (estimate.usd or 0.0)) if left else 0.0
        self._reserved = Reserved(left, held.tokens - estimate.tokens, usd)

    def _refuse_over(self, what: str, limit: float | None, used: float, more: float) -> None:
        # A limit that is reached exactly is spent: a budget of 0 forbids every request.
        if limit is None or (used + more <= limit and limit > 0):
            return
        raise errors.BudgetExceeded(
            f"the {what} budget of {self._of} is used up: {used:g} of {limit:g} spent or reserved, the next "
            f"request needs about {more:g}; raise the budget with configure",
            details={"limit": what, "budget": limit, "used": used, "needed": more},
        )


def _fields(totals: _ModelTotals) -> dict[str, Any]:
    return {name: getattr(totals, name) for name in _ModelTotals.__slots__}


def _nobody() -> None:
    """Stands where nobody writes down what is spent."""


def _count(usage: dict[str, Any], key: str) -> int:
    value = usage.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < MAX_TOKENS:
        return 0  # a provider's nonsense must not lower what was spent, nor stop the count
    return int(value)
