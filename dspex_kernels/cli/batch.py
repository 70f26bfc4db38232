"""`dspex-kernels batch`: one program over a JSONL file, bounded in concurrency and cost, and resumable."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import orjson
from traitlets import Bool, Float, Int, Unicode

from dspex_kernels import errors
from dspex_kernels.cli import jsonl
from dspex_kernels.cli.base import (
    BASE_ALIASES,
    BASE_FLAGS,
    EXIT_BUDGET,
    EXIT_FAILED,
    EXIT_SOME_FAILED,
    Subcommand,
    complain,
    tell,
)
from dspex_kernels.cli.ephemeral import ephemeral_service, lm_profile

if TYPE_CHECKING:
    from dspex_kernels.sessions.session import Session

PROGRAM_ID = "batch"
LINES_READ_AT_ONCE = 64

STOPPING_CODES = frozenset(
    {
        "lm_not_configured",
        "lm_credentials_required",
        "policy_denied",
        "budget_unpriced",
        "invalid_lm_profile",
        "program_not_found",
        "kernel_start_failed",
        "session_not_found",
        "service_closed",
        "auth",
        "billing",
        "not_configured",
        "unsupported_model",
    }
)
"""Errors that every further line would meet: the run ends at the first."""

Execute = Callable[[dict[str, Any]], Awaitable[Mapping[str, Any]]]


@dataclass
class Tally:
    """How a run went.

    Attributes:
        done: Lines answered by this run.
        failed: Lines that failed for themselves.
        cost: USD spent; None once a line of unknown price was answered.
        stopped_by: The error that ended the run early: the budget's, or one that every line would meet.
    """

    done: int = 0
    failed: int = 0
    cost: float | None = 0.0
    stopped_by: errors.DSPexError | None = None

    @property
    def exit_code(self) -> int:
        """What the run comes to."""
        if isinstance(self.stopped_by, errors.BudgetExceeded):
            return EXIT_BUDGET
        if self.stopped_by is not None:
            return EXIT_FAILED
        return EXIT_SOME_FAILED if self.failed else 0


@dataclass
class BatchRun:
    """The lines that are left, worked off by a fixed number of workers.

    Attributes:
        execute: Runs the program on one line's inputs and returns the command's result.
        lines: The input.
        finished: Line numbers to leave out.
        results: Where answers go.
        failures: Where errors go.
        keeps_id: Whether ``id`` is one of the program's inputs, besides naming the line.
        on_line: Called after each line that was tried.
        tally: How it goes.
    """

    execute: Execute
    lines: Iterator[jsonl.InputLine]
    finished: Mapping[int, str]
    results: jsonl.LinesOut
    failures: jsonl.LinesOut
    keeps_id: bool = False
    on_line: Callable[[], object] = lambda: None
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self._read: list[jsonl.InputLine] = []
        self._reading = asyncio.Lock()  # guards _read and lines: the file is read in a thread

    async def run(self, concurrency: int) -> Tally:
        """Work off the lines, at most ``concurrency`` at once; an early stop lets the running ones end.

        Raises:
            StoreError: A result could not be written.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(self._work())
        except* errors.DSPexError as failures:
            raise failures.exceptions[0] from None  # the group adds nothing to the one line that is told
        return self.tally

    async def _work(self) -> None:
        while self.tally.stopped_by is None:
            line = await self._next_line()
            if line is None:
                return
            await self._try_line(line)
            self.on_line()

    async def _next_line(self) -> jsonl.InputLine | None:
        async with self._reading:
            while not self._read:
                chunk = await asyncio.to_thread(lambda: list(islice(self.lines, LINES_READ_AT_ONCE)))
                if not chunk:
                    return None
                self._read = [line for line in reversed(chunk) if line.number not in self.finished]
            return self._read.pop()

    async def _try_line(self, line: jsonl.InputLine) -> None:
        name = (line.item or {}).get("id")
        if line.item is None:
            assert line.problem is not None
            self._fail(line, name, line.problem)
            return
        inputs = line.item if self.keeps_id else {key: value for key, value in line.item.items() if key != "id"}
        try:
            result = await self.execute(inputs)
        except errors.DSPexError as failure:
            if isinstance(failure, errors.BudgetExceeded) or failure.code in STOPPING_CODES:
                self.tally.stopped_by = self.tally.stopped_by or failure
            else:
                self._fail(line, name, failure)
            return
        self.results.write(
            {
                "line": line.number,
                "id": name,
                "input_hash": line.input_hash,
                "outputs": result["outputs"],
                "usage": result["usage"],
                "cost": result["cost"],
            }
        )
        self.tally.done += 1
        cost = result["cost"]
        self.tally.cost = None if cost is None or self.tally.cost is None else self.tally.cost + cost

    def _fail(self, line: jsonl.InputLine, name: Any, failure: errors.DSPexError) -> None:
        told = {"code": failure.code, "message": failure.message}
        self.failures.write({"line": line.number, "id": name, "error": told})
        self.tally.failed += 1


