"""The clock: MongoDB's time, by the process's own monotonic clock."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from bson import ObjectId
from structlog.testing import capture_logs

from persistence.clock import Clock, Jump, milliseconds
from persistence.store import Store
from statemachine.goal import CommandName, Role
from tests.persistence.world import code_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from pymongo.database import Database

    from tests.persistence.world import World


def test_the_time_is_aware_in_utc_and_in_whole_milliseconds() -> None:
    now = Clock().now()

    assert now.tzinfo is UTC
    assert now.microsecond % 1000 == 0


def test_a_clock_that_nobody_has_set_tells_this_machines_time() -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)

    assert before <= Clock().now() <= datetime.now(UTC) + timedelta(seconds=1)


def test_the_clock_takes_over_the_databases_time() -> None:
    clock = Clock()
    server_at = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
    asked_at_s = clock.monotonic_s()

    clock.follow(server_at, asked_at_s, asked_at_s)

    assert timedelta() <= clock.now() - server_at < timedelta(seconds=5)


def test_the_database_is_taken_to_have_answered_half_way() -> None:
    clock = Clock()
    server_at = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
    asked_at_s = clock.monotonic_s()

    clock.follow(server_at, asked_at_s - 100, asked_at_s + 300)

    assert timedelta(seconds=-100) <= clock.now() - server_at < timedelta(seconds=-95)


@pytest.mark.parametrize(
    ("off_s", "round_trip_s", "followed"),
    [
        pytest.param(0.004, 0.0, False, id="within the least correction"),
        pytest.param(0.5, 2.0, False, id="within the measurement's doubt"),
        pytest.param(-0.5, 2.0, False, id="within the doubt, backwards"),
        pytest.param(0.05, 0.01, True, id="beyond the doubt"),
        pytest.param(-0.05, 0.01, True, id="beyond the doubt, backwards"),
        pytest.param(1.5, 2.0, True, id="beyond a large doubt"),
    ],
)
def test_only_a_difference_beyond_the_measurements_doubt_is_followed(
    off_s: float, round_trip_s: float, followed: bool
) -> None:
    clock = Clock()
    origin = datetime(2031, 5, 6, tzinfo=UTC)
    start_s = clock.monotonic_s()
    clock.follow(origin, start_s, start_s)
    offset_before_s = clock._offset_s

    asked_at_s = start_s + 10
    middle = origin + timedelta(seconds=10 + round_trip_s / 2)
    clock.follow(middle + timedelta(seconds=off_s), asked_at_s, asked_at_s + round_trip_s)

    moved_s = clock._offset_s - offset_before_s
    assert moved_s == pytest.approx(off_s if followed else 0.0, abs=1e-4)


def followed_clock() -> tuple[Clock, Callable[[float, float], Jump | None]]:
    """A clock that has followed once, and how it is told later that the time is off by so much."""
    clock = Clock()
    origin = datetime(2031, 5, 6, tzinfo=UTC)
    start_s = clock.monotonic_s()

    def follow(after_s: float, by_s: float) -> Jump | None:
        at_s = start_s + after_s
        return clock.follow(origin + timedelta(seconds=after_s + by_s), at_s, at_s)

    assert follow(0, 0) is None
    return clock, follow


@pytest.mark.parametrize("jump_s", [-300.0, -1.1, 1.1, 300.0])
def test_a_jump_is_told_once_and_followed_when_it_is_measured_again(jump_s: float) -> None:
    clock, follow = followed_clock()
    offset_s = clock._offset_s

    told = [follow(after_s, jump_s) for after_s in (10, 20, 30)]

    assert told[0] is not None
    assert told[0].from_offset_s == offset_s
    assert told[0].to_offset_s == pytest.approx(offset_s + jump_s, abs=1e-4)
    assert told[1:] == [None, None]
    assert clock._offset_s == pytest.approx(offset_s + jump_s, abs=1e-4)


def test_a_jump_is_told_when_the_first_measurement_found_the_clock_right() -> None:
    clock = Clock()
    now_s = clock.monotonic_s()
    right = datetime.fromtimestamp(now_s + clock._offset_s, UTC)

    told = [clock.follow(right + timedelta(seconds=by_s), now_s, now_s) for by_s in (0.0, 300.0)]

    assert [type(one) for one in told] == [type(None), Jump]


@pytest.mark.parametrize("jump_s", [-300.0, 300.0])
def test_a_jump_that_the_next_measurement_denies_moves_nothing(jump_s: float) -> None:
    clock, follow = followed_clock()
    offset_s = clock._offset_s

    told = [
        follow(after_s, by_s)
        for after_s, by_s in ((10, jump_s), (20, 0.0), (30, jump_s), (40, -jump_s), (50, 0.0))
    ]

    assert [type(one) for one in told] == [Jump, type(None), Jump, Jump, type(None)]
    assert clock._offset_s == offset_s


def test_a_shift_moves_the_clock_on_and_stays_when_the_database_is_asked_again() -> None:
    clock = Clock()
    before = clock.now()

    clock.shift(3600)
    after_shift = clock.now()
    asked_at_s = clock.monotonic_s()
    clock.follow(before, asked_at_s, asked_at_s)

    assert timedelta(seconds=3600) <= after_shift - before < timedelta(seconds=3605)
    assert timedelta(seconds=3600) <= clock.now() - before < timedelta(seconds=3605)


def test_time_doesnt_stand_still() -> None:
    clock = Clock()
    first = clock.now()

    while (later := clock.now()) == first:
        pass

    assert later > first


def test_spans_are_in_whole_milliseconds() -> None:
    assert milliseconds(0.0015) == timedelta(milliseconds=2)
    assert milliseconds(5) == timedelta(seconds=5)
    assert milliseconds(1.0004) == timedelta(seconds=1)


@pytest.mark.parametrize("zone", ["UTC", "Asia/Taipei", "America/New_York"])
async def test_a_store_that_opens_sets_a_wrong_clock_right_in_any_time_zone(
    zone: str,
    monkeypatch: pytest.MonkeyPatch,
    mongodb_url: str,
    worlds_database: Database[Any],
) -> None:
    """MongoDB's time once came back without a zone, and was read in the machine's own."""
    clock = Clock()
    clock._offset_s += 7200
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        store = await Store.open(mongodb_url, worlds_database.name, clock)
        await store.close()
    finally:
        monkeypatch.undo()
        time.tzset()

    assert abs(clock.now() - datetime.now(UTC)) < timedelta(seconds=5)


@pytest.mark.parametrize("off_s", [-300.0, 300.0], ids=["slow", "fast"])
async def test_a_node_whose_machine_is_five_minutes_off_expires_and_pays_as_the_others_do(
    world: World, off_s: float
) -> None:
    """Its claims, deadlines and agreements are by MongoDB's time, as everybody's are."""
    clock = Clock()
    clock._offset_s += off_s  # as its machine's wall clock has it
    off = await world.add_node(clock=clock)
    world.clock.at = datetime.now(UTC)
    standing = await world.invited(await world.session("anna"), node=off)
    overdue = await world.invited(await world.session("berta"), node=off)
    agreed = await world.agreed(await world.session("clara"))
    past = datetime.now(UTC) - timedelta(milliseconds=10)
    for goal_id in (overdue, agreed):
        world.raw["goals"].update_one(
            {"_id": ObjectId(goal_id)}, {"$set": {"due_at": past, "exp": past}}
        )

    assert abs(clock.now() - datetime.now(UTC)) < timedelta(seconds=5)
    late = await world.ask(CommandName.AGREE, overdue, by="berta", node=off)
    early = await world.ask(CommandName.EXPIRE, standing, by=None, role=Role.TIMER, node=off)
    answers = await off.fire_due()
    world.clock.at = datetime.now(UTC)
    answers += await world.node.fire_due()

    assert (code_of(late), code_of(early)) == ("goal_expired", "too_early")
    assert [code_of(answer) for answer in answers] == ["ok"] * 2, "each once, by either"
    assert [world.movements(goal_id) for goal_id in (standing, overdue, agreed)] == [
        ["hold"],
        ["hold", "release"],
        ["hold", "release"],
    ]


@pytest.mark.parametrize("jump_s", [-30.0, 30.0], ids=["backwards", "forwards"])
async def test_a_jump_of_the_databases_time_moves_no_money_twice(
    world: World, jump_s: float
) -> None:
    """A failover to a member with another time, between a claim and its command, and again."""
    goal_id = await world.invited(await world.session("anna"))
    live = await world.started(await world.session("berta"))
    world.clock.shift(95)  # both are due: after 60 s the one, after 90 s the other
    due = await world.node.deadlines.claim_due(10)
    assert len(due) == 2

    world.clock.shift(jump_s)
    answers = [await world.node.deadlines.fire(one) for one in due]
    world.clock.shift(-jump_s)
    world.clock.shift(10)  # longer than a claim lasts
    answers += await world.node.fire_due()

    assert sorted(code_of(answer) for answer in answers if code_of(answer) == "ok") == ["ok"] * 2
    assert {code_of(answer) for answer in answers} <= {"ok", "too_early"}
    assert world.movements(goal_id) == ["hold", "release"]
    assert world.movements(live) == ["hold", "capture"]
    assert world.goal_row(live)["state"] == "ended"


class ClockOfAJumpingDatabase(Clock):
    """Is told another time than MongoDB's, as if MongoDB's own clock had been set."""

    __slots__ = ("database_off_s",)

    def __init__(self) -> None:
        super().__init__()
        self.database_off_s = 0.0

    def follow(self, server_at: datetime, asked_at_s: float, answered_at_s: float) -> Jump | None:
        server_at += timedelta(seconds=self.database_off_s)
        return super().follow(server_at, asked_at_s, answered_at_s)


async def test_a_database_that_is_five_minutes_ahead_for_a_moment_expires_nothing(
    world: World,
) -> None:
    clock = ClockOfAJumpingDatabase()
    node = await world.add_node(clock=clock)
    goal_id = await world.invited(await world.session(), node=node)

    clock.database_off_s = 300.0
    with capture_logs() as lines:
        await node.store.follow_time()
        claimed = await node.deadlines.claim_due(10)
        early = await world.ask(CommandName.EXPIRE, goal_id, by=None, role=Role.TIMER, node=node)
        clock.database_off_s = 0.0
        await node.store.follow_time()
    agreed = await world.ask(CommandName.AGREE, goal_id, node=node)

    assert claimed == []
    assert (code_of(early), code_of(agreed)) == ("too_early", "ok")
    [line] = lines
    assert (line["event"], line["log_level"]) == ("database_time_jumped", "warning")
    assert line["to_offset_s"] - line["from_offset_s"] == pytest.approx(300, abs=1)


async def test_a_database_that_stays_ahead_and_is_set_right_again_pays_once(world: World) -> None:
    clock = ClockOfAJumpingDatabase()
    node = await world.add_node(clock=clock)
    world.clock.at = datetime.now(UTC)
    expired = await world.invited(await world.session("anna"), node=node)
    refunded = await world.agreed(await world.session("berta"))
    fired = []

    with capture_logs() as lines:
        for off_s in (300.0, 0.0):
            clock.database_off_s = off_s
            for _ in range(3):
                await node.store.follow_time()
                fired += await node.fire_due()

    assert [code_of(answer) for answer in fired] == ["ok", "ok"]
    assert world.movements(expired) == world.movements(refunded) == ["hold", "release"]
    assert [line["event"] for line in lines] == ["database_time_jumped"] * 2, "there, and back"
    assert abs(clock.now() - datetime.now(UTC)) < timedelta(seconds=5)
