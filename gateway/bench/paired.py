"""Duet and its peers measured in turn, and compared repeat by repeat.

A machine that others use is slower in one minute than in the next, by more than what is to be
found out. So the servers are measured one right after the other, and only figures of one repeat
are divided by each other: what slows one slows the other. Of two repeats in a row the order of the
second is reversed, so that no server is always the first.

All servers stay up with their own sockets connected for the whole run. An idle one costs next to
nothing, and nothing of it is counted as another's: CPU and memory are read from each one's own
processes. Connecting 10,000 sockets anew for each repeat would take longer than the repeat, and
put the two that are compared a minute apart.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from gateway.bench.results import Comparison, Row, measures_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from gateway.bench.results import Figures, Report
    from gateway.bench.stage import Stage
    from gateway.bench.target import Target


@dataclass(frozen=True, slots=True)
class Found:
    """What one stretch of load on one server found.

    Attributes:
        figures: For the table; their names are the same in every stretch of a row.
        generator_share: What the generator's busiest process used, of a core.
        idle_share: What was left of the machine; None where the system doesn't tell.
    """

    figures: Figures
    deliveries: int
    expected: int
    generator_share: float
    idle_share: float | None


class Load(Protocol):
    """A server with its sockets connected, under the load of one shape.

    Attributes:
        name: The server's.
    """

    name: str

    async def measure(self, row: str, seconds: float) -> Found:
        """Loads the server for at least that long, in the way that the row is named after.

        Raises:
            BenchError: It can't be measured; a loss is no error.
        """


@dataclass(slots=True)
class Outcome:
    """What all stretches found.

    Attributes:
        rows: The first load is the target, the others are its peers.
    """

    rows: list[Row]
    delivery_ratio: float


def order(loads: Sequence[Load], repeat: int) -> Sequence[Load]:
    """The servers in the order of that repeat; the first load, Duet, comes last in even ones."""
    return loads[::-1] if repeat % 2 == 0 else loads


async def run_paired(
    shape: str,
    target: Target,
    stage: Stage,
    options: msgspec.Struct,
    rows: Sequence[str],
    load_of: Callable[[Target, AsyncExitStack], Awaitable[Load]],
) -> Report:
    """Loads the target and the stage's peers, and measures them in turn.

    Args:
        shape: Its name.
        target: Duet.
        stage: Of this run.
        options: The load, for the report.
        rows: Names of what is measured.
        load_of: Connects the sockets of a server; they leave with the stack.

    Raises:
        BenchError: It can't be measured; a loss is no error, it is in the report.
    """
    async with AsyncExitStack() as stack:
        loads = [await load_of(each, stack) for each in (target, *stage.peers)]
        outcome = await measure_in_turn(loads, rows, stage)
    return paired_report(shape, target, stage, options, outcome)


def paired_report(
    shape: str, target: Target, stage: Stage, options: msgspec.Struct, outcome: Outcome
) -> Report:
    """The report of a run whose servers were measured in turn, with their comparisons."""
    report = stage.report(shape, target.name, options, outcome.rows, outcome.delivery_ratio)
    return msgspec.structs.replace(report, comparisons=comparisons(outcome.rows))


async def measure_in_turn(loads: Sequence[Load], rows: Sequence[str], stage: Stage) -> Outcome:
    """Warms up, then measures each row of each load as often as the plan says.

    Repeats go round the rows, so that a slow minute of the machine hits each alike. It ends early
    when something is not delivered: what is under way still would be counted in the next stretch.

    Raises:
        BenchError: Something can't be measured.
    """
    plan, progress = stage.plan, stage.progress
    repeats = plan.repeats + (plan.warmup_s > 0)
    bar = progress.add_task("measuring", total=repeats * len(rows) * len(loads))
    if plan.warmup_s > 0:
        for row in rows:
            for load in loads:
                await load.measure(row, plan.warmup_s)
                progress.advance(bar)
    found: dict[tuple[str, str], list[Found]] = {
        (row, load.name): [] for row in rows for load in loads
    }
    for row, load in _stretches(loads, rows, plan.repeats):
        stretch = await load.measure(row, plan.seconds)
        found[row, load.name].append(stretch)
        progress.advance(bar)
        if stretch.deliveries < stretch.expected:
            stage.doubts.add(f"{row}, {load.name}: ended early, a round was not delivered whole")
            break
    return _outcome(found, loads[0].name, stage)


def _stretches(
    loads: Sequence[Load], rows: Sequence[str], repeats: int
) -> Iterator[tuple[str, Load]]:
    for repeat in range(repeats):
        for row in rows:
            for load in order(loads, repeat):
                yield row, load


def _outcome(found: dict[tuple[str, str], list[Found]], own: str, stage: Stage) -> Outcome:
    rows: list[Row] = []
    for (row, load), stretches in found.items():
        if not stretches:
            continue
        measures = measures_of([stretch.figures for stretch in stretches])
        measured = Row(row, measures, "" if load == own else load)
        rows.append(measured)
        for stretch in stretches:
            stage.doubts.generator_share(measured.title, stretch.generator_share)
            stage.doubts.idle_share(measured.title, stretch.idle_share)
    done = [stretch for stretches in found.values() for stretch in stretches]
    delivered = sum(stretch.deliveries for stretch in done)
    expected = sum(stretch.expected for stretch in done)
    return Outcome(rows, delivered / expected if expected else 1.0)


# Shares of a core say how a figure came about, they are none to win with.
_NOT_COMPARED: Final = "%"


def comparisons(rows: Sequence[Row]) -> tuple[Comparison, ...]:
    """Every quantity that the target and a peer have, repeat beside repeat.

    A repeat that one of them lacks, since the run ended early, and a quantity that is 0 or less on
    a side have no ratio and are left out.
    """
    own = {row.name: row for row in rows if not row.peer}
    compared: list[Comparison] = []
    for row in rows:
        if not row.peer or row.name not in own:
            continue
        for measure in own[row.name].measures:
            other = row.measure(measure.name)
            if other is None or measure.name.endswith(_NOT_COMPARED):
                continue
            pairs = tuple(zip(other.values, measure.values, strict=False))
            if all(value > 0 for pair in pairs for value in pair):
                compared.append(Comparison(row.name, row.peer, measure.name, pairs, measure.digits))
    return tuple(compared)