class BatchApp(Subcommand):
    name = "jupyter-dspex-batch"
    usage = 'batch INPUT.jsonl --output=OUT.jsonl (--signature="question -> answer" | --program=RECORD.json)'
    description = (
        "Run a program over a JSONL file, in a session of its own. Each line is an object of inputs, with an "
        '"id" if you like; results and errors are written as they come, in no fixed order, with the number of '
        "their line. Exit code: 0 all lines answered, 2 some failed, 3 stopped at --max-cost, 130 interrupted "
        "(--resume goes on), 1 could not run."
    )
    examples = """
    dspex-kernels batch questions.jsonl --output=answers.jsonl --signature="question -> answer"
    dspex-kernels batch q.jsonl --output=a.jsonl --signature="question -> answer" --module=ChainOfThought --lm=openai/gpt-5-mini --max-cost=0.50
    dspex-kernels batch q.jsonl --output=a.jsonl --program=qa_bot.json --lm=openai/gpt-5-mini --resume
    """  # noqa: E501  # a command line is one line
    flags = BASE_FLAGS | {
        "resume": ({"BatchApp": {"resume": True}}, "Go on where an earlier run with this --output ended."),
        "quiet": ({"BatchApp": {"quiet": True}}, "No progress bar and no summary."),
    }
    aliases = BASE_ALIASES | {
        "output": "BatchApp.output",
        "errors": "BatchApp.errors_to",
        "signature": "BatchApp.signature",
        "module": "BatchApp.module",
        "program": "BatchApp.program",
        "lm": "BatchApp.lm",
        "api-base": "BatchApp.api_base",
        "api-key-env": "BatchApp.api_key_env",
        "concurrency": "BatchApp.concurrency",
        "max-cost": "BatchApp.max_cost",
        "timeout": "BatchApp.timeout",
    }
    shown_defaults = ("module", "lm", "concurrency", "timeout")

    output = Unicode("", help="Where results go, one JSON object a line.").tag(config=True)
    errors_to = Unicode("", help="Where this run's errors go; OUT.errors.jsonl if not given.").tag(config=True)
    signature = Unicode("", help="The program's signature.").tag(config=True)
    module = Unicode("Predict", help="The program's module: Predict, ChainOfThought, ….").tag(config=True)
    program = Unicode("", help="A program record (export_program), instead of a signature.").tag(config=True)
    lm = Unicode("offline/echo", help="The model; offline/echo needs no network and says so.").tag(config=True)
    api_base = Unicode("", help="Another endpoint than the provider's own.").tag(config=True)
    api_key_env = Unicode("", help="The environment variable that holds the key, if not the usual one.").tag(
        config=True
    )
    concurrency = Int(8, min=1, max=1000, help="Lines that run at once.").tag(config=True)
    max_cost = Float(None, min=0.0, allow_none=True, help="Stop before more is spent than this, in USD.").tag(
        config=True
    )
    timeout = Float(120.0, min=0.1, max=86400.0, help="Longest wait for one line, in seconds.").tag(config=True)
    resume = Bool(False, help="Go on where an earlier run ended.").tag(config=True)
    quiet = Bool(False, help="No progress bar and no summary.").tag(config=True)

    async def run(self) -> int:
        """Run the program over the file."""
        source, output = self._check_usage()
        record = await asyncio.to_thread(_read_record, Path(self.program)) if self.program else None
        total, finished = await asyncio.to_thread(_plan, source, output, self.resume)
        if len(finished) == total:
            self._tell(f"{total} lines: all were done before")
            return 0
        began = time.monotonic()
        tally = Tally()
        try:
            await self._run_lines(source, output, record, finished, total, tally)
        finally:
            if tally != Tally():  # else nothing was tried, and what stopped it is told
                self._summarise(tally, len(finished), total, output, time.monotonic() - began)
        if tally.stopped_by is not None:
            complain(tally.stopped_by)
        return tally.exit_code

    async def _run_lines(
        self,
        source: Path,
        output: Path,
        record: dict[str, Any] | None,
        finished: Mapping[int, str],
        total: int,
        tally: Tally,
    ) -> None:
        async with ephemeral_service(self) as service, service.session(owner="batch") as session:
            inputs = await self._prepare(session, record)

            async def execute(values: dict[str, Any]) -> Mapping[str, Any]:
                args = {"program_id": PROGRAM_ID, "inputs": values}
                return await session.call("execute_program", args, timeout=self.timeout)

            with ExitStack() as files:
                bar = files.enter_context(self._bar(total, len(finished)))
                run = BatchRun(
                    execute=execute,
                    lines=jsonl.read_lines(files.enter_context(_open(source))),
                    finished=finished,
                    results=files.enter_context(jsonl.LinesOut(output, append=True)),
                    failures=files.enter_context(jsonl.LinesOut(self._errors_path(output), append=False)),
                    keeps_id="id" in inputs,
                    on_line=bar.update,
                    tally=tally,
                )
                await run.run(self.concurrency)

    async def _prepare(self, session: Session, record: dict[str, Any] | None) -> Mapping[str, Any]:
        """Give the session its LM, budget and program; returns the program's input fields with their types."""
        settings: dict[str, Any] = {
            "lm": lm_profile(model=self.lm, api_base=self.api_base, api_key_env=self.api_key_env)
        }
        if self.max_cost is not None:
            settings["budget"] = {"usd": self.max_cost}
        await session.configure(**settings)
        if record is None:
            await session.create_program(PROGRAM_ID, self.signature, self.module)
        else:
            await session.import_program(record, program_id=PROGRAM_ID)
        fields: Mapping[str, Any] = (await session.get_program(PROGRAM_ID))["inputs"]
        return fields

    def _check_usage(self) -> tuple[Path, Path]:
        if len(self.extra_args) != 1:
            self.fail_usage(f"batch takes one input file, not {len(self.extra_args)}: see --help")
        if not self.output:
            self.fail_usage("--output is missing: name the file for the results")
        if bool(self.signature) == bool(self.program):
            self.fail_usage("give either --signature or --program: what shall be run?")
        source, output = Path(self.extra_args[0]), Path(self.output)
        if not source.is_file():
            self.fail_usage(f"{source} is not a file: batch reads a JSONL file, twice when it resumes")
        outputs = (output, self._errors_path(output))
        if len({path.resolve() for path in (source, *outputs)}) != 3:
            self.fail_usage("input, --output and --errors must be three different files")
        return source, output

    def _errors_path(self, output: Path) -> Path:
        return Path(self.errors_to) if self.errors_to else output.with_name(f"{output.stem}.errors.jsonl")

    def _bar(self, total: int, done: int) -> Any:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # its thread would outlive the bar
        silent = self.quiet or not sys.stderr.isatty()
        return tqdm(total=total, initial=done, unit="line", file=sys.stderr, disable=silent)

    def _summarise(self, tally: Tally, before: int, total: int, output: Path, seconds: float) -> None:
        left = total - before - tally.done - tally.failed
        cost = "cost unknown" if tally.cost is None else f"{tally.cost:.6f} USD"
        parts = [f"{before + tally.done} of {total} lines done"]
        if before:
            parts.append(f"{before} of them before")
        if tally.failed:
            parts.append(f"{tally.failed} failed (see {self._errors_path(output)})")
        if left:
            parts.append(f"{left} left (--resume goes on)")
        self._tell(", ".join([*parts, cost, f"{seconds:.1f} s"]))

    def _tell(self, text: str) -> None:
        if not self.quiet:
            tell(text)


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as failure:
        raise errors.InvalidArguments(f"cannot read {path}: {failure.strerror or failure}") from failure


