"""The benchmark's figures, tables and pictures; what it measures is in ``live``."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dspex_kernels.cli.bench import clock, figures, machine, plots, processes
from dspex_kernels.cli.bench.crowd import in_turns
from dspex_kernels.cli.bench.figures import Spread
from dspex_kernels.cli.bench.measurement import Bar, Row, Samples
from dspex_kernels.cli.bench.report import HEADINGS, Measured, Report, data_of, markdown_of, short, text_of
from tests.waiting import wait_for

ROOT = Path(__file__).parents[1]


class TestFigures:
    @pytest.mark.parametrize(
        ("samples", "share", "value"),
        [([1.0], 0.95, 1.0), ([1.0, 3.0], 0.5, 2.0), ([1.0, 2.0, 3.0], 0.5, 2.0), ([0.0, 10.0], 0.95, 9.5)],
    )
    def test_a_quantile_lies_between_its_neighbours(self, samples, share, value):
        assert figures.quantile(samples, share) == value

    def test_a_spread_sorts_for_itself(self):
        spread = Spread.of([5.0, 1.0, 4.0, 2.0, 3.0])
        assert (spread.count, spread.low, spread.high) == (5, 1.0, 5.0)
        assert (spread.quartile_1, spread.median, spread.quartile_3) == (2.0, 3.0, 4.0)

    @pytest.mark.parametrize(("more_is_better", "median"), [(False, 4.0), (True, 0.25)])
    def test_a_ratio_above_one_is_better_whatever_the_unit(self, more_is_better, median):
        compared = figures.ratio([[2.0], [3.0]], [[8.0], [12.0]], more_is_better=more_is_better)
        assert compared.median == median

    def test_rounds_are_compared_with_their_neighbours_in_time(self):
        # The machine was ten times slower in the second round: for both.
        compared = figures.ratio([[1.0], [10.0]], [[50.0], [500.0]], more_is_better=False)
        assert (compared.low, compared.high, compared.count) == (50.0, 50.0, 2)

    def test_sides_of_unlike_rounds_are_compared_by_their_medians(self):
        compared = figures.ratio([[1.0], [2.0], [3.0]], [[8.0]], more_is_better=False)
        assert (compared.median, compared.count) == (4.0, 1)

    @pytest.mark.parametrize(
        ("ours", "theirs"), [([], [[1.0]]), ([[1.0]], []), ([[1.0]], [[0.0]]), ([[0.0]], [[1.0]])]
    )
    def test_nothing_is_compared_with_nothing(self, ours, theirs):
        assert figures.ratio(ours, theirs, more_is_better=False) is None


class TestSamples:
    def test_rows_of_a_thing_stand_together_and_are_compared_with_the_first_that_is_there(self):
        samples = Samples()
        samples.add("start", "stock", "ms", 100.0)
        samples.add("memory", "ours", "MiB", 5.0)
        samples.add("start", "ours", "ms", 4.0, 5.0, 6.0)
        rows = samples.rows(against=("missing", "stock"), bars={("start", "ours"): Bar(10, "ratio", is_least=True)})
        assert [(row.what, row.way) for row in rows] == [("start", "stock"), ("start", "ours"), ("memory", "ours")]
        stock, ours, memory = rows
        assert (ours.against, ours.ratio.median, ours.is_met) == ("stock", 20.0, True)
        assert (stock.ratio, stock.is_met, memory.ratio) == (None, None, None)

    @pytest.mark.parametrize(
        ("bar", "is_met"),
        [(Bar(3.0), True), (Bar(2.0), False), (Bar(3.0, is_least=True), True), (Bar(4.0, is_least=True), False)],
    )
    def test_a_bar_is_reached_or_not(self, bar, is_met):
        assert Row("what", "way", "ms", [[3.0]], bar=bar).is_met is is_met

    def test_a_ratio_that_is_not_known_reaches_no_bar(self):
        assert Row("what", "way", "ms", [[3.0]], bar=Bar(3.0, "ratio")).is_met is None


class TestTimes:
    def test_calls_side_by_side_are_counted_to_their_end(self):
        running = most = made = 0

        async def call() -> None:
            nonlocal running, most, made
            running, made = running + 1, made + 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1

        rate = asyncio.run(clock.per_second(call, concurrency=5, seconds=0.0))
        assert (most, made, rate > 0) == (5, 5, True)

    def test_calls_one_by_one_give_a_time_each(self):
        took = asyncio.run(clock.one_by_one(lambda: asyncio.sleep(0), 3))
        assert len(took) == 3
        assert all(seconds >= 0 for seconds in took)

    @pytest.mark.parametrize("so", [True, False])
    def test_what_does_not_come_to_be_is_not_waited_for(self, so):
        assert asyncio.run(clock.until(lambda: so, timeout=0.0)) is so

    def test_results_keep_the_order_of_the_work(self):
        async def work(number: int) -> int:
            for _ in range(10 - number):
                await asyncio.sleep(0)
            return number

        done = asyncio.run(in_turns([lambda n=n: work(n) for n in range(10)], workers=4))
        assert done == list(range(10))


class TestProcesses:
    def test_a_process_is_weighed_and_its_computing_counted(self):
        weight = processes.weigh(os.getpid())
        assert 0 < weight.uss <= weight.pss
        assert weight.descriptors > 2
        assert weight.threads >= 1
        before = processes.computed_ns([os.getpid()])
        # Linux counts up to the last tick or switch: polling computes until it has come.
        wait_for(lambda: processes.computed_ns([os.getpid()]) > before, what="computing that counts")

    def test_descendants_are_found_and_seen_to_end(self):
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            process = processes.identify(child.pid)
            assert process in processes.descendants(os.getpid())
            assert process.lives()
            child.communicate(b"\n", timeout=60)
        assert not process.lives()

    def test_processors_are_kept_awake_by_processes_that_give_way_to_all_others_and_end(self):
        before = processes.descendants(os.getpid())
        with machine.awake():
            spinning = processes.descendants(os.getpid()) - before
            assert len(spinning) == len(os.sched_getaffinity(0))
            wait_for(lambda: all(os.sched_getscheduler(one.pid) == os.SCHED_IDLE for one in spinning))
        assert not any(process.lives() for process in spinning)


def report_of(*rows: Row, failure: str = "") -> Report:
    measured = [Measured("starts", "Start", rows, 1.5, failure)]
    return Report("dspex-kernels bench", "2026-01-01T00:00:00+00:00", {"cores": "2"}, measured, ["a note"])


SLOW = Row("start", "stock", "ms", [[100.0, 110.0], [120.0]])
FAST = Row("start", "ours", "ms", [[1.0], [2.0]], "stock", Spread.of([100.0]), Bar(40, "ratio", is_least=True))


class TestTheReport:
    def test_a_table_tells_medians_ratios_and_what_was_wanted(self):
        text = text_of(report_of(SLOW, FAST))
        assert "2 cores" in text
        assert "1.50 ms" in text
        assert "100 × stock  ≥ 40 ×: yes" in text
        assert "- wanted: 1 of 1 reached." in text
        assert "- a note" in text

    def test_markdown_has_a_cell_for_each_heading(self):
        rows = [line for line in markdown_of(report_of(SLOW, FAST)).splitlines() if line.startswith("|")]
        assert len(rows) == 4
        assert {line.count("|") for line in rows} == {len(HEADINGS) + 1}

    def test_json_holds_every_sample(self):
        data = json.loads(json.dumps(data_of(report_of(SLOW, FAST))))
        [measurement] = data["measurements"]
        assert measurement["rows"][0]["rounds"] == [[100.0, 110.0], [120.0]]
        assert measurement["rows"][1]["ratio"]["median"] == 100.0
        assert measurement["rows"][1]["is_met"] is True

    @pytest.mark.parametrize("tell", [text_of, markdown_of])
    def test_a_measurement_that_failed_says_why(self, tell):
        assert "ailed: kernel_died: gone" in tell(report_of(failure="kernel_died: gone"))

    @pytest.mark.parametrize(
        ("number", "text"),
        [
            (0.0, "0"),
            (3, "3"),
            (1234.5, "1234"),
            (12.34, "12.3"),
            (1.234, "1.23"),
            (0.0123, "0.012"),
            (-2.5, "-2.50"),
        ],
    )
    def test_numbers_are_short(self, number, text):
        assert short(number) == text


class TestPictures:
    @pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is optional")
    def test_each_measurement_with_figures_is_drawn(self, tmp_path):
        # In a process of its own: matplotlib keeps its fonts open.
        code = (
            "import sys\nfrom pathlib import Path\nfrom dspex_kernels.cli.bench import plots\n"
            "from tests.test_bench import FAST, SLOW, Measured, report_of\n"
            "report = report_of(SLOW, FAST)\n"
            "report.measured.append(Measured('memory', 'Memory', [], 1.0, 'failed'))\n"
            "print([path.name for path in plots.draw(report, Path(sys.argv[1]))])"
        )
        directory = tmp_path / "new"
        done = subprocess.run(
            [sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True, cwd=ROOT
        )
        assert done.stdout == "['starts.svg']\n"
        assert (directory / "starts.svg").read_text().startswith("<?xml")

    def test_without_matplotlib_the_remedy_is_told(self, tmp_path, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(plots.errors.DependencyMissing, match=r"pip install .dspex-kernels\[bench\]"):
            plots.draw(report_of(SLOW), tmp_path / "new")
        assert not Path(tmp_path / "new").exists()
