"""Instants as they are written for people and programs outside."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

from statemachine.instants import rfc3339


def test_an_instant_is_written_in_utc_with_milliseconds() -> None:
    assert rfc3339(datetime(2026, 11, 22, 17, 25, 0, 123_000, UTC)) == "2026-11-22T17:25:00.123Z"


def test_whole_seconds_keep_their_milliseconds() -> None:
    assert rfc3339(datetime(2026, 1, 2, 3, 4, 5, 0, UTC)) == "2026-01-02T03:04:05.000Z"


def test_other_time_zones_are_turned_into_utc() -> None:
    taipei = timezone(timedelta(hours=8))

    assert rfc3339(datetime(2026, 1, 1, 1, 0, tzinfo=taipei)) == "2025-12-31T17:00:00.000Z"


def test_microseconds_are_cut_off_and_never_rounded_up() -> None:
    assert rfc3339(datetime(2026, 1, 1, 0, 0, 0, 999_999, UTC)) == "2026-01-01T00:00:00.999Z"
