"""MongoDB's own failpoints amid a command: carried out once, or refused as one to be asked again.

Source: the driver's specification of transactions (TransientTransactionError,
UnknownTransactionCommitResult).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from typing import TYPE_CHECKING, Any

import pytest
from pymongo import MongoClient

from persistence.abandoned import AbandonedTransactions
from persistence.errors import StoreUnavailable
from persistence.intents import Done
from persistence.store import application_name
from statemachine.goal import CommandName
from tests.faults.failpoints import DEADLINE_S, failing, once
from tests.persistence.world import goal_id_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from persistence.documents import Session
    from persistence.intents import Answer
    from tests.faults.judged_world import JudgedWorld
    from tests.persistence.world import World

# What a busy machine adds to it is not the product's.
ANSWER_WITHIN_S = DEADLINE_S + 2.0
# Longer than a command may take, so that it is given up first.
BLOCKED_MS = 3_000

# At the same time, so that commands share transactions.
STREAMERS = 8
SHOWS = 2
PATIENCE_S = 50.0

NO_SUCH_TRANSACTION = 251
WRITE_CONFLICT = 112
PRIMARY_STEPPED_DOWN = 189
OUT_OF_DISK_SPACE = 14031
WRITE_CONCERN_FAILED = 64
ILLEGAL_OPERATION = 20
MAX_TIME_EXPIRED = 50
UNAUTHORIZED = 13


async def assert_agreed_once(world: World, goal_id: str) -> None:
    """The agreement stands, with one of everything that it makes."""
    row = world.goal_row(goal_id)
    assert (row["state"], row["version"]) == ("agreed", 2)
    assert [entry["event_id"] for entry in row["outbox"]] == [f"{goal_id}:2:goal.ended"]
    assert world.movements(goal_id) == ["hold"]
    again = await world.ask(CommandName.AGREE, goal_id, request_id="one")
    assert isinstance(again, Done), again
    assert world.goal_row(goal_id)["version"] == 2
    # Nothing is locked: a plain update passes at once.
    world.raw.command(
        "update",
        "goals",
        updates=[{"q": {"_id": row["_id"]}, "u": {"$set": {"progress": 1}}}],
        maxTimeMS=1000,
    )


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(
            once(failCommands=["update"], errorCode=NO_SUCH_TRANSACTION,
                 errorLabels=["TransientTransactionError"]),
            id="the transaction is gone at its first write",
        ),
        pytest.param(
            once(failCommands=["update"], errorCode=WRITE_CONFLICT,
                 errorLabels=["TransientTransactionError"]),
            id="a write conflict at its first write",
        ),
        pytest.param(
            once(failCommands=["insert"], closeConnection=True),
            id="the connection breaks amid the transaction",
        ),
        pytest.param(
            once(failCommands=["commitTransaction"], errorCode=NO_SUCH_TRANSACTION,
                 errorLabels=["TransientTransactionError"]),
            id="the transaction is gone at the commit",
        ),
        pytest.param(
            once(failCommands=["commitTransaction"], closeConnection=True),
            id="the connection breaks before the commit",
        ),
        pytest.param(
            {"mode": {"times": 2}, "failCommands": ["commitTransaction"],
             "errorCode": PRIMARY_STEPPED_DOWN,
             "errorLabels": ["RetryableWriteError", "UnknownTransactionCommitResult"]},
            id="the primary steps down at the commit, twice",
        ),
        pytest.param(
            once(failCommands=["commitTransaction"],
                 writeConcernError={"code": WRITE_CONCERN_FAILED, "errmsg": "no majority yet"},
                 errorLabels=["UnknownTransactionCommitResult"]),
            id="committed, and no majority has said so",
        ),
        pytest.param(
            once(failCommands=["find"], closeConnection=True), id="the connection breaks at a read"
        ),
    ],
)  # fmt: skip
async def test_what_the_driver_may_repeat_succeeds_at_once(
    world: World, fault: dict[str, Any]
) -> None:
    goal_id = await world.invited(await world.session())

    with failing(world, **fault):
        asked_at_s = time.monotonic()
        agreed = await world.ask(CommandName.AGREE, goal_id, request_id="one")
        took_s = time.monotonic() - asked_at_s

    assert isinstance(agreed, Done), agreed
    assert took_s < ANSWER_WITHIN_S
    await assert_agreed_once(world, goal_id)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(
            {"failCommands": ["insert", "update"],
             "errorCode": OUT_OF_DISK_SPACE},
            id="the disk is full",
        ),
        pytest.param(
            {"failCommands": ["commitTransaction"], "errorCode": OUT_OF_DISK_SPACE},
            id="the disk is full at the commit",
        ),
        pytest.param(
            {"failCommands": ["insert", "update"],
             "errorCode": ILLEGAL_OPERATION},
            id="the server is read-only",
        ),
        pytest.param(
            {"failCommands": ["update"], "errorCode": WRITE_CONFLICT,
             "errorLabels": ["TransientTransactionError"]},
            id="conflicts without end",
        ),
        pytest.param(
            {"failCommands": ["commitTransaction"], "closeConnection": True},
            id="every connection breaks before the commit",
        ),
        pytest.param(
            {"failCommands": ["commitTransaction"],
             "writeConcernError": {"code": WRITE_CONCERN_FAILED, "errmsg": "no majority"},
             "errorLabels": ["UnknownTransactionCommitResult"]},
            id="committed, and never a majority",
        ),
        pytest.param(
            {"failCommands": ["commitTransaction"], "blockConnection": True,
             "blockTimeMS": BLOCKED_MS},
            id="the commit hangs",
        ),
        pytest.param(
            {"failCommands": ["find", "aggregate"], "blockConnection": True,
                 "blockTimeMS": BLOCKED_MS},
            id="reads hang",
        ),
    ],
)  # fmt: skip
async def test_what_lasts_is_unavailable_in_time_and_done_once_when_it_is_asked_again(
    world: World, fault: dict[str, Any]
) -> None:
    goal_id = await world.invited(await world.session())

    with failing(world, "alwaysOn", **fault):
        asked_at_s = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await world.ask(CommandName.AGREE, goal_id, request_id="one")
        took_s = time.monotonic() - asked_at_s

    assert took_s < ANSWER_WITHIN_S
    while True:
        try:
            agreed = await world.ask(CommandName.AGREE, goal_id, request_id="one")
        except StoreUnavailable:
            continue
        break
    assert isinstance(agreed, Done), agreed
    await assert_agreed_once(world, goal_id)


async def test_a_shared_transaction_that_hangs_leaves_nothing_locked(world: World) -> None:
    """Neither for those who shared it nor for whoever wants their goals and Sessions next."""
    invited = [
        (f"streamer{number}", await world.invited(await world.session(f"streamer{number}")))
        for number in range(STREAMERS)
    ]
    hangs = once(failCommands=["insert"], blockConnection=True, blockTimeMS=BLOCKED_MS)

    with failing(world, **hangs):
        answers = await asyncio.gather(
            *(
                world.ask(CommandName.AGREE, goal_id, by=streamer, request_id="one")
                for streamer, goal_id in invited
            ),
            return_exceptions=True,
        )

    # Several shared it, else it would prove nothing.
    assert sum(isinstance(answer, StoreUnavailable) for answer in answers) > 1
    everything = {"q": {}, "u": {"$set": {"looked_at": True}}, "multi": True}
    for collection in ("goals", "sessions"):
        found = world.raw.command("update", collection, updates=[everything], maxTimeMS=1000)
        assert found["n"] == STREAMERS


async def test_an_invitation_whose_commit_nobody_knows_of_is_held_once(world: World) -> None:
    session = await world.session()

    with (
        failing(
            world,
            "alwaysOn",
            failCommands=["commitTransaction"],
            writeConcernError={"code": WRITE_CONCERN_FAILED, "errmsg": "no majority"},
            errorLabels=["UnknownTransactionCommitResult"],
        ),
        pytest.raises(StoreUnavailable),
    ):
        await world.invite(session, request_id="one")
    answers = [await world.invite(session, request_id="one") for _ in range(2)]

    [goal] = world.raw["goals"].find()
    assert [answer.goal["id"] for answer in answers if answer.goal] == [str(goal["_id"])] * 2
    assert world.movements(str(goal["_id"])) == ["hold"]


async def test_while_all_sessions_are_killed_again_and_again_each_command_is_done_once(
    world: JudgedWorld, failing_mongodb: MongoClient[dict[str, Any]]
) -> None:
    """As somebody does who ends what runs too long; the commands share their transactions."""
    interrupted = 0

    async def insist(ask: Callable[..., Awaitable[Answer]], *arguments: Any, **named: Any) -> str:
        nonlocal interrupted
        request_id = secrets.token_hex(8)
        while True:
            killing = asyncio.create_task(
                asyncio.to_thread(failing_mongodb.admin.command, "killAllSessions", [])
            )
            try:
                return goal_id_of(await ask(*arguments, request_id=request_id, **named))
            except StoreUnavailable:
                interrupted += 1
            finally:
                await killing

    async def play(session: Session) -> None:
        for _ in range(SHOWS):
            goal_id = await insist(world.invite, session)
            for name in (CommandName.AGREE, CommandName.START, CommandName.FINISH):
                await insist(world.ask, name, goal_id, by=session.user.id)

    sessions = [await world.session(f"streamer{number}") for number in range(STREAMERS)]
    async with asyncio.timeout(PATIENCE_S):
        # Until it has mattered: kills that come between the commands interrupt none.
        while not interrupted:
            async with asyncio.TaskGroup() as streamers:
                for session in sessions:
                    streamers.create_task(play(session))


async def test_a_right_that_was_missing_for_a_while_is_used_again_when_it_is_given(
    world: JudgedWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who was dropped and created anew: what killed processes hold was left for ever."""
    monkeypatch.setattr("persistence.abandoned._ASK_AGAIN_S", 0.0)
    abandoned = AbandonedTransactions(world.node.store)
    name = application_name(world.raw.name, "node9/dead")
    gone = MongoClient[dict[str, Any]](world.url, appname=name)
    left = gone.start_session()
    left.start_transaction()
    gone[world.raw.name]["goal_records"].insert_one({"_id": "one"}, session=left)
    gone.close()

    with failing(world, **once(failCommands=["aggregate"], errorCode=UNAUTHORIZED)):
        assert await abandoned.free_left() == 0
    async with asyncio.timeout(10):
        while await abandoned.free_left() == 0:
            pass

    assert list(world.raw["goal_records"].find()) == []


