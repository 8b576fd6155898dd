"""Fan-out, interest, two nodes, and a broker that fails."""

from __future__ import annotations

import asyncio
import json
import secrets
from socket import socketpair
from typing import TYPE_CHECKING, Any

import pytest

from gateway.apps import Apps
from gateway.broker import BrokerUnavailable, MemoryBroker, MemoryBus, Publication
from gateway.fanout import FanOut
from gateway.frames import frame
from gateway.hub import Channel, Gate, Hub
from gateway.interest import Interest
from gateway.live_streams import LiveStreams
from gateway.presence import MemoryPresence, MemoryStore
from gateway.redis_broker import RedisBroker
from gateway.redis_lease import RedisLease
from gateway.redis_presence import RedisPresence
from gateway.tasks import Tasks
from tests.gateway.harness import APP, redis_shared, running_gateway, settings_for_tests, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.broker import Broker
    from gateway.presence import Presence
    from persistence.embedded_redis import RedisServer


class Socket:
    """Takes what fan-out writes."""

    pusher: Any = None
    fd = -1

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.slow = False

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    answer = write

    def abort_slow(self) -> None:
        self.slow = True

    @property
    def received(self) -> bytes:
        return b"".join(self.writes)


class Field:
    """A channel with sockets on it, and the fan-out in front."""

    def __init__(self, sockets: int, **settings: Any) -> None:
        self.channel = Channel("1", "c")
        self.sockets = [Socket() for _ in range(sockets)]
        for socket in self.sockets:
            self.channel.put(socket)
        self.deliveries = 0
        self.by_id: dict[str, Socket] = {}
        loop = asyncio.get_running_loop()
        chosen = settings_for_tests(**({"join_wait_ms": 1} | settings))
        self.fan_out = FanOut(loop, chosen, self.by_id.get, self._count)

    def _count(self, count: int) -> None:
        self.deliveries += count

    def push(self, *bodies: bytes, excluded: str | None = None) -> None:
        for body in bodies:
            self.fan_out.push(self.channel, body, excluded)

    async def quiet(self) -> None:
        """Waits until the channel has written everything and is quiet again."""
        await until(lambda: self.channel.batch is None and not self.channel.slicing)


def frames_of(*bodies: bytes) -> bytes:
    return b"".join(frame(body) for body in bodies)


async def test_publications_read_together_leave_in_one_write_in_their_order() -> None:
    field = Field(3)
    field.push(b"1", b"2", b"3")
    await asyncio.sleep(0)

    assert [socket.writes for socket in field.sockets] == [[frames_of(b"1", b"2", b"3")]] * 3
    assert field.deliveries == 9


async def test_the_first_publication_goes_out_at_once_and_the_next_ones_join() -> None:
    field = Field(1, join_wait_ms=20)
    field.push(b"1")
    await asyncio.sleep(0)
    assert field.sockets[0].received == frames_of(b"1")

    field.push(b"2")
    await asyncio.sleep(0)
    field.push(b"3")
    await asyncio.sleep(0)
    assert field.sockets[0].received == frames_of(b"1")
    await field.quiet()
    assert field.sockets[0].writes == [frames_of(b"1"), frames_of(b"2", b"3")]


async def test_after_a_burst_the_first_of_the_next_one_waits_for_the_others() -> None:
    field = Field(1, join_wait_ms=20)
    for body in (b"1", b"2", b"3"):
        field.push(body)
        await asyncio.sleep(0)
    await field.quiet()

    for body in (b"4", b"5"):
        field.push(body)
        await asyncio.sleep(0)
    await field.quiet()

    first, *rest = field.sockets[0].writes
    assert (first, rest) == (frames_of(b"1"), [frames_of(b"2", b"3"), frames_of(b"4", b"5")])


async def test_what_came_while_a_burst_was_written_counts_as_a_burst() -> None:
    field = Field(4, fanout_slice=2, join_wait_ms=20)
    field.push(b"1")
    await asyncio.sleep(0)
    # Between the slices of the first one.
    field.push(b"2", b"3")
    await field.quiet()

    field.push(b"4")
    await asyncio.sleep(0)
    field.push(b"5")
    await field.quiet()

    assert field.sockets[0].writes == [
        frames_of(b"1"),
        frames_of(b"2", b"3"),
        frames_of(b"4", b"5"),
    ]


