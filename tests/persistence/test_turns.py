"""Turns: first come, first served, no Session more than its share, and one too many is told so."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from persistence.errors import StoreOverloaded
from persistence.turns import Turns
from tests.persistence.world import code_of

if TYPE_CHECKING:
    from tests.persistence.world import World


def turns(concurrency: int = 1, queue_size: int = 100) -> Turns:
    return Turns(concurrency, queue_size, patience_s=20.0)


async def test_one_more_than_the_queue_holds_is_refused_at_once() -> None:
    queue = turns(queue_size=2)
    release = asyncio.Event()

    async def hold() -> None:
        async with queue.turn():
            await release.wait()

    holders = [asyncio.ensure_future(hold()) for _ in range(3)]
    await asyncio.sleep(0)

    with pytest.raises(StoreOverloaded):
        async with queue.turn():
            pass
    release.set()
    await asyncio.gather(*holders)
    async with queue.turn():
        pass


async def test_turns_are_given_in_order_of_arrival() -> None:
    queue = turns(concurrency=2)
    order: list[int] = []

    async def take(number: int) -> None:
        async with queue.turn():
            order.append(number)
            await asyncio.sleep(0)

    await asyncio.gather(*(take(number) for number in range(20)))

    assert order == list(range(20))


async def test_no_more_run_at_once_than_there_are_places() -> None:
    queue = turns(concurrency=3)
    inside = most = 0

    async def take() -> None:
        nonlocal inside, most
        async with queue.turn():
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(take() for _ in range(20)))

    assert most == 3


async def test_who_gives_up_waiting_leaves_no_gap_in_a_queue() -> None:
    queue = turns(concurrency=2, queue_size=4)
    async with queue.turn(), queue.session_turn("hot"):
        for _ in range(5):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0), queue.turn():
                    pass
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0), queue.session_turn("hot"):
                    pass

    async with queue.turn(), queue.session_turn("hot"):
        pass
    assert queue.waiting == 0


async def test_a_session_is_busy_while_somebody_has_it_and_forgotten_afterwards() -> None:
    queue = turns(concurrency=2)

    async with queue.session_turn("a"):
        busy = [queue.session_busy("a"), queue.session_busy("b")]

    assert busy == [True, False]
    assert not queue.session_busy("a")
    assert len(queue._lines) == 0


async def test_who_waits_too_long_for_a_session_is_one_too_many() -> None:
    queue = Turns(concurrency=2, queue_size=100, patience_s=0.05)

    async with queue.session_turn("hot"):
        with pytest.raises(StoreOverloaded):
            async with queue.session_turn("hot"):
                pass


async def test_commands_over_the_queue_are_refused_and_the_others_done(world: World) -> None:
    node = await world.add_node(concurrency=1, queue_size=3)
    sessions = [await world.session(f"streamer{number}") for number in range(12)]

    answers = await asyncio.gather(
        *(world.invite(session, node=node) for session in sessions), return_exceptions=True
    )

    refused = [answer for answer in answers if isinstance(answer, StoreOverloaded)]
    done = len(answers) - len(refused)
    assert refused
    assert done >= 4
    assert world.raw["goals"].count_documents({}) == done


async def test_a_hot_session_takes_a_quarter_of_the_queue_and_others_are_served(
    world: World,
) -> None:
    node = await world.add_node(queue_size=40)
    hot = await world.session("hot")
    others = [await world.session(f"streamer{number}") for number in range(50)]

    async with node.store.turns.session_turn(hot.id):
        calls = [
            asyncio.ensure_future(world.invite(hot, f"viewer{number}", node=node))
            for number in range(12)
        ]
        await asyncio.sleep(0)
        waiting = [call for call in calls if not call.done()]
        refused = [call.exception() for call in calls if call.done()]
        elsewhere = [await world.invite(session, node=node) for session in others]

    assert len(waiting) == 10
    assert [type(error) for error in refused] == [StoreOverloaded] * 2
    assert {code_of(answer) for answer in elsewhere} == {"ok"}
    assert {code_of(answer) for answer in await asyncio.gather(*waiting)} == {"ok"}
    assert code_of(await world.invite(hot, "late", node=node)) == "ok"


async def test_the_places_of_a_full_queue_are_not_taken_by_one_session(world: World) -> None:
    """A thousand callers of one Session, and another Session asks while they wait."""
    node = await world.add_node()
    hot, other = await world.session("hot"), await world.session("other")

    async with node.store.turns.session_turn(hot.id):
        crowd = [
            asyncio.ensure_future(world.invite(hot, f"viewer{number}", node=node))
            for number in range(1000)
        ]
        await asyncio.sleep(0)
        answer = await world.invite(other, node=node)
        for call in crowd:
            call.cancel()
        ends = await asyncio.gather(*crowd, return_exceptions=True)

    assert code_of(answer) == "ok"
    assert sum(isinstance(end, StoreOverloaded) for end in ends) == 750
    assert node.store.turns.waiting == 0
