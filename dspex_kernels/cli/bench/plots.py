"""What was measured, drawn: one picture a measurement. Needs matplotlib, the extra ``bench``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dspex_kernels import errors
from dspex_kernels.cli.bench.measurement import Row
from dspex_kernels.cli.bench.report import Measured, Report, short

WIDTH = 8.0
"""Inches."""
ROW_HEIGHT, HEAD_HEIGHT = 0.4, 0.7
WIDE = 20.0
"""A largest median so many times the smallest is drawn on a logarithmic scale."""


def check_available() -> None:
    """Refuse what could only fail once everything has been measured.

    Raises:
        DependencyMissing: There is no matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise errors.DependencyMissing('--plots needs matplotlib: pip install "dspex-kernels[bench]"')


def draw(report: Report, directory: Path) -> list[Path]:
    """Draw each measurement that gave figures, as ``NAME.svg``; the files.

    Raises:
        DependencyMissing: There is no matplotlib.
    """
    check_available()
    directory.mkdir(parents=True, exist_ok=True)
    return [_draw(one, directory / f"{one.name}.svg") for one in report.measured if one.rows]


def _draw(one: Measured, path: Path) -> Path:
    # Not pyplot: it would look for a screen.
    from matplotlib.figure import Figure

    groups = _groups(one.rows)
    heights = [HEAD_HEIGHT + ROW_HEIGHT * len(rows) for rows in groups]
    figure = Figure(figsize=(WIDTH, 0.5 + sum(heights)), layout="constrained")
    figure.suptitle(one.title)
    plots = figure.subplots(len(groups), squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, rows in zip(plots[:, 0], groups, strict=True):
        _draw_group(axes, rows)
    figure.savefig(path)
    return path


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that belong into one diagram: of the same thing, each way once."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.what, row.unit), {}).setdefault(row.way, row)
    return [list(ways.values()) for ways in groups.values()]


def _draw_group(axes: Any, rows: Sequence[Row]) -> None:
    """Points at the medians, with whiskers from quartile to quartile; no bars, which a logarithm would cut off."""
    ways, spreads = [row.way for row in rows], [row.spread for row in rows]
    middles = [spread.median for spread in spreads]
    whiskers = [
        [spread.median - spread.quartile_1 for spread in spreads],
        [spread.quartile_3 - spread.median for spread in spreads],
    ]
    axes.errorbar(middles, ways, xerr=whiskers, fmt="o", color="#4c72b0", ecolor="#333333", capsize=3)
    for way, middle in zip(ways, middles, strict=True):
        label = f"{short(middle)} {rows[0].unit}".rstrip()
        axes.annotate(label, (middle, way), (0, 5), textcoords="offset points", ha="center", fontsize="small")
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.3)
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(rows[0].what, loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    if min(middles) > 0 and max(middles) > WIDE * min(middles):
        axes.set_xscale("log")
    elif min(middles) >= 0:
        axes.set_xlim(left=0)
