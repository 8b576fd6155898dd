"""Each command on a real MongoDB, with the exact documents that it leaves behind."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from bson import ObjectId

from persistence.errors import StoreDamaged
from persistence.intents import Done, Refused
from persistence.rows import object_id
from statemachine.goal import CommandName, Role
from statemachine.instants import rfc3339
from tests.persistence.world import code_of, goal_id_of

if TYPE_CHECKING:
    from datetime import datetime

    from persistence.documents import Session
    from tests.persistence.world import Row, World

OUTBOX_FIELDS = ("outbox", "outbox_due_at", "outbox_owner")


def without_outbox(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in OUTBOX_FIELDS}


def invitation_row(goal_id: str, session: Session, created_at: datetime, **different: Any) -> Row:
    """The invitation of `World.invite`, under the requirements' field names."""
    plain: Row = {
        "_id": ObjectId(goal_id),
        "_cls": "TriggerExclusiveGoal",
        "active": True,
        "progress": 1,
        "levels": [],
        "conditions": {"session_id": session.id, "exclusive_to": "ben"},
        "context": {"type": "trigger-exclusive", "exclusive_to": "ben"},
        "exp": created_at + timedelta(seconds=60),
        "triggerer": "viewer-app",
        "metadata": {"user_id": "anna", "prepaid_duration": 30},
        "breakdown": {"ben": 500},
        "amount": 500,
        "state": "invited",
        "rtc_sources": [],
        "created_at": created_at,
        "due_at": created_at + timedelta(seconds=60),
        "due_command": "expire",
        "version": 1,
        "schema_version": 1,
    }
    row = plain | different
    return {name: value for name, value in row.items() if value is not None}


def session_row(session: Session, **different: Any) -> Row:
    plain: Row = {
        "_id": session.id,
        "user": {"id": "anna"},
        "active": True,
        "status": {"exclusive_to": []},
        "exclusive_goal_pairs": {},
        "viewers": {},
        "rtc_sources": [],
        "created_at": session.created_at,
        "version": 1,
        "schema_version": 1,
    }
    return plain | different


def entry_row(goal_id: str, session: Session, movement: str, **rest: Any) -> Row:
    debit, credit = {
        "hold": ("viewer:ben", "escrow"),
        "capture": ("escrow", "streamer:anna"),
        "release": ("escrow", "viewer:ben"),
    }[movement]
    return {
        "_id": f"{goal_id}:{'hold' if movement == 'hold' else 'close'}",
        "goal_id": ObjectId(goal_id),
        "session_id": session.id,
        "viewer_id": "ben",
        "streamer_id": "anna",
        "movement": movement,
        "debit": debit,
        "credit": credit,
        "amount": 500,
        "schema_version": 1,
        **rest,
    }


# Invite


async def test_invite_writes_goal_pair_and_hold(world: World) -> None:
    session = await world.session()
    now = world.clock.now()

    answer = await world.invite(session)

    goal_id = goal_id_of(answer)
    assert without_outbox(world.goal_row(goal_id)) == invitation_row(goal_id, session, now)
    assert world.session_row(session) == session_row(
        session,
        exclusive_goal_pairs={"ben": {"trigger_exclusive_goal": ObjectId(goal_id)}},
        version=2,
    )
    assert world.ledger(goal_id) == [entry_row(goal_id, session, "hold", reason="invited", at=now)]


async def test_invite_leaves_goal_added_and_escrow_held_in_the_outbox(world: World) -> None:
    answer = await world.invite(await world.session())

    row = world.goal_row(goal_id_of(answer))
    assert [(entry["event_id"], entry["pending"]) for entry in row["outbox"]] == [
        (f"{row['_id']}:1:goal.added", ["notify_goal_added"]),
        (f"{row['_id']}:1:escrow.held", ["notify_escrow"]),
    ]
    assert row["outbox_owner"] == world.node.store.owner
    assert row["outbox_due_at"] == world.clock.now() + timedelta(seconds=5)


