"""The guard against slow decline: what the hot paths cost, in counts that no machine changes.

`tests/guard/budgets.py` has the figures. The last three tests are the guard's own: a copy, a parse
and a task that slip in are caught and named.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import gateway
from gateway.socket import GatewayProtocol
from tests.guard.budgets import MARGIN, over_budget
from tests.guard.counting import Costs, Meter
from tests.guard.stage import (
    CLIENT_EVENT,
    PING,
    Stage,
    Wire,
    connection_of,
    message_from_redis,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REPEATS = 10
PUSH = message_from_redis(b'{"event":"e","channel":"private-guard","data":"x"}')
# Longer than a busy channel waits for more, so that the next publication finds it quiet.
QUIET_S = 0.01


@pytest.fixture(scope="module", autouse=True)
def everything_has_been_traced() -> None:
    """Python 3.12 and later miss the instructions of a function that is traced the first time."""
    stage = Stage()
    with Meter(stage.loop):
        sender = stage.subscribed(300)[0]
        stage.receive(sender, PING)
        stage.receive(sender, CLIENT_EVENT)
        stage.loop.do(stage.reader().data_received, PUSH)
        quiet(stage)
        caller = Wire()
        stage.loop.do(stage.accept, caller)
        for _ in range(2):
            stage.receive(caller, stage.publish_call("nobody-listens"))
        stage.loop.pass_s(0.25)
    stage.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


def quiet(stage: Stage) -> None:
    for _ in range(2):
        stage.loop.pass_s(QUIET_S)


def costs_of_push(stage: Stage) -> Costs:
    """What one publication from Redis costs, with all its deliveries."""
    link = stage.reader()

    def push() -> None:
        stage.loop.do(link.data_received, PUSH)
        quiet(stage)

    with Meter(stage.loop) as meter:
        push()
        meter.restart()
        push()
    return meter.costs


def costs_of_ping(stage: Stage) -> Costs:
    wires = stage.subscribed(REPEATS)
    with Meter(stage.loop) as meter:
        for wire in wires:
            stage.receive(wire, PING)
    assert [len(wire.written) for wire in wires] == [1] * REPEATS
    return meter.costs.per(REPEATS)


# The budgets


@pytest.mark.parametrize("what", ["delivery", "delivery by transport"])
def test_a_delivery_is_one_write_and_costs_the_same_however_many_get_it(
    stage: Stage, what: str
) -> None:
    costs = []
    with Path(os.devnull).open("wb") as sink:
        for count in (250, 250, 500):
            stage.subscribed(count, sink if what == "delivery" else None)
            costs.append(costs_of_push(stage))

    few, many = (costs[1] - costs[0]).per(250), (costs[2] - costs[1]).per(500)

    assert over_budget(what, few) == {}
    assert over_budget(what, many) == {}
    assert many.opcodes <= few.opcodes * (1 + MARGIN)


def test_every_socket_of_a_channel_is_written_the_same_bytes_object_once(stage: Stage) -> None:
    wires = stage.subscribed(1_000)

    stage.loop.do(stage.reader().data_received, PUSH)
    quiet(stage)

    assert [len(wire.written) for wire in wires] == [1] * 1_000
    assert len({id(wire.written[0]) for wire in wires}) == 1


def test_a_publication_from_redis_is_neither_parsed_nor_built_again(stage: Stage) -> None:
    stage.subscribed(2)

    costs = costs_of_push(stage)

    assert costs.json == 0
    assert over_budget("publication", costs) == {}


def test_a_plain_publication_over_http_has_no_task(stage: Stage) -> None:
    wire = Wire()
    stage.loop.do(stage.accept, wire)
    call = stage.publish_call("nobody-listens")
    stage.receive(wire, call)

    with Meter(stage.loop) as meter:
        for _ in range(REPEATS):
            stage.receive(wire, call)

    assert [answer.partition(b"\r\n")[0] for answer in wire.written] == [b"HTTP/1.1 200 OK"] * (
        REPEATS + 1
    )
    assert over_budget("http publish", meter.costs.per(REPEATS)) == {}


def test_connecting_and_subscribing_are_two_writes_and_no_task(stage: Stage) -> None:
    stage.subscribed(1)
    wires = [Wire() for _ in range(REPEATS)]

    with Meter(stage.loop) as connecting:
        for wire in wires:
            stage.connect(wire)
    frames = [stage.subscription(wire) for wire in wires]
    with Meter(stage.loop) as subscribing:
        for wire, frame in zip(wires, frames, strict=True):
            stage.receive(wire, frame)

    assert [len(wire.written) for wire in wires] == [2] * REPEATS
    assert over_budget("connect", connecting.costs.per(REPEATS)) == {}
    assert over_budget("subscribe", subscribing.costs.per(REPEATS)) == {}


def test_a_ping_is_one_write_and_no_task(stage: Stage) -> None:
    assert over_budget("ping", costs_of_ping(stage)) == {}


def test_a_client_event_has_no_task(stage: Stage) -> None:
    sender, other = stage.subscribed(2)

    with Meter(stage.loop) as meter:
        for _ in range(5):
            stage.receive(sender, CLIENT_EVENT)
            quiet(stage)

    assert (len(sender.written), len(other.written)) == (0, 5)
    assert over_budget("client event", meter.costs.per(5)) == {}


def test_a_second_costs_the_same_however_many_sockets_are_idle(stage: Stage) -> None:
    def costs_of_a_second() -> Costs:
        with Meter(stage.loop) as meter:
            for _ in range(40):
                stage.loop.pass_s(0.25)
        return meter.costs.per(10)

    stage.subscribed(10)
    few = costs_of_a_second()
    stage.subscribed(400)
    many = costs_of_a_second()

    assert over_budget("idle second", few) == {}
    assert over_budget("idle second", many) == {}
    assert many.opcodes <= few.opcodes * (1 + MARGIN)


# The guard itself


def doctored(source: str, **names: Any) -> Callable[..., Any]:
    """The function `slow` of `source`, which passes for one of the gateway's own."""
    namespace: dict[str, Any] = dict(names)
    place = str(Path(gateway.__file__).parent / "doctored.py")
    exec(compile(source, place, "exec"), namespace)
    slow: Callable[..., Any] = namespace["slow"]
    return slow


