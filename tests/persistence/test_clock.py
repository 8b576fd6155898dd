"""The clock: MongoDB's time, by the process's own monotonic clock."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from persistence.clock import Clock, milliseconds
from persistence.store import Store

if TYPE_CHECKING:
    from pymongo.database import Database


def test_the_time_is_aware_in_utc_and_in_whole_milliseconds() -> None:
    now = Clock().now()

    assert now.tzinfo is UTC
    assert now.microsecond % 1000 == 0


def test_a_clock_that_nobody_has_set_tells_this_machines_time() -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)

    assert before <= Clock().now() <= datetime.now(UTC) + timedelta(seconds=1)


def test_the_clock_takes_over_the_databases_time() -> None:
    clock = Clock()
    server_at = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
    asked_at_s = clock.monotonic_s()

    clock.follow(server_at, asked_at_s, asked_at_s)

    assert timedelta() <= clock.now() - server_at < timedelta(seconds=5)


def test_the_database_is_taken_to_have_answered_half_way() -> None:
    clock = Clock()
    server_at = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
    asked_at_s = clock.monotonic_s()

    clock.follow(server_at, asked_at_s - 100, asked_at_s + 300)

    assert timedelta(seconds=-100) <= clock.now() - server_at < timedelta(seconds=-95)


@pytest.mark.parametrize(
    ("off_s", "round_trip_s", "followed"),
    [
        pytest.param(0.004, 0.0, False, id="within the least correction"),
        pytest.param(0.5, 2.0, False, id="within the measurement's doubt"),
        pytest.param(-0.5, 2.0, False, id="within the doubt, backwards"),
        pytest.param(0.05, 0.01, True, id="beyond the doubt"),
        pytest.param(-0.05, 0.01, True, id="beyond the doubt, backwards"),
        pytest.param(1.5, 2.0, True, id="beyond a large doubt"),
    ],
)
def test_only_a_difference_beyond_the_measurements_doubt_is_followed(
    off_s: float, round_trip_s: float, followed: bool
) -> None:
    clock = Clock()
    origin = datetime(2031, 5, 6, tzinfo=UTC)
    start_s = clock.monotonic_s()
    clock.follow(origin, start_s, start_s)
    offset_before_s = clock._offset_s

    asked_at_s = start_s + 10
    middle = origin + timedelta(seconds=10 + round_trip_s / 2)
    clock.follow(middle + timedelta(seconds=off_s), asked_at_s, asked_at_s + round_trip_s)

    moved_s = clock._offset_s - offset_before_s
    assert moved_s == pytest.approx(off_s if followed else 0.0, abs=1e-4)


def test_a_shift_moves_the_clock_on_and_stays_when_the_database_is_asked_again() -> None:
    clock = Clock()
    before = clock.now()

    clock.shift(3600)
    after_shift = clock.now()
    asked_at_s = clock.monotonic_s()
    clock.follow(before, asked_at_s, asked_at_s)

    assert timedelta(seconds=3600) <= after_shift - before < timedelta(seconds=3605)
    assert timedelta(seconds=3600) <= clock.now() - before < timedelta(seconds=3605)


def test_time_doesnt_stand_still() -> None:
    clock = Clock()
    first = clock.now()

    while (later := clock.now()) == first:
        pass

    assert later > first


def test_spans_are_in_whole_milliseconds() -> None:
    assert milliseconds(0.0015) == timedelta(milliseconds=2)
    assert milliseconds(5) == timedelta(seconds=5)
    assert milliseconds(1.0004) == timedelta(seconds=1)


@pytest.mark.parametrize("zone", ["UTC", "Asia/Taipei", "America/New_York"])
async def test_a_store_that_opens_sets_a_wrong_clock_right_in_any_time_zone(
    zone: str,
    monkeypatch: pytest.MonkeyPatch,
    mongodb_url: str,
    worlds_database: Database[Any],
) -> None:
    """MongoDB's time once came back without a zone, and was read in the machine's own."""
    clock = Clock()
    clock._offset_s += 7200
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        store = await Store.open(mongodb_url, worlds_database.name, clock)
        await store.close()
    finally:
        monkeypatch.undo()
        time.tzset()

    assert abs(clock.now() - datetime.now(UTC)) < timedelta(seconds=5)
