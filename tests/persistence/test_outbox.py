"""The outbox: in order, until all have run, by one process at a time, whoever dies."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from bson import ObjectId
from structlog.testing import capture_logs

from persistence.faults import Step
from persistence.intents import Done
from statemachine.goal import CommandName
from statemachine.receivers import (
    TRIGGER_EXCLUSIVE_GOAL,
    Invoke,
    Phase,
    Push,
    Receiver,
    Signal,
    Track,
    standard_receivers,
)
from tests.persistence.world import code_of, goal_id_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from persistence.intents import Answer
    from statemachine.receivers import Effect, Occurrence
    from tests.persistence.world import Row, Steps, World

STREAMERS_CHANNELS = ("private-stream@anna", "presence-stream@anna", "private-user@anna")


def pending(row: Row) -> list[tuple[str, list[str]]]:
    """What still waits, as signal and receivers."""
    return [(entry["event_id"].rpartition(":")[2], entry["pending"]) for entry in row["outbox"]]


def pushes(event: str) -> object:
    """A failure of whatever pushes `event`."""

    def fails(_: Occurrence, effects: Sequence[Effect]) -> bool:
        return any(isinstance(effect, Push) and effect.event == event for effect in effects)

    return fails


async def delivered(world: World, answer: Answer) -> list[bool]:
    assert isinstance(answer, Done)
    return [await world.node.outbox.deliver(delivery) for delivery in answer.deliveries]


# The way it goes when nothing goes wrong


async def test_an_agreement_is_delivered_in_order_and_to_the_right_channels(
    world: World, steps: Steps
) -> None:
    goal_id = await world.invited(await world.session())
    world.node.recorder.performed.clear()
    steps.reached.clear()

    assert await delivered(world, await world.ask(CommandName.AGREE, goal_id)) == [True]

    assert steps.details(Step.AFTER_RECEIVER) == [
        "invalidate_get_session_token_view_cache",
        "invalidate_cached_pusher_channel_data",
        "notify_stream_authorized_for_agreed_trigger_goal",
        "notify_goal_ended",
        "track_goals",
    ]
    assert world.node.recorder.pushed == [
        ("stream.authorized", ("presence-stream-viewer@anna.preview.ben",)),
        ("goal.ended", STREAMERS_CHANNELS),
    ]


async def test_a_whole_invitation_pushes_exactly_these_events(world: World) -> None:
    session = await world.session()

    goal_id = await world.started(session)
    await delivered(world, await world.ask(CommandName.FINISH, goal_id))

    stream, room, _ = STREAMERS_CHANNELS
    assert world.node.recorder.pushed == [
        ("goal.added", ("private-stream@anna", "private-user@anna")),
        ("escrow.held", ("private-user@ben",)),
        ("stream.authorized", ("presence-stream-viewer@anna.preview.ben",)),
        ("goal.ended", STREAMERS_CHANNELS),
        ("exclusive.started", (stream, room)),
        ("escrow.captured", ("private-user@ben",)),
        ("exclusive.ended", (stream, room)),
        ("goal.ended", STREAMERS_CHANNELS),
    ]


async def test_what_is_read_back_from_the_outbox_is_what_was_put_in(world: World) -> None:
    """The same occurrence, whether it comes from memory or, after a crash, from MongoDB."""
    other = await world.add_node()
    goal_id = await world.invited(await world.session())
    answer = await world.ask(CommandName.AGREE, goal_id)
    world.node.recorder.performed.clear()
    await delivered(world, answer)
    world.raw["goals"].update_one(
        {"_id": ObjectId(goal_id)},
        {
            "$set": {
                "outbox": [entry.model_dump() for entry in answer.deliveries[0].entries]
                if isinstance(answer, Done)
                else [],
                "outbox_due_at": world.clock.now(),
            }
        },
    )

    await other.deliver_due()

    assert other.recorder.performed == world.node.recorder.performed


async def test_nothing_is_delivered_twice_after_success(world: World) -> None:
    other = await world.add_node()
    goal_id = await world.invited(await world.session())
    await delivered(world, await world.ask(CommandName.DISAGREE, goal_id))
    row = world.goal_row(goal_id)

    world.clock.shift(3600)

    assert row["outbox"] == []
    assert not {"outbox_due_at", "outbox_owner"} & set(row)
    assert await world.node.deliver_due() == await other.deliver_due() == 0
    assert await world.node.outbox.pending() == 0


async def test_what_the_caller_has_run_already_is_not_run_again(world: World, steps: Steps) -> None:
    goal_id = await world.invited(await world.session())
    answer = await world.ask(CommandName.DISAGREE, goal_id)
    assert isinstance(answer, Done)
    steps.reached.clear()

    await world.node.outbox.deliver(
        answer.deliveries[0], frozenset({"invalidate_get_session_token_view_cache"})
    )

    run = steps.details(Step.AFTER_RECEIVER)
    assert "invalidate_get_session_token_view_cache" not in run
    assert run[0] == "invalidate_cached_pusher_channel_data"
    assert world.goal_row(goal_id)["state"] == "ended"


async def test_what_the_caller_has_run_is_run_for_entries_that_came_later(world: World) -> None:
    other = await world.add_node()
    invited = await world.invite(await world.session())
    goal_id = goal_id_of(invited)
    await world.ask(CommandName.AGREE, goal_id, node=other)
    await world.ask(CommandName.START, goal_id, node=other)
    assert isinstance(invited, Done)

    await world.node.outbox.deliver(invited.deliveries[0], frozenset({"notify_escrow"}))

    events = world.node.recorder.events
    assert "escrow.held" not in events
    assert events[-1] == "escrow.captured"


# Settling


async def test_a_declined_goal_ends_when_its_release_is_acknowledged(world: World) -> None:
    goal_id = await world.invited(await world.session())
    answer = await world.ask(CommandName.DISAGREE, goal_id)
    assert world.goal_row(goal_id)["state"] == "declined"

    await delivered(world, answer)

    row = world.goal_row(goal_id)
    assert (row["state"], row["outcome"], row["reason"]) == ("ended", "refunded", "disagreed")
    assert row["version"] == 3


async def test_a_goal_that_is_not_declined_is_not_settled(world: World) -> None:
    """A refunded show is released too, and has ended already."""
    goal_id = await world.agreed(await world.session())
    world.clock.shift(65)
    [answer] = await world.node.fire_due()
    before = world.goal_row(goal_id)["version"]

    await delivered(world, answer)

    row = world.goal_row(goal_id)
    assert (row["outcome"], row["reason"]) == ("refunded", "not_started")
    assert row["version"] == before


async def test_a_goal_is_not_settled_while_its_release_is_not_acknowledged(world: World) -> None:
    goal_id = await world.invited(await world.session())
    answer = await world.ask(CommandName.DISAGREE, goal_id)
    world.node.recorder.fails = pushes("escrow.released")  # type: ignore[assignment]

    assert await delivered(world, answer) == [False]

    assert world.goal_row(goal_id)["state"] == "declined"


# Failures


async def test_a_failure_keeps_what_has_not_run_and_the_retry_runs_only_that(
    world: World, steps: Steps
) -> None:
    goal_id = await world.invited(await world.session())
    answer = await world.ask(CommandName.DISAGREE, goal_id)
    world.node.recorder.fails = pushes("goal.ended")  # type: ignore[assignment]

    assert await delivered(world, answer) == [False]

    row = world.goal_row(goal_id)
    assert pending(row) == [
        ("goal.ended", ["notify_goal_ended", "track_goals"]),
        (
            "escrow.released",
            ["invalidate_get_session_token_view_cache", "notify_escrow", "settle_escrow"],
        ),
    ]
    assert row["outbox_due_at"] == world.clock.now() + timedelta(seconds=0.25)
    world.node.recorder.fails = lambda _occurrence, _effects: False
    assert await world.node.deliver_due() == 0
    world.clock.shift(0.25)
    steps.reached.clear()
    assert await world.node.deliver_due() == 1
    assert steps.details(Step.AFTER_RECEIVER) == [
        "notify_goal_ended",
        "track_goals",
        "invalidate_get_session_token_view_cache",
        "notify_escrow",
        "settle_escrow",
    ]
    assert world.goal_row(goal_id)["state"] == "ended"


async def test_entries_that_were_finished_before_a_failure_are_gone(world: World) -> None:
    goal_id = await world.invited(await world.session())
    answer = await world.ask(CommandName.DISAGREE, goal_id)
    world.node.recorder.fails = pushes("escrow.released")  # type: ignore[assignment]

    await delivered(world, answer)

    assert pending(world.goal_row(goal_id)) == [
        ("escrow.released", ["notify_escrow", "settle_escrow"])
    ]


async def test_a_receiver_that_fails_for_ever_holds_up_only_its_own_goal(world: World) -> None:
    session = await world.session()
    stuck, fine = await world.invited(session, "ben"), await world.invited(session, "cleo")
    world.node.recorder.fails = lambda occurrence, _: occurrence.viewer_id == "ben"

    for goal_id in (stuck, fine):
        await delivered(world, await world.ask(CommandName.DISAGREE, goal_id))

    assert world.goal_row(stuck)["state"] == "declined"
    assert world.goal_row(fine)["state"] == "ended"
    assert await world.node.outbox.pending() == 1


async def test_a_receiver_that_fails_for_many_goals_is_told_once(world: World) -> None:
    session = await world.session()
    goals = [await world.invited(session, viewer) for viewer in ("ben", "cleo", "dora")]
    answers = [await world.ask(CommandName.DISAGREE, goal_id) for goal_id in goals]
    world.node.recorder.fails = pushes("goal.ended")  # type: ignore[assignment]

    with capture_logs() as logs:
        for answer in answers:
            await delivered(world, answer)

    [told] = [line for line in logs if line["log_level"] != "debug"]
    assert (told["event"], told["receiver"]) == ("receiver_failed", "notify_goal_ended")
    assert await world.node.outbox.pending() == 3


async def test_the_oldest_news_that_waits_is_as_old_as_its_cause(world: World) -> None:
    session = await world.session()
    answer = await world.ask(CommandName.DISAGREE, await world.invited(session, "ben"))
    asked_at = world.clock.now()
    world.clock.shift(30)
    await world.ask(CommandName.DISAGREE, await world.invited(session, "cleo"))
    assert await world.node.outbox.oldest_at() <= asked_at  # type: ignore[operator]

    await delivered(world, answer)

    assert await world.node.outbox.oldest_at() > asked_at  # type: ignore[operator]
    await world.node.deliver_due()
    world.clock.shift(10)
    await world.node.deliver_due()
    assert await world.node.outbox.oldest_at() is None


async def test_the_platforms_own_receiver_runs_from_the_outbox(world: World) -> None:
    heard: list[str] = []

    async def handler(occurrence: Occurrence) -> None:
        heard.append(occurrence.event_id)

    registry = standard_receivers()
    registry.register(
        Receiver(
            "bill",
            Signal.GOAL_ENDED,
            Phase.DELIVER,
            frozenset({TRIGGER_EXCLUSIVE_GOAL}),
            lambda _: (Invoke(handler),),
        )
    )
    node = await world.add_node(registry)
    goal_id = await world.invited(await world.session())
    answer = await world.ask(CommandName.AGREE, goal_id, node=node)

    await node.deliver(answer)

    [effect] = node.recorder.performed[-1][1]
    assert effect == Invoke(handler)
    assert world.goal_row(goal_id)["outbox"] == []


async def test_a_receiver_that_this_process_does_not_know_waits_for_one_that_does(
    world: World,
) -> None:
    """While a new version is rolled out, old nodes meet entries of new ones."""
    registry = standard_receivers()
    registry.register(
        Receiver(
            "bill",
            Signal.GOAL_ENDED,
            Phase.DELIVER,
            frozenset({TRIGGER_EXCLUSIVE_GOAL}),
            lambda _: (),
        )
    )
    newer = await world.add_node(registry)
    goal_id = await world.invited(await world.session())
    await world.ask(CommandName.AGREE, goal_id, node=newer)
    world.clock.shift(5)

    assert await world.node.deliver_due() == 1
    assert pending(world.goal_row(goal_id)) == [("goal.ended", ["bill"])]

    world.clock.shift(0.25)
    assert await newer.deliver_due() == 1
    assert world.goal_row(goal_id)["outbox"] == []


# Entries that come meanwhile


async def test_entries_added_while_a_run_is_on_its_way_are_delivered_by_the_same_run(
    world: World,
) -> None:
    other = await world.add_node()
    goal_id = goal_id_of(invited := await world.invite(await world.session()))

    agreed = await world.ask(CommandName.AGREE, goal_id, node=other)
    started = await world.ask(CommandName.START, goal_id, node=other)
    assert isinstance(agreed, Done)
    assert isinstance(started, Done)
    assert agreed.deliveries == started.deliveries == ()
    await delivered(world, invited)

    assert world.node.recorder.events == [
        "goal.added",
        "escrow.held",
        "stream.authorized",
        "goal.ended",
        "exclusive.started",
        "escrow.captured",
    ]
    assert other.recorder.events == []
    assert world.goal_row(goal_id)["outbox"] == []


async def test_an_entry_added_at_the_last_moment_is_not_lost(world: World, steps: Steps) -> None:
    """Between the last receiver and the removal, another node's commit adds its entry."""
    goal_id = goal_id_of(invited := await world.invite(await world.session()))
    held = world.goal_row(goal_id)["outbox"][1]
    event_id = f"{goal_id}:9:escrow.held"
    late = {**held, "event_id": event_id, "occurrence": held["occurrence"] | {"event_id": event_id}}

    def another_node_commits() -> None:
        world.raw["goals"].update_one(
            {"_id": ObjectId(goal_id)}, {"$push": {"outbox": late}, "$inc": {"version": 1}}
        )

    steps.once(Step.BEFORE_OUTBOX_REMOVAL, "", another_node_commits)

    assert await delivered(world, invited) == [True]

    ids = [occurrence.event_id for occurrence, _ in world.node.recorder.performed]
    assert ids == [
        f"{goal_id}:1:goal.added",
        f"{goal_id}:1:escrow.held",
        event_id,
    ]
    assert world.goal_row(goal_id)["outbox"] == []


