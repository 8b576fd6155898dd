"""`duet serve --workers`: where sockets land, and what happens when a worker goes."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import ConnectionClosed

from tests.e2e.gateway_process import APP_KEY, START_DEADLINE_S, Gateway
from tests.e2e.inbox import PATIENCE_S
from tests.e2e.wire_socket import WireSocket
from tests.gateway.harness import until

if TYPE_CHECKING:
    from persistence.embedded_process import ServerGuard
    from tests.e2e.gateway_process import GatewayBuilder, Stores
    from tests.e2e.stage import StageBuilder

# Several processes take seconds to start on a busy machine.
pytestmark = pytest.mark.timeout(120)

GUESTS = itertools.count(1)


async def served(gateway: Gateway, workers: int) -> dict[str, int]:
    """Waits until so many workers serve; the process of each number."""
    lines = await gateway.until_said("worker_serves", workers)
    return {str(line["worker"]): line["pid"] for line in lines}


async def connections(gateway: Gateway) -> Counter[str]:
    """How many sockets each worker holds."""
    answer = await gateway.call("GET", "/metrics")
    [family] = [
        one for one in text_string_to_metric_families(answer.text) if one.name == "duet_connections"
    ]
    return Counter({one.labels["worker"]: int(one.value) for one in family.samples})


async def guest(stack: AsyncExitStack, gateway: Gateway) -> WireSocket:
    """A connected socket of a new user."""
    return await stack.enter_async_context(WireSocket(gateway, f"guest-{next(GUESTS)}", "viewer"))


async def guest_at(stack: AsyncExitStack, gateway: Gateway, worker: str) -> WireSocket:
    """A new user's socket that has landed on this worker; others may have landed elsewhere."""
    while True:
        before = await connections(gateway)
        socket = await guest(stack, gateway)
        if (await connections(gateway))[worker] > before[worker]:
            return socket


async def test_sockets_spread_evenly_and_one_scrape_shows_it(gateway_with: GatewayBuilder) -> None:
    gateway = await gateway_with(DUET_WORKERS="2")
    await served(gateway, 2)

    async with AsyncExitStack() as stack:
        for _ in range(200):
            await guest(stack, gateway)
        spread = await connections(gateway)

    # 200 throws of a fair coin: fewer than 65 of a side come once in two million tries.
    assert sum(spread.values()) == 200
    assert min(spread["1"], spread["2"]) >= 65


async def test_a_killed_worker_is_replaced_and_its_clients_come_back_and_learn_what_they_missed(
    stage_with: StageBuilder,
) -> None:
    stage = await stage_with(DUET_WORKERS="2")
    gateway = stage.gateway
    pids = await served(gateway, 2)
    streamer = await stage.streamer()
    [place] = [worker for worker, count in (await connections(gateway)).items() if count]
    session_id = stage.session_id

    os.kill(pids[place], signal.SIGKILL)
    invited = await gateway.call(
        "POST",
        "/goals",
        user_id=stage.user("viewer"),
        role="viewer",
        body={"session_id": session_id, "prepaid_duration": 60, "amount": 100},
    )
    await streamer.connected()

    assert invited.status_code == 201, invited.text
    goal_id = invited.json()["id"]
    told = await streamer.expect(
        channel=streamer.own_channel,
        where=lambda record: (
            record.event in {"goal.snapshot", "goal.added"} and goal_id in json.dumps(record.data)
        ),
    )
    assert told
    [replaced] = gateway.said("worker_replaced")
    [*_, again] = await gateway.until_said("worker_serves", 3)
    assert (replaced["exit_code"], replaced["pause_s"]) == (-signal.SIGKILL, 0)
    # Under the number, and so the node's name, of its predecessor.
    assert str(again["worker"]) == place


async def test_members_of_a_killed_worker_leave_with_its_lease(
    gateway_with: GatewayBuilder,
) -> None:
    gateway = await gateway_with(DUET_WORKERS="2", DUET_NODE_LEASE_S="1.5")
    pids = await served(gateway, 2)

    async with AsyncExitStack() as stack:
        streamer = await stack.enter_async_context(WireSocket(gateway, "star", "streamer"))
        live = await gateway.call("POST", "/sessions", user_id="star", role="streamer", body={})
        assert live.status_code == 201
        here = await guest_at(stack, gateway, "1")
        gone = await guest_at(stack, gateway, "2")
        await here.subscribe("presence-stream@star")
        await gone.subscribe("presence-stream@star")
        await here.expect("pusher_internal:member_added", "presence-stream@star")

        os.kill(pids["2"], signal.SIGKILL)

        left = await here.expect("pusher_internal:member_removed", "presence-stream@star")
        assert left.data["user_id"] == gone.user_id
        assert streamer.user_id == "star"


