"""`/healthz`, `/readyz` and `/metrics`: what supervisors and dashboards ask.

None asks for a token; keep them off the public network where their figures are nobody's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from gateway.parts import parts_of
from gateway.telemetry import METRICS_CONTENT_TYPE
from persistence.errors import StoreUnavailable

if TYPE_CHECKING:
    from starlette.requests import Request

    from gateway.parts import Parts
    from gateway.worker_metrics import WorkerMetrics


class Readiness(msgspec.Struct, frozen=True):
    """Whether new work may be sent here, and what each part says."""

    ready: bool
    mongodb: str
    redis: str
    node: str


def routes(prefix: str) -> list[Route]:
    """The three addresses."""
    return [
        Route(f"{prefix}/healthz", healthz, methods=["GET"]),
        Route(f"{prefix}/readyz", readyz, methods=["GET"]),
        Route(f"{prefix}/metrics", metrics, methods=["GET"]),
    ]


async def healthz(_request: Request) -> Response:
    """200 as long as the process answers: a restart would not cure what `/readyz` reports."""
    return PlainTextResponse("ok\n")


async def readyz(request: Request) -> Response:
    """200 when every part works and the node takes new connections, else 503; JSON either way."""
    state = await readiness(parts_of(request.scope))
    return Response(
        msgspec.json.encode(state),
        200 if state.ready else 503,
        {"Cache-Control": "no-store"},
        "application/json",
    )


async def readiness(parts: Parts) -> Readiness:
    """Asks MongoDB now; the node knows of Redis by the heartbeat through its own channel."""
    try:
        await parts.store.ping()
    except StoreUnavailable:
        mongodb = "unreachable"
    else:
        mongodb = "ok"
    redis = "ok" if parts.node.broker_ok else "unreachable"
    node = "ok" if parts.node.ready else "not ready"
    return Readiness(mongodb == redis == node == "ok", mongodb, redis, node)


async def metrics(request: Request) -> Response:
    """Every metric, in Prometheus's text format; of several workers, those of all."""
    of_all: WorkerMetrics | None = request.scope["state"].get("metrics")
    if of_all is not None:
        body = await of_all.exposition()
    else:
        body = parts_of(request.scope).telemetry.exposition()
    return Response(body, headers={"Content-Type": METRICS_CONTENT_TYPE})
