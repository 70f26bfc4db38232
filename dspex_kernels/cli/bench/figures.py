"""Samples become figures: medians, spread, ratios. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """How samples lie.

    Attributes:
        count: How many there are.
        low: The smallest.
        quartile_1: A quarter is below it.
        median: Half is.
        quartile_3: Three quarters are.
        p95: Nineteen of twenty are.
        high: The largest.
    """

    count: int
    low: float
    quartile_1: float
    median: float
    quartile_3: float
    p95: float
    high: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        """The spread of samples, of which there is at least one."""
        ascending = sorted(samples)
        return cls(
            count=len(ascending),
            low=ascending[0],
            quartile_1=quantile(ascending, 0.25),
            median=quantile(ascending, 0.5),
            quartile_3=quantile(ascending, 0.75),
            p95=quantile(ascending, 0.95),
            high=ascending[-1],
        )


def quantile(ascending: Sequence[float], share: float) -> float:
    """The value below which this share of sorted samples lies, between two of them by distance."""
    place = share * (len(ascending) - 1)
    below = int(place)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (ascending[above] - ascending[below]) * (place - below)


def medians(rounds: Iterable[Sequence[float]]) -> list[float]:
    """The median of each round that has samples."""
    return [quantile(sorted(samples), 0.5) for samples in rounds if samples]


def flat(rounds: Iterable[Sequence[float]]) -> list[float]:
    """The samples of all rounds."""
    return [sample for samples in rounds for sample in samples]


def ratio(
    rounds: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]], *, more_is_better: bool
) -> Spread | None:
    """How many times as good as a baseline: above 1 is better, whatever the unit.

    Rounds are compared each with its neighbour in time, by their medians; where the two sides have not the same
    rounds, their medians are compared once.

    Args:
        rounds: Samples, round by round.
        baseline: The same of what it is compared with.
        more_is_better: Whether larger samples are the better ones.

    Returns:
        None where there is nothing to compare, or nothing was counted.
    """
    ours, theirs = medians(rounds), medians(baseline)
    if not ours or not theirs:
        return None
    if len(ours) != len(theirs):
        ours, theirs = medians([ours]), medians([theirs])
    pairs = list(zip(ours, theirs, strict=True) if more_is_better else zip(theirs, ours, strict=True))
    if any(0 in pair for pair in pairs):
        return None
    return Spread.of(above / below for above, below in pairs)
