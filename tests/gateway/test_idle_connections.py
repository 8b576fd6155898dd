"""When an HTTP connection on which nothing comes is closed: uvicorn's rule, with one timer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.guard.stage import UPGRADE, Stage, Wire

if TYPE_CHECKING:
    from collections.abc import Iterator

# uvicorn's own; the stage changes nothing.
KEEP_ALIVE_S = 5.0


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


@pytest.fixture
def wire(stage: Stage) -> Wire:
    """A connection whose first call has been answered."""
    wire = Wire()
    stage.loop.do(stage.accept, wire)
    stage.receive(wire, stage.publish_call("c"))
    assert wire.written.pop().startswith(b"HTTP/1.1 200 OK")
    return wire


def is_open(wire: Wire) -> bool:
    return wire.protocol is not None


def test_a_silent_connection_is_closed_once_the_time_has_passed(stage: Stage, wire: Wire) -> None:
    stage.loop.pass_s(KEEP_ALIVE_S - 0.1)
    assert is_open(wire)

    stage.loop.pass_s(0.2)

    assert not is_open(wire)


def test_each_answer_begins_the_time_anew(stage: Stage, wire: Wire) -> None:
    for _ in range(3):
        stage.loop.pass_s(KEEP_ALIVE_S - 0.1)
        stage.receive(wire, stage.publish_call("c"))
    assert len(wire.written) == 3

    stage.loop.pass_s(KEEP_ALIVE_S - 0.1)
    assert is_open(wire)
    stage.loop.pass_s(0.2)

    assert not is_open(wire)


def test_a_call_that_is_still_coming_is_waited_for(stage: Stage, wire: Wire) -> None:
    call = stage.publish_call("c")
    stage.receive(wire, call[:-1])

    stage.loop.pass_s(KEEP_ALIVE_S + 1)
    stage.receive(wire, call[-1:])

    assert [answer[:15] for answer in wire.written] == [b"HTTP/1.1 200 OK"]
    stage.loop.pass_s(KEEP_ALIVE_S + 1)
    assert not is_open(wire)


def test_a_connection_that_has_become_a_websocket_is_left_alone(stage: Stage, wire: Wire) -> None:
    stage.receive(wire, UPGRADE)
    assert wire.written[0].startswith(b"HTTP/1.1 101 ")

    stage.loop.pass_s(KEEP_ALIVE_S + 1)

    assert is_open(wire)


def test_an_ended_connection_leaves_no_timer_behind(stage: Stage, wire: Wire) -> None:
    protocol = wire.protocol
    wire.abort()

    assert protocol.timeout_keep_alive_task is None
