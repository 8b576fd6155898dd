"""What a benchmark found: values of repeats, their median and spread, as table, JSON and plot."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

# What one repeat found: name with unit, value, digits to show.
Figures = list[tuple[str, float, int]]


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
    """One way of loading a server, such as one burst size.

    Attributes:
        peer: Who was loaded; empty: the report's target.
    """

    name: str
    measures: tuple[Measure, ...]
    peer: str = ""

    @property
    def title(self) -> str:
        """The name, with whose it is where it isn't the target's."""
        return f"{self.name}, {self.peer}" if self.peer else self.name

    def measure(self, name: str) -> Measure | None:
        """The measure of that name, if this row has it."""
        return next((measure for measure in self.measures if measure.name == name), None)


class Comparison(msgspec.Struct, frozen=True):
    """One quantity of a row, the peer's and Duet's values in pairs of one repeat.

    Attributes:
        row: Name of Duet's row.
        measure: Name of the quantity.
        pairs: `(peer's, Duet's)` for each repeat, all positive.
        digits: After the decimal point, when shown to a person.
    """

    row: str
    peer: str
    measure: str
    pairs: tuple[tuple[float, float], ...]
    digits: int = 0

    @property
    def ratios(self) -> list[float]:
        """Duet's value over the peer's, repeat by repeat."""
        return [own / peer for peer, own in self.pairs]

    @property
    def median(self) -> float:
        """The middle of the ratios; not the ratio of the medians, which are of two repeats."""
        return statistics.median(self.ratios)

    def ratio_text(self) -> str:
        """The median of the ratios and, with several repeats, the least and the greatest."""
        ratios = self.ratios
        spread = f" ({min(ratios):.2f}-{max(ratios):.2f})" if len(ratios) > 1 else ""
        return f"{self.median:.2f}{spread}"

    def pairs_text(self) -> str:
        """Each repeat: the peer's value, Duet's, and their ratio."""
        digits = self.digits
        return "  ".join(
            f"{peer:,.{digits}f}:{own:,.{digits}f}={own / peer:.2f}" for peer, own in self.pairs
        )


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one run found, and what one has to know to judge it.

    Attributes:
        delivery_ratio: Delivered over expected, of all measured repeats.
        comparisons: With the peers that were measured in turn with the target.
        warnings: What speaks against trusting the figures, one sentence each.
    """

    shape: str
    target: str
    started_at: str
    machine: dict[str, Any]
    options: dict[str, Any]
    rows: tuple[Row, ...]
    delivery_ratio: float
    comparisons: tuple[Comparison, ...] = ()
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
        for comparison, shown in zip(self.comparisons, document["comparisons"], strict=True):
            shown |= {"ratios": comparison.ratios, "median_ratio": comparison.median}
        return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def measures_of(repeats: Sequence[Figures]) -> tuple[Measure, ...]:
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
