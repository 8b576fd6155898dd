"""How long what a killed gateway had committed stays undelivered: the figures of issue 3."""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from bson import ObjectId

from persistence.faults import Step
from tests.faults.checker import judge
from tests.faults.forked_gateway import CrashPoint, ForkedGateway
from tests.faults.players import Scene, Witness, ask, insist

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from pymongo import MongoClient

    from tests.e2e.books import Books
    from tests.e2e.gateway_process import Stores
    from tests.faults.players import Act

AGREEMENTS = 20
RESTARTED_WITHIN_S = 2.0
TAKEN_OVER_WITHIN_S = 5.0

pytestmark = pytest.mark.timeout(300)


def tell(measured: str) -> None:
    """Shows a figure to whoever runs this with `-s`."""
    sys.stdout.write(f"\n{measured}\n")


@dataclass(frozen=True, slots=True)
class House:
    """Two gateways with the default settings, of which only the first runs at the beginning.

    They are forked with everything imported: the figures leave out the interpreter's own start.
    """

    first: ForkedGateway
    second: ForkedGateway
    books: Books
    witness: Witness

    async def kill_amid_agreements(self) -> tuple[list[Scene], float]:
        """Lets streamers agree all at once and the first gateway die over it.

        Returns:
            The scenes, and when it died.
        """
        scenes = [Scene(self.books, self.witness) for _ in range(AGREEMENTS)]
        acts = [await scene.prepare(self.first, "agree") for scene in scenes]
        await self.first.arm(CrashPoint(Step.AFTER_COMMIT, "agree", AGREEMENTS // 2))
        async with asyncio.TaskGroup() as tasks:
            for scene, act in zip(scenes, acts, strict=True):
                tasks.create_task(self.agree(scene, act))
        assert await self.first.until_dead(30)
        died_at_s = time.monotonic()
        pending = await self.books.database["goals"].count_documents(
            {"outbox.0": {"$exists": True}}
        )
        assert pending, "something was committed and not delivered"
        tell(f"{pending} goals with pending deliveries")
        return scenes, died_at_s

    async def agree(self, scene: Scene, act: Act) -> None:
        """Asks again as long as a busy machine makes the agreement late, and it counts for none."""
        answer = await ask(scene.history, self.first, act)
        while answer is not None and answer.retryable:
            answer = await ask(scene.history, self.first, act)

    async def judged(self, scenes: list[Scene], gateway: ForkedGateway) -> None:
        """Lets those agree again whom the crash cut off, and has every scene judged."""
        for scene in scenes:
            asked = next(one for one in scene.history.asked if one.command == "agree")
            act = scene.act("agree", asked.goal_id)
            await insist(scene.history, gateway, act)
        for scene in scenes:
            await scene.settled()
            await scene.final_snapshots(gateway)
            assert judge(scene.history, await scene.truth()) == []


@pytest_asyncio.fixture
async def house(
    stores: Stores, apps_file: Path, books: Books, tmp_path: Path
) -> AsyncIterator[House]:
    async with AsyncExitStack() as stack:
        gateways = [
            await stack.enter_async_context(ForkedGateway(stores, apps_file, tmp_path / "log"))
            for _ in range(2)
        ]
        await gateways[0].start()
        witness = await stack.enter_async_context(Witness(stores))
        yield House(gateways[0], gateways[1], books, witness)


async def test_a_restarted_gateway_has_delivered_everything_within_two_seconds(
    house: House,
) -> None:
    scenes, _ = await house.kill_amid_agreements()

    started_at_s = time.monotonic()
    await house.first.start()
    await house.books.until_delivered()
    took_s = time.monotonic() - started_at_s

    tell(f"delivered {took_s:.2f} s after the restart")
    assert took_s <= RESTARTED_WITHIN_S
    await house.judged(scenes, house.first)


async def test_a_gateway_starts_although_somebody_holds_what_it_would_take_over(
    house: House, mongodb_client: MongoClient, stores: Stores
) -> None:
    """A transaction that another dead node left open: it once kept this one from starting."""
    scene = Scene(house.books, house.witness)
    act = await scene.prepare(house.first, "agree")
    await house.first.arm(CrashPoint(Step.AFTER_COMMIT, "agree"))
    await ask(scene.history, house.first, act)
    assert await house.first.until_dead(10)
    goals = mongodb_client[stores.database]["goals"]
    with mongodb_client.start_session() as holder, holder.start_transaction():
        goals.update_one({"_id": ObjectId(act.goal_id)}, {"$set": {"progress": 0}}, session=holder)

        await house.first.start()

        holder.abort_transaction()
    await house.judged([scene], house.first)


async def test_a_second_gateway_has_delivered_everything_within_five_seconds(
    house: House,
) -> None:
    await house.second.start()
    scenes, died_at_s = await house.kill_amid_agreements()

    await house.books.until_delivered()
    took_s = time.monotonic() - died_at_s

    tell(f"delivered {took_s:.2f} s after the crash")
    assert took_s <= TAKEN_OVER_WITHIN_S
    await house.judged(scenes, house.second)