async def test_invite_answers_with_the_goal(world: World) -> None:
    session = await world.session()

    answer = await world.invite(session)

    assert isinstance(answer, Done)
    assert answer.session_id == str(session.id)
    assert answer.goal["state"] == "invited"
    assert answer.goal["metadata"] == {"user_id": "anna", "prepaid_duration": 30}
    assert answer.goal["version"] == 1


async def test_a_second_invitation_waits_until_the_first_is_answered(world: World) -> None:
    session = await world.session()
    first = await world.invited(session)
    before = world.documents()

    assert code_of(await world.invite(session)) == "already_invited"
    assert world.documents() == before

    await world.node.deliver(await world.ask(CommandName.DISAGREE, first))
    second = await world.invited(session)
    assert world.session_row(session)["exclusive_goal_pairs"] == {
        "ben": {"trigger_exclusive_goal": ObjectId(second)}
    }


@pytest.mark.parametrize("session_id", ["0" * 24, "no-id", "", "$where"])
async def test_an_invitation_to_no_session_is_refused(world: World, session_id: str) -> None:
    session = await world.session()
    session.id = session_id  # type: ignore[assignment]

    answer = await world.invite(session)

    assert answer == Refused("unknown_session", "There is no such session.")


@pytest.mark.parametrize(
    ("terms", "code"),
    [
        ({"amount_minor": 0}, "amount_out_of_range"),
        ({"amount_minor": -5}, "amount_out_of_range"),
        ({"amount_minor": 100_000_001}, "amount_out_of_range"),
        ({"prepaid_duration_s": 0}, "duration_out_of_range"),
        ({"prepaid_duration_s": 86_401}, "duration_out_of_range"),
        ({"viewer_id": "anna"}, "own_session"),
    ],
)
async def test_impossible_terms_write_nothing(
    world: World, terms: dict[str, Any], code: str
) -> None:
    session = await world.session()
    before = world.documents()

    answer = await world.invite(session, **terms)

    assert code_of(answer) == code
    assert world.documents() == before


# Agree


async def test_agree_deactivates_the_goal_and_makes_it_due_for_the_refund_check(
    world: World,
) -> None:
    session = await world.session()
    created_at = world.clock.now()
    goal_id = await world.invited(session)
    world.clock.shift(7.5)
    now = world.clock.now()

    await world.node.deliver(await world.ask(CommandName.AGREE, goal_id))

    assert without_outbox(world.goal_row(goal_id)) == invitation_row(
        goal_id,
        session,
        created_at,
        active=False,
        exp=now,
        triggerer="streamer-app",
        metadata={"user_id": "anna", "prepaid_duration": 30, "agreed": now},
        state="agreed",
        due_at=now + timedelta(seconds=65),
        due_command="refund",
        version=2,
    )
    assert world.movements(goal_id) == ["hold"]


async def test_agree_marks_the_pair_takes_the_stream_and_gives_the_viewer_a_pass(
    world: World,
) -> None:
    session = await world.session()
    goal_id = await world.invited(session)
    world.clock.shift(7.5)
    now = world.clock.now()

    await world.ask(CommandName.AGREE, goal_id)

    assert world.session_row(session) == session_row(
        session,
        status={"exclusive_to": ["ben"]},
        exclusive_goal_pairs={
            "ben": {
                "trigger_exclusive_goal": ObjectId(goal_id),
                "trigger_exclusive_goal_ended": True,
                "trigger_exclusive_goal_agreed": now,
            }
        },
        viewers={"ben": {"nbf": now, "duration": 90.0, "exp": now + timedelta(seconds=90)}},
        version=3,
    )


async def test_agree_keeps_the_nbf_of_a_viewer_who_had_one(world: World) -> None:
    session = await world.session()
    goal_id = await world.invited(session)
    nbf = world.clock.now() - timedelta(seconds=45)
    world.raw["sessions"].update_one(
        {"_id": session.id},
        {"$set": {"viewers.ben": {"nbf": nbf, "duration": 5.0, "exp": nbf}}},
    )

    await world.ask(CommandName.AGREE, goal_id)

    assert world.session_row(session)["viewers"] == {
        "ben": {"nbf": nbf, "duration": 90.0, "exp": nbf + timedelta(seconds=90)}
    }


