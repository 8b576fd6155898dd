"""A `request_id` is answered once, whoever asks again, wherever, however often."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from persistence.faults import Step
from persistence.intents import Done, Intent, Refused, Terms
from statemachine.goal import CommandName, Role
from tests.persistence.world import code_of, goal_id_of

if TYPE_CHECKING:
    from persistence.intents import Answer
    from tests.persistence.world import Steps, World


def repeated(answer: Answer) -> Answer:
    """The same answer as it is given again: what it left to do was handed out once."""
    return replace(answer, deliveries=()) if isinstance(answer, Done) else answer


async def test_the_same_invitation_again_gives_the_same_answer_and_no_second_effect(
    world: World,
) -> None:
    session = await world.session()
    first = await world.invite(session, request_id="r1")
    before = world.documents()

    again = await world.invite(session, request_id="r1")

    assert again == repeated(first)
    assert world.documents() == before


async def test_the_same_agree_again_gives_the_answer_of_then(world: World) -> None:
    goal_id = await world.invited(await world.session())
    first = await world.ask(CommandName.AGREE, goal_id, request_id="r1")
    await world.node.deliver(await world.ask(CommandName.START, goal_id))
    before = world.documents()

    again = await world.ask(CommandName.AGREE, goal_id, request_id="r1")

    assert again == repeated(first)
    assert isinstance(again, Done)
    assert again.goal["state"] == "agreed"
    assert world.documents() == before


async def test_a_large_amount_is_a_plain_number_in_the_repeated_answer_too(world: World) -> None:
    session = await world.session()
    await world.invite(session, request_id="r1")
    # As with a higher limit of amounts: MongoDB keeps this as an integer of 64 bits.
    world.raw["requests"].update_one({}, {"$set": {"goal.amount": 3_000_000_000}})

    again = await world.invite(session, request_id="r1")

    assert isinstance(again, Done)
    assert type(again.goal["amount"]) is int


async def test_without_a_request_id_nothing_is_remembered(world: World) -> None:
    goal_id = await world.invited(await world.session())

    await world.ask(CommandName.AGREE, goal_id)

    assert code_of(await world.ask(CommandName.AGREE, goal_id)) == "goal_already_agreed"
    assert world.documents()["requests"] == []


async def test_a_request_id_is_each_users_own(world: World) -> None:
    session = await world.session()
    await world.invite(session, "ben", request_id="r1")

    answer = await world.invite(session, "cleo", request_id="r1")

    assert code_of(answer) == "ok"
    assert {row["_id"] for row in world.documents()["requests"]} == {"ben:r1", "cleo:r1"}


@pytest.mark.parametrize("name", [CommandName.DISAGREE, CommandName.AGREE])
async def test_a_request_id_reused_for_another_command_is_refused(
    world: World, name: CommandName
) -> None:
    """Also when the other command would itself be refused."""
    session = await world.session()
    answered = await world.invited(session, "ben")
    standing = await world.invited(session, "cleo")
    await world.ask(CommandName.DISAGREE, answered, request_id="r1")
    before = world.documents()

    answers = [
        await world.ask(name, standing, request_id="r1"),
        await world.ask(CommandName.AGREE, answered, request_id="r1"),
        await world.ask(CommandName.START, "f" * 24, request_id="r1"),
    ]

    assert [code_of(answer) for answer in answers] == ["request_id_reused"] * 3
    assert world.documents() == before


async def test_an_invitation_on_other_terms_is_another_command(world: World) -> None:
    session = await world.session()
    await world.invite(session, request_id="r1", amount_minor=500)

    dearer = await world.invite(session, request_id="r1", amount_minor=501)
    longer = await world.invite(session, request_id="r1", prepaid_duration_s=31)

    assert code_of(dearer) == code_of(longer) == "request_id_reused"


async def test_a_rejection_is_remembered_even_when_the_command_would_be_allowed_by_now(
    world: World,
) -> None:
    session = await world.session()
    goal_id = await world.invited(session)
    refused = await world.ask(CommandName.START, goal_id, request_id="r1")
    await world.ask(CommandName.AGREE, goal_id)
    before = world.documents()

    again = await world.ask(CommandName.START, goal_id, request_id="r1")

    assert isinstance(again, Refused)
    assert again == refused
    assert again.code == "goal_not_agreed"
    assert world.documents() == before
    assert code_of(await world.ask(CommandName.START, goal_id, request_id="r2")) == "ok"


@pytest.mark.parametrize(
    ("goal_id", "code"), [("f" * 24, "unknown_goal"), ("nonsense", "unknown_goal")]
)
async def test_the_refusal_of_an_unknown_goal_is_remembered(
    world: World, goal_id: str, code: str
) -> None:
    first = await world.ask(CommandName.AGREE, goal_id, request_id="r1")

    assert code_of(first) == code
    assert await world.ask(CommandName.AGREE, goal_id, request_id="r1") == first
    assert len(world.documents()["requests"]) == 1


async def test_the_refusal_of_an_unknown_session_is_remembered(world: World) -> None:
    session = await world.session()
    for session_id in ("f" * 24, "nonsense"):
        session.id = session_id  # type: ignore[assignment]
        first = await world.invite(session, request_id=f"r-{session_id}")

        assert code_of(first) == "unknown_session"
        assert await world.invite(session, request_id=f"r-{session_id}") == first


async def test_the_same_request_at_once_on_two_nodes_has_one_effect_and_one_answer(
    world: World,
) -> None:
    other = await world.add_node()
    session = await world.session()

    invitations = await asyncio.gather(
        *(
            world.invite(session, request_id="r1", node=(world.node, other)[turn % 2])
            for turn in range(10)
        )
    )
    for turn, answer in enumerate(invitations):
        # An outbox is its owner's: whichever node has put up the invitation.
        await (world.node, other)[turn % 2].deliver(answer)
    goal_id = goal_id_of(invitations[0])
    agrees = await asyncio.gather(
        *(
            world.ask(
                CommandName.AGREE, goal_id, request_id="r1", node=(world.node, other)[turn % 2]
            )
            for turn in range(10)
        )
    )

    for answers in (invitations, agrees):
        assert all(repeated(answer) == repeated(answers[0]) for answer in answers)
        delivering = [a for a in answers if isinstance(a, Done) and a.deliveries]
        assert len(delivering) == 1
    assert world.raw["goals"].count_documents({}) == 1
    assert world.goal_row(goal_id)["version"] == 2
    assert world.movements(goal_id) == ["hold"]
    assert len(world.documents()["requests"]) == 2


async def test_a_request_that_another_node_refuses_meanwhile_is_refused_here_too(
    world: World, steps: Steps
) -> None:
    """Whoever writes the record first has answered, and the other's effect is undone."""
    goal_id = await world.invited(await world.session())
    intent = Intent(CommandName.AGREE, Role.STREAMER, "anna", goal_id=goal_id, request_id="r1")

    def another_node_refuses() -> None:
        world.raw["requests"].insert_one(
            {
                "_id": "anna:r1",
                "fingerprint": intent.fingerprint,
                "goal": None,
                "error": {"code": "session_busy", "message": "Busy."},
                "at": world.clock.now(),
            }
        )

    steps.once(Step.AFTER_DECIDE, "agree", another_node_refuses)

    answer = await world.ask(CommandName.AGREE, goal_id, request_id="r1")

    assert answer == Refused("session_busy", "Busy.")
    assert world.goal_row(goal_id)["state"] == "invited"


async def test_what_was_answered_is_kept_for_a_day(world: World) -> None:
    await world.invite(await world.session(), request_id="r1")

    [row] = world.documents()["requests"]
    index = world.raw["requests"].index_information()["at_1"]
    assert row["at"] == world.clock.now()
    assert index["expireAfterSeconds"] == 24 * 60 * 60


def test_the_timer_has_no_request() -> None:
    intent = Intent(CommandName.EXPIRE, Role.TIMER, None, goal_id="f" * 24)

    assert intent.request_key is None


def test_a_fingerprint_tells_commands_goals_and_terms_apart() -> None:
    def of(name: CommandName, goal_id: str | None, terms: Terms | None = None) -> str:
        return Intent(name, Role.VIEWER, "ben", goal_id=goal_id, terms=terms).fingerprint

    prints = {
        of(CommandName.AGREE, "a"),
        of(CommandName.AGREE, "b"),
        of(CommandName.DISAGREE, "a"),
        of(CommandName.INVITE, None, Terms("s", 1, 23)),
        of(CommandName.INVITE, None, Terms("s", 12, 3)),
        of(CommandName.INVITE, None, Terms("t", 1, 23)),
    }

    assert len(prints) == 6
