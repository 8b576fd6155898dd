"""Many commands at once, over two nodes: one winner, and the losers hear what they lost to."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from bson import ObjectId

from persistence.errors import StoreUnavailable
from persistence.faults import Step
from persistence.intents import Done, Refused
from statemachine.goal import CommandName
from tests.persistence.world import VIEWER, code_of, goal_id_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from pymongo import MongoClient

    from persistence.documents import Goal, Session
    from persistence.intents import Answer, Intent
    from tests.persistence.world import Steps, World


async def all_of(commands: Sequence[Awaitable[Answer]]) -> list[Answer]:
    return list(await asyncio.gather(*commands))


def accounts(world: World) -> dict[str, int]:
    """What each account has gained or lost, over the whole ledger."""
    sums: Counter[str] = Counter()
    for row in world.raw["escrow"].find():
        sums[row["debit"]] -= row["amount"]
        sums[row["credit"]] += row["amount"]
    return dict(sums)


async def test_of_200_agrees_and_disagrees_on_one_goal_exactly_one_wins(world: World) -> None:
    other = await world.add_node()
    goal_id = await world.invited(await world.session())
    names = [CommandName.AGREE, CommandName.DISAGREE]

    answers = await all_of(
        [
            world.ask(names[turn % 2], goal_id, node=(world.node, other)[turn // 2 % 2])
            for turn in range(200)
        ]
    )

    [winner] = [answer for answer in answers if isinstance(answer, Done)]
    losers = [answer for answer in answers if isinstance(answer, Refused)]
    agreed = winner.goal["state"] == "agreed"
    assert len(losers) == 199
    assert {loser.code for loser in losers} == {
        "goal_already_agreed" if agreed else "goal_already_declined"
    }
    for loser in losers:
        assert loser.goal == winner.goal
    assert world.movements(goal_id) == (["hold"] if agreed else ["hold", "release"])
    assert world.goal_row(goal_id)["version"] == 2
    assert len(winner.deliveries) == 1


async def test_of_agrees_on_20_goals_of_one_session_one_wins_and_the_others_are_refunded(
    world: World,
) -> None:
    other = await world.add_node()
    session = await world.session()
    goal_ids = [await world.invited(session, f"viewer{number}") for number in range(20)]

    answers = await all_of(
        [
            world.ask(CommandName.AGREE, goal_id, node=(world.node, other)[number % 2])
            for number, goal_id in enumerate(goal_ids)
        ]
    )

    [winner] = [answer for answer in answers if isinstance(answer, Done)]
    winner_id = goal_id_of(winner)
    for goal_id, answer in zip(goal_ids, answers, strict=True):
        row = world.goal_row(goal_id)
        if goal_id == winner_id:
            assert (row["state"], world.movements(goal_id)) == ("agreed", ["hold"])
            continue
        assert isinstance(answer, Refused)
        assert answer.code == "goal_already_declined"
        assert answer.goal is not None
        assert answer.goal["reason"] == "superseded"
        assert (row["state"], row["reason"]) == ("declined", "superseded")
        assert world.movements(goal_id) == ["hold", "release"]
    assert list(world.session_row(session)["exclusive_goal_pairs"]) == [
        winner.goal["conditions"]["exclusive_to"]
    ]
    assert accounts(world)["escrow"] == 500
    assert sum(accounts(world).values()) == 0
    assert len(winner.deliveries) == 20


async def test_of_an_agree_and_a_withdraw_one_wins_and_the_money_knows_which(
    world: World,
) -> None:
    other = await world.add_node()
    for _ in range(10):
        session = await world.session()
        goal_id = await world.invited(session)

        agree, withdraw = await all_of(
            [
                world.ask(CommandName.AGREE, goal_id),
                world.withdraw(goal_id, node=other),
            ]
        )

        assert isinstance(agree, Done) is not isinstance(withdraw, Done)
        if isinstance(agree, Done):
            assert world.movements(goal_id) == ["hold"]
            assert code_of(withdraw) == "goal_already_agreed"
            await world.node.deliver(await world.ask(CommandName.START, goal_id))
            await world.node.deliver(await world.ask(CommandName.FINISH, goal_id))
        else:
            assert world.movements(goal_id) == ["hold", "release"]
            assert code_of(agree) == "goal_already_declined"


async def test_of_a_start_and_a_refund_one_moves_the_money(world: World) -> None:
    other = await world.add_node()
    for number in range(10):
        session = await world.session(f"streamer{number}")
        goal_id = await world.agreed(session)
        world.clock.shift(65)

        [due] = await other.deadlines.claim_due(10)

        start, refund = await all_of(
            [
                world.ask(CommandName.START, goal_id, by=f"streamer{number}"),
                other.deadlines.fire(due),
            ]
        )

        captured = isinstance(start, Done)
        assert captured is not isinstance(refund, Done)
        assert world.movements(goal_id) == ["hold", "capture" if captured else "release"]
        assert world.raw["goals"].count_documents({"trigger_goal": ObjectId(goal_id)}) == captured
        world.raw["goals"].update_many({}, {"$unset": {"due_at": ""}})


async def test_of_invitations_of_one_viewer_at_once_one_stands(world: World) -> None:
    other = await world.add_node()
    session = await world.session()

    answers = await all_of(
        [world.invite(session, node=(world.node, other)[turn % 2]) for turn in range(12)]
    )

    codes = Counter(code_of(answer) for answer in answers)
    assert codes == {"ok": 1, "already_invited": 11}
    assert world.raw["goals"].count_documents({}) == 1
    assert accounts(world) == {"viewer:ben": -500, "escrow": 500}


async def test_invitations_of_many_viewers_at_once_all_stand(world: World) -> None:
    other = await world.add_node()
    session = await world.session()

    answers = await all_of(
        [
            world.invite(session, f"viewer{turn}", node=(world.node, other)[turn % 2])
            for turn in range(24)
        ]
    )

    assert {code_of(answer) for answer in answers} == {"ok"}
    row = world.session_row(session)
    assert len(row["exclusive_goal_pairs"]) == 24
    assert row["version"] == 25


async def test_an_invitation_that_races_the_end_of_the_stream_is_refused_or_refunded(
    world: World,
) -> None:
    other = await world.add_node()
    for number in range(8):
        session = await world.session(f"streamer{number}")

        answer, _ = await asyncio.gather(
            world.invite(session, node=other), world.node.sessions.end(session)
        )

        if isinstance(answer, Refused):
            assert answer.code == "session_ended"
            assert world.raw["goals"].count_documents({"conditions.session_id": session.id}) == 0
        else:
            row = world.goal_row(goal_id_of(answer))
            assert (row["state"], row["reason"]) == ("declined", "stream_ended")
            assert world.movements(goal_id_of(answer)) == ["hold", "release"]


# Forced interleavings


async def test_who_was_overtaken_between_decision_and_commit_decides_again(
    world: World, steps: Steps
) -> None:
    goal_id = await world.invited(await world.session())

    def another_node_declines() -> None:
        world.raw["goals"].update_one(
            {"_id": ObjectId(goal_id)},
            {
                "$set": {"state": "declined", "reason": "withdrawn", "active": False},
                "$inc": {"version": 1},
            },
        )

    steps.once(Step.AFTER_DECIDE, "agree", another_node_declines)

    answer = await world.ask(CommandName.AGREE, goal_id)

    assert isinstance(answer, Refused)
    assert answer.code == "goal_already_declined"
    assert answer.goal is not None
    assert answer.goal["reason"] == "withdrawn"
    assert world.movements(goal_id) == ["hold"]


async def test_a_session_that_changed_under_a_command_is_read_again(
    world: World, steps: Steps
) -> None:
    session = await world.session()
    goal_id = await world.invited(session)

    def the_stream_ends() -> None:
        world.raw["sessions"].update_one(
            {"_id": session.id}, {"$set": {"active": False}, "$inc": {"version": 1}}
        )

    steps.once(Step.AFTER_DECIDE, "agree", the_stream_ends)

    answer = await world.ask(CommandName.AGREE, goal_id)

    assert code_of(answer) == "session_ended"
    assert world.goal_row(goal_id)["state"] == "invited"


async def test_an_invitation_that_comes_behind_an_agreements_decision_is_superseded_by_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it was decided, the Session had no other invitation to clean up."""
    other = await world.add_node()
    session = await world.session()
    goal_id = await world.invited(session)
    commits = world.node.goals.commits
    commit, rivals = commits.commit, []

    async def behind_a_rival(*decided: Any) -> Done:
        monkeypatch.undo()
        rivals.append(goal_id_of(await world.invite(session, "rival", node=other)))
        return await commit(*decided)

    monkeypatch.setattr(commits, "commit", behind_a_rival)
    answer = await world.ask(CommandName.AGREE, goal_id)

    assert code_of(answer) == "ok"
    [rival] = rivals
    assert world.goal_row(rival)["reason"] == "superseded"
    assert world.movements(rival) == ["hold", "release"]