async def test_after_a_failure_later_entries_wait_behind_the_failed_one(world: World) -> None:
    goal_id = goal_id_of(invited := await world.invite(await world.session()))
    world.node.recorder.fails = pushes("goal.added")  # type: ignore[assignment]
    await delivered(world, invited)
    world.node.recorder.fails = lambda _occurrence, _effects: False

    agreed = await world.ask(CommandName.AGREE, goal_id)
    assert isinstance(agreed, Done)
    assert agreed.deliveries == ()
    world.clock.shift(5)
    await world.node.deliver_due()

    assert world.node.recorder.events == [
        "goal.added",
        "escrow.held",
        "stream.authorized",
        "goal.ended",
    ]


# Leases


async def test_another_process_takes_over_when_the_lease_has_run_out_and_not_before(
    world: World,
) -> None:
    other = await world.add_node()
    goal_id = goal_id_of(await world.invite(await world.session()))

    world.clock.shift(4.999)
    assert await other.deliver_due() == 0
    world.clock.shift(0.001)
    assert await other.deliver_due() == 1

    assert other.recorder.events == ["goal.added", "escrow.held"]
    assert world.goal_row(goal_id)["outbox"] == []


async def test_of_two_processes_that_look_at_once_one_takes_over(world: World) -> None:
    other = await world.add_node()
    await world.invite(await world.session())
    world.clock.shift(5)

    mine = await world.node.outbox.claim_due(10)
    theirs = await other.outbox.claim_due(10)

    assert (len(mine), len(theirs)) == (1, 0)
    world.clock.shift(5)
    assert len(await other.outbox.claim_due(10)) == 1


