"""A platform's receiver that hangs holds up one delivery at a time, and no more."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from gateway.platform_code import PlatformCode
from persistence.outbox import DeliveryFailed
from tests.statemachine.builders import occurrence

if TYPE_CHECKING:
    from statemachine.receivers import Occurrence

LIMIT_S = 0.05


@dataclass(eq=False)
class Platform:
    """Its receivers, which do as the test says, and the time."""

    hangs: bool = False
    raises: Exception | None = None
    calls: int = 0
    now_s: float = 1000.0
    code: PlatformCode = field(init=False)

    def __post_init__(self) -> None:
        self.code = PlatformCode(LIMIT_S, lambda: self.now_s)

    async def receive(self, _occurrence: Occurrence) -> None:
        self.calls += 1
        if self.raises is not None:
            raise self.raises
        if self.hangs:
            await asyncio.get_running_loop().create_future()

    async def receive_other(self, _occurrence: Occurrence) -> None:
        self.calls += 1

    async def run(self) -> None:
        await self.code.run(self.receive, occurrence())

    async def refused(self) -> str:
        """Why a delivery was refused."""
        with pytest.raises(DeliveryFailed) as refusal:
            await self.run()
        return str(refusal.value)


@pytest.fixture
async def hung() -> Platform:
    """A platform whose receiver has just hung."""
    platform = Platform(hangs=True)
    assert await platform.refused() == "TimeoutError in the platform's receiver"
    return platform


async def test_after_one_that_hung_the_others_fail_at_once(hung: Platform) -> None:
    hung.hangs = False

    assert await hung.refused() == "the platform's receiver hung a moment ago"
    assert hung.calls == 1


async def test_one_at_a_time_finds_out_whether_it_answers_again(hung: Platform) -> None:
    hung.now_s += LIMIT_S

    finding_out = asyncio.create_task(hung.refused())
    await asyncio.sleep(0)
    assert await hung.refused() == "the platform's receiver hung a moment ago"

    assert await finding_out == "TimeoutError in the platform's receiver"
    assert hung.calls == 2


@pytest.mark.parametrize("raises", [None, RuntimeError("no")])
async def test_once_it_answers_everyone_is_served(hung: Platform, raises: Exception | None) -> None:
    hung.now_s += LIMIT_S
    hung.hangs, hung.raises = False, raises
    if raises is None:
        await hung.run()
    else:
        assert await hung.refused() == "RuntimeError in the platform's receiver"

    hung.raises = None
    await hung.run()
    assert hung.calls == 3


@pytest.mark.parametrize("made", ["a lambda", "a partial", "an object"])
async def test_one_that_is_made_anew_for_each_occurrence_is_known_again(made: str) -> None:
    platform = Platform(hangs=True)

    class Call:
        async def __call__(self, event: Occurrence) -> None:
            await platform.receive(event)

    async def call(_of: object, event: Occurrence) -> None:
        await platform.receive(event)

    def anew() -> Any:
        if made == "an object":
            return Call()
        return partial(call, object()) if made == "a partial" else lambda event: call(made, event)

    for _ in range(2):
        with pytest.raises(DeliveryFailed):
            await platform.code.run(anew(), occurrence())
    assert platform.calls == 1


async def test_another_receiver_is_called_as_ever(hung: Platform) -> None:
    await hung.code.run(hung.receive_other, occurrence())

    assert hung.calls == 2


async def test_one_that_raises_is_tried_by_everyone() -> None:
    platform = Platform(raises=TimeoutError("its own"))

    for _ in range(2):
        assert await platform.refused() == "TimeoutError in the platform's receiver"
    assert platform.calls == 2
