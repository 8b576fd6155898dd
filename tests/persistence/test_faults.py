"""The named steps, and what a crash at each of them leaves behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from persistence import faults
from persistence.faults import Step, reached
from statemachine.goal import CommandName
from tests.persistence.world import Steps, code_of

if TYPE_CHECKING:
    from tests.persistence.world import World


class Crash(BaseException):
    """Not an `Exception`: nothing may catch it on its way out, as nothing survives `kill -9`."""


def crash() -> None:
    raise Crash


def test_a_step_without_a_hook_does_nothing() -> None:
    faults.install(None)

    reached(Step.BEFORE_LOAD, "agree")


def test_the_hook_hears_of_each_step_until_it_is_taken_away() -> None:
    heard = Steps()
    faults.install(heard)
    reached(Step.BEFORE_LOAD, "agree")
    faults.install(None)
    reached(Step.BEFORE_REPLY, "agree")

    assert heard.reached == [(Step.BEFORE_LOAD, "agree")]


async def test_a_command_reaches_its_steps_in_order(world: World, steps: Steps) -> None:
    goal_id = await world.invited(await world.session())
    steps.reached.clear()

    answer = await world.ask(CommandName.DISAGREE, goal_id)
    await world.node.deliver(answer)

    names = [step for step, _ in steps.reached]
    in_order = [step for step in Step if step is not Step.BEFORE_REPLY]
    assert sorted(set(names), key=names.index) == in_order


BEFORE_THE_COMMIT = [
    Step.BEFORE_LOAD,
    Step.AFTER_DECIDE,
    Step.IN_TRANSACTION,
    Step.BEFORE_COMMIT,
]


@pytest.mark.parametrize("step", BEFORE_THE_COMMIT)
@pytest.mark.parametrize(
    "name", [CommandName.INVITE, CommandName.AGREE, CommandName.DISAGREE, CommandName.START]
)
async def test_a_crash_before_the_commit_leaves_everything_as_it_was(
    world: World, steps: Steps, step: Step, name: CommandName
) -> None:
    session = await world.session()
    if name is CommandName.START:
        goal_id = await world.agreed(session)
    else:
        goal_id = await world.invited(session)
    before = world.documents()
    steps.once(step, name, crash)
    if name is CommandName.INVITE:
        command = world.invite(session, "cleo", request_id="r")
    else:
        command = world.ask(name, goal_id, request_id="r")

    with pytest.raises(Crash):
        await command

    assert world.documents() == before


@pytest.mark.parametrize("step", [*BEFORE_THE_COMMIT, Step.AFTER_COMMIT])
async def test_after_a_crash_the_same_request_has_one_effect(
    world: World, steps: Steps, step: Step
) -> None:
    goal_id = await world.invited(await world.session())
    steps.once(step, "disagree", crash)

    with pytest.raises(Crash):
        await world.ask(CommandName.DISAGREE, goal_id, request_id="r")
    again = await world.ask(CommandName.DISAGREE, goal_id, request_id="r")

    assert code_of(again) == "ok"
    assert world.movements(goal_id) == ["hold", "release"]
    assert world.goal_row(goal_id)["reason"] == "disagreed"


async def test_after_a_crash_behind_the_commit_another_node_delivers_it_all(
    world: World, steps: Steps
) -> None:
    other = await world.add_node()
    goal_id = await world.invited(await world.session())
    steps.once(Step.AFTER_COMMIT, "agree", crash)

    with pytest.raises(Crash):
        await world.ask(CommandName.AGREE, goal_id)
    world.clock.shift(5.0)
    taken = await other.deliver_due()

    assert taken == 1
    assert other.recorder.events == ["stream.authorized", "goal.ended"]
    assert "outbox_due_at" not in world.goal_row(goal_id)


RECEIVERS_OF_DISAGREE = [
    "invalidate_get_session_token_view_cache",
    "invalidate_cached_pusher_channel_data",
    "notify_stream_authorized_for_agreed_trigger_goal",
    "notify_goal_ended",
    "track_goals",
    "notify_escrow",
    "settle_escrow",
]


@pytest.mark.parametrize("receiver", RECEIVERS_OF_DISAGREE)
@pytest.mark.parametrize("step", [Step.BEFORE_RECEIVER, Step.AFTER_RECEIVER])
async def test_a_crash_around_any_receiver_has_every_receiver_run(
    world: World, steps: Steps, step: Step, receiver: str
) -> None:
    other = await world.add_node()
    goal_id = await world.invited(await world.session())
    answer = await world.ask(CommandName.DISAGREE, goal_id)
    steps.once(step, receiver, crash)
    with pytest.raises(Crash):
        await world.node.deliver(answer)
    steps.reached.clear()

    world.clock.shift(5.0)
    await other.deliver_due()

    assert set(RECEIVERS_OF_DISAGREE) == set(steps.details(Step.AFTER_RECEIVER))
    row = world.goal_row(goal_id)
    assert (row["state"], row["outcome"], row["outbox"]) == ("ended", "refunded", [])
    assert world.movements(goal_id) == ["hold", "release"]
    assert world.raw["goal_records"].count_documents({}) == 1


async def test_a_crash_before_the_removal_of_the_outbox_has_it_delivered_again(
    world: World, steps: Steps
) -> None:
    other = await world.add_node()
    goal_id = await world.invited(await world.session())
    answer = await world.ask(CommandName.AGREE, goal_id)
    world.node.recorder.performed.clear()
    steps.once(Step.BEFORE_OUTBOX_REMOVAL, "", crash)
    with pytest.raises(Crash):
        await world.node.deliver(answer)

    world.clock.shift(5.0)
    await other.deliver_due()

    first = [occurrence.event_id for occurrence, _ in world.node.recorder.performed]
    second = [occurrence.event_id for occurrence, _ in other.recorder.performed]
    assert first == second
    assert other.recorder.pushed == world.node.recorder.pushed
    assert world.raw["goal_records"].count_documents({}) == 1


async def test_a_crash_behind_the_removal_of_the_outbox_leaves_nothing_to_do(
    world: World, steps: Steps
) -> None:
    other = await world.add_node()
    goal_id = await world.invited(await world.session())
    answer = await world.ask(CommandName.DISAGREE, goal_id)
    steps.once(Step.AFTER_OUTBOX_REMOVAL, "", crash)
    with pytest.raises(Crash):
        await world.node.deliver(answer)

    world.clock.shift(5.0)

    assert await other.deliver_due() == 0
    assert world.goal_row(goal_id)["state"] == "ended"
