"""One node alone is cut off from Redis: what happens meanwhile, its sockets hear behind it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.e2e.stage import authorized, reply, to_audience, to_streamer
from tests.lifeline import Lifeline

if TYPE_CHECKING:
    from tests.e2e.gateway_process import Gateway, GatewayBuilder, Stores
    from tests.e2e.stage import StageBuilder

# Gateways of their own take seconds to start on a busy machine.
pytestmark = pytest.mark.timeout(120)


async def until_ready(gateway: Gateway, *, ready: bool) -> None:
    async with asyncio.timeout(30):
        while await asyncio.to_thread(gateway.is_ready) is not ready:
            pass


async def test_a_viewer_hears_what_was_agreed_while_his_node_was_cut_off(
    stage_with: StageBuilder, gateway_with: GatewayBuilder, stores: Stores
) -> None:
    stage = await stage_with()
    async with Lifeline(stores.redis_url) as line:
        cut_off = await gateway_with(DUET_REDIS_URL=line.url)
        streamer = await stage.streamer()
        viewer = await stage.viewer("viewer", streamer, gateway=cut_off)
        goal = await stage.invited(viewer)
        await stage.mark()

        line.cut()
        await until_ready(cut_off, ready=False)
        await streamer.succeed("client-goal.agree", goal_id=goal["id"])
        await stage.books.until_delivered()
        line.mend()
        await viewer.expect("goal.snapshot", viewer.own_channel)

        await stage.assert_received(
            {
                streamer: [*reply(streamer), *to_streamer("goal.ended", streamer)],
                viewer: [
                    *to_audience("goal.ended", streamer),
                    *authorized(streamer, viewer),
                    ("goal.snapshot", viewer.own_channel),
                ],
            }
        )
