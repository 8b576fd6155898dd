"""The Pusher HTTP API while Redis does not answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx

from gateway.apps import App, Apps, Webhook
from gateway.server import running_gateway
from tests.gateway.backend import Backend

if TYPE_CHECKING:
    from gateway.settings import Settings
    from persistence.embedded_redis import RedisServer


ASKED: list[tuple[str, str, object, dict[str, str]]] = [
    ("POST", "events", {"name": "e", "data": "", "channel": "c"}, {}),
    ("POST", "events", {"name": "e", "data": "", "channel": "c"}, {"Idempotency-Key": "k"}),
    ("POST", "events", {"name": "e", "data": "", "channel": "c", "info": "subscription_count"}, {}),
    ("POST", "batch_events", {"batch": [{"name": "e", "data": "", "channel": "cache-c"}]}, {}),
    ("GET", "channels", None, {}),
    ("GET", "channels/presence-c", None, {}),
    ("GET", "channels/presence-c/users", None, {}),
    ("GET", "channels/presence-c/stats", None, {}),
    ("POST", "users/ada/terminate_connections", {}, {}),
]


async def test_every_route_says_in_time_that_it_can_not_answer_now(
    settings: Settings, own_redis: RedisServer
) -> None:
    app = App(
        id="1",
        key="app-key",
        secret="app-s3cret",
        webhooks=(Webhook(url="http://127.0.0.1:9/", events=("channel_occupied",)),),
    )
    changed: dict[str, Any] = {"redis_url": own_redis.url, "redis_timeout_s": 0.3, "drain_s": 0}
    quick = settings.model_copy(update=changed)
    async with (
        running_gateway(quick, Apps([app])) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=10) as http,
    ):
        backend = Backend(http, gateway, app)
        own_redis.process.pause()
        try:
            answers = [
                await (
                    backend.get(address)
                    if method == "GET"
                    else backend.post(address, document, headers)
                )
                for method, address, document, headers in ASKED
            ]
        finally:
            own_redis.process.resume()

    assert [answer.status_code for answer in answers] == [503] * len(ASKED)
    assert {answer.headers["retry-after"] for answer in answers} == {"1"}
    assert {answer.text for answer in answers} == {
        "the broker can't be reached; try again shortly\n"
    }
    assert all(answer.elapsed.total_seconds() < 5 for answer in answers)
