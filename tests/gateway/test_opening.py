"""Whose token a connection carries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.auth import Identity
from gateway.opening import prove
from statemachine.goal import Role
from tests.gateway.harness import APP, TokensForTests, running_gateway

if TYPE_CHECKING:
    from datetime import datetime


class NamelessTokens(TokensForTests):
    """Tokens that say nothing of the app that acts."""

    async def identity_of(self, token: str, now: datetime) -> Identity:
        return Identity(token, Role.VIEWER)


async def test_a_token_without_client_id_acts_through_the_invitations_app() -> None:
    async with running_gateway() as gateway:
        gateway.node.auth = NamelessTokens()

        proved = await prove(gateway.node, "ana")
        named = Identity("ana", client_id="studio").acting_through(APP)

    assert proved == Identity("ana", Role.VIEWER, APP.key)
    assert named.client_id == "studio"
