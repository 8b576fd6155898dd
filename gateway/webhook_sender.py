"""Sends webhooks: claims queues that have something, calls their endpoints, notes the outcome.

Every node does it; a claim keeps two from calling one endpoint at the same time. As long as no app
has an endpoint, Redis is only asked now and then whether one was removed that had events waiting.
"""

from __future__ import annotations

import asyncio
import math
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import httpx
import structlog

from gateway.broker import BrokerUnavailable
from gateway.outage import Outage
from gateway.tasks import Tasks
from gateway.trust import trusted
from gateway.webhooks import signed_call

if TYPE_CHECKING:
    from gateway.apps import Apps
    from gateway.redis_webhooks import Batch, Claim, RedisWebhooks, Settled
    from gateway.telemetry import Telemetry
    from persistence.clock import Clock

log = structlog.get_logger(__name__)

# Endpoints that this node calls at the same time.
_AT_ONCE: Final = 32
# What a stopping node gives calls that are under way.
_GRACE_S: Final = 2.0
# Between two looks while no app has an endpoint.
_FOR_ORPHANS_EVERY_S: Final = 60.0


class WebhookSender:
    """The loop that sends, and the calls under way."""

    def __init__(
        self,
        webhooks: RedisWebhooks,
        apps: Apps,
        clock: Clock,
        telemetry: Telemetry,
        timeout_s: float,
        poll_interval_s: float,
    ) -> None:
        self._webhooks = webhooks
        self._apps = apps
        self._clock = clock
        self._telemetry = telemetry
        self._timeout_s = timeout_s
        self._poll_interval_s = poll_interval_s
        self._outage = Outage(log, "webhooks_not_read", "webhooks_read_again")
        self._loop = Tasks()
        self._calls = Tasks()
        self._client = httpx.AsyncClient(
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=_AT_ONCE, max_keepalive_connections=_AT_ONCE),
            follow_redirects=False,
            trust_env=False,
            verify=trusted(),
            headers={"User-Agent": "duet", "Accept-Encoding": "identity"},
        )

    def start(self) -> None:
        """Begins to look for something to send."""
        self._loop.spawn(self._run(), "webhooks")

    async def stop(self) -> None:
        """Ends after the calls under way, or without them: another node sends those again."""
        await self._loop.stop()
        await self._calls.stop(_GRACE_S)
        await self._client.aclose()

    async def _run(self) -> None:
        now = asyncio.get_running_loop().time
        looked_at = -math.inf
        while True:
            # The apps may have been read again.
            wanted = any(app.webhooks for app in self._apps)
            free = _AT_ONCE - len(self._calls)
            if free > 0 and (wanted or now() - looked_at >= _FOR_ORPHANS_EVERY_S):
                looked_at = now()
                for claim in await self._look(free):
                    self._calls.spawn(self._send(claim), "webhook", app=claim.app.id)
            await asyncio.sleep(self._poll_interval_s)

    async def _look(self, most: int) -> list[Claim]:
        """Claims what may be sent."""
        now = asyncio.get_running_loop().time
        try:
            claims = await self._webhooks.claim(most)
        except BrokerUnavailable as error:
            self._outage.failed(now(), error)
        except Exception:
            # Whatever it is, the next look may find something that can be sent.
            log.exception("webhooks_failed")
        else:
            self._outage.worked(now())
            return claims
        return []

    async def _send(self, claim: Claim) -> None:
        """Sends what is at the head of a claimed queue and notes the outcome."""
        webhooks = self._webhooks
        try:
            batch = await webhooks.read(claim)
            if batch is None:
                return
            why = await self._call(claim, batch)
            if why is None:
                settled = await webhooks.sent(claim, batch)
            else:
                settled = await webhooks.failed(claim)
        except BrokerUnavailable as error:
            # The claim runs out, and the batch is sent again.
            log.warning("webhook_not_settled", app=claim.app.id, error=str(error))
            return
        self._note(claim, settled, len(batch.events), why)

    def _note(self, claim: Claim, settled: Settled | None, count: int, why: str | None) -> None:
        """Counts what a call with `count` events has come to, and logs what went wrong."""
        app, telemetry = claim.app.id, self._telemetry
        # The address without its path and query, which may hold a secret.
        host = urlsplit(claim.endpoint.url).hostname
        if why is not None:
            given_up = settled.removed if settled else 0
            telemetry.webhooks_retried.labels(app).inc()
            telemetry.webhooks_given_up.labels(app).inc(given_up)
            log.warning("webhook_not_taken", app=app, host=host, why=why, given_up=given_up)
        elif settled is not None:
            telemetry.webhooks_sent.labels(app).inc(count)
        if settled is not None and settled.dropped:
            telemetry.webhooks_dropped.labels(app).inc(settled.dropped)
            if settled.begins:
                log.error("webhook_queue_full", app=app, host=host, dropped=settled.dropped)

    async def _call(self, claim: Claim, batch: Batch) -> str | None:
        """Calls the endpoint once; why it has not taken the batch, else none."""
        now_ms = int(self._clock.now().timestamp() * 1000)
        body, headers = signed_call(claim.app, batch.events, now_ms)
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._client.stream(
                    "POST", claim.endpoint.url, content=body, headers=headers
                ) as response,
            ):
                status = response.status_code
        except TimeoutError:
            return f"no answer within {self._timeout_s:g} s"
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return type(error).__name__
        except Exception as error:
            # A call that can't be made is one that failed: its events grow old, too.
            log.exception("webhook_failed", app=claim.app.id)
            return type(error).__name__
        return None if HTTPStatus(200) <= status < HTTPStatus(300) else f"status {status}"
