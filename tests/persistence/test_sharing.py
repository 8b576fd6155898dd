"""Sharing: nobody waits for company, nothing is done twice, one's failure is not another's."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pymongo
import pytest

from persistence import sharing
from persistence.errors import StoreOverloaded, StoreUnavailable
from persistence.sharing import Apart, Shared

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass
class Line:
    """Bounds of those who wait."""

    most: float
    patience_s: float
    waiting: int = 0


class Work:
    """Goes that end when the test says so, and what each was asked to do."""

    def __init__(self, at_once: int = 1, queue: Line | None = None) -> None:
        self.goes: list[tuple[int, ...]] = []
        self.apart: set[int] = set()
        self.fails: set[int] = set()
        self.overloaded: set[int] = set()
        self.ends = asyncio.Semaphore(0)
        self.second = asyncio.Event()
        self.shared = Shared(self.together, at_once, queue)

    async def together(self, items: Sequence[int]) -> tuple[int, ...]:
        self.goes.append(tuple(items))
        if len(self.goes) == 2:
            self.second.set()
        await self.ends.acquire()
        if len(items) > 1 and self.apart & set(items):
            raise Apart
        if self.fails & set(items):
            raise ValueError(items)
        if self.overloaded & set(items):
            raise StoreOverloaded("no place")
        return tuple(items)

    def ask(self, *items: int) -> list[asyncio.Task[tuple[int, ...]]]:
        return [asyncio.create_task(self.shared.do(item)) for item in items]

    async def ask_in_turn(self, *items: int) -> list[asyncio.Task[tuple[int, ...]]]:
        """Asks for each when the one before has begun, or waits."""
        asked = []
        for item in items:
            asked += self.ask(item)
            await turned()
        return asked

    def end(self, goes: int) -> None:
        for _ in range(goes):
            self.ends.release()


async def turned() -> None:
    """Lets all tasks come as far as they can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_one_alone_is_done_at_once() -> None:
    work = Work()
    work.end(1)

    assert await work.shared.do(1) == (1,)


async def test_those_who_come_meanwhile_share_the_next_go() -> None:
    work = Work()
    asked = await work.ask_in_turn(1, 2, 3, 4)
    assert work.goes == [(1,)]

    work.end(2)

    assert await asyncio.gather(*asked) == [(1,), (2, 3, 4), (2, 3, 4), (2, 3, 4)]
    assert work.goes == [(1,), (2, 3, 4)]


async def test_those_who_come_in_one_turn_of_the_loop_share_the_first_go() -> None:
    work = Work()
    asked = work.ask(1, 2, 3)
    work.end(1)

    assert await asyncio.gather(*asked) == [(1, 2, 3)] * 3


async def test_as_many_goes_are_under_way_as_are_allowed() -> None:
    work = Work(at_once=2)
    asked = await work.ask_in_turn(1, 2, 3, 4)
    assert work.goes == [(1,), (2,)]

    work.end(1)
    await turned()
    assert work.goes == [(1,), (2,), (3, 4)]

    work.end(2)
    await asyncio.gather(*asked)


async def test_a_go_has_sixteen_items_at_most() -> None:
    work = Work()
    asked = await work.ask_in_turn(*range(40))

    work.end(4)
    await asyncio.gather(*asked)

    assert [len(go) for go in work.goes] == [1, 16, 16, 7]
    assert [item for go in work.goes for item in go] == list(range(40))


@pytest.mark.parametrize(("count", "sizes"), [(13, [1, 1, 8, 3]), (24, [1, 1, 12, 10])])
async def test_of_many_a_go_leaves_the_next_one_its_share(count: int, sizes: list[int]) -> None:
    work = Work(at_once=2)
    asked = await work.ask_in_turn(*range(count))

    work.end(4)
    await asyncio.gather(*asked)

    assert [len(go) for go in work.goes] == sizes


async def test_what_can_not_be_done_together_is_done_one_by_one() -> None:
    work = Work()
    work.apart = {3}
    asked = await work.ask_in_turn(1, 2, 3, 4)

    work.end(5)

    assert await asyncio.gather(*asked) == [(1,), (2,), (3,), (4,)]
    assert work.goes[:2] == [(1,), (2, 3, 4)]
    assert sorted(work.goes[2:]) == [(2,), (3,), (4,)]


async def test_one_that_fails_alone_fails_nobody_else() -> None:
    work = Work()
    work.apart = work.fails = {3}
    asked = await work.ask_in_turn(1, 2, 3, 4)
    work.end(5)

    first, second, third, fourth = await asyncio.gather(*asked, return_exceptions=True)

    assert (first, second, fourth) == ((1,), (2,), (4,))
    assert isinstance(third, ValueError)


async def test_who_shared_a_go_that_failed_is_told_that_it_is_not_known() -> None:
    work = Work()
    work.fails = {2}
    asked = await work.ask_in_turn(1, 2, 3)
    work.end(2)

    first, follower, leader = await asyncio.gather(*asked, return_exceptions=True)

    assert first == (1,)
    assert isinstance(leader, ValueError)
    assert isinstance(follower, StoreUnavailable)


async def test_who_shared_a_go_that_found_no_place_is_told_that_nothing_was_done() -> None:
    work = Work()
    work.overloaded = {2}
    asked = await work.ask_in_turn(1, 2, 3)
    work.end(2)

    first, *others = await asyncio.gather(*asked, return_exceptions=True)

    assert first == (1,)
    assert [type(other) for other in others] == [StoreOverloaded] * 2