async def test_agree_leaves_goal_ended_with_all_its_arguments_in_the_outbox(
    world: World,
) -> None:
    session = await world.session()
    goal_id = await world.invited(session)
    world.clock.shift(1)

    answer = await world.ask(CommandName.AGREE, goal_id)

    [entry] = world.goal_row(goal_id)["outbox"]
    at = answer.goal["exp"] if answer.goal else None
    assert entry["event_id"] == f"{goal_id}:2:goal.ended"
    assert entry["occurrence"]["args"] == {
        "goal_id": goal_id,
        "_cls": "TriggerExclusiveGoal",
        "active": False,
        "progress": 1,
        "levels": [],
        "conditions": {"session_id": str(session.id), "exclusive_to": "ben"},
        "context": {"type": "trigger-exclusive", "exclusive_to": "ben"},
        "exp": at,
        "triggerer": "streamer-app",
        "metadata": {"user_id": "anna", "prepaid_duration": 30, "agreed": at},
    }


async def test_agree_supersedes_the_other_invitations_and_refunds_them_at_once(
    world: World,
) -> None:
    session = await world.session()
    ours = await world.invited(session, "ben")
    others = [await world.invited(session, viewer) for viewer in ("cleo", "dora")]
    world.clock.shift(3)
    now = world.clock.now()

    answer = await world.ask(CommandName.AGREE, ours)

    assert set(world.session_row(session)["exclusive_goal_pairs"]) == {"ben"}
    for goal_id in others:
        row = world.goal_row(goal_id)
        assert (row["state"], row["reason"], row["active"]) == ("declined", "superseded", False)
        assert (row["exp"], row.get("due_at"), row["version"]) == (now, None, 2)
        assert [entry["event_id"] for entry in row["outbox"]] == [
            f"{goal_id}:2:goal.ended",
            f"{goal_id}:2:escrow.released",
        ]
        assert world.movements(goal_id) == ["hold", "release"]
        assert world.ledger(goal_id)[1]["reason"] == "superseded"
    assert isinstance(answer, Done)
    assert {str(delivery.goal_id) for delivery in answer.deliveries} == {ours, *others}


async def test_agree_cleans_up_ended_shows_and_keeps_answered_invitations(world: World) -> None:
    """The requirements' aggregation as it stands: a disagreed pair matches neither branch."""
    session = await world.session()
    shown = await world.started(session, "cleo")
    await world.node.deliver(await world.ask(CommandName.FINISH, shown))
    disagreed = await world.invited(session, "dora")
    await world.node.deliver(await world.ask(CommandName.DISAGREE, disagreed))
    ours = await world.invited(session, "ben")
    assert set(world.session_row(session)["exclusive_goal_pairs"]) == {"ben", "cleo", "dora"}

    await world.ask(CommandName.AGREE, ours)

    assert set(world.session_row(session)["exclusive_goal_pairs"]) == {"ben", "dora"}
    assert (world.goal_row(shown)["state"], world.goal_row(shown)["version"]) == ("ended", 4)
    assert world.movements(shown) == ["hold", "capture"]
    assert world.movements(disagreed) == ["hold", "release"]


async def test_agree_leaves_a_pair_alone_that_names_another_goal(world: World) -> None:
    session = await world.session()
    goal_id = await world.invited(session)
    theirs = {"trigger_exclusive_goal": ObjectId()}
    world.raw["sessions"].update_one(
        {"_id": session.id}, {"$set": {"exclusive_goal_pairs.ben": theirs}}
    )

    answer = await world.ask(CommandName.AGREE, goal_id)

    row = world.session_row(session)
    assert code_of(answer) == "ok"
    assert row["exclusive_goal_pairs"] == {"ben": theirs}
    assert row["status"] == {"exclusive_to": []}
    assert world.goal_row(goal_id)["state"] == "agreed"


