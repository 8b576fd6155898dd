"""Shared transactions: many commands at once, each as if it were alone."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from persistence.errors import StoreDamaged
from persistence.faults import Step
from persistence.intents import Done
from persistence.store import Store
from persistence.transactions import Transactions, Writes
from statemachine.goal import CommandName
from tests.persistence.world import World, code_of, goal_id_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from persistence.documents import Session
    from persistence.intents import Answer
    from tests.persistence.world import Steps

STREAMERS = [f"streamer{number}" for number in range(8)]


@pytest.fixture
def transactions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the transactions that are begun."""
    begun: list[int] = []
    transact = Store.transact

    async def counted(self: Store, body: Callable[[], Awaitable[object]]) -> object:
        begun.append(1)
        return await transact(self, body)

    monkeypatch.setattr(Store, "transact", counted)
    return begun


@pytest.fixture
async def sessions(world: World) -> list[Session]:
    return [await world.session(streamer) for streamer in STREAMERS]


@pytest.fixture
async def invited(world: World, sessions: list[Session]) -> list[str]:
    """The invitations of eight viewers to eight streamers, delivered."""
    return [await world.invited(session, f"of-{session.user.id}") for session in sessions]


async def agree(world: World, streamer: str, goal_id: str) -> Answer:
    return await world.ask(CommandName.AGREE, goal_id, by=streamer, request_id="agree")


async def all_agree(world: World, invited: list[str]) -> list[str]:
    answers = (agree(world, *each) for each in zip(STREAMERS, invited, strict=True))
    return [code_of(answer) for answer in await asyncio.gather(*answers)]


async def test_commands_that_come_together_share_transactions_and_each_is_written(
    world: World, invited: list[str], transactions: list[int]
) -> None:
    assert await all_agree(world, invited) == ["ok"] * 8

    assert len(transactions) < 8
    for streamer, goal_id in zip(STREAMERS, invited, strict=True):
        goal = world.goal_row(goal_id)
        session = world.raw["sessions"].find_one({"_id": goal["conditions"]["session_id"]})
        request = world.raw["requests"].find_one({"_id": f"{streamer}:agree"})
        assert (goal["state"], goal["version"], len(goal["outbox"])) == ("agreed", 2, 1)
        assert session is not None
        assert session["status"] == {"exclusive_to": [f"of-{streamer}"]}
        assert request is not None
        assert request["goal"]["id"] == goal_id


async def test_invitations_that_come_together_share_transactions(
    world: World, sessions: list[Session], transactions: list[int]
) -> None:
    answers = await asyncio.gather(
        *(world.invite(session, request_id=str(session.id)) for session in sessions)
    )

    assert [code_of(answer) for answer in answers] == ["ok"] * 8
    assert len(transactions) < 8
    assert world.raw["goals"].count_documents({"state": "invited"}) == 8
    assert world.raw["escrow"].count_documents({"movement": "hold"}) == 8
    for session in sessions:
        assert list(world.session_row(session)["exclusive_goal_pairs"]) == ["ben"]


async def test_invitations_to_one_session_share_transactions(
    world: World, sessions: list[Session], transactions: list[int]
) -> None:
    """A hundred viewers want the same streamer; with one transaction each they stood in line."""
    hot, viewers = sessions[0], [f"viewer{number}" for number in range(100)]

    answers = await asyncio.gather(
        *(world.invite(hot, viewer, request_id="the same for all") for viewer in viewers)
    )

    assert [code_of(answer) for answer in answers] == ["ok"] * 100
    assert len(transactions) < 25
    row = world.session_row(hot)
    assert sorted(row["exclusive_goal_pairs"]) == sorted(viewers)
    assert row["version"] == 101
    for viewer, answer in zip(viewers, answers, strict=True):
        goal = world.goal_row(goal_id_of(answer))
        assert goal["conditions"] == {"session_id": hot.id, "exclusive_to": viewer}
        assert row["exclusive_goal_pairs"][viewer] == {"trigger_exclusive_goal": goal["_id"]}
        assert world.movements(goal_id_of(answer)) == ["hold"]


async def test_of_invitations_that_share_a_turn_only_who_may_not_is_refused(
    world: World, sessions: list[Session], transactions: list[int]
) -> None:
    """Two have invitations that stand already; the others' are put up together all the same."""
    hot = sessions[0]
    for viewer in ("ben", "cleo"):
        await world.invited(hot, viewer)
    transactions.clear()
    viewers = [f"viewer{number}" for number in range(30)]
    viewers.insert(3, "ben")
    # The second go's.
    viewers.insert(20, "cleo")

    answers = await asyncio.gather(
        *(world.invite(hot, viewer, request_id="again") for viewer in viewers)
    )

    codes = dict(zip(viewers, map(code_of, answers), strict=True))
    assert {viewer for viewer, code in codes.items() if code != "ok"} == {"ben", "cleo"}
    assert codes["ben"] == codes["cleo"] == "already_invited"
    assert world.raw["escrow"].count_documents({}) == 32
    assert len(transactions) == 2
    kept = world.raw["requests"].find_one({"_id": "cleo:again"})
    assert kept is not None
    assert kept["error"]["code"] == "already_invited"


