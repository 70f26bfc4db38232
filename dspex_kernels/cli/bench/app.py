"""The subcommand: chooses what is measured, runs it, and tells what came out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from traitlets import Bool, Integer, Unicode

from dspex_kernels import errors
from dspex_kernels.cli.base import (
    BASE_ALIASES,
    BASE_FLAGS,
    EXIT_FAILED,
    EXIT_SOME_FAILED,
    Subcommand,
    say,
    tell,
)
from dspex_kernels.cli.bench import machine, plots, report
from dspex_kernels.cli.bench.backends import Backends
from dspex_kernels.cli.bench.crowd import Crowd
from dspex_kernels.cli.bench.measurement import QUICK, Bench, Measurement, Scale
from dspex_kernels.cli.bench.memory import Memory
from dspex_kernels.cli.bench.refill import Refill
from dspex_kernels.cli.bench.report import Measured, Report
from dspex_kernels.cli.bench.round_trip import RoundTrip
from dspex_kernels.cli.bench.starts import Starts
from dspex_kernels.cli.bench.throughput import Throughput

MEASUREMENTS: tuple[Measurement, ...] = (
    Starts(),
    Memory(),
    RoundTrip(),
    Throughput(),
    Backends(),
    Refill(),
    Crowd(),  # last: a thousand kernels leave a machine's memory colder than they found it
)

_NAMES = ", ".join(measurement.name for measurement in MEASUREMENTS)


class BenchApp(Subcommand):
    name = "jupyter-dspex-bench"
    usage = "bench [--only=NAME,…] [--quick] [--awake] [--sessions=N] [--markdown] [--json=FILE] [--plots=DIR]"
    description = (
        "Measure this installation on this machine: sessions against a stock kernel with DSPy, dedicated against "
        "pooled, commands against execute_request and against DSPy in process; each side by side, in turns. Needs "
        f"no network and no key. The measurements: {_NAMES}."
    )
    examples = """
    dspex-kernels bench                                    # everything: about twenty minutes on two cores
    dspex-kernels bench --only=starts,round_trip
    dspex-kernels bench --only=crowd --sessions=1000       # a thousand sessions at once
    dspex-kernels bench --json=bench.json --plots=plots    # every sample, and pictures
    dspex-kernels bench --quick                            # whether it works, not what comes out
    """
    flags = BASE_FLAGS | {
        "quick": ({"BenchApp": {"quick": True}}, "A few seconds for each measurement: whether it works."),
        "markdown": ({"BenchApp": {"markdown": True}}, "The tables in Markdown."),
        "awake": ({"BenchApp": {"awake": True}}, "Keep the processors from halting meanwhile."),
    }
    aliases = BASE_ALIASES | {
        "only": "BenchApp.only",
        "sessions": "BenchApp.sessions",
        "rounds": "BenchApp.rounds",
        "json": "BenchApp.json",
        "plots": "BenchApp.plots",
    }

    only = Unicode("", help="Measurements to run, with commas between them; all by default.").tag(config=True)
    quick = Bool(False, help="A few seconds for each measurement: whether it works.").tag(config=True)
    awake = Bool(
        False,
        help="Keep the processors from halting meanwhile (Linux): to wake one takes long on a virtual machine, and "
        "is measured else.",
    ).tag(config=True)
    sessions = Integer(0, min=0, help="Sessions that live at once; 0 is 100, or 2 with --quick.").tag(config=True)
    rounds = Integer(0, min=0, help="Turns that those compared take; 0 is 5, or 1 with --quick.").tag(config=True)
    markdown = Bool(False, help="The tables in Markdown.").tag(config=True)
    json = Unicode("", help="A file for everything, each sample too.").tag(config=True)
    plots = Unicode("", help="A directory for pictures; needs matplotlib.").tag(config=True)

    async def run(self) -> int:
        """Measure, tell, and fail if a measurement did."""
        if self.extra_args:
            self.fail_usage(f"bench takes no argument {self.extra_args[0]!r}: see --help")
        chosen = self._chosen()
        if self.plots:
            plots.check_available()
        done = Report(self._command(), datetime.now(UTC).isoformat(timespec="seconds"), machine.describe())
        # A short path: an ipc socket's ends at 107 bytes.
        with tempfile.TemporaryDirectory(prefix="dspex-") as directory, _contained(Path(directory)):
            bench = Bench(Path(directory), self._scale(), self.config, tell, done.notes)
            if not machine.has_fork_server():
                bench.note("There is no fork server in this installation: forked and standby are plain starts.")
            with machine.awake() if self.awake else contextlib.nullcontext():
                for measurement in chosen:
                    done.measured.append(await _measure(measurement, bench))
        await asyncio.to_thread(self._publish, done)
        failed = [one for one in done.measured if one.failure]
        return 0 if not failed else EXIT_FAILED if len(failed) == len(chosen) else EXIT_SOME_FAILED

    def _chosen(self) -> list[Measurement]:
        wanted = {name.strip() for name in self.only.split(",") if name.strip()}
        if unknown := sorted(wanted - {measurement.name for measurement in MEASUREMENTS}):
            self.fail_usage(f"there is no measurement {', '.join(unknown)}: there are {_NAMES}")
        return [measurement for measurement in MEASUREMENTS if not wanted or measurement.name in wanted]

    def _scale(self) -> Scale:
        scale = QUICK if self.quick else Scale()
        return replace(scale, sessions=self.sessions or scale.sessions, rounds=self.rounds or scale.rounds)

    def _command(self) -> str:
        options = {"only": self.only, "sessions": self.sessions, "rounds": self.rounds}
        words = [f"--{name}" for name in ("quick", "awake") if getattr(self, name)]
        words += [f"--{name}={value}" for name, value in options.items() if value]
        return shlex.join(["dspex-kernels", "bench", *words])

    def _publish(self, done: Report) -> None:
        say(report.markdown_of(done) if self.markdown else report.text_of(done))
        if self.json:
            Path(self.json).write_text(json.dumps(report.data_of(done), indent=1) + "\n", encoding="utf-8")
        if self.plots:
            for path in plots.draw(done, Path(self.plots)):
                tell(f"wrote {path}")


async def _measure(measurement: Measurement, bench: Bench) -> Measured:
    """Run one measurement; that it failed is a result too, and the others go on."""
    began = time.monotonic()
    try:
        rows, failure = await measurement.run(bench), ""
    except (errors.DSPexError, OSError) as refusal:
        rows, failure = [], _told(refusal)
    except ExceptionGroup as refusals:
        rows, failure = [], _told(next(_leaves(refusals)))
    return Measured(measurement.name, measurement.title, rows, time.monotonic() - began, failure)


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for failure in group.exceptions:
        if isinstance(failure, BaseExceptionGroup):
            yield from _leaves(failure)
        else:
            yield failure


def _told(failure: BaseException) -> str:
    if isinstance(failure, errors.DSPexError):
        return f"{failure.code}: {failure.message}"
    return f"{type(failure).__name__}: {failure}"


@contextlib.contextmanager
def _contained(directory: Path) -> Iterator[None]:
    """Keep kernels off the network, and what they write inside a directory: sockets, history, DSPy's cache."""
    own = {
        "JUPYTER_RUNTIME_DIR": str(directory / "r"),
        "IPYTHONDIR": str(directory / "ipython"),
        "DSPY_CACHEDIR": str(directory / "cache"),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else DSPy asks the network for prices
    }
    before: Mapping[str, str | None] = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
