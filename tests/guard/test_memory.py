"""What an idle, subscribed socket keeps in memory, object by object."""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.guard.budgets import IDLE_SOCKET_BYTES, MARGIN, over_budget
from tests.guard.counting import Meter
from tests.guard.stage import Stage, Wire

if TYPE_CHECKING:
    from collections.abc import Iterator

SOCKETS = 1_000


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    stage.subscribed(10)
    yield stage
    stage.close()


def subscribe(stage: Stage, wires: list[Wire]) -> None:
    for wire in wires:
        stage.connect(wire)
        stage.receive(wire, stage.subscription(wire))
        wire.written.clear()


def tracked_types() -> Counter[str]:
    gc.collect()
    return Counter(f"{type(one).__module__}.{type(one).__name__}" for one in gc.get_objects())


def test_an_idle_socket_is_these_objects_and_no_others(stage: Stage) -> None:
    wires = [Wire() for _ in range(SOCKETS)]
    before = tracked_types()

    subscribe(stage, wires)

    # The dict of its subscriptions holds nothing that could be part of a cycle: it is untracked.
    more = tracked_types() - before
    kept = {name: count for name, count in more.items() if count > SOCKETS // 10}
    assert kept == {
        "gateway.socket.GatewayProtocol": SOCKETS,
        "gateway.protocol.PusherProtocol": SOCKETS,
    }


def test_an_idle_socket_keeps_few_blocks(stage: Stage) -> None:
    wires = [Wire() for _ in range(SOCKETS)]

    with Meter(stage.loop, blocks=True) as meter:
        subscribe(stage, wires)

    assert over_budget("idle socket", meter.costs.per(SOCKETS)) == {}


def test_an_idle_socket_keeps_few_bytes(stage: Stage) -> None:
    wires = [Wire() for _ in range(SOCKETS)]
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.take_snapshot()
        subscribe(stage, wires)
        gc.collect()
        after = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()

    # Tables grow by doubling: how full they are now says nothing about one socket.
    lines = after.compare_to(before, "lineno")
    own = sum(line.size_diff for line in lines if line.count_diff > SOCKETS // 10)
    assert own / SOCKETS <= IDLE_SOCKET_BYTES * (1 + MARGIN)
