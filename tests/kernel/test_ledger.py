"""What is spent and reserved adds up, whoever spends it and however it ends."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from dspex_kernels import errors
from dspex_kernels.kernel.ledger import Estimate, Ledger, Reserved
from dspex_kernels.protocol.records import Budget, ModelSpent, Spent

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def _ledger(**limits: float) -> Ledger:
    return Ledger(Budget.model_validate(limits), of="session 'x'")


def test_a_limit_is_reached_exactly_by_many_threads() -> None:
    ledger = _ledger(lm_calls=100)

    def request(number: int) -> bool:
        try:
            estimate = ledger.reserve(Estimate(10, 0.1))
        except errors.BudgetExceeded:
            return False
        ledger.settle(estimate, "m", USAGE, 0.1, failed=number % 7 == 0)
        return True

    with ThreadPoolExecutor(16) as threads:
        admitted = list(threads.map(request, range(1000)))
    assert sum(admitted) == ledger.spent().lm_calls == 100


def test_nothing_stays_reserved_when_all_are_settled() -> None:
    ledger = _ledger()
    estimates = [ledger.reserve(Estimate(n, n * 0.1)) for n in range(1, 100)]
    assert ledger.reserved().lm_calls == 99
    for number, estimate in enumerate(estimates):
        if number % 3 == 0:
            ledger.release(estimate)
        else:
            ledger.settle(estimate, "m", USAGE, None, failed=number % 3 == 1)
    assert ledger.reserved() == Reserved()


def test_a_refused_request_reserves_nothing() -> None:
    ledger = _ledger(tokens=10)
    with pytest.raises(errors.BudgetExceeded):
        ledger.reserve(Estimate(11, None))
    assert ledger.reserved() == Reserved()


@pytest.mark.parametrize("reported", [-1000, float("inf"), float("nan"), 10**30, "many", True])
def test_a_providers_nonsense_lowers_no_count_and_ends_none(reported: object) -> None:
    ledger = _ledger(tokens=100)
    ledger.settle(ledger.reserve(Estimate(10, None)), "m", USAGE, None)
    ledger.settle(ledger.reserve(Estimate(10, None)), "m", {"total_tokens": reported}, None)
    assert 10 <= ledger.spent().tokens <= 20
    assert ledger.by_model()["m"].total_tokens == 10


def test_one_answer_without_a_price_does_not_forget_the_dollars_before_it() -> None:
    ledger = _ledger(usd=1.0)
    ledger.settle(ledger.reserve(Estimate(10, 0.1)), "m", USAGE, 0.9)
    ledger.settle(ledger.reserve(Estimate(10, 0.05)), "m", USAGE, None)
    assert ledger.cost() is None
    assert ledger.by_model()["m"].cost is None
    assert ledger.spent().usd == pytest.approx(0.95)
    with pytest.raises(errors.BudgetExceeded):
        ledger.reserve(Estimate(10, 0.1))


def test_an_answer_without_usage_counts_as_its_estimate_against_the_budget() -> None:
    ledger = _ledger(tokens=100)
    ledger.settle(ledger.reserve(Estimate(60, None)), "m", {}, None)
    assert ledger.by_model()["m"].total_tokens == 0
    assert ledger.spent().tokens == 60
    with pytest.raises(errors.BudgetExceeded):
        ledger.reserve(Estimate(60, None))


def test_a_failed_request_is_counted_and_costs_nothing() -> None:
    ledger = _ledger()
    ledger.settle(ledger.reserve(Estimate(60, 0.5)), "m", {}, None, failed=True)
    assert ledger.cost() == 0.0
    assert ledger.spent() == Spent(lm_calls=1, models={"m": ModelSpent(lm_calls=1, failed_calls=1)})
    assert ledger.by_model()["m"].failed_calls == 1


def test_what_earlier_kernels_spent_counts_against_the_budget() -> None:
    ledger = _ledger(lm_calls=3)
    earlier = ModelSpent(lm_calls=2, total_tokens=5, usd=0.5)
    ledger.carry_over(Spent(lm_calls=2, tokens=5, usd=0.5, models={"m": earlier}, cache_hits=4))
    ledger.settle(ledger.reserve(Estimate(1, 0.0)), "m", USAGE, 0.0)
    model = ModelSpent(lm_calls=3, prompt_tokens=7, completion_tokens=3, total_tokens=15, usd=0.5)
    assert ledger.spent() == Spent(lm_calls=3, tokens=15, usd=0.5, models={"m": model}, cache_hits=4)
    assert ledger.lm_calls() == 3
    assert ledger.cost() == 0.5
    with pytest.raises(errors.BudgetExceeded):
        ledger.reserve(Estimate(1, 0.0))


@pytest.mark.parametrize("limit", ["lm_calls", "tokens", "usd"])
def test_a_budget_of_zero_forbids_every_request(limit: str) -> None:
    with pytest.raises(errors.BudgetExceeded):
        _ledger(**{limit: 0}).reserve(Estimate(0, 0.0))


def test_a_budget_in_dollars_refuses_an_unknown_price() -> None:
    with pytest.raises(errors.BudgetUnpriced):
        _ledger(usd=1.0).reserve(Estimate(1, None))


@pytest.mark.parametrize("cost", [float("nan"), float("inf"), -5.0])
def test_a_price_that_makes_no_sense_counts_as_unknown(cost: float) -> None:
    ledger = _ledger(usd=10.0)
    ledger.settle(ledger.reserve(Estimate(10, 0.1)), "m", USAGE, cost)
    assert ledger.spent().usd == pytest.approx(0.1), "the estimate stands in"
    assert ledger.cost() is None
