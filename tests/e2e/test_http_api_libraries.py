"""Every route of the Pusher HTTP API through the unmodified `pusher` libraries."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING, Any

import pusher
import pytest
from pusher.errors import PusherBadRequest

from gateway.apps import App
from tests.e2e.gateway_process import APP_ID, APP_KEY, APP_SECRET
from tests.e2e.node_process import NodeProcess, OrderFailedError
from tests.gateway.member import Member

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.e2e.gateway_process import Gateway
    from tests.e2e.stage import Stage

APP = App(id=APP_ID, key=APP_KEY, secret=APP_SECRET)
MASTER_KEY = base64.b64encode(bytes(range(32))).decode()


class Backend(NodeProcess):
    script = "backend.mjs"


@pytest.fixture
async def node(stage: Stage) -> AsyncIterator[Backend]:
    """`pusher` for Node."""
    async with Backend("backend") as backend:
        options = stage.gateway.backend_options() | {"encryptionMasterKeyBase64": MASTER_KEY}
        await backend.order("connect", options=options)
        yield backend


@pytest.fixture
def python(stage: Stage) -> pusher.Pusher:
    """`pusher` for Python."""
    return pusher.Pusher(
        app_id=APP_ID,
        key=APP_KEY,
        secret=APP_SECRET,
        host="127.0.0.1",
        port=stage.gateway.port,
        ssl=False,
        encryption_master_key_base64=MASTER_KEY,
    )


@pytest.fixture
async def room(stage: Stage) -> AsyncIterator[str]:
    """A presence channel in which ada is twice and bob once."""
    channel = f"presence-{stage.user('room')}"
    async with (
        Member.connected(stage.gateway, APP) as one,
        Member.connected(stage.gateway, APP) as two,
        Member.connected(stage.gateway, APP) as three,
    ):
        await one.subscribe(channel, "ada")
        await two.subscribe(channel, "ada")
        await three.subscribe(channel, "bob")
        yield channel


class TestNode:
    @pytest.mark.pusher("clients", "pusher for Node triggers with info, and batches")
    async def test_trigger_with_info_and_triggerbatch(
        self, node: Backend, stage: Stage, room: str
    ) -> None:
        plain = stage.user("plain")
        counts = await node.order(
            "trigger",
            channels=[room, plain],
            event="e",
            data={},
            params={"info": "user_count,subscription_count"},
        )
        batch = [
            {"channel": room, "name": "e", "data": {"n": 1}},
            {"channel": plain, "name": "e", "data": "text", "info": "subscription_count"},
        ]
        told = await node.order("trigger_batch", batch=batch)
        untold = await node.order("trigger_batch", batch=batch[:1])

        assert counts["status"] == 200
        assert json.loads(counts["body"]) == {
            "channels": {
                room: {"user_count": 2, "subscription_count": 3},
                plain: {"subscription_count": 0},
            }
        }
        assert json.loads(told["body"]) == {"batch": [{}, {"subscription_count": 0}]}
        assert untold == {"status": 200, "body": "{}"}

    @pytest.mark.pusher("clients", "pusher for Node asks for channels, one channel and its users")
    async def test_get_channels_channel_and_users(self, node: Backend, room: str) -> None:
        every = await node.order(
            "get", path="/channels", params={"filter_by_prefix": room, "info": "user_count"}
        )
        one = await node.order(
            "get",
            path=f"/channels/{room}",
            params={"info": "user_count,subscription_count"},
        )
        users = await node.order("get", path=f"/channels/{room}/users", params={})
        stats = await node.order("get", path=f"/channels/{room}/stats", params={})

        assert json.loads(every["body"]) == {"channels": {room: {"user_count": 2}}}
        counted = {"occupied": True, "subscription_count": 3, "user_count": 2}
        assert json.loads(one["body"]) == json.loads(stats["body"]) == counted
        assert sorted(user["id"] for user in json.loads(users["body"])["users"]) == ["ada", "bob"]

    async def test_a_refusal_has_its_status(self, node: Backend) -> None:
        with pytest.raises(OrderFailedError) as refused:
            await node.order("get", path="/channels/plain/users", params={})

        assert refused.value.status == 400

    async def test_the_deprecated_form_of_publishing(self, node: Backend, stage: Stage) -> None:
        channel = stage.user("old")
        async with Member.connected(stage.gateway, APP) as member:
            await member.subscribe(channel)
            answer = await node.order(
                "post", path=f"/channels/{channel}/events", params={"name": "e"}, body={"n": 1}
            )
            received = await member.next()

        assert answer == {"status": 202, "body": "{}"}
        assert received == {"event": "e", "channel": channel, "data": '{"n":1}'}

    @pytest.mark.parametrize("user", ["auth0|5f7c", "ann+news@example.com", "Zoë B.", "50%"])
    async def test_users_with_ids_of_other_letters_than_a_channels(
        self, node: Backend, stage: Stage, user: str
    ) -> None:
        async with Member.connected(stage.gateway, APP) as theirs:
            await theirs.sign_in(user)
            await theirs.subscribe(f"#server-to-user-{user}")

            sent = await node.order("send_to_user", user=user, event="news", data={"n": 1})
            received = await theirs.next()
            terminated = await node.order("terminate", user=user)

            assert (sent["status"], terminated["status"]) == (200, 200)
            assert (received["event"], json.loads(received["data"])) == ("news", {"n": 1})
            assert await theirs.closed() == 4009

    @pytest.mark.pusher("clients", "pusher for Node terminates a user's connections")
    async def test_terminate_user_connections(self, node: Backend, stage: Stage) -> None:
        await _assert_terminated(
            stage, lambda user: node.order("terminate", user=user), {"status": 200, "body": "{}"}
        )

    @pytest.mark.pusher("clients", "pusher for Node publishes to encrypted and cache channels")
    async def test_encrypted_and_cached(self, node: Backend, stage: Stage) -> None:
        channel = f"private-encrypted-cache-{stage.user('x')}"
        for number in (1, 2):
            await node.order("trigger", channels=channel, event="e", data={"n": number}, params={})

        answer = await node.order("get", path=f"/channels/{channel}", params={"info": "cache"})

        cached = json.loads(answer["body"])["cache"]
        assert set(json.loads(cached["data"])) == {"nonce", "ciphertext"}
        assert cached["ttl"] > 0


class TestPython:
    @pytest.mark.pusher("clients", "pusher for Python batches")
    async def test_trigger_batch(self, python: pusher.Pusher, stage: Stage) -> None:
        channel = stage.user("news")
        async with Member.connected(stage.gateway, APP) as member:
            await member.subscribe(channel)
            answer = await asyncio.to_thread(
                python.trigger_batch,
                [{"channel": channel, "name": f"e{n}", "data": {"n": n}} for n in range(3)],
            )
            received = [await member.next() for _ in range(3)]

        assert answer == {}
        assert [event["event"] for event in received] == ["e0", "e1", "e2"]
        assert [json.loads(event["data"]) for event in received] == [{"n": n} for n in range(3)]

    @pytest.mark.pusher("2.1", "a body_md5 of the empty body on GET, as Python's library signs it")
    async def test_channels_info_channel_info_and_users_info(
        self, python: pusher.Pusher, room: str
    ) -> None:
        every = await asyncio.to_thread(
            python.channels_info, room, ["user_count", "subscription_count"]
        )
        one = await asyncio.to_thread(python.channel_info, room, ["user_count"])
        users = await asyncio.to_thread(python.users_info, room)

        assert every == {"channels": {room: {"user_count": 2, "subscription_count": 3}}}
        assert one == {"occupied": True, "user_count": 2}
        assert sorted(user["id"] for user in users["users"]) == ["ada", "bob"]

    async def test_what_does_not_apply_is_a_bad_request(self, python: pusher.Pusher) -> None:
        with pytest.raises(PusherBadRequest):
            await asyncio.to_thread(python.channels_info, "plain", ["user_count"])

    @pytest.mark.pusher("2.1", "terminate_connections without /apps/ID, as Python's library asks")
    async def test_terminate_user_connections(self, python: pusher.Pusher, stage: Stage) -> None:
        await _assert_terminated(
            stage, lambda user: asyncio.to_thread(python.terminate_user_connections, user), {}
        )

    @pytest.mark.pusher("clients", "pusher for Python publishes to encrypted channels")
    async def test_encrypted(self, python: pusher.Pusher, stage: Stage) -> None:
        channel = f"private-encrypted-{stage.user('x')}"
        async with Member.connected(stage.gateway, APP) as member:
            await member.subscribe(channel)
            assert await asyncio.to_thread(python.trigger, channel, "e", {"n": 1}) == {}
            received = await member.next()

        assert set(json.loads(received["data"])) == {"nonce", "ciphertext"}


async def _assert_terminated(stage: Stage, terminate: Any, expected: object) -> None:
    gateway: Gateway = stage.gateway
    async with (
        Member.connected(gateway, APP) as theirs,
        Member.connected(gateway, APP) as bystander,
    ):
        user = stage.user("ada")
        await theirs.sign_in(user)
        await bystander.sign_in(stage.user("bob"))

        assert await terminate(user) == expected

        assert await theirs.closed() == 4009
        await bystander.subscribe(stage.user("still-there"))
