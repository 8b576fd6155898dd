"""What a benchmark found: values of repeats, their median and spread, as table, JSON and plot."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence


class Measure(msgspec.Struct, frozen=True):
    """One quantity of a row, once per repeat.

    Attributes:
        name: What was measured, with its unit; the same quantity has the same name in every row.
        digits: After the decimal point, when shown to a person.
    """

    name: str
    values: tuple[float, ...]
    digits: int = 0

    @property
    def median(self) -> float:
        """The middle of the repeats."""
        return statistics.median(self.values)

    def text(self) -> str:
        """The median and, with several repeats, how far the farthest is from it."""
        middle = f"{self.median:,.{self.digits}f}"
        if len(self.values) == 1 or not self.median:
            return middle
        farthest = max(abs(value - self.median) for value in self.values)
        return f"{middle} ±{farthest / self.median:.0%}"


class Row(msgspec.Struct, frozen=True):
    """One way of loading the target, such as one burst size."""

    name: str
    measures: tuple[Measure, ...]

    def measure(self, name: str) -> Measure | None:
        """The measure of that name, if this row has it."""
        return next((measure for measure in self.measures if measure.name == name), None)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one run found, and what one has to know to judge it.

    Attributes:
        delivery_ratio: Delivered over expected, of all measured repeats.
        warnings: What speaks against trusting the figures, one sentence each.
    """

    shape: str
    target: str
    started_at: str
    machine: dict[str, Any]
    options: dict[str, Any]
    rows: tuple[Row, ...]
    delivery_ratio: float
    warnings: tuple[str, ...] = ()

    def measure_names(self) -> list[str]:
        """The names of all rows' measures, in the order in which they first appear."""
        return list(dict.fromkeys(measure.name for row in self.rows for measure in row.measures))

    def json(self) -> bytes:
        """The report for machines, medians beside the values."""
        document = msgspec.to_builtins(self)
        for row, shown in zip(self.rows, document["rows"], strict=True):
            for measure, entry in zip(row.measures, shown["measures"], strict=True):
                entry["median"] = measure.median
        return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def measures_of(repeats: Sequence[Sequence[tuple[str, float, int]]]) -> tuple[Measure, ...]:
    """Joins what each repeat found, `(name, value, digits)`, into measures over the repeats."""
    first = repeats[0]
    return tuple(
        Measure(name, tuple(repeat[index][1] for repeat in repeats), digits)
        for index, (name, _, digits) in enumerate(first)
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of the values do not exceed; 0 when there is none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    # Nearest rank: no value is invented between two that were measured.
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]
