"""How a person sees a report: a table on standard output, a plot in a file."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from gateway.bench.errors import BenchError

if TYPE_CHECKING:
    from pathlib import Path

    from gateway.bench.results import Report

_PLOT_WIDTH_IN: Final = 10
_TITLE_HEIGHT_IN: Final = 0.5
_PANEL_HEIGHT_IN: Final = 0.7
_BAR_HEIGHT_IN: Final = 0.25
# A pipe or a file has no width of its own, and 80 columns would cut figures.
_FILE_WIDTH: Final = 120


def progress_bar() -> Progress:
    """The bar, on standard error and only where somebody watches it."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description:>11}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def print_report(report: Report) -> None:
    """The report as a table: quantities downwards, rows of the report across."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    machine = report.machine
    table = Table(
        title=f"{report.target}: {report.shape}",
        caption=f"median (spread) of {report.options['repeats']} · {machine['cores']} cores · "
        f"{machine['system']} · Python {machine['python']}",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column(no_wrap=True)
    for row in report.rows:
        table.add_column(row.name, justify="right", no_wrap=True)
    for name in report.measure_names():
        measures = [row.measure(name) for row in report.rows]
        table.add_row(name, *(measure.text() if measure else "" for measure in measures))
    console.print(table)
    console.print(f"delivered: {report.delivery_ratio:.4%} of what was expected")
    for warning in report.warnings:
        console.print(f"note: {warning}", style="yellow", soft_wrap=True)


def check_plot_file(file: Path) -> None:
    """Finds out whether a plot can be made of this file's type.

    Raises:
        BenchError: matplotlib is not installed, or doesn't write such files.
    """
    if find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install 'duet[bench]'")
    from matplotlib.backend_bases import FigureCanvasBase

    types = sorted(FigureCanvasBase.get_supported_filetypes())
    if file.suffix.removeprefix(".") not in types:
        raise BenchError(f"--plot {file}: its name must end in one of .{', .'.join(types)}")


def plot_report(report: Report, file: Path) -> None:
    """Writes a picture with a panel for each quantity: medians as bars, the spread as whiskers."""
    from matplotlib.figure import Figure

    panels = [bars for name in report.measure_names() if (bars := _bars(report, name))]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    height_in = _TITLE_HEIGHT_IN + lines * (_PANEL_HEIGHT_IN + _BAR_HEIGHT_IN * len(report.rows))
    figure = Figure(figsize=(_PLOT_WIDTH_IN, height_in), layout="constrained")
    for index, bars in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.barh(
            bars.rows, bars.medians, xerr=(bars.below, bars.above), color="#4c78a8", capsize=3
        )
        axes.invert_yaxis()
        axes.set_title(bars.name, loc="left", fontsize=10)
        axes.grid(visible=True, axis="x", alpha=0.3)
    figure.suptitle(f"{report.target}: {report.shape}, {report.started_at}")
    figure.savefig(file)


@dataclass(frozen=True, slots=True)
class _Bars:
    """One panel: the medians of a quantity, and how far the repeats reach below and above them."""

    name: str
    rows: list[str]
    medians: list[float]
    below: list[float]
    above: list[float]


def _bars(report: Report, name: str) -> _Bars | None:
    """The panel of a quantity; None when there is nothing to compare it with."""
    found = [(row.name, measure) for row in report.rows if (measure := row.measure(name))]
    if len(found) == 1 < len(report.rows):
        return None
    measures = [measure for _, measure in found]
    return _Bars(
        name,
        rows=[row for row, _ in found],
        medians=[measure.median for measure in measures],
        below=[measure.median - min(measure.values) for measure in measures],
        above=[max(measure.values) - measure.median for measure in measures],
    )