async def let_in(stack: AsyncExitStack, gateway: Gateway) -> WireSocket:
    """A guest who comes again when told to (4100), as client libraries do."""
    while True:
        comer = WireSocket(gateway, f"guest-{next(GUESTS)}", "viewer")
        try:
            return await stack.enter_async_context(comer)
        except AssertionError:
            assert comer.close_code in {4100, 4200}


async def subscribed(stack: AsyncExitStack, gateway: Gateway, comer: WireSocket) -> None:
    """Subscribes a guest; who was let in by the worker that drains comes again (4200)."""
    while True:
        try:
            await comer.subscribe("news")
        except ConnectionClosed as closed:
            if closed.rcvd is None or closed.rcvd.code != 4200:
                raise
            comer = await let_in(stack, gateway)
        else:
            return


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_nobody_is_refused_while_a_worker_dies_or_drains(
    gateway_with: GatewayBuilder, number: signal.Signals
) -> None:
    gateway = await gateway_with(DUET_WORKERS="2", DUET_DRAIN_S="2")
    pids = await served(gateway, 2)

    async with AsyncExitStack() as stack:
        leaving = await guest_at(stack, gateway, "1")
        os.kill(pids["1"], number)
        async with asyncio.TaskGroup() as group:
            # Raises if one is refused, reset, or not answered.
            comers = [group.create_task(let_in(stack, gateway)) for _ in range(60)]
        for comer in comers:
            await subscribed(stack, gateway, comer.result())

        closed = await leaving.wait_closed()
        await gateway.until_said("worker_serves", 3)

    assert closed == (4200 if number == signal.SIGTERM else 1006)


UPGRADE = (
    f"GET /app/{APP_KEY}?protocol=7 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    "Sec-WebSocket-Version: 13\r\n\r\n"
).encode()
CALL = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


async def last_words(comer: socket.socket, words: bytes) -> bytes:
    """Says something and returns what comes, until the server closes."""
    reader, writer = await asyncio.open_connection(sock=comer)
    writer.write(words)
    async with asyncio.timeout(PATIENCE_S):
        said = await reader.read()
    writer.close()
    return said


@pytest.mark.parametrize("workers", [1, 2])
async def test_who_has_connected_when_a_gateway_is_told_to_stop_is_answered(
    gateway_with: GatewayBuilder, workers: int
) -> None:
    gateway = await gateway_with(DUET_WORKERS=str(workers))
    pids = [gateway.running().pid]
    if workers > 1:
        pids += (await served(gateway, workers)).values()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)

    # The kernel lets them in; the gateway sees them when it has been told to stop.
    comers = [socket.create_connection(("127.0.0.1", gateway.port)) for _ in range(60)]
    for comer in comers[:20]:
        comer.sendall(CALL)
    for comer in comers[20:40]:
        comer.sendall(UPGRADE)
    os.kill(gateway.running().pid, signal.SIGTERM)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    async with asyncio.timeout(PATIENCE_S):
        while await answers(gateway):
            pass
    late = [await last_words(comer, CALL) for comer in comers[40:]]
    called = [await last_words(comer, b"") for comer in comers[:20]]
    upgraded = [await last_words(comer, b"") for comer in comers[20:40]]

    # Some may have been answered before the signal was seen, and are closed on while idle.
    assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in called)
    for answer in late:
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"\r\nconnection: close\r\n" in answer
    for answer in upgraded:
        assert answer.startswith(b"HTTP/1.1 101 ")
        # The close frame's code; who was let in before the signal is sent away by the drain.
        assert (4100).to_bytes(2) in answer or (4200).to_bytes(2) in answer
    await ended(gateway)