async def test_of_two_processes_that_look_at_the_same_moment_each_outbox_goes_to_one(
    world: World,
) -> None:
    other = await world.add_node()
    session = await world.session()
    for number in range(6):
        await world.invite(session, f"viewer{number}")
    world.clock.shift(5)

    mine, theirs = await asyncio.gather(world.node.outbox.claim_due(10), other.outbox.claim_due(10))

    claimed = [delivery.goal_id for delivery in (*mine, *theirs)]
    assert len(claimed) == len(set(claimed)) == 6


async def test_no_more_is_claimed_than_asked_for_and_the_oldest_first(world: World) -> None:
    session = await world.session()
    goal_ids = []
    for number in range(4):
        goal_ids.append(goal_id_of(await world.invite(session, f"viewer{number}")))
        world.clock.shift(0.1)
    world.clock.shift(5)

    first = await world.node.outbox.claim_due(3)
    second = await world.node.outbox.claim_due(3)

    assert [str(delivery.goal_id) for delivery in (*first, *second)] == goal_ids
    assert len(first) == 3


async def test_a_restarted_node_takes_over_at_once_what_its_predecessor_left(
    world: World,
) -> None:
    stranger = await world.add_node(node_name="other")
    await world.invite(await world.session())
    restarted = await world.add_node(node_name="node0")

    assert await stranger.outbox.take_over() == 0
    assert await stranger.deliver_due() == 0
    assert await restarted.outbox.take_over() == 1
    assert await restarted.deliver_due() == 1
    assert restarted.recorder.events == ["goal.added", "escrow.held"]