DATABASE_COMMANDS = ["find", "update", "insert", "findAndModify", "commitTransaction"]


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"closeConnection": True}, id="its connection breaks"),
        pytest.param({"errorCode": PRIMARY_STEPPED_DOWN}, id="the primary steps down"),
        pytest.param({"errorCode": WRITE_CONFLICT}, id="a conflict that nobody calls transient"),
        pytest.param({"errorCode": MAX_TIME_EXPIRED}, id="its time is over"),
        pytest.param(
            {"writeConcernError": {"code": MAX_TIME_EXPIRED, "errmsg": "no majority yet"}},
            id="a majority is slow",
        ),
        pytest.param({"blockConnection": True, "blockTimeMS": 300}, id="it is slow"),
    ],
)
async def test_while_one_database_call_in_thirty_fails_each_command_is_done_once(
    world: JudgedWorld, fault: dict[str, Any]
) -> None:
    """Amid commands and deliveries that share their calls."""

    async def insist(ask: Callable[..., Awaitable[Answer]], *arguments: Any, **named: Any) -> str:
        request_id = secrets.token_hex(8)
        while True:
            with contextlib.suppress(StoreUnavailable):
                answer = await ask(*arguments, request_id=request_id, **named)
                await world.node.deliver(answer)
                return goal_id_of(answer)

    async def play(session: Session) -> None:
        declined = await insist(world.invite, session)
        await insist(world.ask, CommandName.DISAGREE, declined, by=session.user.id)
        agreed = await insist(world.invite, session)
        await insist(world.ask, CommandName.AGREE, agreed, by=session.user.id)

    sessions = [await world.session(f"streamer{number}") for number in range(STREAMERS)]
    with failing(world, {"activationProbability": 1 / 30}, failCommands=DATABASE_COMMANDS, **fault):
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as streamers:
            for session in sessions:
                streamers.create_task(play(session))
