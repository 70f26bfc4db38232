"""What a measurement is: it runs, and gives rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from traitlets.config import Config

from dspex_kernels.cli.bench import figures
from dspex_kernels.cli.bench.figures import Spread

Unit = Literal["ms", "s", "MiB", "%", "", "per s"]
"""Of milliseconds, seconds, MiB and percent fewer are better; of what comes per second, more. "" counts things."""


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure has to reach.

    Attributes:
        limit: The number.
        of: Whether it is the median's, or the median ratio's to what the row is compared with.
        is_least: Whether the figure must not be below it; else it must not be above.
    """

    limit: float
    of: Literal["median", "ratio"] = "median"
    is_least: bool = False

    def is_met(self, figure: float) -> bool:
        return figure >= self.limit if self.is_least else figure <= self.limit


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of one of the things that are compared.

    Attributes:
        what: What was measured.
        way: Of which of them.
        unit: Of the samples.
        rounds: The samples, round by round.
        against: Which of them ``ratio`` compares with; "" is none.
        ratio: How many times as good.
        bar: What was to be reached; None is nothing.
    """

    what: str
    way: str
    unit: Unit
    rounds: Sequence[Sequence[float]]
    against: str = ""
    ratio: Spread | None = None
    bar: Bar | None = None

    @property
    def spread(self) -> Spread:
        return Spread.of(figures.flat(self.rounds))

    @property
    def is_met(self) -> bool | None:
        """Whether the bar was reached; None where there is none, or nothing to tell it by."""
        if self.bar is None:
            return None
        if self.bar.of == "median":
            return self.bar.is_met(self.spread.median)
        return None if self.ratio is None else self.bar.is_met(self.ratio.median)


class Samples:
    """Takes the samples of what is compared, and makes rows of them."""

    def __init__(self) -> None:
        self._rounds: dict[tuple[str, str, Unit], list[list[float]]] = {}

    def add(self, what: str, way: str, unit: Unit, *samples: float) -> None:
        """Another round's samples of one thing."""
        self._rounds.setdefault((what, way, unit), []).append(list(samples))

    def rows(self, *, against: Sequence[str] = (), bars: dict[tuple[str, str], Bar] | None = None) -> list[Row]:
        """The rows, what belongs together in the order it first came.

        Args:
            against: Ways to compare the others with: the first of them that has samples of the same ``what``.
            bars: What is to be reached, by ``what`` and ``way``.
        """
        order = list(dict.fromkeys(what for what, _, _ in self._rounds))
        keys = sorted(self._rounds, key=lambda key: order.index(key[0]))
        return [self._row(*key, against, (bars or {}).get(key[:2])) for key in keys if any(self._rounds[key])]

    def _row(self, what: str, way: str, unit: Unit, against: Sequence[str], bar: Bar | None) -> Row:
        rounds = self._rounds[what, way, unit]
        baseline = next((one for one in against if (what, one, unit) in self._rounds), way)
        if baseline == way:
            return Row(what, way, unit, rounds, bar=bar)
        theirs = self._rounds[what, baseline, unit]
        compared = figures.ratio(rounds, theirs, more_is_better=unit == "per s")
        return Row(what, way, unit, rounds, baseline, compared, bar)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured.

    Attributes:
        rounds: Turns that those compared take.
        starts: Sessions started in one turn.
        settle_s: Pause before each start, for what works in the background to come to rest.
        kernels: Kernels whose memory is read.
        idle_kernels: Kernels whose processor time is read while they idle.
        idle_s: For how long.
        sessions: Sessions that live at once.
        calls: Calls in one turn, one after another.
        seconds: Length of one turn of calls side by side.
        concurrency: How many run side by side.
        pool: Kernels in the pool that is killed.
    """

    rounds: int = 5
    starts: int = 5
    settle_s: float = 1.0
    kernels: int = 5
    idle_kernels: int = 100
    idle_s: float = 30.0
    sessions: int = 100
    calls: int = 200
    seconds: float = 2.0
    concurrency: tuple[int, ...] = (1, 10, 100, 1000)
    pool: int = 10


QUICK = Scale(
    rounds=1,
    starts=1,
    settle_s=0.1,
    kernels=1,
    idle_kernels=1,
    idle_s=0.5,
    sessions=2,
    calls=10,
    seconds=0.2,
    concurrency=(1, 10),
    pool=2,
)
"""A few seconds for each measurement: whether it works, not what comes out."""


@dataclass(frozen=True)
class Bench:
    """What the measurements of one run share.

    Attributes:
        directory: Everything is in it.
        scale: How much is measured.
        settings: The configuration of the services.
        say: Takes a line on how it goes.
        notes: What a reader of the figures has to know; measurements add theirs.
    """

    directory: Path
    scale: Scale
    settings: Config
    say: Callable[[str], None]
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Have a reader told something, once."""
        if text not in self.notes:
            self.notes.append(text)


class Measurement(Protocol):
    """One thing to measure, side by side.

    Attributes:
        name: How ``--only`` calls it.
        title: How the report does.
    """

    name: str
    title: str

    async def run(self, bench: Bench) -> list[Row]:
        """Measure, and leave nothing behind."""
        ...
