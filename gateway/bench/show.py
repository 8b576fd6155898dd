"""How a person sees a report: a table on standard output, a plot in a file."""

from __future__ import annotations

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

_PANEL_HEIGHT_IN: Final = 2.4
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

    panels = [name for name in report.measure_names() if _bars(report, name)[0]]
    figure = Figure(figsize=(8, _PANEL_HEIGHT_IN * len(panels)), layout="constrained")
    for index, name in enumerate(panels):
        labels, medians, below, above = _bars(report, name)
        axes = figure.add_subplot(len(panels), 1, index + 1)
        axes.barh(labels, medians, xerr=(below, above), color="#4c78a8", capsize=3)
        axes.invert_yaxis()
        axes.set_title(name, loc="left", fontsize=10)
        axes.grid(visible=True, axis="x", alpha=0.3)
    figure.suptitle(f"{report.target}: {report.shape}, {report.started_at}")
    figure.savefig(file)


def _bars(report: Report, name: str) -> tuple[list[str], list[float], list[float], list[float]]:
    """Row names, medians, and how far the repeats reach below and above them."""
    found = [(row.name, measure) for row in report.rows if (measure := row.measure(name))]
    medians = [measure.median for _, measure in found]
    below = [measure.median - min(measure.values) for _, measure in found]
    above = [max(measure.values) - measure.median for _, measure in found]
    return [row_name for row_name, _ in found], medians, below, above
