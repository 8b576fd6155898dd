"""When a loop looks again, by a clock that a test moves."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from gateway.lookout import Lookout
from persistence.clock import Clock

HOUR_S = 3600.0


class HandClock(Clock):
    """Moves only when it is told to, in both of its times."""

    __slots__ = ("at_s",)

    def __init__(self) -> None:
        super().__init__()
        self.at_s = 1000.0

    def monotonic_s(self) -> float:  # type: ignore[override]
        return self.at_s

    def move(self, seconds: float) -> None:
        self.at_s += seconds
        self.shift(seconds)


async def soon(lookout: Lookout) -> None:
    """Waits for the next look, which is to come at once."""
    async with asyncio.timeout(10):
        await lookout.wait()


async def not_yet(lookout: Lookout) -> None:
    """However long one waits, the clock stands and no look comes."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await lookout.wait()


async def between(lookout: Lookout, clock: HandClock, early_s: float, late_s: float) -> None:
    """The next look is no sooner than `early_s` from now, and has come by `late_s`."""
    clock.move(early_s)
    await not_yet(lookout)
    clock.move(late_s - early_s)
    await soon(lookout)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def looked(clock: HandClock) -> Lookout:
    """One whose first look is over."""
    lookout = Lookout(clock, HOUR_S)
    await soon(lookout)
    return lookout


async def test_the_first_look_is_at_once_and_the_next_after_the_interval(clock: HandClock) -> None:
    lookout = Lookout(clock, HOUR_S)

    await soon(lookout)
    clock.move(HOUR_S - 1)
    lookout.within(1)
    clock.move(1)
    await soon(lookout)
    await not_yet(lookout)
    clock.move(HOUR_S)
    await soon(lookout)


async def test_a_loop_that_waits_looks_when_something_nearer_is_told(looked: Lookout) -> None:
    waiting = asyncio.ensure_future(soon(looked))
    await asyncio.sleep(0)

    looked.within(0)

    await waiting


async def test_what_is_told_during_a_look_counts_for_the_next(looked: Lookout) -> None:
    looked.within(0)

    await soon(looked)
    await not_yet(looked)


async def test_what_is_farther_does_not_put_off_what_is_nearer(
    looked: Lookout, clock: HandClock
) -> None:
    looked.within(10)
    looked.within(1000)
    clock.move(10)

    await soon(looked)


async def test_the_look_for_what_falls_due_is_at_its_time_or_spread_behind_it(
    looked: Lookout, clock: HandClock
) -> None:
    assert not looked.is_due(clock.now() + timedelta(seconds=10))

    await between(looked, clock, 9.99, 10.25)


async def test_what_is_due_is_looked_for_and_nothing_is_due_where_there_is_nothing(
    clock: HandClock,
) -> None:
    lookout = Lookout(clock, HOUR_S)

    assert lookout.is_due(clock.now())
    assert not lookout.is_due(None)


async def test_instants_that_are_close_together_share_a_look(
    looked: Lookout, clock: HandClock
) -> None:
    assert not looked.is_due(clock.now() + timedelta(milliseconds=1))

    await between(looked, clock, 0.24, 0.26)
