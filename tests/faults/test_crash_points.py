"""`kill -9` at every step of every command, and what becomes of it.

Which steps a command reaches is found out first, by letting one pass. Then a process dies at each
of them in turn: it is started again, or a second one takes over. The checker judges every case.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from persistence.faults import Step
from tests.e2e.books import Books
from tests.e2e.gateway_process import Stores
from tests.e2e.wire_socket import WireSocket
from tests.faults.checker import judge
from tests.faults.forked_gateway import CrashPoint, ForkedGateway
from tests.faults.players import DEADLINES, SETTLES_WITHIN_S, Scene, Witness, ask, insist

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
    from pathlib import Path

    from pymongo import MongoClient

    from tests.faults.history import Answered
    from tests.faults.players import Act

SETTINGS = {
    "poll_interval_s": 0.05,
    # Twice this long the survivors let a transaction rest before they end it.
    "command_timeout_s": 0.8,
    # Only deadlines that a test moves are to come.
    "invitation_ttl_s": 3_600,
    "refund_delay_s": 3_600,
    "log_level": "warning",
}
# What the doomed one had claimed, its survivor is not to wait for; those who live on keep theirs
# however slow the machine is, so that each step comes once.
SHORT_LEASE = {"lease_s": 0.5}
LONG_LEASE = {"lease_s": 30}
COMMANDS = (
    "invite",
    "agree",
    "disagree",
    "withdraw",
    "expire",
    "start",
    "refund",
    "finish",
    "finish_due",
    "close",
    # No invitation stands beside a live show: what can meet one is its end, and these two.
    "close_live",
    "invite_live",
)
# It is told that a show is on, so there is nothing to commit or to deliver.
REFUSED = "invite_live"
LANES = 2
DIES_WITHIN_S = 30.0

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


@dataclass(slots=True)
class Lane:
    """A database and its gateways, beside which another lane can go on."""

    books: Books
    witness: Witness
    gateway: ForkedGateway
    doomed: ForkedGateway
    points: dict[str, list[CrashPoint]] = field(default_factory=dict)

    async def ready(self) -> None:
        """Starts the gateway that is to run, unless it does."""
        if not self.gateway.is_running:
            await self.gateway.start()

    def scene(self) -> Scene:
        return Scene(self.books, self.witness)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lanes(
    mongodb_url: str,
    redis_url: str,
    mongodb_client: MongoClient,
    apps_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[list[Lane]]:
    """Each with one gateway that runs and one that is started to die."""
    async with AsyncExitStack() as stack:
        made = []
        for number in range(LANES):
            name = f"test_{secrets.token_hex(6)}"
            stack.callback(mongodb_client.drop_database, name)
            stores = Stores(mongodb_url, name, redis_url, name)
            log = tmp_path_factory.mktemp("crash") / f"lane{number}.log"
            gateways = [
                await stack.enter_async_context(
                    ForkedGateway(stores, apps_file, log, SETTINGS | lease)
                )
                for lease in (LONG_LEASE, SHORT_LEASE)
            ]
            made.append(
                Lane(
                    await stack.enter_async_context(Books(stores)),
                    await stack.enter_async_context(Witness(stores)),
                    gateway=gateways[0],
                    doomed=gateways[1],
                )
            )
        yield made


async def perform(scene: Scene, gateway: ForkedGateway, act: Act) -> None:
    """Sends the command, or lets the deadline come that stands for it."""
    if act.command in DEADLINES:
        await scene.let_come(act)
    else:
        await ask(scene.history, gateway, act)


async def repeat(scene: Scene, gateway: ForkedGateway, act: Act) -> None:
    """Sends a command again, as a client does that has had no answer."""
    if act.command not in DEADLINES:
        await insist(scene.history, gateway, act)


async def deadline_met(scene: Scene, act: Act) -> None:
    """Waits until a deadline that was let come has moved the goal on."""
    if act.command in DEADLINES:
        assert act.goal_id is not None
        await scene.books.until_state(act.goal_id, "ended", timeout_s=SETTLES_WITHIN_S)


async def points_of(lane: Lane, command: str) -> list[CrashPoint]:
    """Every step that this command reaches, with the how-manieth time it does."""
    if command in lane.points:
        return lane.points[command]
    scene = lane.scene()
    act = await scene.prepare(lane.gateway, command)
    # What is left of the preparations would count among the command's own steps.
    await scene.books.until_delivered(timeout_s=SETTLES_WITHIN_S)
    await lane.gateway.arm(None)
    await perform(scene, lane.gateway, act)
    await deadline_met(scene, act)
    await scene.settled()
    async with asyncio.timeout(DIES_WITHIN_S):
        # The last step comes a moment after the write that everybody else waits for.
        while (reached := await lane.gateway.steps())[-1][0] not in {
            Step.AFTER_OUTBOX_REMOVAL,
            Step.BEFORE_REPLY,
        }:
            pass
    missing = set(Step) - {step for step, _ in reached}
    assert not missing or command == REFUSED, f"{command} does not pass {missing}"
    count: Counter[tuple[str, str]] = Counter()
    points = []
    for step, detail in reached:
        count[step, detail] += 1
        points.append(CrashPoint(step, detail, count[step, detail]))
    lane.points[command] = points
    return points


async def each_at_its_lane(
    lanes: list[Lane],
    points: list[CrashPoint],
    case: Callable[[Lane, CrashPoint], Awaitable[Iterable[str]]],
) -> None:
    """Runs every case, two at a time, and fails with everything that was wrong."""
    wrong: list[str] = []
    waiting = iter(points)

    async def run(lane: Lane) -> None:
        for point in waiting:
            wrong.extend(f"{point}: {text}" for text in await case(lane, point))

    async with asyncio.TaskGroup() as tasks:
        for lane in lanes:
            tasks.create_task(run(lane))
    assert not wrong, "\n".join(wrong)


async def verdict(scene: Scene, gateway: ForkedGateway) -> list[str]:
    """What the checker says, once everything has settled."""
    await scene.settled()
    await scene.final_snapshots(gateway)
    return [str(violation) for violation in judge(scene.history, await scene.truth())]


@pytest.mark.parametrize("command", COMMANDS)
async def test_a_killed_gateway_that_is_started_again_finishes_what_it_began(
    lanes: list[Lane], command: str
) -> None:
    for lane in lanes:
        await lane.ready()
    points = await points_of(lanes[0], command)

    async def case(lane: Lane, point: CrashPoint) -> list[str]:
        gateway = lane.gateway
        scene = lane.scene()
        act = await scene.prepare(gateway, command)
        await gateway.arm(point)
        await perform(scene, gateway, act)
        if not await gateway.until_dead(DIES_WITHIN_S):
            await gateway.kill()  # it is armed still
            await gateway.start()
            return ["it was not reached"]
        await gateway.start()
        await repeat(scene, gateway, act)
        await deadline_met(scene, act)
        return await verdict(scene, gateway)

    await each_at_its_lane(lanes, points, case)


@pytest.mark.parametrize("command", COMMANDS)
async def test_a_second_gateway_finishes_what_a_killed_one_began(
    lanes: list[Lane], command: str
) -> None:
    for lane in lanes:
        await lane.ready()
    points = await points_of(lanes[0], command)

    async def case(lane: Lane, point: CrashPoint) -> list[str]:
        survivor, doomed = lane.gateway, lane.doomed
        await doomed.launch(point if command not in DEADLINES else None)
        scene = lane.scene()
        act = await scene.prepare(survivor, command)
        async with listeners(scene, survivor) as sockets:
            await doomed.until_ready()
            if command in DEADLINES:
                await doomed.arm(point)
                # Else the survivor might be the one that sees the deadline first.
                survivor.pause()
            await perform(scene, doomed, act)
            died = await doomed.until_dead(DIES_WITHIN_S)
            if command in DEADLINES:
                survivor.resume()
            if not died:
                await doomed.kill()
                return ["it was not reached"]
            await deadline_met(scene, act)
            await scene.books.until_delivered(timeout_s=SETTLES_WITHIN_S)
            await repeat(scene, survivor, act)
            await scene.settled()
            await sockets.heard_all()
        return await verdict(scene, survivor)

    await each_at_its_lane(lanes, points, case)


TOGETHER = 8


async def agree_together(
    gateway: ForkedGateway, asked: list[tuple[Scene, Act]]
) -> list[Answered | None]:
    """What each was answered; none when the gateway died over it."""
    return await asyncio.gather(*(ask(scene.history, gateway, act) for scene, act in asked))


async def prepared(lane: Lane) -> list[tuple[Scene, Act]]:
    """Eight invitations to eight streamers, which are about to be agreed to."""
    scenes = [lane.scene() for _ in range(TOGETHER)]
    return [(scene, await scene.prepare(lane.gateway, "agree")) for scene in scenes]


@pytest.mark.parametrize("step", [Step.IN_TRANSACTION, Step.BEFORE_COMMIT, Step.AFTER_COMMIT])
async def test_commands_that_share_a_transaction_are_written_or_not_each_as_a_whole(
    lanes: list[Lane], step: Step
) -> None:
    lane = lanes[0]
    await lane.ready()
    gateway = lane.gateway
    asked = await prepared(lane)
    # The first two have transactions of their own; of the others some in the middle is the last.
    await gateway.arm(CrashPoint(step, "agree", TOGETHER - 3))

    answers = await agree_together(gateway, asked)
    while not await gateway.until_dead(DIES_WITHIN_S):
        # The step comes as often as commands are carried out; on a busy machine some are not.
        assert any(answer is not None and answer.retryable for answer in answers), answers
        more = await prepared(lane)
        asked += more
        answers = await agree_together(gateway, more)
    await gateway.start()

    wrong: list[str] = []
    for scene, act in asked:
        await repeat(scene, gateway, act)
        wrong += await verdict(scene, gateway)
    assert not wrong, "\n".join(wrong)


async def test_commands_that_come_together_do_share_a_transaction(lanes: list[Lane]) -> None:
    """Without it the test above would prove nothing."""
    lane = lanes[0]
    await lane.ready()
    halfway = ""
    # On a busy machine eight calls may come one by one. Two transactions may be under way at once,
    # so three in a row are of one.
    while "xxx" not in halfway:
        asked = await prepared(lane)
        await lane.gateway.arm(None)

        await agree_together(lane.gateway, asked)

        names = [step for step, detail in await lane.gateway.steps() if detail == "agree"]
        halfway = "".join("x" if name == Step.IN_TRANSACTION else " " for name in names)
        for scene, _ in asked:
            assert not await verdict(scene, lane.gateway)


@dataclass(slots=True)
class Listeners:
    """The parties' sockets; what they hear is part of the history."""

    scene: Scene
    channels_of: dict[WireSocket, list[str]]

    async def heard_all(self) -> None:
        """Waits until the sockets have received all that is on its way, and writes it down."""
        channels = {channel for channels in self.channels_of.values() for channel in channels}
        barrier = await self.scene.witness.barrier(sorted(channels))
        for socket, own in self.channels_of.items():
            for channel in own:
                await socket.expect(barrier, channel)
            for record in socket.received:
                if record.channel in own and record.event is not None:
                    heard = (record.channel, record.event, record.data)
                    self.scene.history.hear(socket.name, *heard)
                    last = self.scene.history.heard.pop()
                    self.scene.history.heard.append(replace(last, at_s=record.at_s))


@contextlib.asynccontextmanager
async def listeners(scene: Scene, gateway: ForkedGateway) -> AsyncIterator[Listeners]:
    """Everyone's socket on a gateway that survives; subscribed before the command is sent."""
    streamer, (viewer, rival) = scene.streamer, scene.viewers
    room = f"presence-stream@{streamer}"
    wanted = {
        (streamer, "streamer"): [f"private-stream@{streamer}", room],
        (viewer, "viewer"): [room, f"presence-stream-viewer@{streamer}.preview.{viewer}"],
        (rival, "viewer"): [room],
    }
    async with AsyncExitStack() as stack:
        sockets = {}
        for (user_id, role), channels in wanted.items():
            socket = await stack.enter_async_context(WireSocket(gateway, user_id, role))
            await socket.subscribe_own()
            for channel in channels:
                await socket.subscribe(channel)
            sockets[socket] = [socket.own_channel, *channels]
        yield Listeners(scene, sockets)