async def test_a_channel_that_has_waited_in_vain_thrice_is_served_at_once_again() -> None:
    field = Field(1, join_wait_ms=4)
    for body in (b"1", b"2", b"3"):
        field.push(body)
        await asyncio.sleep(0)
    await field.quiet()
    for _ in range(3):
        field.push(b"alone")
        await asyncio.sleep(0)
        assert field.channel.batch == [frames_of(b"alone")]
        await field.quiet()

    field.push(b"at once")
    await asyncio.sleep(0)

    assert field.sockets[0].writes[-1] == frames_of(b"at once")


async def test_a_batch_waits_no_longer_than_it_may_however_many_come() -> None:
    field = Field(1, join_wait_ms=20)
    field.push(b"1")
    await asyncio.sleep(0)
    began_at = asyncio.get_running_loop().time()
    while len(field.sockets[0].writes) < 2:
        field.push(b"2")
        await asyncio.sleep(0)

    assert asyncio.get_running_loop().time() - began_at < 1


async def test_slices_give_the_loop_its_turn_and_every_socket_keeps_the_order() -> None:
    field = Field(10, fanout_slice=3, join_wait_ms=0)
    field.push(b"1")
    await asyncio.sleep(0)
    assert [len(socket.writes) for socket in field.sockets] == [1] * 3 + [0] * 7

    # Arrives in the middle of the slices.
    field.push(b"2")
    await field.quiet()

    for socket in field.sockets:
        assert socket.received == frames_of(b"1", b"2")


async def test_a_socket_that_leaves_between_slices_gets_nothing_more() -> None:
    field = Field(4, fanout_slice=2)
    field.push(b"1")
    await asyncio.sleep(0)
    gone = field.sockets[3]
    field.channel.remove(gone)
    await field.quiet()

    assert gone.writes == []
    assert field.sockets[2].received == frames_of(b"1")


async def test_an_excluded_socket_misses_its_own_frames_and_nothing_else() -> None:
    field = Field(3)
    sender, other, _ = field.sockets
    field.by_id = {}
    field.fan_out.find = {"1.1": sender}.get
    field.push(b"1", excluded="1.1")
    field.push(b"2")
    field.push(b"3", excluded="9.9")
    field.push(b"4", excluded="1.1")
    await field.quiet()

    assert sender.received == frames_of(b"2", b"3")
    assert other.writes == [frames_of(b"1", b"2", b"3", b"4")]


async def test_a_gated_socket_gets_its_pushes_in_order_when_the_gate_opens() -> None:
    field = Field(1)
    late, gate = Socket(), Gate()
    field.channel.gates[late] = gate
    field.push(b"1")
    await field.quiet()
    field.push(b"2")
    await field.quiet()

    assert late.writes == []
    assert b"".join(gate.waiting) == frames_of(b"1", b"2")
    assert Hub.open_gate(field.channel, late) is gate
    field.push(b"3")
    await field.quiet()
    assert late.received == frames_of(b"3")


async def test_a_gate_over_the_send_bound_ends_its_connection() -> None:
    field = Field(0, send_buffer_bytes=16_384)
    late = Socket()
    field.channel.gates[late] = Gate()
    field.push(b"x" * 20_000)
    await field.quiet()

    assert late.slow


async def test_sockets_are_written_to_by_their_descriptors_while_they_keep_up() -> None:
    field = Field(0, fanout_slice=2)
    pairs = [socketpair() for _ in range(5)]
    for near, _ in pairs:
        near.setblocking(False)
        socket = Socket()
        socket.fd = near.fileno()
        field.sockets.append(socket)
        field.channel.put(socket)
    gone, lags = field.sockets[3:]
    field.push(b"1")
    await asyncio.sleep(0)
    # Between the slices.
    field.channel.remove(gone)
    lags.fd = -1
    field.channel.reroute(lags)
    await field.quiet()

    received = []
    for near, far in pairs:
        near.close()
        received.append(far.recv(100))
        far.close()
    assert received == [frames_of(b"1")] * 3 + [b""] * 2
    assert [socket.received for socket in field.sockets] == [b""] * 4 + [frames_of(b"1")]


