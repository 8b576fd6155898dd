from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import httpx

    from gateway.server import RunningGateway

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_running_gateway_is_alive_and_ready(http: httpx.AsyncClient) -> None:
    alive = await http.get("/healthz")
    ready = await http.get("/readyz")

    assert (alive.status_code, alive.text) == (200, "ok\n")
    assert ready.status_code == 200
    assert ready.json() == {"ready": True, "mongodb": "ok", "redis": "ok", "node": "ok"}


async def test_a_node_that_takes_no_connections_is_alive_but_not_ready(
    http: httpx.AsyncClient, gateway: RunningGateway
) -> None:
    gateway.parts.node.ready = False
    try:
        alive, ready = await http.get("/healthz"), await http.get("/readyz")
    finally:
        gateway.parts.node.ready = True

    assert alive.status_code == 200
    assert ready.status_code == 503
    assert ready.json() == {"ready": False, "mongodb": "ok", "redis": "ok", "node": "not ready"}


async def test_metrics_are_in_prometheus_text_format(http: httpx.AsyncClient) -> None:
    answer = await http.get("/metrics")

    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    assert "# TYPE duet_connections gauge" in answer.text
