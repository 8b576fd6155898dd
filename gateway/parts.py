"""What one running gateway process consists of, for whoever answers an HTTP call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import MutableMapping
    from typing import Any

    from gateway.apps import Apps
    from gateway.goal_commands import GoalCommands
    from gateway.node import Node
    from gateway.redis_once import PublishOnce
    from gateway.redis_rates import ApiRates
    from gateway.settings import Settings
    from gateway.telemetry import Telemetry
    from gateway.token_keys import FixedAuthorizer, JwksAuthorizer
    from persistence.clock import Clock
    from persistence.store import Store


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one process, wired together by `gateway.app` and alive while it serves."""

    settings: Settings
    apps: Apps
    clock: Clock
    telemetry: Telemetry
    authorizer: FixedAuthorizer | JwksAuthorizer
    store: Store
    commands: GoalCommands
    node: Node
    once: PublishOnce
    rates: ApiRates


def parts_of(scope: MutableMapping[str, Any]) -> Parts:
    """The parts that serve the call of this ASGI scope."""
    return cast("Parts", scope["state"]["parts"])
