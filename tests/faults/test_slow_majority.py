"""What is claimed is worked on although no majority says in time that the claim stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from persistence.escrow_calls import EscrowCalls
from statemachine.goal import CommandName
from tests.faults.failpoints import DEADLINE_S, failing
from tests.faults.judged_world import Acknowledging

if TYPE_CHECKING:
    from tests.faults.judged_world import JudgedWorld

# What the server answers when it has written, and the caller's time is over before a majority has.
MAX_TIME_EXPIRED = 50


async def test_claims_whose_answers_all_come_too_late_are_worked_on(world: JudgedWorld) -> None:
    """Else each would run out with its lease, and be made again and answered too late again."""
    port = Acknowledging()
    node = await world.add_node(port=port, deadline_s=DEADLINE_S)
    # It does everything from here on, and is judged.
    world.nodes.reverse()
    session = await world.session()
    declined, waiting = [await world.invited(session, viewer) for viewer in ("ben", "cleo")]
    await world.ask(CommandName.DISAGREE, declined)
    calls = EscrowCalls(node.store, node.goals, port, timeout_s=1, give_up_s=600)
    world.clock.shift(60)

    with failing(
        world,
        "alwaysOn",
        failCommands=["update", "findAndModify"],
        writeConcernError={"code": MAX_TIME_EXPIRED, "errmsg": "no majority yet"},
    ):
        [call] = await calls.claim_due(10)
        [delivery] = await node.outbox.claim_due(10)
        [due] = await node.deadlines.claim_due(10)

    assert (str(call.goal_id), call.call) == (declined, "release")
    assert str(delivery.goal_id) == declined
    assert str(due.goal_id) == waiting
    await calls.say(call)
    assert world.goal_row(declined)["state"] == "ended"
