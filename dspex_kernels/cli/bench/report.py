"""What was measured, for people (a table, Markdown) and for programs (JSON)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dspex_kernels.cli.bench.measurement import Bar, Row

HEADINGS = ("what", "way", "median", "quartiles", "p95", "n", "ratio", "wanted")
NUMBERS = frozenset({"median", "quartiles", "p95", "n", "ratio"})
"""Columns whose cells end at the right."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a measurement gave.

    Attributes:
        name: Of the measurement.
        title: Of its table.
        rows: Its figures; none where it failed.
        took_s: Seconds that it ran.
        failure: ``code: message``; "" where it succeeded.
    """

    name: str
    title: str
    rows: Sequence[Row]
    took_s: float
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """A run of the benchmark.

    Attributes:
        command: How it was called.
        began_at: When, in ISO 8601.
        machine: On what, by name.
        measured: What came out.
        notes: What a reader has to know.
    """

    command: str
    began_at: str
    machine: Mapping[str, str]
    measured: list[Measured] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def bars(self) -> tuple[int, int]:
        """How many bars were reached, of how many that there are."""
        told = [row.is_met for one in self.measured for row in one.rows if row.bar is not None]
        return told.count(True), len(told)


def text_of(report: Report) -> str:
    """A table for a terminal."""
    return "\n".join(_text_lines(report))


def markdown_of(report: Report) -> str:
    """The same for a README."""
    return "\n".join(_markdown_lines(report))


def data_of(report: Report) -> dict[str, Any]:
    """The same as data, with every sample."""
    return {
        "command": report.command,
        "began_at": report.began_at,
        "machine": dict(report.machine),
        "notes": list(report.notes),
        "measurements": [
            {
                "name": one.name,
                "title": one.title,
                "took_s": one.took_s,
                "failure": one.failure,
                "rows": [_row_data(row) for row in one.rows],
            }
            for one in report.measured
        ],
    }


def _row_data(row: Row) -> dict[str, Any]:
    return {
        "what": row.what,
        "way": row.way,
        "unit": row.unit,
        "rounds": [list(samples) for samples in row.rounds],
        "spread": asdict(row.spread),
        "against": row.against,
        "ratio": asdict(row.ratio) if row.ratio is not None else None,
        "bar": asdict(row.bar) if row.bar is not None else None,
        "is_met": row.is_met,
    }


def _text_lines(report: Report) -> Iterator[str]:
    yield report.command
    yield _machine_line(report)
    for one in report.measured:
        yield ""
        yield f"{one.title}  ({one.name}, {one.took_s:.0f} s)"
        yield from [f"  failed: {one.failure}"] if one.failure else _table_lines([_cells(row) for row in one.rows])
    yield ""
    yield from (f"- {note}" for note in _reading(report))


def _markdown_lines(report: Report) -> Iterator[str]:
    yield f"`{report.command}`, {report.began_at}: {_machine_line(report)}"
    for one in report.measured:
        yield f"\n**{one.title}**\n"
        if one.failure:
            yield f"Failed: {one.failure}"
            continue
        yield f"| {' | '.join(HEADINGS)} |"
        yield f"| {' | '.join('--:' if heading in NUMBERS else '---' for heading in HEADINGS)} |"
        yield from (f"| {' | '.join(_cells(row))} |" for row in one.rows)
    yield ""
    yield from (f"- {note}" for note in _reading(report))


def _reading(report: Report) -> Iterator[str]:
    """How to read it."""
    reached, bars = report.bars()
    if bars:
        yield f"wanted: {reached} of {bars} reached."
    yield (
        "ratio: how many times as good as the row named behind it; above 1 is better, whatever the unit; the "
        "median of the rounds' ratios, with their quartiles in the JSON."
    )
    yield from report.notes


def _machine_line(report: Report) -> str:
    told = dict(report.machine)
    cores, memory = told.pop("cores", "?"), told.pop("memory", "?")
    return ", ".join([f"{cores} cores", memory, *(f"{name} {value}" for name, value in told.items())])


def _table_lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    table = [HEADINGS, *rows]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(HEADINGS))]
    previous = ""
    for number, cells in enumerate(table):
        shown = ["" if column == 0 and cells[0] == previous else cell for column, cell in enumerate(cells)]
        previous = cells[0] if number else ""
        yield "  " + "  ".join(map(_padded, shown, widths, HEADINGS)).rstrip()


def _padded(cell: str, width: int, heading: str) -> str:
    return cell.rjust(width) if heading in NUMBERS else cell.ljust(width)


def _cells(row: Row) -> list[str]:
    spread = row.spread
    return [
        row.what,
        row.way,
        f"{short(spread.median)} {row.unit}".rstrip(),
        f"{short(spread.quartile_1)} – {short(spread.quartile_3)}" if spread.count > 1 else "",
        short(spread.p95) if spread.count > 1 else "",
        str(spread.count),
        f"{short(row.ratio.median)} × {row.against}" if row.ratio is not None else "",
        _wanted(row.bar, row),
    ]


def _wanted(bar: Bar | None, row: Row) -> str:
    if bar is None:
        return ""
    sign, unit = "≥" if bar.is_least else "≤", "×" if bar.of == "ratio" else row.unit
    wanted = f"{sign} {short(bar.limit)} {unit}".rstrip()
    return f"{wanted}: {'unknown' if row.is_met is None else 'yes' if row.is_met else 'NO'}"


def short(number: float) -> str:
    """A number with the digits that count; whole ones as they are."""
    size = abs(number)
    if float(number).is_integer() or size >= 100:
        return f"{number:.0f}"
    if size >= 10:
        return f"{number:.1f}"
    return f"{number:.2f}" if size >= 0.1 else f"{number:.2g}"