async def test_one_that_another_node_overtakes_is_refused_and_the_others_are_not(
    world: World, invited: list[str], steps: Steps
) -> None:
    """It is decided, and its goal then withdrawn elsewhere: the transaction of all conflicts."""
    taken = invited[5]

    def another_node_withdraws() -> None:
        world.raw["goals"].update_one(
            {"_id": world.goal_row(taken)["_id"]},
            {
                "$set": {"state": "ended", "reason": "withdrawn", "active": False},
                "$inc": {"version": 1},
            },
        )

    steps.once(Step.AFTER_DECIDE, "agree", another_node_withdraws)

    codes = await all_agree(world, invited)

    assert codes[5] not in {"ok", "unavailable"}
    assert codes[:5] + codes[6:] == ["ok"] * 7
    states = [world.goal_row(goal_id)["state"] for goal_id in invited]
    assert states == ["agreed"] * 5 + ["ended"] + ["agreed"] * 2


async def test_one_whose_posting_is_there_already_fails_alone(
    world: World, invited: list[str]
) -> None:
    world.raw["escrow"].insert_one({"_id": f"{invited[5]}:close"})

    asked = (
        world.ask(CommandName.DISAGREE, goal_id, by=streamer)
        for streamer, goal_id in zip(STREAMERS, invited, strict=True)
    )
    answers = await asyncio.gather(*asked, return_exceptions=True)

    assert isinstance(answers.pop(5), StoreDamaged)
    assert [type(answer) for answer in answers] == [Done] * 7
    assert world.goal_row(invited[5])["state"] == "invited"


async def test_what_is_too_big_for_one_message_is_written_apart(
    world: World, transactions: list[int]
) -> None:
    """Twelve ends of shows with long lists of media sources may be."""
    store = world.node.store
    together = Transactions(store)
    rows = [{"_id": f"big:{number}", "what": "x" * (7 << 20)} for number in range(3)]

    async def commit(row: dict[str, str]) -> None:
        async with store.reading():
            await together.commit(Writes(CommandName.FINISH, requests=[row]))

    await asyncio.gather(*map(commit, rows))

    assert world.raw["requests"].count_documents({}) == 3
    # One of all, and each.
    assert len(transactions) == 4


async def test_a_document_that_is_locked_keeps_nobody_else_waiting(
    world: World, invited: list[str], sessions: list[Session]
) -> None:
    """Another process's transaction stands open on one Session; the other seven go on."""
    client = world.raw.client
    with client.start_session() as other:
        other.start_transaction()
        world.raw["sessions"].update_one(
            {"_id": sessions[3].id}, {"$set": {"rtc_sources": ["camera"]}}, session=other
        )
        asked = [
            asyncio.create_task(agree(world, *each))
            for each in zip(STREAMERS, invited, strict=True)
        ]
        free = asked[:3] + asked[4:]
        async with asyncio.timeout(10):
            answers = await asyncio.gather(*free)
        assert [code_of(answer) for answer in answers] == ["ok"] * 7
        assert not asked[3].done()
        other.abort_transaction()
    assert code_of(await asked[3]) == "ok"


async def test_a_request_id_that_is_used_twice_in_one_transaction_is_told_apart(
    world: World, sessions: list[Session]
) -> None:
    """The same viewer invites eight streamers under one request_id."""
    answers = await asyncio.gather(
        *(world.invite(session, request_id="the same") for session in sessions)
    )

    codes = [code_of(answer) for answer in answers]
    assert sorted(codes) == ["ok"] + ["request_id_reused"] * 7
    assert world.raw["goals"].count_documents({}) == 1
    assert world.raw["escrow"].count_documents({}) == 1


async def test_events_queue_up_behind_those_that_are_still_on_their_way(
    world: World, sessions: list[Session]
) -> None:
    """Of four goals the first events are not delivered yet: whoever has them delivers all."""
    goal_ids = []
    for number, session in enumerate(sessions):
        answer = await world.invite(session)
        if number % 2:
            await world.node.deliver(answer)
        goal_ids.append(goal_id_of(answer))

    asked = (agree(world, *each) for each in zip(STREAMERS, goal_ids, strict=True))
    answers = await asyncio.gather(*asked)

    for number, answer in enumerate(answers):
        assert isinstance(answer, Done)
        outbox = world.goal_row(goal_ids[number])["outbox"]
        assert len(outbox) == (1 if number % 2 else 3)
        assert len(answer.deliveries) == number % 2