async def test_a_restart_of_each_worker_in_turn_loses_no_call_over_kept_connections(
    gateway_with: GatewayBuilder,
) -> None:
    gateway = await gateway_with(DUET_WORKERS="2", DUET_DRAIN_S="3")
    pids = await served(gateway, 2)
    witnesses = await gateway_with()
    accepted: list[int] = []
    numbers = itertools.count()
    restarted = asyncio.Event()

    async def publish() -> None:
        """Publishes over one connection as long as that is kept; raises if a call is cut."""
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            while not restarted.is_set():
                number = next(numbers)
                target, body = gateway.signed_event(["news"], "counted", json.dumps(number))
                answer = await client.post(f"{gateway.url}{target}", content=body)
                assert answer.status_code == 200, answer.text
                accepted.append(number)

    async with AsyncExitStack() as stack:
        witness = await guest(stack, witnesses)
        await witness.subscribe("news")
        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(publish())
            for times, pid in enumerate(pids.values(), 3):
                await until(lambda: len(accepted) > 50)
                os.kill(pid, signal.SIGTERM)
                await gateway.until_said("worker_serves", times)
            restarted.set()
        last = await gateway.publish(["news"], "counted", -1)
        assert last.status_code == 200
        await witness.expect("counted", "news", where=lambda record: record.data == -1)
        seen = {record.data for record in witness.received if record.event == "counted"}

    assert set(accepted) <= seen


async def test_a_stopping_gateway_closes_every_workers_sockets_and_refuses_new_ones(
    gateway_with: GatewayBuilder,
) -> None:
    gateway = await gateway_with(DUET_WORKERS="2", DUET_DRAIN_S="1")
    await served(gateway, 2)

    async with AsyncExitStack() as stack:
        sockets = [await guest(stack, gateway) for _ in range(20)]
        os.kill(gateway.running().pid, signal.SIGTERM)
        codes = [await socket.wait_closed() for socket in sockets]
        with pytest.raises(OSError, match="Connect call failed"):
            await guest(stack, gateway)

    assert set(codes) == {4200}
    assert await ended(gateway) == 0


async def ended(gateway: Gateway) -> int | None:
    """Waits until the process has ended; its exit code."""
    await until(
        lambda: gateway.running().exit_code() is not None,
        within_s=START_DEADLINE_S + PATIENCE_S,
    )
    return gateway.running().exit_code()


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_second_signal_ends_a_drain_at_once(
    gateway_with: GatewayBuilder, workers: str
) -> None:
    gateway = await gateway_with(DUET_WORKERS=workers, DUET_DRAIN_S="3600")
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(
        b"POST /goals HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
        + gateway.token("ana", "viewer").encode()
        + b"\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
    )
    assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"

    os.kill(gateway.running().pid, signal.SIGTERM)
    async with asyncio.timeout(PATIENCE_S):
        while await answers(gateway):
            pass
    assert gateway.running().exit_code() is None
    os.kill(gateway.running().pid, signal.SIGTERM)

    await ended(gateway)
    writer.close()


async def answers(gateway: Gateway) -> bool:
    """Whether somebody listens on its port."""
    try:
        await gateway.call("GET", "/healthz")
    except httpx.TransportError:
        return False
    return True


async def test_workers_drain_and_end_when_their_supervisor_is_killed(
    gateway_with: GatewayBuilder,
) -> None:
    gateway = await gateway_with(DUET_WORKERS="2")
    pids = await served(gateway, 2)

    async with AsyncExitStack() as stack:
        sockets = [await guest(stack, gateway) for _ in range(10)]
        os.kill(gateway.running().pid, signal.SIGKILL)
        codes = [await socket.wait_closed() for socket in sockets]

        await until(lambda: not any(map(is_running, pids.values())))
    assert set(codes) == {4200}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_worker_that_goes_on_dying_comes_back_after_growing_pauses(
    gateway_with: GatewayBuilder,
) -> None:
    gateway = await gateway_with(DUET_WORKERS="2")
    victim = (await served(gateway, 2))["2"]

    for deaths in (1, 2, 3):
        os.kill(victim, signal.SIGKILL)
        victim = (await gateway.until_said("worker_serves", 2 + deaths))[-1]["pid"]

    assert [line["pause_s"] for line in gateway.said("worker_replaced")] == [0, 0.5, 1]


async def test_workers_that_cannot_start_end_the_gateway_with_the_reason(
    server_guard: ServerGuard, stores: Stores, apps_file: Path
) -> None:
    settings = {"DUET_WORKERS": "2", "DUET_RECEIVERS": "nowhere:register"}
    gateway = Gateway(server_guard, stores, apps_file, settings)
    await asyncio.to_thread(gateway.launch)

    code = await ended(gateway)

    [line] = [line for line in gateway.log_text().splitlines() if line.startswith("duet: ")]
    assert line.startswith("duet: DUET_RECEIVERS: ")
    assert code == 1
