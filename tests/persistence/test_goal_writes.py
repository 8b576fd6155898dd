"""From a decision to what is written, without a database: guards, updates, signals."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from bson import ObjectId

from persistence.documents import (
    Conditions,
    Context,
    Goal,
    Metadata,
    OutboxEntry,
    Pair,
    Session,
    SessionStatus,
    SessionUser,
    ViewerPass,
)
from persistence.goal_writes import GoalWrite, SessionWrite, Writer, facts_of
from persistence.occurrences import occurrence_of
from persistence.rows import goal_row
from statemachine.goal import (
    Command,
    CommandName,
    Decision,
    GoalState,
    Limits,
    Role,
    decide,
)
from statemachine.receivers import SyncViewers, standard_receivers

if TYPE_CHECKING:
    from tests.persistence.world import World

NOW = datetime(2026, 11, 22, 17, 25, 0, 123_000, UTC)
GOAL_ID, SESSION_ID = ObjectId("a" * 24), ObjectId("b" * 24)
LIMITS = Limits()

COMMANDS = [
    (GoalState.INVITED, CommandName.AGREE, Role.STREAMER, "anna"),
    (GoalState.INVITED, CommandName.DISAGREE, Role.STREAMER, "anna"),
    (GoalState.INVITED, CommandName.WITHDRAW, Role.VIEWER, "ben"),
    (GoalState.INVITED, CommandName.SUPERSEDE, Role.SYSTEM, None),
    (GoalState.INVITED, CommandName.CLOSE, Role.SYSTEM, None),
    (GoalState.AGREED, CommandName.START, Role.STREAMER, "anna"),
    (GoalState.AGREED, CommandName.REFUND, Role.TIMER, None),
    (GoalState.LIVE, CommandName.FINISH, Role.VIEWER, "ben"),
]


@pytest.fixture(autouse=True)
def _documents(world: object) -> None:
    """Beanie wants its documents initialized before one is built."""


def goal(state: GoalState = GoalState.INVITED, **different: Any) -> Goal:
    fields: dict[str, Any] = {
        "id": GOAL_ID,
        "cls": "TriggerExclusiveGoal",
        "active": state is GoalState.INVITED,
        "conditions": Conditions(session_id=SESSION_ID, exclusive_to="ben"),
        "context": Context(type="trigger-exclusive", exclusive_to="ben"),
        "exp": NOW + timedelta(seconds=60),
        "triggerer": "viewer-app",
        "metadata": Metadata(user_id="anna", prepaid_duration=30),
        "breakdown": {"ben": 500},
        "amount": 500,
        "state": state,
        "exclusive_goal": ObjectId("c" * 24) if state is GoalState.LIVE else None,
        "created_at": NOW,
        "version": 4,
    }
    return Goal(**(fields | different))


def session(**different: Any) -> Session:
    fields: dict[str, Any] = {
        "id": SESSION_ID,
        "user": SessionUser(id="anna"),
        "exclusive_goal_pairs": {"ben": Pair(trigger_exclusive_goal=GOAL_ID)},
        "created_at": NOW,
        "version": 7,
    }
    return Session(**(fields | different))


def writer() -> Writer:
    return Writer(standard_receivers(), LIMITS, owner="node/1", lease_s=5.0)


def decision_on(before: Goal, name: CommandName, role: Role, user_id: str | None) -> Decision:
    decision = decide(facts_of(before, session()), Command(name, role, user_id), NOW, LIMITS)
    assert isinstance(decision, Decision), decision
    return decision


def plain(write: GoalWrite) -> dict[str, Any]:
    update = write.update()
    assert isinstance(update, dict)
    return update


# The compare-and-set


@pytest.mark.parametrize(("state", "name", "role", "user_id"), COMMANDS)
def test_every_write_is_guarded_by_id_streamer_state_and_version(
    state: GoalState, name: CommandName, role: Role, user_id: str | None
) -> None:
    before = goal(state)

    write, _ = writer().goal_write(before, decision_on(before, name, role, user_id), NOW, "app")

    guard = {
        "_id": GOAL_ID,
        "metadata.user_id": "anna",
        "state": state.value,
        "version": 4,
    }
    # The requirements' filter of `deactivate_goal` asks for `active` too.
    assert write.guard == (guard | {"active": True} if state is GoalState.INVITED else guard)
    assert plain(write)["$inc"] == {"version": 1}
    assert write.after.version == 5


@pytest.mark.parametrize(("state", "name", "role", "user_id"), COMMANDS)
def test_no_field_is_set_and_unset_by_one_write(
    state: GoalState, name: CommandName, role: Role, user_id: str | None
) -> None:
    before = goal(state)

    write, _ = writer().goal_write(before, decision_on(before, name, role, user_id), NOW, "app")

    update = plain(write)
    assert not set(update["$set"]) & set(update["$unset"])
    assert ("due_at" in update["$set"]) is (name in (CommandName.AGREE, CommandName.START))


@pytest.mark.parametrize(("state", "name", "role", "user_id"), COMMANDS)
async def test_a_goal_is_written_the_same_whether_its_outbox_was_empty_or_is_no_more(
    world: World, state: GoalState, name: CommandName, role: Role, user_id: str | None
) -> None:
    """What lay in the outbox when it was read may have been delivered by the time of the write."""
    before = goal(state)
    waits = OutboxEntry(event_id="before", pending=["track_goals"], occurrence={})
    decision = decision_on(before, name, role, user_id)
    goals = world.raw["goals"]
    written = []
    for read in (before, before.model_copy(update={"outbox": [waits]})):
        write, _ = writer().goal_write(read, decision, NOW, "app")
        # A show has an id of its own, another each time.
        write.set_fields.pop("exclusive_goal", None)
        goals.replace_one({"_id": GOAL_ID}, goal_row(before), upsert=True)
        assert goals.update_one(write.guard, write.update()).matched_count == 1
        row = world.goal_row(str(GOAL_ID))
        assert [each["event_id"] for each in row["outbox"]] == [
            entry.event_id for entry in write.entries
        ]
        written.append(row)

    assert written[0] == written[1]


async def test_new_entries_stand_behind_those_that_wait_and_leave_them_to_whoever_has_them(
    world: World,
) -> None:
    waits = OutboxEntry(event_id="before", pending=["track_goals"], occurrence={})
    before = goal(outbox=[waits], outbox_owner="another", outbox_due_at=NOW)
    decision = decision_on(before, CommandName.AGREE, Role.STREAMER, "anna")
    goals = world.raw["goals"]
    goals.insert_one(goal_row(before))
    write, _ = writer().goal_write(before, decision, NOW, "app")

    goals.update_one(write.guard, write.update())

    row = world.goal_row(str(GOAL_ID))
    assert [entry["event_id"] for entry in row["outbox"]] == [
        "before",
        *(entry.event_id for entry in write.entries),
    ]
    assert row["outbox_owner"] == "another"
    assert row["outbox_due_at"] == NOW


@pytest.mark.parametrize(("state", "name", "role", "user_id"), COMMANDS)
def test_every_signal_has_an_event_id_of_its_own_with_the_goals_new_version(
    state: GoalState, name: CommandName, role: Role, user_id: str | None
) -> None:
    before = goal(state)

    write, _ = writer().goal_write(before, decision_on(before, name, role, user_id), NOW, "app")

    ids = [entry.event_id for entry in write.entries]
    assert len(ids) == len(set(ids)) > 0
    for entry in write.entries:
        assert entry.event_id == f"{GOAL_ID}:5:{entry.occurrence['signal']}"


def test_an_entry_is_read_back_as_the_occurrence_that_it_was() -> None:
    before = goal()
    decision = decision_on(before, CommandName.AGREE, Role.STREAMER, "anna")
    [entry] = writer().goal_write(before, decision, NOW, "app")[0].entries

    occurrence = occurrence_of(entry)

    assert occurrence.event_id == entry.event_id
    assert (occurrence.streamer_id, occurrence.viewer_id) == ("anna", "ben")
    assert occurrence.breakdown == ("ben",)
    assert occurrence.agreed_at == occurrence.exp == NOW
    assert occurrence.args["metadata"] == {
        "user_id": "anna",
        "prepaid_duration": 30,
        "agreed": "2026-11-22T17:25:00.123Z",
    }


def test_nobody_delivers_while_earlier_entries_are_on_their_way() -> None:
    before = goal()
    decision = decision_on(before, CommandName.DISAGREE, Role.STREAMER, "anna")
    write, _ = writer().goal_write(before, decision, NOW, "app")

    [delivery] = write.deliveries(0)

    assert list(delivery.entries) == write.entries
    assert write.deliveries(1) == []


# The Session's part


def session_write_of(
    stored: Session, state: GoalState, name: CommandName, role: Role, user_id: str | None
) -> SessionWrite | None:
    before = goal(state)
    decision = decision_on(before, name, role, user_id)
    write, effects = writer().goal_write(before, decision, NOW, "app")
    return writer().session_write(stored, write.after, decision, effects)


def test_the_sessions_write_is_guarded_by_its_version_and_the_pairs_goal() -> None:
    write = session_write_of(session(), GoalState.INVITED, CommandName.AGREE, Role.STREAMER, "anna")

    assert write is not None
    assert write.guard == {
        "_id": SESSION_ID,
        "version": 7,
        "exclusive_goal_pairs.ben.trigger_exclusive_goal": GOAL_ID,
    }


@pytest.mark.parametrize("pairs", [{}, {"ben": Pair(trigger_exclusive_goal=ObjectId("d" * 24))}])
def test_a_pair_that_names_another_goal_is_not_written(pairs: dict[str, Pair]) -> None:
    stored = session(exclusive_goal_pairs=pairs)

    declined = session_write_of(
        stored, GoalState.INVITED, CommandName.DISAGREE, Role.STREAMER, "anna"
    )
    finished = session_write_of(stored, GoalState.LIVE, CommandName.FINISH, Role.VIEWER, "ben")

    assert declined is None
    assert finished is not None
    assert finished.set_fields == {}
    assert finished.unset_fields == ["viewers.ben"]


def test_a_show_that_ends_frees_the_stream_only_if_it_is_the_shows() -> None:
    ours = session(status=SessionStatus(exclusive_to=["ben"]))
    theirs = session(status=SessionStatus(exclusive_to=["cleo"]))

    def freed(stored: Session) -> bool:
        write = session_write_of(stored, GoalState.LIVE, CommandName.FINISH, Role.VIEWER, "ben")
        assert write is not None
        return write.set_fields.get("status.exclusive_to") == []

    assert freed(ours)
    assert not freed(theirs)


def test_values_in_a_pipeline_are_literals() -> None:
    """A string that begins with a dollar sign is a value, not a path."""
    write = SessionWrite(
        guard={"_id": SESSION_ID},
        set_fields={"status.exclusive_to": ["$viewers"]},
        unset_fields=["viewers.cleo"],
        sync=SyncViewers(str(SESSION_ID), ("ben",), NOW, 90.0),
    )

    assert write.pipeline() == [
        {
            "$set": {
                "status.exclusive_to": {"$literal": ["$viewers"]},
                "version": {"$add": ["$version", 1]},
            }
        },
        {
            "$set": {
                "viewers.ben.nbf": {"$ifNull": ["$viewers.ben.nbf", {"$literal": NOW}]},
                "viewers.ben.duration": {"$literal": 90.0},
            }
        },
        {"$set": {"viewers.ben.exp": {"$add": ["$viewers.ben.nbf", 90_000]}}},
        {"$unset": ["viewers.cleo"]},
    ]


# Facts


@pytest.mark.parametrize(
    ("state", "exclusive_to", "taken"),
    [
        (GoalState.INVITED, [], False),
        (GoalState.INVITED, ["cleo"], True),
        (GoalState.INVITED, ["ben"], True),
        (GoalState.AGREED, ["ben"], False),
        (GoalState.AGREED, ["cleo"], True),
        (GoalState.LIVE, ["ben"], False),
        (GoalState.AGREED, [], False),
    ],
)
def test_a_session_is_taken_by_everyone_but_the_goal_itself(
    state: GoalState, exclusive_to: list[str], taken: bool
) -> None:
    stored = session(status=SessionStatus(exclusive_to=exclusive_to))

    assert facts_of(goal(state), stored).session_taken is taken


def test_what_is_known_to_be_taken_is_taken_whatever_the_session_says() -> None:
    assert facts_of(goal(), session(), taken=True).session_taken


def test_the_facts_are_the_goals_and_the_sessions() -> None:
    nbf = NOW - timedelta(seconds=9)
    stored = session(active=False, viewers={"ben": ViewerPass(nbf=nbf, duration=1.0, exp=NOW)})
    before = goal(GoalState.AGREED, due_at=NOW)

    facts = facts_of(before, stored)

    assert (facts.streamer_id, facts.viewer_id, facts.amount_minor) == ("anna", "ben", 500)
    assert (facts.prepaid_duration_s, facts.expires_at) == (30, before.exp)
    assert (facts.due_at, facts.viewer_nbf, facts.session_active) == (NOW, nbf, False)
