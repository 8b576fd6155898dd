"""Two apps that use the same names for everything, on real servers: neither knows of the other."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pusher
import pytest
import pytest_asyncio

from gateway.apps import App, Apps
from gateway.auth import sign_channel, sign_user
from gateway.server import running_gateway
from tests.gateway.harness import RawClient, until, until_yes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway.server import RunningGateway
    from gateway.settings import Settings

pytestmark = pytest.mark.asyncio(loop_scope="module")

ONE = App(id="1", key="one-key", secret="one-s3cret")
TWO = App(id="2", key="two-key", secret="two-s3cret")
USER = "ana"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateways(settings: Settings) -> AsyncIterator[tuple[RunningGateway, RunningGateway]]:
    """Two nodes of one cluster."""
    other = settings.model_copy(update={"node_name": "other"})
    async with (
        running_gateway(settings, Apps([ONE, TWO])) as first,
        running_gateway(other, Apps([ONE, TWO])) as second,
    ):
        yield first, second


@dataclass
class Tenant:
    """One app: a socket on each node, and the backend's library."""

    app: App
    sockets: list[RawClient]
    gateway: RunningGateway

    async def join(self, channel: str, user_id: str = USER) -> None:
        """Both sockets subscribe; on presence they are one user."""
        for socket in self.sockets:
            shown = json.dumps({"user_id": user_id}) if channel.startswith("presence-") else None
            extra = {} if shown is None else {"channel_data": shown}
            auth = sign_channel(self.app, socket.socket_id, channel, shown)
            await socket.subscribed(channel, auth, **extra)

    def backend(self) -> pusher.Pusher:
        return pusher.Pusher(
            app_id=self.app.id,
            key=self.app.key,
            secret=self.app.secret,
            host="127.0.0.1",
            port=self.gateway.port,
            ssl=False,
        )

    async def ask(self, name: str, *args: Any) -> Any:
        """Calls the library, which blocks."""
        return await asyncio.to_thread(getattr(self.backend(), name), *args)

    async def quiet(self) -> None:
        """Everything that was sent to the sockets so far has been read, and it was nothing."""
        for socket in self.sockets:
            await socket.ping()


@pytest_asyncio.fixture(loop_scope="module")
async def tenants(
    gateways: tuple[RunningGateway, RunningGateway],
) -> AsyncIterator[tuple[Tenant, Tenant]]:
    async with AsyncExitStack() as stack:
        tenants = []
        for app in (ONE, TWO):
            sockets = []
            for gateway in gateways:
                path = f"/app/{app.key}?protocol=7"
                socket = await stack.enter_async_context(await RawClient.open(gateway.port, path))
                established = json.loads((await socket.event())["data"])
                socket.socket_id = established["socket_id"]
                sockets.append(socket)
            tenants.append(Tenant(app, sockets, gateways[0]))
        yield tenants[0], tenants[1]


async def test_an_event_of_one_app_reaches_that_apps_sockets_alone(
    tenants: tuple[Tenant, Tenant],
) -> None:
    one, two = tenants
    for tenant in tenants:
        await tenant.join("private-room")

    await one.ask("trigger", "private-room", "e", {"of": "one"})
    one.sockets[0].send({"event": "client-e", "channel": "private-room", "data": {}})

    assert [(await socket.event())["event"] for socket in one.sockets] == ["e", "e"]
    assert (await one.sockets[1].event())["event"] == "client-e"
    await two.quiet()


async def test_a_signature_of_one_app_opens_nothing_of_the_other(
    tenants: tuple[Tenant, Tenant],
) -> None:
    _, two = tenants
    socket = two.sockets[0]
    forged = sign_channel(ONE, socket.socket_id, "private-room")
    user_data = json.dumps({"id": USER})

    socket.subscribe("private-room", forged)
    assert (await socket.event())["event"] == "pusher:subscription_error"
    socket.subscribe("private-room", forged.replace(ONE.key, TWO.key))
    assert (await socket.event())["event"] == "pusher:subscription_error"
    auth = sign_user(ONE, socket.socket_id, user_data)
    socket.send({"event": "pusher:signin", "data": {"auth": auth, "user_data": user_data}})
    assert (await socket.event())["event"] == "pusher:error"


async def test_members_of_one_app_are_no_members_of_the_other(
    tenants: tuple[Tenant, Tenant],
) -> None:
    one, two = tenants
    await one.join("presence-room", "ana")
    await two.join("presence-room", "ben")

    await until_members(one, ["ana"])
    await until_members(two, ["ben"])
    for socket in one.sockets:
        socket.send({"event": "pusher:unsubscribe", "data": {"channel": "presence-room"}})

    await until_members(one, [])
    await until_members(two, ["ben"])
    await two.quiet()


async def until_members(tenant: Tenant, members: list[str]) -> None:
    """Waits until the HTTP API tells of these members."""

    async def told() -> bool:
        answer = await tenant.ask("users_info", "presence-room")
        return [user["id"] for user in answer["users"]] == members

    await until_yes(told)


async def test_the_last_event_of_a_cache_channel_is_the_apps_own(
    tenants: tuple[Tenant, Tenant],
) -> None:
    one, two = tenants
    await one.ask("trigger", "cache-room", "e", {"of": "one"})

    await two.sockets[0].subscribed("cache-room")
    await one.sockets[0].subscribed("cache-room")

    assert (await two.sockets[0].event())["event"] == "pusher:cache_miss"
    assert (await one.sockets[0].event())["event"] == "e"


async def test_an_app_is_told_of_its_own_channels_alone(tenants: tuple[Tenant, Tenant]) -> None:
    one, two = tenants
    await one.sockets[0].subscribed("only-of-one")
    await two.sockets[0].subscribed("only-of-two")

    async with asyncio.timeout(10):
        for tenant, channel in ((one, "only-of-one"), (two, "only-of-two")):
            while list((await tenant.ask("channels_info", "only-"))["channels"]) != [channel]:
                pass


async def test_a_user_of_one_app_is_terminated_in_that_app_alone(
    tenants: tuple[Tenant, Tenant],
) -> None:
    one, two = tenants
    user_data = json.dumps({"id": USER})
    for tenant in tenants:
        for socket in tenant.sockets:
            auth = sign_user(tenant.app, socket.socket_id, user_data)
            socket.send({"event": "pusher:signin", "data": {"auth": auth, "user_data": user_data}})
            assert (await socket.event())["event"] == "pusher:signin_success"
            await socket.subscribed(f"#server-to-user-{USER}")

    await one.ask("send_to_user", USER, "e", {})
    assert [(await socket.event())["event"] for socket in one.sockets] == ["e", "e"]
    await one.ask("terminate_user_connections", USER)

    for socket in one.sockets:
        assert (await socket.refused())[1].code == 4009
    await two.quiet()


async def test_connections_are_counted_by_app(
    tenants: tuple[Tenant, Tenant], gateways: tuple[RunningGateway, RunningGateway]
) -> None:
    registry = gateways[0].parts.telemetry.registry

    def connections(app: App) -> float | None:
        return registry.get_sample_value("duet_app_connections", {"app": app.id})

    await until(lambda: (connections(ONE), connections(TWO)) == (1, 1))
    await tenants[0].sockets[0].close()
    await until(lambda: (connections(ONE), connections(TWO)) == (0, 1))
    async with httpx.AsyncClient(base_url=gateways[0].url) as http:
        text = (await http.get("/metrics")).text
    assert 'duet_app_connections{app="2"} 1.0' in text
