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
_FILE_WIDTH_WITH_PAIRS: Final = 160
_COLOURS: Final = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d")


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
    """The report as a table: quantities downwards, rows of the report across; then the peers'."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH_WITH_PAIRS if report.comparisons else _FILE_WIDTH
    machine = report.machine
    table = Table(
        title=f"{report.target}: {report.shape}",
        caption=f"median (spread) of {report.options['repeats']} · {machine['cores']} cores · "
        f"{machine['system']} · Python {machine['python']}",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column(no_wrap=True)
    rows = [row for row in report.rows if not row.peer]
    for row in rows:
        table.add_column(row.name, justify="right", no_wrap=True)
    for name in report.measure_names():
        measures = [row.measure(name) for row in rows]
        table.add_row(name, *(measure.text() if measure else "" for measure in measures))
    console.print(table)
    for peer in dict.fromkeys(comparison.peer for comparison in report.comparisons):
        console.print(_peer_table(report, peer))
    console.print(f"delivered: {report.delivery_ratio:.4%} of what was expected")
    for warning in report.warnings:
        console.print(f"note: {warning}", style="yellow", soft_wrap=True)


def _peer_table(report: Report, peer: str) -> Table:
    own = report.target
    table = Table(title=f"{own} against {peer}: {report.shape}", title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(f"{own} / {peer}", justify="right", no_wrap=True)
    table.add_column(f"each repeat, {peer}:{own}=ratio")
    last = ""
    for comparison in report.comparisons:
        if comparison.peer != peer:
            continue
        if last and comparison.row != last:
            table.add_section()
        table.add_row(
            comparison.row if comparison.row != last else "",
            comparison.measure,
            comparison.ratio_text(),
            comparison.pairs_text(),
        )
        last = comparison.row
    return table


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

    names = report.measure_names()
    panels = [bars for name in names if (bars := _bars(report, name))]
    panels += [bars for name in names if (bars := _ratio_bars(report, name))]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    height_in = _TITLE_HEIGHT_IN + lines * (_PANEL_HEIGHT_IN + _BAR_HEIGHT_IN * len(report.rows))
    figure = Figure(figsize=(_PLOT_WIDTH_IN, height_in), layout="constrained")
    for index, bars in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.barh(
            bars.rows, bars.medians, xerr=(bars.below, bars.above), color=bars.colours, capsize=3
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
    colours: list[str]


def _colour(report: Report, peer: str) -> str:
    servers = list(dict.fromkeys(row.peer for row in report.rows))
    return _COLOURS[servers.index(peer) % len(_COLOURS)]


def _bars(report: Report, name: str) -> _Bars | None:
    """The panel of a quantity; None when there is nothing to compare it with."""
    found = [(row, measure) for row in report.rows if (measure := row.measure(name))]
    if len(found) == 1 < len(report.rows):
        return None
    # What belongs together stands together: a row's servers, not a server's rows.
    order = list(dict.fromkeys(row.name for row, _ in found))
    found.sort(key=lambda each: order.index(each[0].name))
    measures = [measure for _, measure in found]
    return _Bars(
        name,
        rows=[row.title for row, _ in found],
        medians=[measure.median for measure in measures],
        below=[measure.median - min(measure.values) for measure in measures],
        above=[max(measure.values) - measure.median for measure in measures],
        colours=[_colour(report, row.peer) for row, _ in found],
    )


def _ratio_bars(report: Report, name: str) -> _Bars | None:
    """The panel of the ratios of a quantity; None when it was not compared."""
    found = [each for each in report.comparisons if each.measure == name]
    if not found:
        return None
    return _Bars(
        f"{name}: {report.target} / peer",
        rows=[f"{each.row}, {each.peer}" for each in found],
        medians=[each.median for each in found],
        below=[each.median - min(each.ratios) for each in found],
        above=[max(each.ratios) - each.median for each in found],
        colours=[_colour(report, each.peer) for each in found],
    )