def _plan(source: Path, output: Path, resume: bool) -> tuple[int, dict[int, str]]:
    """How many lines there are, and which are done; the output is repaired.

    Raises:
        InvalidArguments: The output holds something and this is no resumption, or the input has changed.
    """
    try:
        if not output.exists() or output.stat().st_size == 0:
            return jsonl.count_lines(source), {}
        if not resume:
            raise errors.InvalidArguments(
                f"{output} holds something: go on with --resume, or name another --output"
            )
        jsonl.repair(output)
        finished = jsonl.finished_lines(output)
        return jsonl.check_unchanged(source, finished, output), finished
    except OSError as failure:
        raise errors.InvalidArguments(
            f"cannot read {failure.filename or source}: {failure.strerror or failure}"
        ) from failure


def _read_record(path: Path) -> dict[str, Any]:
    """A program record: as it is, or as the result of export_program.

    Raises:
        InvalidRecord: The file holds no such thing.
    """
    try:
        record = orjson.loads(path.read_bytes())
    except OSError as failure:
        raise errors.InvalidArguments(f"cannot read {path}: {failure.strerror or failure}") from failure
    except orjson.JSONDecodeError as failure:
        raise errors.InvalidRecord(f"{path} is not JSON: {failure}") from failure
    if isinstance(record, dict) and isinstance(record.get("record"), dict):
        record = record["record"]
    if not isinstance(record, dict):
        raise errors.InvalidRecord(f"{path} holds no program record: write one with export_program")
    return record
