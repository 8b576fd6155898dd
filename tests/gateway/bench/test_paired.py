from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from gateway.bench.paired import Found, comparisons, measure_in_turn, order
from gateway.bench.results import Comparison, Measure, Row
from gateway.bench.show import progress_bar
from gateway.bench.stage import Plan, Stage

if TYPE_CHECKING:
    from collections.abc import Sequence


class ScriptedLoad:
    """A load whose stretches cost what the script says, and that notes when it was its turn."""

    def __init__(self, name: str, costs: Sequence[float], log: list[str], lost: int = 0) -> None:
        self.name = name
        self._costs = list(costs)
        self._log = log
        self._lost = lost

    async def measure(self, row: str, seconds: float) -> Found:
        self._log.append(f"{row} {self.name} {seconds:g}")
        return Found([("µs", self._costs.pop(0), 1)], 100 - self._lost, 100, 0.5, 0.5)


def stage_of(repeats: int, warmup_s: float = 0) -> Stage:
    return Stage(Plan(repeats=repeats, seconds=1, warmup_s=warmup_s), progress_bar())


def test_servers_take_turns_within_each_row_and_the_order_is_reversed_each_time() -> None:
    log: list[str] = []
    duet = ScriptedLoad("duet", [1.0] * 4, log)
    bun = ScriptedLoad("bun", [1.0] * 4, log)

    asyncio.run(measure_in_turn([duet, bun], ["burst 1", "burst 8"], stage_of(2)))

    assert log == [
        *("burst 1 bun 1", "burst 1 duet 1", "burst 8 bun 1", "burst 8 duet 1"),
        *("burst 1 duet 1", "burst 1 bun 1", "burst 8 duet 1", "burst 8 bun 1"),
    ]


def test_a_warm_up_comes_first_and_is_in_no_figure() -> None:
    log: list[str] = []
    duet = ScriptedLoad("duet", [99.0, 2.0, 3.0], log)

    outcome = asyncio.run(measure_in_turn([duet], ["burst 1"], stage_of(2, warmup_s=0.5)))

    assert log == ["burst 1 duet 0.5", "burst 1 duet 1", "burst 1 duet 1"]
    assert outcome.rows == [Row("burst 1", (Measure("µs", (2.0, 3.0), 1),))]


def test_the_first_load_is_the_target_and_the_others_are_its_peers() -> None:
    log: list[str] = []
    loads = [ScriptedLoad(name, [1.0], log) for name in ("duet", "bun", "c")]

    outcome = asyncio.run(measure_in_turn(loads, ["burst 1"], stage_of(1)))

    assert [(row.name, row.peer) for row in outcome.rows] == [
        ("burst 1", ""),
        ("burst 1", "bun"),
        ("burst 1", "c"),
    ]


def test_a_loss_ends_the_run_and_what_was_measured_is_kept() -> None:
    log: list[str] = []
    duet = ScriptedLoad("duet", [1.0] * 2, log)
    bun = ScriptedLoad("bun", [1.0] * 2, log, lost=10)
    stage = stage_of(2)

    outcome = asyncio.run(measure_in_turn([duet, bun], ["burst 1"], stage))

    assert len(log) == 1
    assert outcome.delivery_ratio == 0.9
    assert [row.title for row in outcome.rows] == ["burst 1, bun"]
    assert "burst 1, bun: ended early, a round was not delivered whole" in stage.doubts.all()


@pytest.mark.parametrize(("repeat", "names"), [(0, "cba"), (1, "abc"), (2, "cba")])
def test_no_server_is_always_the_first(repeat: int, names: str) -> None:
    loads = [ScriptedLoad(name, [], []) for name in "abc"]

    assert "".join(load.name for load in order(loads, repeat)) == names


def test_only_values_of_the_same_repeat_are_divided_by_each_other() -> None:
    rows = [
        Row("burst 1", (Measure("µs", (2.0, 15.0, 4.0), 1),)),
        Row("burst 1", (Measure("µs", (1.0, 3.0, 4.0), 1),), "bun"),
    ]

    (found,) = comparisons(rows)

    assert found == Comparison("burst 1", "bun", "µs", ((1.0, 2.0), (3.0, 15.0), (4.0, 4.0)), 1)
    assert found.ratios == [2.0, 5.0, 1.0]
    # The ratio of the medians would be 4 / 3, the mean of the ratios 8 / 3.
    assert found.median == 2.0
    assert found.ratio_text() == "2.00 (1.00-5.00)"
    assert found.pairs_text() == "1.0:2.0=2.00  3.0:15.0=5.00  4.0:4.0=1.00"


def test_what_has_no_partner_or_is_zero_or_a_share_is_not_compared() -> None:
    rows = [
        Row(
            "burst 1",
            (
                Measure("µs", (2.0, 4.0)),
                Measure("redis µs", (1.0,)),
                Measure("KiB", (5.0,)),
                Measure("CPU %", (50.0,)),
            ),
        ),
        Row(
            "burst 1",
            (Measure("µs", (1.0,)), Measure("KiB", (0.0,)), Measure("CPU %", (25.0,))),
            "bun",
        ),
        Row("burst 8", (Measure("µs", (1.0,)),), "bun"),
    ]

    assert comparisons(rows) == (Comparison("burst 1", "bun", "µs", ((1.0, 2.0),)),)