async def test_a_node_takes_over_nothing_of_its_own_nor_of_a_name_that_looks_like_it(
    world: World,
) -> None:
    await world.invite(await world.session())
    for name in ("node", "node00", "n.de0", "node0/x", ".*"):
        alike = await world.add_node(node_name=name)
        assert await alike.outbox.take_over() == 0, name

    assert await world.node.outbox.take_over() == 0


@pytest.mark.parametrize("name", ["host.example:6001", "a+b", "node (1)", "ключ~2"])
async def test_any_node_name_finds_its_own_again(world: World, name: str) -> None:
    node = await world.add_node(node_name=name)
    await world.invite(await world.session(), node=node)

    restarted = await world.add_node(node_name=name)

    assert await restarted.outbox.take_over() == 1


async def test_a_restarted_node_frees_the_deadlines_that_its_predecessor_had_claimed(
    world: World,
) -> None:
    goal_id = await world.invited(await world.session())
    world.clock.shift(60)
    assert len(await world.node.deadlines.claim_due(10)) == 1
    restarted = await world.add_node(node_name="node0")
    assert await restarted.deadlines.claim_due(10) == []

    assert await restarted.outbox.take_over() == 1

    [answer] = await restarted.fire_due()
    assert code_of(answer) == "ok"
    assert world.goal_row(goal_id)["reason"] == "expired"