async def test_a_second_goal_of_the_session_is_busy_even_when_the_status_does_not_say_so(
    world: World,
) -> None:
    """The index `one_show_per_session` holds when the Session's own field has been lost."""
    session = await world.session()
    first = await world.agreed(session)
    world.raw["sessions"].update_one({"_id": session.id}, {"$set": {"status.exclusive_to": []}})
    second = await world.invited(session, "cleo")

    answer = await world.ask(CommandName.AGREE, second)

    assert code_of(answer) == "session_busy"
    assert world.goal_row(first)["state"] == "agreed"
    assert world.goal_row(second)["state"] == "invited"
    assert world.movements(second) == ["hold"]


# Disagree, withdraw, expire


@pytest.mark.parametrize(
    ("name", "by", "role", "reason", "triggerer"),
    [
        (CommandName.DISAGREE, "anna", Role.STREAMER, "disagreed", "streamer-app"),
        (CommandName.WITHDRAW, "ben", Role.VIEWER, "withdrawn", "viewer-app"),
    ],
)
async def test_an_invitation_that_is_declined_gives_the_money_back(
    world: World, name: CommandName, by: str, role: Role, reason: str, triggerer: str
) -> None:
    session = await world.session()
    created_at = world.clock.now()
    goal_id = await world.invited(session)
    world.clock.shift(5)
    now = world.clock.now()

    answer = await world.ask(name, goal_id, by=by, role=role)

    assert without_outbox(world.goal_row(goal_id)) == invitation_row(
        goal_id,
        session,
        created_at,
        active=False,
        exp=now,
        triggerer=triggerer,
        state="declined",
        reason=reason,
        due_at=None,
        due_command=None,
        version=2,
    )
    assert world.session_row(session) == session_row(
        session,
        exclusive_goal_pairs={
            "ben": {
                "trigger_exclusive_goal": ObjectId(goal_id),
                "trigger_exclusive_goal_ended": True,
            }
        },
        version=3,
    )
    assert world.ledger(goal_id) == [
        entry_row(goal_id, session, "hold", reason="invited", at=created_at),
        entry_row(goal_id, session, "release", reason=reason, at=now),
    ]
    await world.node.deliver(answer)
    row = world.goal_row(goal_id)
    assert (row["state"], row["outcome"], row["version"]) == ("ended", "refunded", 3)


async def test_disagreeing_leaves_the_other_invitations_standing(world: World) -> None:
    session = await world.session()
    goal_id = await world.invited(session, "ben")
    other = await world.invited(session, "cleo")

    await world.ask(CommandName.DISAGREE, goal_id)

    assert world.goal_row(other)["state"] == "invited"
    pairs = world.session_row(session)["exclusive_goal_pairs"]
    assert pairs["cleo"] == {"trigger_exclusive_goal": ObjectId(other)}


async def test_a_disagreed_goals_arguments_have_no_agreed(world: World) -> None:
    goal_id = await world.invited(await world.session())

    await world.ask(CommandName.DISAGREE, goal_id)

    args = world.goal_row(goal_id)["outbox"][0]["occurrence"]["args"]
    assert args["metadata"] == {"user_id": "anna", "prepaid_duration": 30}
    assert args["active"] is False


async def test_an_invitation_nobody_answers_expires_and_is_refunded(world: World) -> None:
    session = await world.session()
    created_at = world.clock.now()
    goal_id = await world.invited(session)
    world.clock.shift(60.25)

    [answer] = await world.node.fire_due()

    row = world.goal_row(goal_id)
    assert (row["state"], row["reason"]) == ("declined", "expired")
    assert row["exp"] == created_at + timedelta(seconds=60)
    assert row["triggerer"] is None
    assert not {"due_at", "due_command", "due_lease_until", "due_owner"} & set(row)
    assert world.ledger(goal_id)[1] == entry_row(
        goal_id, session, "release", reason="expired", at=world.clock.now()
    )
    await world.node.deliver(answer)
    assert world.goal_row(goal_id)["state"] == "ended"
    assert code_of(await world.invite(session)) == "ok"


# Start, finish, refund