async def test_what_a_descriptor_does_not_take_is_left_to_the_transport() -> None:
    field = Field(1)
    [socket] = field.sockets
    near, far = socketpair()
    with near, far:
        near.setblocking(False)
        socket.fd = near.fileno()
        field.channel.reroute(socket)
        body = b"x" * 4_000_000
        field.push(body)
        await field.quiet()
        # Full now: not a byte more.
        field.push(b"2")
        await field.quiet()

        far.settimeout(5)
        taken = b""
        while len(taken) + len(socket.received) < len(frames_of(body, b"2")):
            taken += far.recv(1_000_000)
    assert taken
    assert taken + socket.received == frames_of(body, b"2")


async def test_one_busy_channel_does_not_hold_up_another() -> None:
    field = Field(1, join_wait_ms=1000)
    field.push(b"1")
    await asyncio.sleep(0)
    quiet, socket = Channel("1", "d"), Socket()
    quiet.put(socket)
    field.fan_out.push(quiet, b"now")
    await asyncio.sleep(0)

    assert socket.received == frames_of(b"now")


# Interest


class SlowBroker(MemoryBroker):
    """A memory broker whose subscriptions wait for the test, and fail if it says so."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.release = asyncio.Event()
        self.fault: BrokerUnavailable | None = None

    async def subscribe(self, app_id: str, channel: str) -> None:
        self.calls.append(f"+{channel}")
        await self.release.wait()
        if self.fault is not None:
            raise self.fault
        await super().subscribe(app_id, channel)

    async def unsubscribe(self, app_id: str, channel: str) -> None:
        self.calls.append(f"-{channel}")
        await super().unsubscribe(app_id, channel)


class InterestBench:
    """A hub, an interest that lingers only for a moment, and connections to come and go."""

    def __init__(self) -> None:
        self.hub = Hub()
        self.broker = SlowBroker()
        self.tasks = Tasks()
        self.interest = Interest(self.hub, self.broker, self.tasks, linger_s=0.01)

    def join(self) -> tuple[Any, Channel]:
        connection: Any = Socket()
        self.hub.attach(connection)
        channel, _ = self.hub.join(connection, ("1", "c"))
        return connection, channel

    def leave(self, connection: Any, channel: Channel) -> None:
        if self.hub.leave(connection, channel):
            self.interest.linger(channel)


async def test_all_who_come_during_the_first_subscription_share_it() -> None:
    bench = InterestBench()
    channels = [bench.join()[1] for _ in range(100)]
    waiting = asyncio.gather(*(bench.interest.hear(channel) for channel in channels))
    await asyncio.sleep(0)
    bench.broker.release.set()
    await waiting

    assert bench.broker.calls == ["+c"]
    assert channels[0].heard


async def test_all_who_wait_share_the_failure_and_the_next_one_tries_anew() -> None:
    bench = InterestBench()
    bench.broker.fault = BrokerUnavailable("frozen")
    _, channel = bench.join()
    waiting = asyncio.gather(
        *(bench.interest.hear(channel) for _ in range(10)), return_exceptions=True
    )
    await asyncio.sleep(0)
    bench.broker.release.set()
    outcomes = await waiting
    bench.broker.fault = None
    await bench.interest.hear(channel)

    assert all(isinstance(outcome, BrokerUnavailable) for outcome in outcomes)
    assert bench.broker.calls == ["+c", "+c"]


async def test_the_last_one_out_ends_the_interest_after_a_while() -> None:
    bench = InterestBench()
    bench.broker.release.set()
    connection, channel = bench.join()
    await bench.interest.hear(channel)
    bench.leave(connection, channel)
    assert bench.broker.calls == ["+c"]

    await until(lambda: bench.hub.channel(("1", "c")) is None)
    assert bench.broker.calls == ["+c", "-c"]


async def test_who_comes_back_in_time_finds_the_channel_still_heard() -> None:
    bench = InterestBench()
    bench.broker.release.set()
    connection, channel = bench.join()
    await bench.interest.hear(channel)
    bench.leave(connection, channel)
    bench.join()
    await until(lambda: not bench.interest._lingering)

    assert channel.heard
    assert bench.broker.calls == ["+c"]


async def test_a_waiter_that_gives_up_leaves_the_attempt_to_the_others() -> None:
    bench = InterestBench()
    _, channel = bench.join()
    impatient = asyncio.create_task(bench.interest.hear(channel))
    patient = asyncio.create_task(bench.interest.hear(channel))
    await asyncio.sleep(0)
    impatient.cancel()
    await asyncio.sleep(0)
    bench.broker.release.set()
    await patient

    assert channel.heard
    assert bench.broker.calls == ["+c"]


async def test_a_drop_during_the_question_wins_over_its_answer() -> None:
    streams = LiveStreams()
    asked: list[str] = []

    async def ask(streamer_id: str) -> bool:
        asked.append(streamer_id)
        if len(asked) == 1:
            streams.drop(streamer_id)
        return True

    for _ in range(3):
        assert await streams.is_live("s", 0.0, ask)
    assert asked == ["s", "s"]


# Nodes together


async def test_two_nodes_share_channels_members_and_control_messages() -> None:
    bus, store = MemoryBus(), MemoryStore()

    def presence_of(name: str) -> Callable[[Broker], Presence]:
        def make(broker: Broker) -> Presence:
            assert isinstance(broker, MemoryBroker)
            return MemoryPresence(broker, name, 100, store)

        return make

    async with (
        running_gateway(broker=MemoryBroker(bus), presence=presence_of("n1")) as one,
        running_gateway(broker=MemoryBroker(bus), presence=presence_of("n2")) as two,
    ):
        here, there = await one.connect(), await two.connect()
        await here.subscribed("c")
        await there.subscribed("c")
        await two.push("c", n=1)
        assert json.loads((await here.event())["data"]) == {"n": 1}
        assert json.loads((await there.event())["data"]) == {"n": 1}

        known = await two.connect(path="/app/app-key?token=viewer:v")
        await one.node.terminate_user("1", "v")
        assert (await known.refused())[1].code == 4009


async def test_with_a_frozen_redis_sockets_are_answered_and_existing_ones_recover(
    own_redis: RedisServer,
) -> None:
    settings = settings_for_tests(redis_timeout_s=0.3)
    prefix = f"test-{secrets.token_hex(6)}"
    broker = RedisBroker(own_redis.url, prefix, "n", 0.3)

    lease = RedisLease(broker.commands, prefix, "n", 10)

    def presence(_: Broker) -> Presence:
        return RedisPresence(broker.commands, prefix, lease, 100)

    shared = redis_shared(broker, Apps([APP]), prefix, lease)
    async with running_gateway(
        settings, broker=broker, presence=presence, shared=shared
    ) as gateway:
        client = await gateway.connect(path="/app/app-key?token=viewer:v")
        await client.subscribed("private-user@v")
        assert (await client.event())["event"] == "goal.snapshot"
        own_redis.process.pause()

        client.subscribe("new")
        data = {"request_id": "r", "goal_id": "0" * 24}
        client.send({"event": "client-goal.withdraw", "channel": "private-user@v", "data": data})
        assert (await client.event())["event"] == "goal.reply"
        error = await client.event()
        assert error["event"] == "pusher:subscription_error"
        assert error["data"]["status"] == 503
        with pytest.raises(BrokerUnavailable):
            await gateway.node.publish([Publication("1", "other", b"{}")])

        own_redis.process.resume()
        await client.subscribed("new")
        await gateway.push("new", n=1)
        assert json.loads((await client.event())["data"]) == {"n": 1}


async def test_an_owned_task_that_fails_is_logged_and_one_that_runs_is_ended() -> None:
    tasks = Tasks()

    async def forever() -> None:
        await asyncio.Event().wait()

    async def fail() -> None:
        raise ValueError("x")

    task = tasks.spawn(forever(), "forever")
    failed = tasks.spawn(fail(), "fail", user_id="u")
    await asyncio.wait([failed])
    await tasks.stop()

    assert task.cancelled()
    assert len(tasks) == 0
