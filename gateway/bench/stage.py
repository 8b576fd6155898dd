"""What every shape is given: the plan of repeats, the progress bar, and what it may not exceed."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from gateway.bench.results import Report
from gateway.bench.usage import machine
from persistence.clock import Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.progress import Progress

    from gateway.bench.results import Row
    from gateway.bench.target import Target

# Beyond these shares the generator, or the machine, may have been slower than the target.
GENERATOR_LIMIT: Final = 0.9
_IDLE_LIMIT: Final = 0.03


class Plan(msgspec.Struct, frozen=True):
    """How often and how long each row is measured, after a warm-up that is not."""

    repeats: int
    seconds: float
    warmup_s: float


class Doubts:
    """Collects what speaks against the figures, each sentence once."""

    def __init__(self) -> None:
        self._sentences: dict[str, None] = {}

    def add(self, sentence: str) -> None:
        """Adds a sentence."""
        self._sentences[sentence] = None

    def generator_share(self, row: str, share: float) -> None:
        """Doubts the row when a process of the generator used `share` of a core, nearly all."""
        if share >= GENERATOR_LIMIT:
            self.add(f"{row}: the generator was the limit, it had no more than a core to use")

    def idle_share(self, row: str, share: float | None) -> None:
        """Doubts the row when the machine had no core left for somebody."""
        if share is not None and share < _IDLE_LIMIT:
            self.add(f"{row}: the machine was the limit, all its cores were busy")

    def all(self) -> tuple[str, ...]:
        """The sentences."""
        return tuple(self._sentences)


class IdleWatch:
    """Tells how much of the machine's CPU time was left over since it was made."""

    def __init__(self) -> None:
        self._idle, self._all = _machine_ticks()

    def share(self) -> float | None:
        """From 0 to 1; None where the system doesn't tell."""
        idle, everything = _machine_ticks()
        spent = everything - self._all
        return (idle - self._idle) / spent if spent > 0 else None


def _machine_ticks() -> tuple[int, int]:
    if not sys.platform.startswith("linux"):
        return 0, 0
    with Path("/proc/stat").open(encoding="ascii") as stat:
        ticks = [int(field) for field in stat.readline().split()[1:9]]
    return ticks[3], sum(ticks)


def no_bar(_count: float) -> None:
    """Takes the place of a bar where none is shown."""


class Stage:
    """One run of one shape.

    Attributes:
        plan: Repeats and durations.
        progress: The bar that a person sees.
        doubts: What speaks against the figures.
        peers: Servers to measure in turn with the target (`--against`).
    """

    def __init__(self, plan: Plan, progress: Progress, peers: Sequence[Target] = ()) -> None:
        self.plan = plan
        self.peers = peers
        self.progress = progress
        self.doubts = Doubts()
        self._started_at = Clock().now()

    def bar(self, description: str, total: int) -> Callable[[float], None]:
        """Shows one more bar; what is returned moves it on."""
        return partial(self.progress.advance, self.progress.add_task(description, total=total))

    @contextmanager
    def passing_bar(self, description: str, total: int) -> Iterator[Callable[[float], None]]:
        """As `bar`, but it goes with the block: for what is done again in each repeat."""
        bar = self.progress.add_task(description, total=total)
        try:
            yield partial(self.progress.advance, bar)
        finally:
            self.progress.remove_task(bar)

    def report(
        self,
        shape: str,
        target: str,
        options: msgspec.Struct,
        rows: Sequence[Row],
        delivery_ratio: float,
    ) -> Report:
        """The report of this run."""
        if delivery_ratio < 1:
            self.doubts.add(f"only {delivery_ratio:.6%} of what was expected was delivered")
        plan: dict[str, Any] = msgspec.to_builtins(self.plan)
        return Report(
            shape=shape,
            target=target,
            started_at=self._started_at.isoformat(timespec="seconds"),
            machine=machine(),
            options=plan | msgspec.to_builtins(options),
            rows=tuple(rows),
            delivery_ratio=delivery_ratio,
            warnings=self.doubts.all(),
        )


class CpuWatch:
    """The share of a core that this process has used since the watch was made."""

    def __init__(self) -> None:
        self._cpu_s = time.process_time()
        self._at_s = time.monotonic()

    def share(self) -> float:
        """CPU seconds a second."""
        elapsed_s = time.monotonic() - self._at_s
        return (time.process_time() - self._cpu_s) / elapsed_s if elapsed_s > 0 else 0.0
