"""End-to-end encryption: the backend and the client hold the key, the gateway never sees it."""

from __future__ import annotations

import base64
import secrets
from typing import TYPE_CHECKING

import pytest

from tests.e2e.party import Party
from tests.e2e.test_backends import Backend

if TYPE_CHECKING:
    from tests.e2e.stage import Stage


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
