from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.wheel import BUCKETS, Wheel


class Item:
    """Something with a deadline."""

    def __init__(self) -> None:
        self.bucket = -1


def test_an_item_comes_once_its_deadline_has_passed_and_only_once() -> None:
    wheel: Wheel[Item] = Wheel(1.0, 100.0)
    item = Item()
    wheel.put(item, 103.0)

    assert wheel.advance(102.9) == []
    assert wheel.advance(103.0) == [item]
    assert wheel.advance(110.0) == []


def test_a_new_deadline_takes_the_place_of_the_old_one() -> None:
    wheel: Wheel[Item] = Wheel(1.0, 0.0)
    item = Item()
    wheel.put(item, 2.0)
    wheel.put(item, 5.0)

    assert wheel.advance(4.0) == []
    assert wheel.advance(5.0) == [item]


def test_a_removed_item_does_not_come_and_may_be_removed_again() -> None:
    wheel: Wheel[Item] = Wheel(1.0, 0.0)
    item = Item()
    wheel.put(item, 2.0)
    wheel.remove(item)
    wheel.remove(item)

    assert wheel.advance(1000.0) == []


def test_a_deadline_that_has_passed_already_comes_with_the_next_tick() -> None:
    wheel: Wheel[Item] = Wheel(1.0, 100.0)
    item = Item()
    wheel.put(item, 50.0)

    assert wheel.advance(101.0) == [item]


def test_a_deadline_beyond_the_ring_comes_when_the_ring_has_turned() -> None:
    wheel: Wheel[Item] = Wheel(1.0, 0.0)
    item = Item()
    wheel.put(item, 10_000.0)

    assert wheel.advance(BUCKETS - 2) == []
    assert wheel.advance(BUCKETS - 1) == [item]


def test_after_a_stall_of_hours_everything_is_due_at_once() -> None:
    wheel: Wheel[Item] = Wheel(0.25, 0.0)
    items = [Item() for _ in range(300)]
    for number, item in enumerate(items):
        wheel.put(item, number / 10)

    assert set(wheel.advance(50_000.0)) == set(items)


@given(
    start=st.floats(0, 1e6),
    tick=st.sampled_from([0.01, 0.25, 1.0]),
    waits=st.lists(st.floats(0, 100), min_size=1, max_size=20),
)
def test_no_item_comes_early_or_more_than_a_tick_late(
    start: float, tick: float, waits: list[float]
) -> None:
    wheel: Wheel[Item] = Wheel(tick, start)
    due = {}
    for wait in waits:
        item = Item()
        due[item] = start + min(wait, tick * (BUCKETS - 2))
        wheel.put(item, due[item])

    now = start
    while due:
        now += tick
        for item in wheel.advance(now):
            assert now >= due[item] - 1e-6
            assert now <= due[item] + 2 * tick + 1e-6
            del due[item]
        assert now < start + tick * (BUCKETS + 2)
