"""Logs and metrics: every metric's name in one place, each with its unit as suffix.

Nothing here is touched once per delivery: a fan-out adds its whole batch at once.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, Final

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from gateway.log_stream import unblocked
from persistence.damage import damage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.settings import Settings

METRICS_CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

# A command takes 1-40 ms when all is well and command_timeout_s (2 s) at worst.
_COMMAND_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.1, 0.25, 0.5, 1.0, 2.5)
# A deadline is met within some ms, or late by the lease when the process that claimed it has died.
_LATENESS_BUCKETS_S: Final = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0)


class Telemetry:
    """The metrics of one node, in a registry of their own so that tests can run several nodes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._make_socket_metrics()
        self._make_broker_metrics()
        self._make_goal_metrics()
        self._make_escrow_metrics()
        self._make_webhook_metrics()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def _make_socket_metrics(self) -> None:
        self.connections: Gauge = self._gauge("connections", "Accepted sockets of this node.")
        self.app_connections: Gauge = self._gauge(
            "app_connections", "Accepted sockets of this node, by app.", "app"
        )
        self.subscriptions: Gauge = self._gauge(
            "subscriptions", "Pairs of connection and channel on this node."
        )
        self.channels: Gauge = self._gauge("channels", "Channels with a subscriber on this node.")
        self.deliveries: Counter = self._counter(
            "deliveries_total", "Publications written to a socket, counted per fan-out batch."
        )
        self.slow_aborts: Counter = self._counter(
            "slow_aborts_total", "Sockets aborted because their send buffer passed its bound."
        )
        self.disconnects: Counter = self._counter(
            "disconnects_total", "Sockets that this node closed, by close code.", "code"
        )

    def _make_broker_metrics(self) -> None:
        self.publications_sent: Counter = self._counter(
            "publications_sent_total", "Publications that the broker accepted from this node."
        )
        self.publications_received: Counter = self._counter(
            "publications_received_total", "Publications that the broker handed to this node."
        )
        self.broker_alive: Gauge = self._gauge(
            "broker_alive", "1 while the broker answers this node's heartbeat, else 0."
        )
        self.broker_gaps: Counter = self._counter(
            "broker_gaps_total", "Times that publications may have been missed."
        )
        self._api_calls_of: dict[int, Counter] = {}
        self.api_calls: Counter = self._counter(
            "api_calls_total", "Calls of the Pusher HTTP API, by HTTP status.", "status"
        )

    def _make_goal_metrics(self) -> None:
        self.commands: Counter = self._counter(
            "commands_total",
            "Goal commands answered, by name and outcome (ok or the error's code).",
            "command",
            "outcome",
        )
        self.command_duration: Histogram = self._histogram(
            "command_duration_seconds",
            "From a command's arrival to its reply.",
            _COMMAND_BUCKETS_S,
            "command",
        )
        self.outbox_pending: Gauge = self._gauge(
            "outbox_pending", "Goals whose deliver-phase receivers are not all done."
        )
        self.outbox_oldest: Gauge = self._gauge(
            "outbox_oldest_seconds", "Age of the oldest news that is not delivered, 0 without one."
        )
        self.outbox_retries: Counter = self._counter(
            "outbox_retries_total", "Deliveries that were postponed because a receiver failed."
        )
        self.deadline_lateness: Histogram = self._histogram(
            "deadline_lateness_seconds",
            "How late a due goal got its timer command.",
            _LATENESS_BUCKETS_S,
        )
        self.deadlines_overdue: Gauge = self._gauge(
            "deadlines_overdue", "Goals whose deadline was over five seconds ago and is not met."
        )
        self.mongodb_alive: Gauge = self._gauge(
            "mongodb_alive", "1 while MongoDB answers, asked every ten seconds, else 0."
        )
        self.damaged: Gauge = self._gauge(
            "damaged_documents",
            "Documents of MongoDB that this process could not read within the last minute.",
        )
        self.damaged.set_function(lambda: damage.count)
        self.goals_ended: Counter = self._counter(
            "goals_ended_total", "Goals that are no longer active, by whether agreed.", "reason"
        )

    def _make_escrow_metrics(self) -> None:
        self.escrow_pending: Gauge = self._gauge(
            "escrow_calls_pending", "Calls that the payment service has not acknowledged."
        )
        self.escrow_dead: Gauge = self._gauge(
            "escrow_calls_dead", "Dead letters: calls that wait for an operator."
        )
        self.escrow_oldest: Gauge = self._gauge(
            "escrow_oldest_call_seconds", "Age of the oldest call that is pending, 0 without one."
        )
        self.escrow_duration: Histogram = self._histogram(
            "escrow_call_duration_seconds",
            "Calls to the payment service, by call and verdict.",
            _COMMAND_BUCKETS_S,
            "call",
            "verdict",
        )

    def _make_webhook_metrics(self) -> None:
        self.webhooks_sent: Counter = self._counter(
            "webhook_events_sent_total", "Webhook events that an endpoint has taken, by app.", "app"
        )
        self.webhooks_retried: Counter = self._counter(
            "webhook_calls_failed_total",
            "Webhook calls that an endpoint did not take; they are made again.",
            "app",
        )
        self.webhooks_given_up: Counter = self._counter(
            "webhook_events_given_up_total", "Webhook events that became too old to tell.", "app"
        )
        self.webhooks_dropped: Counter = self._counter(
            "webhook_events_dropped_total",
            "Webhook events that did not fit into their endpoint's queue, the oldest ones.",
            "app",
        )

    def api_called(self, status: int) -> None:
        """Counts one answer of the Pusher HTTP API; finding the label anew would cost more."""
        count = self._api_calls_of.get(status)
        if count is None:
            count = self._api_calls_of[status] = self.api_calls.labels(str(status))
        count.inc()

    def escrow_answered(self, call: str, verdict: str, duration_s: float) -> None:
        """Counts one answer of the payment service, or that there was none."""
        self.escrow_duration.labels(call, verdict).observe(duration_s)

    def command_done(self, command: str, outcome: str, duration_s: float) -> None:
        """Counts one answered command; `outcome` is `ok` or the error's code."""
        self.commands.labels(command, outcome).inc()
        self.command_duration.labels(command).observe(duration_s)

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"duet_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"duet_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"duet_{name}", text, labels, registry=self.registry, buckets=buckets)


def configure_logging(settings: Settings) -> None:
    """Sends this process's logs, the libraries' included, to standard error as settings say."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        _drop_color_message,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(unblocked(sys.stderr))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(settings.log_format),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    # httpx and PyMongo write a line per call at these levels.
    for chatty in ("httpx", "httpcore", "pymongo", "transitions"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
    # uvicorn's start and stop lines repeat what the gateway says itself.
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, root.level))


def _renderers(log_format: str) -> list[Any]:
    if log_format == "console":
        # A process may have been given no standard error.
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        # The default shows every frame's locals: tokens, and thousands of lines for which the loop
        # stands still for seconds.
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=on_terminal, exception_formatter=plain)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]


def _drop_color_message(_logger: Any, _name: str, event: dict[str, Any]) -> dict[str, Any]:
    """Drops what uvicorn sends with each line: itself again, with terminal colours."""
    event.pop("color_message", None)
    return event
