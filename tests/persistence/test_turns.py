"""Turns: first come, first served, no Session more than its share, and one too many is told so."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from persistence.errors import StoreOverloaded
from persistence.turns import Lane, Turns
from tests.gateway.harness import until
from tests.persistence.test_damage import Acknowledging
from tests.persistence.world import code_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from tests.persistence.world import Node, World


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


@asynccontextmanager
async def flood(*calls: Coroutine[Any, Any, Any]) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Calls that all come at once; they end with the block."""
    futures = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(0)
    yield futures
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)


def refused_at_once(futures: list[asyncio.Task[Any]]) -> int:
    return sum(isinstance(each.exception(), StoreOverloaded) for each in futures if each.done())


async def test_a_flood_of_views_fills_its_own_line_and_no_command_waits_for_it(
    world: World,
) -> None:
    node = await world.add_node(concurrency=2, queue_size=10)
    session = await world.session()
    goal_id = await world.invited(session)
    views: list[Coroutine[Any, Any, Any]] = [node.goals.goal(goal_id) for _ in range(20)]
    views += [node.sessions.session(str(session.id)) for _ in range(20)]

    async with flood(*views) as crowd:
        refused = refused_at_once(crowd)
        answer = await world.invite(session, "cleo", node=node)

    # One is read, ten wait.
    assert refused == 29
    assert code_of(answer) == "ok"


async def test_what_sockets_wait_for_is_read_in_turn_however_many_they_are(world: World) -> None:
    node = await world.add_node(concurrency=2, queue_size=10)
    await world.invited(await world.session())

    snapshots = await asyncio.gather(*(node.goals.open_goals("ben") for _ in range(40)))
    live = await asyncio.gather(*(node.sessions.live_session_of("anna") for _ in range(40)))

    assert [len(goals) for goals in snapshots] == [1] * 40
    assert None not in live


async def test_snapshots_of_thousands_leave_connections_to_commands(world: World) -> None:
    """As many are read at once as there are places for, and not as the pool has connections."""
    node = await world.add_node(concurrency=4)
    session = await world.session()

    async with (
        node.store.turns.turn(Lane.VIEWS),
        node.store.turns.turn(Lane.VIEWS),
        flood(*(node.goals.open_goals("ben") for _ in range(100))) as crowd,
    ):
        answer = await world.invite(session, node=node)
        read = [one for one in crowd if one.done()]

    assert code_of(answer) == "ok"
    assert read == []


async def test_a_timer_does_not_wait_behind_a_flood_of_commands(world: World) -> None:
    node = await world.add_node(concurrency=1, queue_size=4)
    session = await world.session()
    await world.invited(session)
    world.clock.shift(60)

    async with node.store.turns.turn(), flood(*(wait_for(node) for _ in range(4))):
        with pytest.raises(StoreOverloaded):
            await world.invite(session, "cleo", node=node)
        answers = await node.fire_due()

    assert [code_of(answer) for answer in answers] == ["ok"]


async def test_a_timer_waits_for_its_session_behind_however_many(world: World) -> None:
    node = await world.add_node(queue_size=4)
    session = await world.session()
    await world.invited(session)
    world.clock.shift(60)

    async with (
        node.store.turns.session_turn(session.id),
        flood(world.invite(session, "cleo", node=node)),
    ):
        with pytest.raises(StoreOverloaded):
            await world.invite(session, "dora", node=node)
        firing = asyncio.ensure_future(node.fire_due())
        await until(lambda: firing.done() or node.store.turns.waiting == 2)
        assert not firing.done()

    assert [code_of(answer) for answer in await firing] == ["ok"]


@pytest.mark.parametrize("command", ["go live", "hold"])
async def test_whatever_commands_the_database_waits_for_its_turn(
    world: World, command: str
) -> None:
    node = await world.add_node(port=Acknowledging(), concurrency=1, queue_size=1)
    session = await world.session()

    async with node.store.turns.turn(), flood(wait_for(node)):
        call = (
            node.sessions.create("other", [])
            if command == "go live"
            else world.invite(session, node=node)
        )
        with pytest.raises(StoreOverloaded):
            await call

    # No hold was begun, which would have to be given back.
    assert world.raw["escrow_calls"].count_documents({}) == 0


async def wait_for(node: Node) -> None:
    async with node.store.turns.turn():
        pass
