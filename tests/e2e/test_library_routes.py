"""Every route that the unmodified `pusher` libraries for Node and Python have."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.inbox import PATIENCE_S
from tests.e2e.party import Party
from tests.e2e.test_backends import Backend, python_backend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.e2e.gateway_process import Gateway
    from tests.e2e.stage import Stage


class NodeBackend:
    """The routes by the library for Node."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def _body(self, name: str, **arguments: Any) -> Any:
        answer = await self._backend.order(name, **arguments)
        assert answer["status"] == 200
        return json.loads(answer["body"])

    async def trigger_batch(self, batch: list[dict[str, Any]]) -> Any:
        return await self._body("trigger_batch", batch=batch)

    async def channels(self, prefix: str, info: list[str]) -> Any:
        params = {"filter_by_prefix": prefix, "info": ",".join(info)}
        return await self._body("get", path="/channels", params=params)

    async def channel(self, name: str, info: list[str]) -> Any:
        return await self._body("get", path=f"/channels/{name}", params={"info": ",".join(info)})

    async def users(self, name: str) -> Any:
        return await self._body("get", path=f"/channels/{name}/users", params={})

    async def terminate(self, user_id: str) -> Any:
        return await self._body("terminate", user=user_id)

    async def send_to_user(self, user_id: str, event: str, data: Any) -> Any:
        return await self._body("send_to_user", user=user_id, event=event, data=data)


class PythonBackend:
    """The routes by the library for Python, which blocks and signs in its own way."""

    def __init__(self, gateway: Gateway) -> None:
        self._pusher = python_backend(gateway)

    async def trigger_batch(self, batch: list[dict[str, Any]]) -> Any:
        return await asyncio.to_thread(self._pusher.trigger_batch, batch)

    async def channels(self, prefix: str, info: list[str]) -> Any:
        return await asyncio.to_thread(self._pusher.channels_info, prefix, info)

    async def channel(self, name: str, info: list[str]) -> Any:
        return await asyncio.to_thread(self._pusher.channel_info, name, info)

    async def users(self, name: str) -> Any:
        return await asyncio.to_thread(self._pusher.users_info, name)

    async def terminate(self, user_id: str) -> Any:
        return await asyncio.to_thread(self._pusher.terminate_user_connections, user_id)

    async def send_to_user(self, user_id: str, event: str, data: Any) -> Any:
        return await asyncio.to_thread(self._pusher.send_to_user, user_id, event, data)


@asynccontextmanager
async def library(name: str, gateway: Gateway) -> AsyncIterator[NodeBackend | PythonBackend]:
    if name == "python":
        yield PythonBackend(gateway)
        return
    async with Backend("backend") as backend:
        await backend.order("connect", options=gateway.backend_options())
        yield NodeBackend(backend)


async def until_equal(ask: Callable[[], Awaitable[Any]], wanted: Any) -> None:
    """Asks until the counts of the cluster, which follow a moment later, are these."""
    answer = None
    try:
        async with asyncio.timeout(PATIENCE_S):
            while answer != wanted:
                answer = await ask()
    except TimeoutError:
        assert answer == wanted


@pytest.mark.pusher("clients", "pusher for Node and for Python, on every route that they have")
@pytest.mark.parametrize("language", ["node", "python"])
async def test_every_route_of_the_library(stage: Stage, language: str) -> None:
    anna = await stage.party("anna", "viewer", by="backend")
    ben = await stage.party("ben", "viewer", by="backend")
    await ben.order("signin")
    await ben.expect("pusher:signin_success", kind="frame")
    news, room = stage.user("news"), f"presence-{stage.user('room')}"
    await anna.subscribe(news)
    for party in (anna, ben):
        await party.subscribe(room)

    async with library(language, stage.gateway) as backend:
        batch = [
            {"channel": news, "name": "first", "data": "1"},
            {"channel": room, "name": "second", "data": "2"},
        ]
        assert await backend.trigger_batch(batch) == {}
        assert (await anna.expect("first", news)).data == 1
        assert (await ben.expect("second", room)).data == 2

        await until_equal(
            lambda: backend.channels(room, ["user_count"]), {"channels": {room: {"user_count": 2}}}
        )
        await until_equal(
            lambda: backend.channel(news, ["subscription_count"]),
            {"occupied": True, "subscription_count": 1},
        )
        users = (await backend.users(room))["users"]
        assert sorted(user["id"] for user in users) == sorted([anna.user_id, ben.user_id])

        assert await backend.send_to_user(ben.user_id, "for-you", {"n": 1}) == {}
        assert (await ben.expect("for-you", kind="user")).data == {"n": 1}
        assert await backend.terminate(ben.user_id) == {}
        await ben.expect(
            kind="state", where=lambda record: record.fields["current"] == "disconnected"
        )
        await anna.expect("pusher:member_removed", room)


@pytest.mark.pusher("1.6", "encrypted channels: the gateway carries what it can't read")
async def test_an_encrypted_event_is_read_by_the_client_and_by_nobody_between(
    stage: Stage,
) -> None:
    key = base64.b64encode(secrets.token_bytes(32)).decode()
    options = {**stage.gateway.backend_options(), "encryptionMasterKeyBase64": key}
    channel = f"private-encrypted-{stage.user('vault')}"
    async with Party(stage.user("anna"), "viewer") as anna, Backend("backend") as backend:
        await anna.connect(stage.gateway, by="backend", app=options)
        await anna.subscribe(channel)
        await backend.order("connect", options=options)

        await backend.order(
            "trigger", channels=channel, event="secret", data={"text": "Grüße 🎭"}, params={}
        )

        assert (await anna.expect("secret", channel)).data == {"text": "Grüße 🎭"}
        carried = await anna.expect("secret", channel, kind="frame")
        assert set(carried.data) == {"nonce", "ciphertext"}