# Analytics


async def test_a_record_is_written_once_however_often_it_is_delivered(world: World) -> None:
    effect = Track(
        "event",
        {
            "goal_type": TRIGGER_EXCLUSIVE_GOAL,
            "goal_id": "a" * 24,
            "session_id": "b" * 24,
            "streamer_id": "anna",
            "viewer_id": "ben",
            "agreed": True,
            "at": world.clock.now(),
        },
    )

    assert await world.node.outbox.track(effect) is True
    assert await world.node.outbox.track(effect) is False

    assert world.documents()["goal_records"] == [{"_id": "event", **effect.record}]


async def test_of_records_that_are_written_together_each_knows_whether_it_is_the_first(
    world: World,
) -> None:
    record = {"goal_type": TRIGGER_EXCLUSIVE_GOAL, "streamer_id": "anna", "at": world.clock.now()}
    await world.node.outbox.track(Track("event2", record))

    first = await asyncio.gather(
        *(world.node.outbox.track(Track(f"event{number}", record)) for number in range(5))
    )

    assert first == [True, True, False, True, True]
    assert [row["_id"] for row in world.documents()["goal_records"]] == [
        f"event{number}" for number in range(5)
    ]


async def test_outboxes_that_are_emptied_together_are_emptied_each_by_its_owner_and_to_the_end(
    world: World,
) -> None:
    """Of four one was taken over by another process, and one has got an entry meanwhile."""
    other = await world.add_node()
    invited = [await world.invite(await world.session(f"streamer{n}")) for n in range(4)]
    goal_ids = [goal_id_of(answer) for answer in invited]
    taken = {"outbox_owner": other.store.owner}
    world.raw["goals"].update_one({"_id": ObjectId(goal_ids[1])}, {"$set": taken})
    agreed = await world.ask(CommandName.AGREE, goal_ids[2], by="streamer2", node=other)
    assert isinstance(agreed, Done)
    assert agreed.deliveries == ()

    await asyncio.gather(*(world.node.deliver(answer) for answer in invited))

    left = [len(world.goal_row(goal_id)["outbox"]) for goal_id in goal_ids]
    assert left == [0, 2, 0, 0]
    assert world.node.recorder.events.count("goal.added") == 4
    assert world.node.recorder.events.count("stream.authorized") == 1


