"""Pauses between attempts: longer each time, bounded, spread."""

from __future__ import annotations

import pytest

from gateway.backoff import Backoff


def test_each_pause_is_twice_the_one_before_up_to_the_limit_and_short_again_after_a_success() -> (
    None
):
    backoff = Backoff(1.0, 5.0)

    pauses_s = [backoff.next_s() for _ in range(5)]
    backoff.begin_again()
    pauses_s.append(backoff.next_s())

    for pause_s, whole_s in zip(pauses_s, (1, 2, 4, 5, 5, 1), strict=True):
        assert whole_s / 2 <= pause_s <= whole_s


def test_many_who_begin_together_come_at_different_times() -> None:
    pauses_s = [Backoff(1.0, 1.0).next_s() for _ in range(100)]

    assert max(pauses_s) - min(pauses_s) > 0.25
    assert sum(pauses_s) / 100 == pytest.approx(0.75, abs=0.1)
