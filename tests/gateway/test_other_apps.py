"""The apps beside the one that carries invitations are Pusher apps and nothing else."""

from __future__ import annotations

import json

import pytest

from gateway.apps import App, Apps
from gateway.auth import sign_channel, sign_user
from tests.gateway.harness import APP, running_gateway
from tests.gateway.subscribers import withdrawal

OTHER = App(id="2", key="other-key", secret="other-secret")
PATH = "/app/other-key?protocol=7"


async def test_who_signs_for_another_app_speaks_for_nobody_of_the_first() -> None:
    async with running_gateway(apps=Apps([APP, OTHER])) as gateway:
        client, friend = await gateway.connect(PATH), await gateway.connect(PATH)
        for one in (client, friend):
            auth = sign_channel(OTHER, one.socket_id, "private-user@ben")
            await one.subscribed("private-user@ben", auth)

        client.send(withdrawal("r-1", "private-user@ben"))
        relayed = await friend.event()
        await gateway.node.subscribing.snapshots_again()
        await client.ping()

        assert relayed["event"] == "client-goal.withdraw"
        assert gateway.commands.executed == []
        assert not gateway.commands.snapshot_asked.is_set()


async def test_a_sign_in_by_another_app_gives_no_channel_of_the_first() -> None:
    async with running_gateway(apps=Apps([APP, OTHER])) as gateway:
        client = await gateway.connect(PATH)
        user_data = json.dumps({"id": "ben"})
        auth = sign_user(OTHER, client.socket_id, user_data)
        client.send({"event": "pusher:signin", "data": {"auth": auth, "user_data": user_data}})
        assert (await client.event())["event"] == "pusher:signin_success"

        client.subscribe("private-user@ben")
        assert (await client.event())["event"] == "pusher:subscription_error"
        signed = sign_channel(OTHER, client.socket_id, "private-user@ben")
        await client.subscribed("private-user@ben", signed)
        await gateway.node.subscribing.snapshots_again()
        await client.ping()

        assert not gateway.commands.snapshot_asked.is_set()


@pytest.mark.parametrize("path", [PATH + "&token=viewer:ben", PATH + "&token=nonsense"])
async def test_a_token_says_nothing_to_another_app(path: str) -> None:
    async with running_gateway(apps=Apps([APP, OTHER])) as gateway:
        client = await gateway.connect(path)

        client.subscribe("#server-to-user-ben")

        assert (await client.event())["event"] == "pusher:subscription_error"