# Who owns an outbox


async def test_a_later_commit_leaves_the_outbox_to_whoever_delivers_it(world: World) -> None:
    other = await world.add_node()
    goal_id = await world.invited(await world.session())
    await world.ask(CommandName.AGREE, goal_id)
    before = world.goal_row(goal_id)

    world.clock.shift(1)
    answer = await world.ask(CommandName.START, goal_id, node=other)

    after = world.goal_row(goal_id)
    assert isinstance(answer, Done)
    assert answer.deliveries == ()
    assert len(after["outbox"]) > len(before["outbox"])
    for name in ("outbox_owner", "outbox_due_at"):
        assert after[name] == before[name]


async def test_a_run_that_was_stalled_does_not_undo_what_its_successor_does(world: World) -> None:
    other = await world.add_node()
    goal_id = await world.invited(await world.session())
    answer = await world.ask(CommandName.AGREE, goal_id)
    assert isinstance(answer, Done)
    world.clock.shift(60)
    [taken] = await other.outbox.claim_due(1)
    row = world.goal_row(goal_id)

    assert await world.node.outbox.deliver(answer.deliveries[0])

    assert world.goal_row(goal_id) == row
    assert await other.outbox.deliver(taken)
    assert world.goal_row(goal_id)["outbox"] == []


async def test_a_receiver_that_keeps_failing_is_tried_less_and_less_often(world: World) -> None:
    goal_id = await world.invited(await world.session())
    answer = await world.ask(CommandName.AGREE, goal_id)
    world.node.recorder.fails = lambda _occurrence, _effects: True
    await delivered(world, answer)
    waits = []

    for _ in range(6):
        due_at = world.goal_row(goal_id)["outbox_due_at"]
        waits.append((due_at - world.clock.now()).total_seconds())
        world.clock.shift(waits[-1])
        assert await world.node.deliver_due() == 1

    assert waits == pytest.approx([0.25, 0.5, 1, 2, 2, 2])
    world.node.recorder.fails = lambda _occurrence, _effects: False
    world.clock.shift(2)
    await world.node.deliver_due()
    assert "outbox_failures" not in world.goal_row(goal_id)