async def test_start_captures_the_escrow_and_creates_the_show(world: World) -> None:
    session = await world.session()
    created_at = world.clock.now()
    goal_id = await world.agreed(session)
    agreed_at = world.clock.now()
    world.clock.shift(4)
    now = world.clock.now()

    await world.ask(CommandName.START, goal_id)

    row = world.goal_row(goal_id)
    show_id = row["exclusive_goal"]
    ends_at = agreed_at + timedelta(seconds=90)
    metadata = {"user_id": "anna", "prepaid_duration": 30, "agreed": agreed_at}
    assert without_outbox(row) == invitation_row(
        goal_id,
        session,
        created_at,
        active=False,
        exp=agreed_at,
        triggerer="streamer-app",
        metadata=metadata,
        state="live",
        exclusive_goal=show_id,
        due_at=ends_at,
        due_command="finish",
        version=3,
    )
    assert without_outbox(world.goal_row(str(show_id))) == invitation_row(
        str(show_id),
        session,
        now,
        _cls="ExclusiveGoal",
        context={"type": "exclusive", "exclusive_to": "ben"},
        exp=ends_at,
        triggerer="streamer-app",
        metadata=metadata,
        state="live",
        trigger_goal=ObjectId(goal_id),
        due_at=None,
        due_command=None,
    )
    pair = world.session_row(session)["exclusive_goal_pairs"]["ben"]
    assert pair["exclusive_goal"] == show_id
    assert world.ledger(goal_id)[1] == entry_row(
        goal_id, session, "capture", reason="started", at=now
    )


async def test_finish_ends_both_goals_and_frees_the_session(world: World) -> None:
    sources = [{"id": "camera", "kind": "video"}]
    session = await world.session(rtc_sources=sources)
    goal_id = await world.started(session)
    agreed_at = world.clock.now()
    show_id = str(world.goal_row(goal_id)["exclusive_goal"])
    world.clock.shift(20)
    now = world.clock.now()

    answer = await world.ask(CommandName.FINISH, goal_id, by="ben", role=Role.VIEWER)

    goal, show = world.goal_row(goal_id), world.goal_row(show_id)
    assert (goal["state"], goal["outcome"], goal["version"]) == ("ended", "captured", 4)
    assert "due_at" not in goal
    assert (show["state"], show["outcome"], show["version"]) == ("ended", "captured", 2)
    assert (show["active"], show["exp"], show["rtc_sources"]) == (False, now, sources)
    assert world.session_row(session) == session_row(
        session,
        rtc_sources=sources,
        exclusive_goal_pairs={
            "ben": {
                "trigger_exclusive_goal": ObjectId(goal_id),
                "trigger_exclusive_goal_ended": True,
                "trigger_exclusive_goal_agreed": agreed_at,
                "exclusive_goal": ObjectId(show_id),
                "exclusive_goal_ended": True,
            }
        },
        version=5,
    )
    assert world.movements(goal_id) == ["hold", "capture"]
    await world.node.deliver(answer)
    assert world.goal_row(goal_id)["outcome"] == "captured"


async def test_the_end_of_a_show_is_signalled_for_the_show_itself(world: World) -> None:
    session = await world.session()
    goal_id = await world.started(session)
    show_id = str(world.goal_row(goal_id)["exclusive_goal"])

    await world.ask(CommandName.FINISH, show_id)

    ended, goal_ended = world.goal_row(goal_id)["outbox"]
    assert ended["occurrence"]["signal"] == "exclusive.ended"
    assert ended["occurrence"]["args"] == {
        "session_id": str(session.id),
        "goal_id": goal_id,
        "exclusive_to": "ben",
    }
    args = goal_ended["occurrence"]["args"]
    assert (args["goal_id"], args["_cls"]) == (show_id, "ExclusiveGoal")
    assert args["context"] == {"type": "exclusive", "exclusive_to": "ben"}


