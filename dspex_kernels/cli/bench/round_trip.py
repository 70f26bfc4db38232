"""One call after another: how much a transport adds to it."""

from __future__ import annotations

from dspex_kernels.cli.bench import figures, in_process
from dspex_kernels.cli.bench.in_process import DSPY, EXECUTE
from dspex_kernels.cli.bench.measurement import Bar, Bench, Row, Samples
from dspex_kernels.cli.bench.sides import COMMAND, EXECUTE_REQUEST, NOTE, all_sides

ROUND_TRIP = "round trip"
OVER_EXECUTE, OVER_DSPY = f"over {EXECUTE}", f"over {DSPY}"
WARM_UP = 20

_BARS = {(OVER_DSPY, COMMAND): Bar(0.4)}


class RoundTrip:
    """The same prediction in process, by a command, and by ``execute_request``."""

    name = "round_trip"
    title = "Round trip of one call"

    async def run(self, bench: Bench) -> list[Row]:
        """Each side makes some calls, then the next; that, for some rounds."""
        bench.note(in_process.NOTE)
        bench.note(NOTE)
        samples = Samples()
        async with all_sides(bench) as sides:
            for number in range(bench.scale.rounds):
                bench.say(f"round_trip: round {number + 1} of {bench.scale.rounds}")
                took = {}
                for name, side in sides.items():
                    await side.one_by_one(min(WARM_UP, bench.scale.calls))
                    took[name] = [1000 * seconds for seconds in await side.one_by_one(bench.scale.calls)]
                    samples.add(ROUND_TRIP, name, "ms", *took[name])
                _add_overheads(samples, took)
        return samples.rows(against=(EXECUTE_REQUEST,), bars=_BARS)


def _add_overheads(samples: Samples, took: dict[str, list[float]]) -> None:
    """What the sides of a round take more than those in process, by their medians."""
    middle = {name: figures.Spread.of(seconds).median for name, seconds in took.items()}
    for over, base in ((OVER_EXECUTE, EXECUTE), (OVER_DSPY, DSPY)):
        for name in middle:
            if name not in (EXECUTE, DSPY):
                samples.add(over, name, "ms", middle[name] - middle[base])
