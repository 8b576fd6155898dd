"""Gateways are killed around a payment service that misbehaves; the books agree at the end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.e2e.gateway_process import DUET_SERVE
from tests.e2e.stage import AMOUNT_MINOR
from tests.faults.crashing_gateway import CRASHING_SERVE
from tests.faults.judged_stage import JudgedStage
from tests.payment_service import SECRET, Fault, PaymentService

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pymongo import MongoClient
    from pymongo.database import Database

    from tests.e2e.books import Books
    from tests.e2e.gateway_process import Gateway, GatewayBuilder, Stores
    from tests.e2e.stage import Stage

DUET = str(Path(sys.executable).with_name("duet"))
SETTINGS = {
    "DUET_ESCROW_SECRET": SECRET,
    "DUET_ESCROW_TIMEOUT_S": "0.2",
    "DUET_LEASE_S": "1",
    "DUET_POLL_INTERVAL_S": "0.05",
}
PATIENCE_S = 90.0
STREAMERS = 6
VIEWERS_OF_EACH = 4
# What a caller sees of a gateway that was killed.
DIED = (httpx.TransportError,)


@pytest.fixture
def service() -> Iterator[PaymentService]:
    with PaymentService() as service:
        yield service


async def serve(
    gateway_with: GatewayBuilder,
    service: PaymentService,
    argv: tuple[str, ...] = DUET_SERVE,
    **more: str,
) -> Gateway:
    """A gateway that is told of the service."""
    return await gateway_with(argv=argv, **{"DUET_ESCROW_URL": service.url, **SETTINGS, **more})


@pytest.fixture
def database(
    mongodb_client: MongoClient[dict[str, Any]], stores: Stores
) -> Database[dict[str, Any]]:
    return mongodb_client[stores.database]


async def invite(
    gateway: Gateway, stage: Stage, viewer: str = "viewer", key: str | None = None
) -> httpx.Response:
    return await gateway.call(
        "POST",
        "/goals",
        user_id=stage.user(viewer),
        role="viewer",
        body=stage.terms(),
        headers={"Idempotency-Key": key} if key else None,
    )


async def until_said(books: Books) -> None:
    """Waits until nothing is left to be said to the service."""
    calls = books.database["escrow_calls"]

    async def holds() -> bool:
        return await calls.count_documents({"status": "pending"}) == 0

    await books.until("every call is acknowledged", holds, timeout_s=PATIENCE_S)


async def test_a_gateway_killed_between_hold_and_commit_leaves_no_money_held(
    gateway_with: GatewayBuilder,
    books: Books,
    database: Database[dict[str, Any]],
    service: PaymentService,
    tmp_path: Path,
) -> None:
    armed_by = tmp_path / "armed"
    doomed = await serve(
        gateway_with,
        service,
        CRASHING_SERVE,
        DUET_FAULT_CRASH_AT="after_decide:invite",
        DUET_FAULT_ARMED_BY=str(armed_by),
    )
    survivor = await serve(gateway_with, service)
    async with JudgedStage(survivor, books) as stage:
        await stage.open_session(stage.user("streamer"))
        armed_by.touch()
        with pytest.raises(DIED):
            await invite(doomed, stage, key="r")
        assert service.times("hold") == 1

        await until_said(books)

        assert service.times("release") == 1
        assert database["goals"].count_documents({}) == 0
        again = await invite(survivor, stage, key="r")
        assert again.status_code == 201
        assert service.most_open == 1
        assert service.disagreements(database) == []


async def test_a_gateway_killed_while_the_service_answers_goes_on_with_the_same_hold(
    gateway_with: GatewayBuilder,
    books: Books,
    database: Database[dict[str, Any]],
    service: PaymentService,
) -> None:
    # The restart must come before the hold is given back.
    gateway = await serve(gateway_with, service, DUET_COMMAND_TIMEOUT_S="30")
    async with JudgedStage(gateway, books) as stage:
        await stage.open_session(stage.user("streamer"))
        service.close_gate("hold")
        inviting = asyncio.create_task(invite(gateway, stage, key="r"))
        await service.until("the money is held", lambda: service.times("hold") == 1)
        await asyncio.to_thread(gateway.kill)
        with pytest.raises(DIED):
            await inviting
        service.open_gate("hold")

        await gateway.restart()
        again = await invite(gateway, stage, key="r")

        assert again.status_code == 201
        assert service.done == [("hold", f"{again.json()['id']}:hold")]
        assert service.disagreements(database) == []


async def test_a_refusal_is_the_viewers_answer(
    gateway_with: GatewayBuilder, books: Books, service: PaymentService
) -> None:
    gateway = await serve(gateway_with, service)
    async with JudgedStage(gateway, books) as stage:
        await stage.open_session(stage.user("streamer"))
        service.plan("hold", Fault.REFUSE)

        answer = await invite(gateway, stage)

        assert answer.status_code == 402
        assert answer.json()["code"] == "payment_refused"


async def test_a_service_that_never_answers_is_unavailable_within_the_commands_time(
    gateway_with: GatewayBuilder,
    books: Books,
    database: Database[dict[str, Any]],
    service: PaymentService,
) -> None:
    gateway = await serve(gateway_with, service)
    async with JudgedStage(gateway, books) as stage:
        await stage.open_session(stage.user("streamer"))
        service.always("hold", Fault.HANG)
        began_s = asyncio.get_running_loop().time()

        answer = await invite(gateway, stage)

        assert asyncio.get_running_loop().time() - began_s < 2.0
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        service.always("hold", None)
        await until_said(books)
        assert service.disagreements(database) == []


@dataclass(frozen=True, slots=True)
class Show:
    """Who invites whom, and to what."""

    streamer: str
    viewer: str
    terms: dict[str, Any]


async def play(gateways: list[Gateway], show: Show, chance: Random) -> None:
    """One invitation as an app plays it: asked again until it has a final answer."""
    goal = await insist(gateways, chance, "POST", "/goals", show.viewer, show.terms)
    if goal is None:
        return
    path = f"/goals/{goal['id']}"
    match chance.randrange(3):
        case 0:
            await insist(gateways, chance, "POST", f"{path}/withdraw", show.viewer, None)
        case 1:
            await insist(gateways, chance, "DELETE", path, show.streamer, {"agree": False})
        case _:
            body = {"agree": True}
            if await insist(gateways, chance, "DELETE", path, show.streamer, body) is not None:
                exclusive = f"/sessions/{show.terms['session_id']}/exclusive"
                named = {"goal_id": goal["id"]}
                await insist(gateways, chance, "POST", exclusive, show.streamer, named)
                await insist(gateways, chance, "DELETE", exclusive, show.streamer, named)


async def insist(
    gateways: list[Gateway], chance: Random, method: str, path: str, user: str, body: Any
) -> dict[str, Any] | None:
    """Sends the same command until it is done or refused for good; none when it was refused."""
    key = f"{chance.getrandbits(64):x}"
    role = "streamer" if user.startswith("streamer") else "viewer"
    last = ""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    answer = await chance.choice(gateways).call(
                        method,
                        path,
                        user_id=user,
                        role=role,
                        body=body,
                        headers={"Idempotency-Key": key},
                    )
                    last = answer.text
                except DIED as error:
                    last = repr(error)
                else:
                    if answer.status_code < 300:
                        told: dict[str, Any] = answer.json()
                        return told
                    if answer.status_code < 500:
                        return None
                # As any app does before it asks again.
                await asyncio.sleep(chance.uniform(0.1, 0.5))
    except TimeoutError:
        raise AssertionError(f"no answer to {method} {path}, key {key}; last: {last}") from None


@pytest.mark.timeout(300)
async def test_under_kills_and_a_service_that_fails_at_random_the_books_agree(
    gateway_with: GatewayBuilder,
    books: Books,
    database: Database[dict[str, Any]],
    service: PaymentService,
) -> None:
    seed = 20_261_122
    gateways = [await serve(gateway_with, service), await serve(gateway_with, service)]
    async with JudgedStage(gateways[0], books) as stage:
        shows = []
        for number in range(STREAMERS):
            streamer = stage.user(f"streamer{number}")
            await stage.open_session(streamer)
            shows += [
                Show(streamer, stage.user(f"viewer{viewer}"), stage.terms())
                for viewer in range(VIEWERS_OF_EACH)
            ]
        service.go_wild(Random(seed))
        chance = Random(seed + 1)

        async def kill_one_after_the_other() -> None:
            for number in range(3):
                seen = len(service.asked)
                # On a busy machine a start takes so long that the other has done it all meanwhile.
                await service.until(
                    "the service was asked some more, or never will be",
                    lambda seen=seen: len(service.asked) >= seen + 6 or len(over) == len(shows),  # type: ignore[misc]
                )
                victim = gateways[number % 2]
                await asyncio.to_thread(victim.kill)
                await victim.restart()

        over = []

        async def play_out(show: Show) -> None:
            await play(gateways, show, Random(chance.random()))
            over.append(show)
            service.look_again()

        async with asyncio.TaskGroup() as group:
            group.create_task(kill_one_after_the_other())
            for show in shows:
                group.create_task(play_out(show))
        service.go_wild(None)
        for session_id, streamer in {
            show.terms["session_id"]: show.streamer for show in shows
        }.items():
            await insist(gateways, chance, "DELETE", f"/sessions/{session_id}", streamer, None)
        await until_said(books)

        assert database["goals"].count_documents({"held_by": "service"}) > 10
        assert service.disagreements(database) == []
        assert database["escrow_calls"].count_documents({"status": "dead"}) == 0
        assert database["goals"].count_documents({"state": "declined"}) == 0


def duet(gateway: Gateway, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DUET, *arguments],
        env={**os.environ, **gateway.environment(), "COLUMNS": "240"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


# Six processes, one after the other.
@pytest.mark.timeout(180)
async def test_an_operator_sees_dead_letters_and_has_them_said_again(
    gateway_with: GatewayBuilder,
    books: Books,
    database: Database[dict[str, Any]],
    service: PaymentService,
) -> None:
    gateway = await serve(gateway_with, service)
    async with JudgedStage(gateway, books) as stage:
        await stage.open_session(stage.user("streamer"))
        empty = await asyncio.to_thread(duet, gateway, "escrow", "list")
        service.plan("release", Fault.REFUSE)
        goal = (await invite(gateway, stage)).json()
        await gateway.call(
            "POST", f"/goals/{goal['id']}/withdraw", user_id=stage.user("viewer"), role="viewer"
        )
        await until_said(books)
        key = f"{goal['id']}:close"

        listed = await asyncio.to_thread(duet, gateway, "escrow", "list", "--dead")
        unknown = await asyncio.to_thread(duet, gateway, "escrow", "retry", "nothing:close")
        neither = await asyncio.to_thread(duet, gateway, "escrow", "retry")
        retried = await asyncio.to_thread(duet, gateway, "escrow", "retry", key)
        ended = await books.until_state(goal["id"], "ended")
        again = await asyncio.to_thread(duet, gateway, "escrow", "retry", key)
        everything = await asyncio.to_thread(duet, gateway, "escrow", "retry", "--all")

    assert (empty.returncode, empty.stdout) == (0, "nothing waits for the payment service\n")
    assert listed.returncode == 0
    (line,) = [each for each in listed.stdout.splitlines() if key in each]
    for word in ("release", str(AMOUNT_MINOR), "dead", "402: ", "not enough money"):
        assert word in line
    assert (unknown.returncode, unknown.stderr) == (
        1,
        "duet: nothing:close: there is no such call\n",
    )
    assert neither.returncode == 2
    assert (retried.returncode, retried.stdout) == (0, "1 call will be said again\n")
    assert ended["outcome"] == "refunded"
    assert again.returncode == 1
    assert (everything.returncode, everything.stdout) == (0, "0 calls will be said again\n")
    assert service.disagreements(database) == []