async def test_one_more_than_may_wait_is_refused_at_once() -> None:
    work = Work(queue=Line(most=2, patience_s=3600))
    asked = await work.ask_in_turn(1, 2, 3, 4)

    with pytest.raises(StoreOverloaded):
        await asked.pop()
    work.end(2)
    assert await asyncio.gather(*asked) == [(1,), (2, 3), (2, 3)]


async def test_where_there_are_bounds_who_waits_too_long_is_refused_and_never_done() -> None:
    line = Line(most=10, patience_s=0.05)
    work = Work(queue=line)
    asked = await work.ask_in_turn(1, 2, 3)

    for follower in asked[1:]:
        with pytest.raises(StoreOverloaded):
            await follower
    assert work.shared.waiting == line.waiting == 0
    work.end(2)
    assert await asked[0] == (1,)
    assert await work.shared.do(4) == (4,)
    assert work.goes == [(1,), (4,)]


async def test_a_caller_who_leaves_while_he_waits_is_left_out() -> None:
    work = Work()
    asked = await work.ask_in_turn(1, 2, 3, 4)
    asked[1].cancel()
    asked[3].cancel()
    await turned()

    work.end(2)

    assert await asked[2] == (3,)
    assert work.goes == [(1,), (3,)]


async def test_who_leaves_when_a_go_was_just_given_to_him_leaves_it_to_the_next() -> None:
    work = Work()
    asked = await work.ask_in_turn(1, 2, 3)
    work.end(1)
    # The first go ends in this turn of the loop, so the last caller is told and gone in one.
    asyncio.get_running_loop().call_soon(asked[2].cancel)
    await turned()
    assert work.goes == [(1,), (2,)]

    work.end(2)

    assert await asked[1] == (2,)
    assert await work.shared.do(4) == (4,)


async def test_who_leaves_a_go_under_way_does_not_undo_it_for_the_others() -> None:
    work = Work()
    asked = await work.ask_in_turn(1, 2, 3, 4)
    work.end(1)
    await turned()
    asked[2].cancel()
    await turned()

    work.end(1)

    assert await asked[1] == await asked[3] == (2, 3, 4)


async def test_when_he_who_leads_leaves_the_others_are_told() -> None:
    work = Work()
    asked = await work.ask_in_turn(1, 2, 3)
    work.end(1)
    await turned()

    asked[2].cancel()

    with pytest.raises(StoreUnavailable, match="shared"):
        await asked[1]


async def test_the_last_to_come_leads_since_he_has_most_of_his_time_left() -> None:
    led_by: list[asyncio.Task[object] | None] = []

    async def together(items: Sequence[int]) -> int:
        led_by.append(asyncio.current_task())
        return len(items)

    shared = Shared(together, at_once=1)
    asked = [asyncio.create_task(shared.do(item)) for item in range(3)]

    assert await asyncio.gather(*asked) == [3, 3, 3]
    assert led_by == [asked[2]]


async def test_he_leads_who_has_most_of_his_time_left_whoever_came_last() -> None:
    """A go fails for all when its leader runs out of time."""
    led_by: list[asyncio.Task[object] | None] = []

    async def together(items: Sequence[int]) -> int:
        led_by.append(asyncio.current_task())
        return len(items)

    shared = Shared(together, at_once=1)

    async def ask(item: int, left_s: float) -> int:
        with pymongo.timeout(left_s):
            return await shared.do(item)

    asked = [asyncio.create_task(ask(item, left_s)) for item, left_s in enumerate((1, 30, 2))]

    assert await asyncio.gather(*asked) == [3, 3, 3]
    assert led_by == [asked[1]]


async def test_nobody_waits_for_long_behind_those_who_have_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sharing, "_PATIENCE_S", 0.1)
    work = Work()
    [stuck] = await work.ask_in_turn(1)
    *left, stays = await work.ask_in_turn(*range(2, 19))
    for each in left:
        each.cancel()

    async with asyncio.timeout(5):
        await work.second.wait()

    assert work.goes == [(1,), (18,)]
    work.end(2)
    assert await stuck == (1,)
    assert await stays == (18,)


async def test_nobody_waits_for_long_behind_a_go_that_is_stuck() -> None:
    work = Work()
    asked = await work.ask_in_turn(1, 2, 3)
    assert work.goes == [(1,)]

    async with asyncio.timeout(5):
        await work.second.wait()
    assert work.goes == [(1,), (2, 3)]

    work.end(2)
    assert await asyncio.gather(*asked) == [(1,), (2, 3), (2, 3)]
    work.end(1)
    assert await work.shared.do(4) == (4,)


async def test_every_item_of_many_is_done_once() -> None:
    done: list[int] = []

    async def together(items: Sequence[int]) -> int:
        await asyncio.sleep(0)
        if len(items) > 1 and any(item % 7 == 0 for item in items):
            raise Apart
        done.extend(items)
        return len(items)

    shared = Shared(together, at_once=2)

    async def caller(first: int) -> None:
        for item in range(first, first + 50):
            await shared.do(item)

    await asyncio.gather(*(caller(100 * number) for number in range(20)))

    assert sorted(done) == sorted(100 * n + item for n in range(20) for item in range(50))