async def test_a_goal_that_is_agreed_between_two_reads_is_not_taken_for_another_ones(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The goal was read before another node agreed it, its Session after.

    The Session is then taken by this very goal, and "busy" would be the wrong answer.
    """
    other = await world.add_node()
    goal_id = await world.invited(await world.session())
    read = world.node.goals._goal_of
    winners: list[Answer] = []

    async def while_another_node_agrees(intent: Intent) -> tuple[Goal, Session] | None:
        before = await read(intent)
        winners.append(await world.ask(CommandName.AGREE, goal_id, node=other))
        after = await read(intent)
        assert before is not None
        assert after is not None
        return before[0], after[1]

    monkeypatch.setattr(world.node.goals, "_goal_of", while_another_node_agrees)

    answer = await world.ask(CommandName.AGREE, goal_id)

    assert code_of(winners[0]) == "ok"
    assert code_of(answer) == "goal_already_agreed"
    assert answer.goal == winners[0].goal


async def test_a_write_conflict_inside_the_transaction_is_tried_again(
    world: World, steps: Steps
) -> None:
    """MongoDB aborts the transaction; the driver runs it once more, and it sees the change."""
    session = await world.session()
    goal_id = await world.invited(session)

    def another_node_writes_the_session() -> None:
        world.raw["sessions"].update_one(
            {"_id": session.id},
            {"$set": {"rtc_sources": ["camera"]}, "$inc": {"version": 1}},
        )

    steps.once(Step.IN_TRANSACTION, "agree", another_node_writes_the_session)

    answer = await world.ask(CommandName.AGREE, goal_id)

    assert code_of(answer) == "ok"
    assert steps.details(Step.IN_TRANSACTION).count("agree") >= 2
    row = world.session_row(session)
    assert (row["version"], row["rtc_sources"]) == (4, ["camera"])
    assert row["status"] == {"exclusive_to": ["ben"]}
    assert len(world.goal_row(goal_id)["outbox"]) == 1


async def test_an_invitation_overtaken_in_its_session_is_decided_again(
    world: World, steps: Steps
) -> None:
    session = await world.session()

    def another_node_agrees_someone_else() -> None:
        world.raw["sessions"].update_one(
            {"_id": session.id},
            {"$set": {"status.exclusive_to": ["cleo"]}, "$inc": {"version": 1}},
        )

    steps.once(Step.AFTER_DECIDE, "invite", another_node_agrees_someone_else)

    answer = await world.invite(session)

    assert code_of(answer) == "session_busy"
    assert world.documents()["goals"] == world.documents()["escrow"] == []


async def test_a_goal_locked_by_another_transaction_is_a_retryable_fault_in_time(
    world: World, mongodb_client: MongoClient[dict[str, Any]]
) -> None:
    """Somebody else's transaction stays open: the command gives up at its deadline, all undone."""
    hasty = await world.add_node(deadline_s=0.6)
    goal_id = await world.invited(await world.session())
    before = world.documents()

    with mongodb_client.start_session() as holder, holder.start_transaction():
        world.raw["goals"].update_one(
            {"_id": ObjectId(goal_id)}, {"$inc": {"version": 1}}, session=holder
        )
        async with asyncio.timeout(5):
            with pytest.raises(StoreUnavailable):
                await world.withdraw(goal_id, node=hasty)
        holder.abort_transaction()

    assert world.documents() == before
    assert code_of(await world.withdraw(goal_id, VIEWER, node=hasty)) == "ok"


async def test_a_cancelled_command_happened_as_a_whole_or_not_at_all(world: World) -> None:
    session = await world.session()
    for number in range(12):
        goal_id = await world.invited(session, f"viewer{number}")
        before = world.documents()

        command = asyncio.ensure_future(world.ask(CommandName.DISAGREE, goal_id))
        for _ in range(number * 2):
            await asyncio.sleep(0)
        command.cancel()
        [outcome] = await asyncio.gather(command, return_exceptions=True)

        if isinstance(outcome, asyncio.CancelledError):
            row = world.goal_row(goal_id)
            moved = row["state"] == "declined"
            assert world.movements(goal_id) == (["hold", "release"] if moved else ["hold"])
            assert moved or world.documents() == before


async def test_a_viewer_who_stands_in_one_line_twice_is_invited_once(world: World) -> None:
    """He who comes next goes by what the one before has read, and the write finds the pair."""
    session = await world.session()

    answers = await asyncio.gather(
        *(world.invite(session, viewer) for viewer in ("ben", "cleo", "ben", "dora"))
    )

    assert [code_of(answer) for answer in answers] == ["ok", "ok", "already_invited", "ok"]
    assert world.session_row(session)["version"] == 4


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"status.exclusive_to": ["zoe"]}, "session_busy"),
        ({"active": False}, "session_ended"),
    ],
)
async def test_who_stands_in_line_is_refused_when_the_stream_is_taken_or_ends_meanwhile(
    world: World, steps: Steps, change: dict[str, Any], code: str
) -> None:
    session = await world.session()

    def another_node_writes_the_session() -> None:
        world.raw["sessions"].update_one(
            {"_id": session.id}, {"$set": change, "$inc": {"version": 1}}
        )

    steps.once(Step.AFTER_COMMIT, "invite", another_node_writes_the_session)
    viewers = [f"viewer{number}" for number in range(20)]

    answers = await asyncio.gather(*(world.invite(session, viewer) for viewer in viewers))

    # Sixteen share the first turn.
    assert [code_of(answer) for answer in answers] == ["ok"] * 16 + [code] * 4
    assert list(world.session_row(session)["exclusive_goal_pairs"]) == viewers[:16]


async def test_of_those_who_share_a_turn_none_is_invited_to_a_stream_that_ends_meanwhile(
    world: World, steps: Steps
) -> None:
    session = await world.session()

    def another_node_ends_it() -> None:
        world.raw["sessions"].update_one(
            {"_id": session.id}, {"$set": {"active": False}, "$inc": {"version": 1}}
        )

    steps.once(Step.AFTER_DECIDE, "invite", another_node_ends_it)

    answers = await asyncio.gather(
        *(world.invite(session, viewer) for viewer in ("ben", "cleo", "dora"))
    )

    assert [code_of(answer) for answer in answers] == ["session_ended"] * 3
    assert world.raw["goals"].count_documents({}) == 0
    assert world.raw["escrow"].count_documents({}) == 0