def test_a_copy_for_each_delivery_is_caught(stage: Stage) -> None:
    copying = doctored("def slow(write):\n    return lambda data: write(data[:1] + data[1:])")

    costs = []
    for _ in range(2):
        for wire in stage.subscribed(250):
            connection = connection_of(wire)
            connection.write = copying(connection.write)
        costs.append(costs_of_push(stage))

    faults = over_budget("delivery", (costs[1] - costs[0]).per(250))
    assert set(faults) == {"opcodes", "calls"}


def test_json_that_is_read_for_each_publication_is_caught(stage: Stage) -> None:
    stage.node._on_publication = doctored(  # type: ignore[method-assign]
        "import msgspec\n"
        "def slow(app_id, channel, body, excluded):\n"
        "    on_publication(app_id, channel, msgspec.json.encode(msgspec.json.decode(body)), None)",
        on_publication=stage.node._on_publication,
    )
    stage.subscribed(2)

    assert "json" in over_budget("publication", costs_of_push(stage))


def test_a_task_for_each_message_is_caught(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    later = doctored(
        "def slow(connection, text):\n"
        "    async def handled():\n"
        "        on_text(connection, text)\n"
        "    connection.node.spawn(handled(), 'text')",
        on_text=GatewayProtocol._on_text,
    )
    # Subscribing comes first, so that pings alone are slow.
    wires = stage.subscribed(REPEATS)
    monkeypatch.setattr(GatewayProtocol, "_on_text", later)

    with Meter(stage.loop) as meter:
        for wire in wires:
            stage.receive(wire, PING)

    faults = over_budget("ping", meter.costs.per(REPEATS))
    assert {"tasks", "turns"} <= set(faults)
    assert faults["tasks"].startswith("ping: 1 tasks, the budget is 0 (new)")
