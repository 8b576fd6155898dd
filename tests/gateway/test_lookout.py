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


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


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


async def test_a_loop_that_waits_looks_when_something_nearer_is_told(clock: HandClock) -> None:
    lookout = Lookout(clock, HOUR_S)
    await soon(lookout)
    waiting = asyncio.ensure_future(soon(lookout))
    await asyncio.sleep(0)

    lookout.within(0)

    await waiting


async def test_what_is_told_during_a_look_counts_for_the_next(clock: HandClock) -> None:
    lookout = Lookout(clock, HOUR_S)
    await soon(lookout)

    lookout.within(0)

    await soon(lookout)
    await not_yet(lookout)


async def test_what_is_farther_does_not_put_off_what_is_nearer(clock: HandClock) -> None:
    lookout = Lookout(clock, HOUR_S)
    await soon(lookout)

    lookout.within(10)
    lookout.within(1000)
    clock.move(10)

    await soon(lookout)


async def test_the_look_for_what_falls_due_is_at_its_time_or_spread_behind_it(
    clock: HandClock,
) -> None:
    lookout = Lookout(clock, HOUR_S)
    await soon(lookout)

    assert not lookout.is_due(clock.now() + timedelta(seconds=10))

    clock.move(9.99)
    await not_yet(lookout)
    clock.move(0.26)
    await soon(lookout)


async def test_what_is_due_is_looked_for_and_nothing_is_due_where_there_is_nothing(
    clock: HandClock,
) -> None:
    lookout = Lookout(clock, HOUR_S)

    assert lookout.is_due(clock.now())
    assert not lookout.is_due(None)


async def test_instants_that_are_close_together_share_a_look(clock: HandClock) -> None:
    lookout = Lookout(clock, HOUR_S)
    await soon(lookout)

    assert not lookout.is_due(clock.now() + timedelta(milliseconds=1))

    clock.move(0.24)
    await not_yet(lookout)
    clock.move(0.02)
    await soon(lookout)
