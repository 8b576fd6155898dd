"""What keeps tasks, and the loops among them, alive."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from gateway import tasks
from gateway.tasks import Tasks, for_ever

if TYPE_CHECKING:
    import pytest


async def test_a_loop_that_fails_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_PAUSE_S", 0.0)
    goes_on = asyncio.Event()
    rounds = 0

    async def loop() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            raise KeyError("nobody foresaw it")
        goes_on.set()
        await asyncio.Event().wait()

    owner = Tasks()
    task = owner.spawn(for_ever(loop, "outboxes"), "outboxes")
    async with asyncio.timeout(5):
        await goes_on.wait()
    await owner.stop()

    assert rounds == 2
    assert task.cancelled()