async def test_a_show_that_nobody_finishes_ends_with_the_viewers_pass(world: World) -> None:
    """`exp` is `min(exp, now)` for the show too, however late its timer is."""
    session = await world.session()
    goal_id = await world.started(session)
    ends_at = world.clock.now() + timedelta(seconds=90)
    show_id = str(world.goal_row(goal_id)["exclusive_goal"])
    world.clock.shift(89.999)
    assert await world.node.fire_due() == []
    world.clock.shift(0.301)

    [answer] = await world.node.fire_due()

    assert code_of(answer) == "ok"
    assert world.goal_row(goal_id)["state"] == "ended"
    assert world.goal_row(show_id)["exp"] == ends_at
    [*_, ended] = world.goal_row(goal_id)["outbox"]
    assert ended["occurrence"]["args"]["exp"] == rfc3339(ends_at)


async def test_an_agreed_show_that_never_starts_is_refunded_65_s_after_exp(
    world: World,
) -> None:
    session = await world.session()
    goal_id = await world.agreed(session)
    world.clock.shift(64.999)
    assert await world.node.fire_due() == []
    world.clock.shift(0.001)
    now = world.clock.now()

    [answer] = await world.node.fire_due()

    row = world.goal_row(goal_id)
    assert (row["state"], row["outcome"], row["reason"]) == ("ended", "refunded", "not_started")
    assert world.ledger(goal_id)[1] == entry_row(
        goal_id, session, "release", reason="not_started", at=now
    )
    assert world.session_row(session) == session_row(session, version=4)
    await world.node.deliver(answer)
    assert world.goal_row(goal_id)["version"] == 3
    assert code_of(await world.invite(session)) == "ok"


async def test_a_show_that_has_started_is_not_refunded(world: World) -> None:
    goal_id = await world.started(await world.session())
    world.clock.shift(65)

    answer = await world.ask(CommandName.REFUND, goal_id, by=None, role=Role.TIMER)

    assert code_of(answer) == "goal_already_live"
    assert world.movements(goal_id) == ["hold", "capture"]


async def test_the_same_viewer_may_have_one_show_after_the_other(world: World) -> None:
    session = await world.session()
    first = await world.started(session)
    world.clock.shift(100)
    for answer in await world.node.fire_due():
        await world.node.deliver(answer)

    second = await world.started(session)

    row = world.session_row(session)
    assert row["viewers"]["ben"]["nbf"] == world.clock.now()
    assert row["exclusive_goal_pairs"]["ben"]["trigger_exclusive_goal"] == ObjectId(second)
    assert "exclusive_goal_ended" not in row["exclusive_goal_pairs"]["ben"]
    assert world.movements(first) == world.movements(second) == ["hold", "capture"]


# People and ids


@pytest.mark.parametrize("goal_id", ["0" * 24, "zz", "", "$ne", "a.b", "f" * 12, "f" * 25])
async def test_an_unknown_goal_is_refused(world: World, goal_id: str) -> None:
    answer = await world.ask(CommandName.AGREE, goal_id)

    assert answer == Refused("unknown_goal", "There is no such goal.")


@pytest.mark.parametrize(
    ("by", "role", "code"),
    [
        ("eve", Role.STREAMER, "not_your_goal"),
        ("ben", Role.VIEWER, "wrong_role"),
        ("ben", None, "wrong_role"),
        ("eve", None, "wrong_role"),
        ("ben", Role.STREAMER, "not_your_goal"),
    ],
)
async def test_nobody_but_its_streamer_agrees_a_goal(
    world: World, by: str, role: Role | None, code: str
) -> None:
    goal_id = await world.invited(await world.session())
    before = world.documents()

    answer = await world.ask(CommandName.AGREE, goal_id, by=by, role=role)

    assert code_of(answer) == code
    assert (answer.goal is None) is (by == "eve")
    assert world.documents() == before


async def test_who_came_without_a_role_is_what_the_goal_says_he_is(world: World) -> None:
    session = await world.session()
    goal_id = await world.invited(session)

    assert code_of(await world.ask(CommandName.AGREE, goal_id, by="anna", role=None)) == "ok"
    assert code_of(await world.ask(CommandName.START, goal_id, by="anna", role=None)) == "ok"
    assert code_of(await world.ask(CommandName.FINISH, goal_id, by="ben", role=None)) == "ok"


