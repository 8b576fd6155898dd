"""What one measured stretch cost: the server's CPU and memory, and the generator's, apart."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from gateway.bench.stage import CpuWatch, IdleWatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.bench.results import Figures
    from gateway.bench.stage import Stage
    from gateway.bench.target import Target

_MIB: Final = 1024 * 1024
# A server is at rest when it used less than this share of a core for that long.
_AT_REST_SHARE: Final = 0.05
_AT_REST_S: Final = 0.2
_AT_REST_WITHIN_S: Final = 30.0
# With less than this share of a core, it can't have been the server that set the pace.
_SERVER_BUSY_SHARE: Final = 0.9


@dataclass(frozen=True, slots=True)
class Cost:
    """What a stretch cost.

    Attributes:
        redis_cpu_s: None when there is no Redis, or somebody else's.
        generator_share: Of a core, of the generator's busiest process.
        idle_share: Of the machine, that nobody used; None where the system doesn't tell.
    """

    elapsed_s: float
    server_cpu_s: float
    server_bytes: int
    redis_cpu_s: float | None
    generator_share: float
    idle_share: float | None

    def with_members(self, cpu_s: Sequence[float]) -> Cost:
        """The same, with what the generator's other processes tell only after the stretch."""
        busiest = max(self.generator_share, *(each / self.elapsed_s for each in cpu_s), 0.0)
        return replace(self, generator_share=busiest)

    def figures(self) -> Figures:
        """The figures that every row of every shape has."""
        figures = [("server CPU %", self.server_cpu_s / self.elapsed_s * 100, 2)]
        if self.redis_cpu_s is not None:
            figures.append(("redis CPU %", self.redis_cpu_s / self.elapsed_s * 100, 2))
        return [
            *figures,
            ("generator CPU %", self.generator_share * 100, 0),
            ("server MiB", self.server_bytes / _MIB, 0),
        ]

    def doubt(self, stage: Stage, row: str) -> None:
        """Notes what speaks against the row: the generator or the machine was the limit."""
        stage.doubts.generator_share(row, self.generator_share)
        stage.doubts.idle_share(row, self.idle_share)

    def doubt_rest(self, stage: Stage, row: str) -> None:
        """Notes that a server that was to run flat out did not."""
        if self.server_cpu_s < _SERVER_BUSY_SHARE * self.elapsed_s:
            stage.doubts.add(f"{row}: the server was not the limit, it had CPU time left")


class Watch:
    """Watches a stretch from when it is made until `cost`."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._server = target.usage()
        self._redis = target.redis_usage()
        self._generator, self._idle = CpuWatch(), IdleWatch()
        self.started_s = time.monotonic()

    def cost(self, members_cpu_s: Sequence[float] = ()) -> Cost:
        """What it cost until now.

        Args:
            members_cpu_s: CPU time that each other process of the generator used meanwhile.
        """
        elapsed_s = time.monotonic() - self.started_s
        server, redis = self._target.usage(), self._target.redis_usage()
        redis_cpu_s = None
        if redis is not None and self._redis is not None:
            redis_cpu_s = redis.cpu_s - self._redis.cpu_s
        return Cost(
            elapsed_s=elapsed_s,
            server_cpu_s=server.cpu_s - self._server.cpu_s,
            server_bytes=server.resident_bytes,
            redis_cpu_s=redis_cpu_s,
            generator_share=max(
                self._generator.share(), *(cpu_s / elapsed_s for cpu_s in members_cpu_s), 0.0
            ),
            idle_share=self._idle.share(),
        )


async def at_rest(target: Target) -> None:
    """Waits until the server has finished what it does by itself, such as forgetting sockets."""
    give_up_at_s = time.monotonic() + _AT_REST_WITHIN_S
    before_s = target.usage().cpu_s
    while time.monotonic() < give_up_at_s:
        await asyncio.sleep(_AT_REST_S)
        now_s = target.usage().cpu_s
        if now_s - before_s < _AT_REST_SHARE * _AT_REST_S:
            return
        before_s = now_s
