from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.hub import Gate, Hub
from gateway.messages import Member

if TYPE_CHECKING:
    from gateway.hub import Connection

CONNECTIONS = st.integers(0, 4)
CHANNELS = st.sampled_from(["a", "b", "presence-c"])
MEMBER = Member("u", b"{}")


class One:
    """A connection, for the hub only something with an identity."""

    def __init__(self, number: int) -> None:
        self.app_id = str(number % 2)
        self.fd = number


class HubMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order, both indexes agree with a plain set of pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.hub = Hub()
        self.connections: list[Any] = [One(number) for number in range(5)]
        self.attached: set[int] = set()
        self.pairs: dict[tuple[int, str], bool] = {}

    def key(self, number: int, name: str) -> tuple[str, str]:
        return (self.connections[number].app_id, name)

    def others(self, number: int, name: str) -> int:
        app = self.connections[number].app_id
        return sum(1 for n, c in self.pairs if c == name and self.connections[n].app_id == app)

    @rule(number=CONNECTIONS)
    def attach(self, number: int) -> None:
        if number not in self.attached:
            assert self.hub.attach(self.connections[number]) == {}
            self.attached.add(number)

    @rule(number=CONNECTIONS, name=CHANNELS, gated=st.booleans())
    def join(self, number: int, name: str, gated: bool) -> None:
        if number not in self.attached or (number, name) in self.pairs:
            return
        alone = self.others(number, name) == 0
        gate = Gate() if gated else None
        _, first = self.hub.join(self.connections[number], self.key(number, name), MEMBER, gate)
        assert first is alone
        self.pairs[number, name] = gated

    @rule(number=CONNECTIONS, name=CHANNELS)
    def open_gate(self, number: int, name: str) -> None:
        channel = self.hub.channel(self.key(number, name))
        if channel is None:
            return
        gate = self.hub.open_gate(channel, self.connections[number])
        assert (gate is not None) is self.pairs.get((number, name), False)
        if gate is not None:
            self.pairs[number, name] = False

    @rule(number=CONNECTIONS, name=CHANNELS)
    def leave(self, number: int, name: str) -> None:
        if (number, name) not in self.pairs:
            return
        del self.pairs[number, name]
        channel = self.hub.channel(self.key(number, name))
        assert channel is not None
        last = self.hub.leave(self.connections[number], channel)
        assert last is (self.others(number, name) == 0)

    @rule(number=CONNECTIONS)
    def detach(self, number: int) -> None:
        mine = {name for n, name in self.pairs if n == number}
        left = self.hub.detach(self.connections[number], self.connections[number].app_id)
        assert {channel.name for channel, _ in left} == mine
        assert all(member is MEMBER for _, member in left)
        self.attached.discard(number)
        for name in mine:
            del self.pairs[number, name]

    @rule()
    def forget_everything_that_may_be_forgotten(self) -> None:
        for channel in list(self.hub.channels()):
            self.hub.forget(channel)

    @invariant()
    def both_indexes_agree(self) -> None:
        number_of: dict[Connection, int] = {c: n for n, c in enumerate(self.connections)}
        by_channel = {
            (number_of[connection], channel.name): gated
            for channel in self.hub.channels()
            for members, gated in ((channel.live, False), (channel.gates, True))
            for connection in members
        }
        by_connection = {
            (number_of[connection], name)
            for connection, names in self.hub.connections.items()
            for name in names
        }
        assert by_channel == self.pairs
        assert by_connection == set(self.pairs)
        assert {number_of[connection] for connection in self.hub.connections} == self.attached


TestHub = HubMachine.TestCase


def test_a_gated_connection_is_on_the_channel_but_not_live() -> None:
    hub = Hub()
    connection: Any = One(0)
    hub.attach(connection)
    channel, first = hub.join(connection, ("1", "c"), gate=Gate())

    assert first
    assert (len(channel), list(channel.live), channel.empty) == (1, [], False)


def test_forgetting_a_channel_that_somebody_is_in_changes_nothing() -> None:
    hub = Hub()
    connection: Any = One(0)
    hub.attach(connection)
    channel, _ = hub.join(connection, ("1", "c"))

    hub.forget(channel)
    assert hub.channel(("1", "c")) is channel
    hub.leave(connection, channel)
    hub.forget(channel)
    assert hub.channel(("1", "c")) is None
