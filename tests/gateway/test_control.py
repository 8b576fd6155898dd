from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from gateway.broker import MemoryBroker, MemoryBus
from gateway.control import Control


class Peer:
    """A node's control messages, and those of one kind that it has heard."""

    def __init__(self, bus: MemoryBus) -> None:
        self.broker = MemoryBroker(bus)
        self.control = Control(self.broker)
        self.heard: list[dict[str, str]] = []
        self.control.on("forget", self.heard.append)

    async def start(self) -> None:
        await self.broker.start(lambda *_: None, self.control.receive, lambda: None)


@pytest.fixture
async def peers() -> tuple[Peer, Peer]:
    bus = MemoryBus()
    one, other = Peer(bus), Peer(bus)
    await one.start()
    await other.start()
    return one, other


async def test_every_node_hears_a_control_message_its_sender_too(peers: tuple[Peer, Peer]) -> None:
    one, other = peers

    await one.control.send("forget", streamer="s")

    assert one.heard == other.heard == [{"streamer": "s"}]


async def test_a_kind_that_only_a_newer_node_knows_is_passed_over(
    peers: tuple[Peer, Peer],
) -> None:
    one, other = peers

    with capture_logs() as lines:
        await one.control.send("of a later version")
        await one.control.send("forget")

    assert {line["event"] for line in lines} == {"control_unknown"}
    assert other.heard == [{}]


@pytest.mark.parametrize("body", [b"", b"not json", b'{"kind":1,"data":{}}', b'{"kind":"forget"}'])
async def test_what_is_no_control_message_is_told_in_the_log_and_does_nothing(
    peers: tuple[Peer, Peer], body: bytes
) -> None:
    one, other = peers

    with capture_logs() as lines:
        await one.broker.publish_control(body)

    assert [line["event"] for line in lines] == ["control_malformed"] * 2
    assert one.heard == other.heard == []
