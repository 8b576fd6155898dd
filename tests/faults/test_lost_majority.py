"""A primary that has lost its majority: what it says may be undone, so nobody is told of it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from pymongo import MongoClient

from persistence.embedded_mongod import mongod_path, start_replica_set
from persistence.errors import StoreUnavailable
from persistence.escrow_calls import EscrowCalls
from persistence.intents import Done
from statemachine.goal import CommandName, GoalState, Role
from tests.conftest import require
from tests.faults.judged_world import Acknowledging, JudgedWorld
from tests.faults.trouble import ELECTED_WITHIN_S, choose_primary
from tests.persistence.world import goal_id_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from persistence.documents import EscrowCall
    from persistence.embedded_mongod import ReplicaSet
    from persistence.embedded_process import ServerGuard
    from persistence.escrow_port import EscrowAnswer
    from persistence.intents import Answer
    from tests.persistence.world import World

T = TypeVar("T")

DEADLINE_S = 1.0
# What a busy machine adds to it is not the product's.
ANSWER_WITHIN_S = DEADLINE_S + 2.0

pytestmark = pytest.mark.timeout(300)


class Partition:
    """Three members; the old primary can be cut off, and later find out what it missed.

    The others stand still while it is alone, and it stands still while they choose another: to
    either side that looks as a cut network does.
    """

    def __init__(self, members: ReplicaSet) -> None:
        primary = members.primary()
        assert primary is not None
        self.url = members.url
        self.old_primary = primary
        self.others = [member for member in members.members if member is not primary]

    def leave_alone(self) -> None:
        for member in self.others:
            member.process.pause()

    def go_on_without_it(self) -> None:
        """Lets the others choose a primary of theirs."""
        self.old_primary.process.pause()
        for member in self.others:
            member.process.resume()
        choose_primary(self.others)

    def mend(self) -> None:
        for member in (self.old_primary, *self.others):
            member.process.resume()


@pytest.fixture
def partition(victim_guard: ServerGuard) -> Iterator[Partition]:
    require(mongod_path(), "there is no mongod, neither on PATH nor in a wheel")
    members = start_replica_set(victim_guard, 3)
    partition = Partition(members)
    with MongoClient[dict[str, Any]](members.url) as client:
        config = client.admin.command("replSetGetConfig")["config"]
        config["version"] += 1
        # It believes for so long that it is the primary still.
        config["settings"] |= {"electionTimeoutMillis": 20_000, "catchUpTimeoutMillis": 0}
        config["settings"] |= {"heartbeatTimeoutSecs": 1}
        client.admin.command("replSetReconfig", config)
    yield partition
    partition.mend()


@pytest.fixture
async def world(partition: Partition) -> AsyncIterator[JudgedWorld]:
    with MongoClient[dict[str, Any]](partition.url, tz_aware=True) as client:
        world = JudgedWorld(partition.url, client["majority"])
        await world.add_node(deadline_s=DEADLINE_S)
        yield world
        partition.mend()
        assert await world.verdict() == []
        await world.close()


async def agreed_in_time(
    world: World, goal_id: str, streamer: str, request_id: str | None
) -> Answer | None:
    """One agreement; none when it was told that nobody knows."""
    asked_at_s = time.monotonic()
    try:
        return await world.ask(CommandName.AGREE, goal_id, by=streamer, request_id=request_id)
    except StoreUnavailable:
        return None
    finally:
        assert time.monotonic() - asked_at_s < ANSWER_WITHIN_S


async def until_answered(ask: Callable[[], Awaitable[T]]) -> T:
    """Asks until somebody knows."""
    give_up_at_s = time.monotonic() + ELECTED_WITHIN_S
    while True:
        try:
            return await ask()
        except StoreUnavailable:
            assert time.monotonic() < give_up_at_s


async def test_a_commit_that_a_majority_has_not_seen_is_told_to_nobody(
    world: World, partition: Partition
) -> None:
    """Asked again, it once was answered from what the old primary alone had written down."""
    goals = {
        await world.invited(await world.session(streamer)): (streamer, request_id)
        for streamer, request_id in (("anna", "one"), ("berta", None))
    }

    async def agree(goal_id: str) -> Answer | None:
        streamer, request_id = goals[goal_id]
        return await agreed_in_time(world, goal_id, streamer, request_id)

    partition.leave_alone()
    told = [await agree(goal_id) for goal_id in [*goals] * 2]
    with MongoClient[dict[str, Any]](partition.old_primary.url, tz_aware=True) as alone:
        states = [row["state"] for row in alone["majority"]["goals"].find()]
    await asyncio.to_thread(partition.go_on_without_it)
    partition.mend()

    assert states == ["agreed"] * 2, "the old primary has committed them, for itself"
    assert told == [None] * 4
    give_up_at_s = time.monotonic() + ELECTED_WITHIN_S
    for goal_id in goals:
        while (agreed := await agree(goal_id)) is None:
            assert time.monotonic() < give_up_at_s
        if goals[goal_id][1] is not None:
            assert isinstance(agreed, Done), agreed
        row = world.goal_row(goal_id)
        assert (row["state"], row["version"]) == ("agreed", 2)
        assert world.movements(goal_id) == ["hold"]


async def test_what_a_majority_has_not_seen_is_shown_to_nobody(
    world: World, partition: Partition
) -> None:
    session = await world.session("anna")
    goal_id = await world.invited(session)
    partition.leave_alone()
    assert await agreed_in_time(world, goal_id, "anna", None) is None

    with MongoClient[dict[str, Any]](partition.old_primary.url, tz_aware=True) as alone:
        assert [row["state"] for row in alone["majority"]["goals"].find()] == ["agreed"]
    shown = await world.node.goals.goal(goal_id)
    [listed] = await world.node.goals.open_goals("anna")
    seen = await world.node.sessions.session(str(session.id))

    assert shown is not None
    assert seen is not None
    assert {shown.state, listed.state} == {GoalState.INVITED}
    assert seen.status.exclusive_to == []


async def test_what_a_majority_has_not_seen_is_delivered_by_nobody(
    world: World, partition: Partition
) -> None:
    """Its news, and the payment call, of a decision that the others may never hear of."""
    port = Acknowledging()
    node = await world.add_node(port=port, deadline_s=DEADLINE_S)
    # It does everything from here on, and is judged.
    world.nodes.reverse()
    calls = EscrowCalls(node.store, node.goals, port, timeout_s=1, give_up_s=600)
    goal_id = await world.invited(await world.session("anna"))
    partition.leave_alone()
    with pytest.raises(StoreUnavailable):
        await world.ask(CommandName.DISAGREE, goal_id, by="anna")
    with MongoClient[dict[str, Any]](partition.old_primary.url, tz_aware=True) as alone:
        assert [row["state"] for row in alone["majority"]["goals"].find()] == ["declined"]

    world.clock.shift(30)
    with pytest.raises(StoreUnavailable):
        await node.outbox.claim_due(10)
    with pytest.raises(StoreUnavailable):
        await calls.claim_due(10)

    partition.mend()
    world.clock.shift(30)
    [call] = await calls.claim_due(10)
    await calls.say(call)
    assert world.goal_row(goal_id)["state"] == "ended"


async def test_a_session_whose_end_a_majority_has_not_seen_has_ended_for_nobody(
    world: JudgedWorld, partition: Partition
) -> None:
    """Asked again, its streamer once was told what the old primary alone had written down."""
    session = await world.session("anna")
    await world.invited(session)
    partition.leave_alone()

    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await world.end(session)

    with MongoClient[dict[str, Any]](partition.old_primary.url, tz_aware=True) as alone:
        assert [row["active"] for row in alone["majority"]["sessions"].find()] == [False]
    partition.mend()
    await until_answered(lambda: world.end(session))
    assert world.session_row(session)["active"] is False


async def test_an_invitation_that_a_majority_has_not_seen_answers_no_request(
    world: JudgedWorld, partition: Partition
) -> None:
    """The answer to its request, found inside a transaction, once was given from there."""

    class Parting(Acknowledging):
        """The majority is lost after the hold was written down and before the invitation is."""

        async def ask(self, call: EscrowCall, within_s: float) -> EscrowAnswer:
            partition.leave_alone()
            return await super().ask(call, within_s)

    port = Parting()
    node = await world.add_node(port=port, deadline_s=DEADLINE_S)
    # It does everything from here on, and is judged.
    world.nodes.reverse()
    session = await world.session("anna")
    with pytest.raises(StoreUnavailable):
        await world.invite(session, request_id="r")
    with MongoClient[dict[str, Any]](partition.old_primary.url, tz_aware=True) as alone:
        [goal] = alone["majority"]["goals"].find()
    # It has expired, so that nothing but its answer stands against a second one.
    world.clock.shift(world.limits.invitation_ttl_s)
    with pytest.raises(StoreUnavailable):
        await world.ask(CommandName.EXPIRE, str(goal["_id"]), by=None, role=Role.TIMER)

    with pytest.raises(StoreUnavailable):
        await world.invite(session, request_id="r")

    partition.mend()
    answer = await until_answered(lambda: world.invite(session, request_id="r"))
    assert goal_id_of(answer) == str(goal["_id"])
    calls = EscrowCalls(node.store, node.goals, Acknowledging(), timeout_s=1, give_up_s=600)
    [release] = await until_answered(lambda: calls.claim_due(10))
    await calls.say(release)