async def test_a_refusal_shows_the_goal_as_it_is(world: World) -> None:
    goal_id = await world.invited(await world.session())
    await world.withdraw(goal_id)

    answer = await world.ask(CommandName.AGREE, goal_id)

    assert isinstance(answer, Refused)
    assert answer.code == "goal_already_declined"
    assert answer.goal is not None
    assert (answer.goal["state"], answer.goal["reason"]) == ("declined", "withdrawn")


async def test_an_expired_goal_cant_be_agreed_even_if_its_timer_is_late(world: World) -> None:
    goal_id = await world.invited(await world.session())
    world.clock.shift(60)

    answer = await world.ask(CommandName.AGREE, goal_id)

    assert code_of(answer) == "goal_expired"
    assert world.goal_row(goal_id)["state"] == "invited"


# Reading


async def test_a_users_open_goals_are_those_that_have_not_ended_on_either_side(
    world: World,
) -> None:
    session = await world.session()
    declined = goal_id_of(await world.invite(session, "cleo"))
    await world.ask(CommandName.DISAGREE, declined)
    world.clock.shift(1)
    ended = await world.invited(session, "dora")
    await world.node.deliver(await world.ask(CommandName.DISAGREE, ended))
    world.clock.shift(1)
    ours = await world.started(session, "ben")

    async def open_ids(user_id: str) -> list[str]:
        return [str(goal.id) for goal in await world.node.goals.open_goals(user_id)]

    assert await open_ids("anna") == [declined, ours]
    assert await open_ids("ben") == [ours]
    assert await open_ids("cleo") == [declined]
    assert await open_ids("dora") == []


async def test_one_goal_is_read_by_its_id_or_not_at_all(world: World) -> None:
    goal_id = await world.invited(await world.session())

    found = await world.node.goals.goal(goal_id)

    assert found is not None
    assert str(found.id) == goal_id
    assert await world.node.goals.goal("f" * 24) is None
    assert await world.node.goals.goal("nonsense") is None


async def test_the_sessions_show_is_its_agreed_or_live_goal(world: World) -> None:
    session = await world.session()
    show_goal_id = world.node.goals.show_goal_id
    goal_id = await world.invited(session)
    assert await show_goal_id(str(session.id)) is None
    await world.ask(CommandName.AGREE, goal_id)
    assert await show_goal_id(str(session.id)) == goal_id
    await world.ask(CommandName.START, goal_id)
    assert await show_goal_id(str(session.id)) == goal_id
    await world.ask(CommandName.FINISH, goal_id)
    assert await show_goal_id(str(session.id)) is None
    assert await show_goal_id("nonsense") is None


def test_an_id_is_24_hex_digits_and_nothing_else() -> None:
    assert object_id("a" * 24) == ObjectId("a" * 24)
    for text in ("", "a" * 23, "a" * 25, "g" * 24, "abcdefghijkl"):
        assert object_id(text) is None


async def test_books_that_contradict_themselves_are_one_loud_error(world: World) -> None:
    goal_id = await world.invited(await world.session())
    world.raw["escrow"].insert_one({"_id": f"{goal_id}:close"})

    with pytest.raises(StoreDamaged, match="close"):
        await world.ask(CommandName.DISAGREE, goal_id)

    assert world.goal_row(goal_id)["state"] == "invited"


async def test_books_that_contradict_themselves_are_loud_where_one_goal_ends_by_another(
    world: World,
) -> None:
    session = await world.session()
    goal_id, rival = await world.invited(session), await world.invited(session, "cleo")
    world.raw["escrow"].insert_one({"_id": f"{rival}:close"})

    with pytest.raises(StoreDamaged, match="close"):
        await world.ask(CommandName.AGREE, goal_id)
    with pytest.raises(StoreDamaged, match="close"):
        await world.node.sessions.end(session)

    assert [world.goal_row(each)["state"] for each in (goal_id, rival)] == ["invited"] * 2
