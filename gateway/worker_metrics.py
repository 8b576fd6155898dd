"""The metrics of all workers of one machine, whichever of them is asked for `/metrics`.

Each worker tells its own over a Unix socket in a folder that only they can enter. The one that a
scrape has hit asks all of them and puts the label `worker` on what they say. One that does not
answer in time is left out: its absence is what a dashboard should show.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final, Self

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from types import TracebackType

    from prometheus_client import Metric

    from gateway.telemetry import Telemetry

# A worker in a long loop turn is waited for; Prometheus gives a scrape ten seconds.
_TIMEOUT_S: Final = 2.0
# The last line of what a worker tells; without it the worker died while it told.
_END: Final = "# EOF\n"


class WorkerMetrics:
    """One worker's door for its siblings, and its way to theirs; open within the block."""

    def __init__(self, folder: Path, number: int, telemetry: Telemetry) -> None:
        """Not open yet.

        Args:
            folder: Where each worker has a socket that is called after its number.
            number: This worker's.
            telemetry: What this worker tells.
        """
        self._folder = folder
        self._door = folder / str(number)
        self._telemetry = telemetry

    async def __aenter__(self) -> Self:
        # What a killed predecessor of this number has left behind.
        self._door.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._tell, self._door)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del kind, error, trace
        self._server.close()
        self._door.unlink(missing_ok=True)

    async def _tell(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self._telemetry.exposition() + _END.encode())
        writer.close()

    async def exposition(self) -> bytes:
        """Everyone's metrics in Prometheus's text format."""
        texts: dict[str, str] = {}
        async with asyncio.TaskGroup() as group:
            for door in self._folder.iterdir():
                group.create_task(_ask(door, texts))
        return merged(texts)


async def _ask(door: Path, texts: dict[str, str]) -> None:
    """Notes what the worker behind a door says, if it says all of it."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(door)
            try:
                text = (await reader.read()).decode()
            finally:
                writer.close()
            if text.endswith(_END):
                texts[door.name] = text.removesuffix(_END)


class _Families(Collector):
    """Metrics that are known already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """All of them."""
        return self._families


def merged(texts: Mapping[str, str]) -> bytes:
    """Several expositions as one, in which each sample names the worker that it comes from."""
    families: dict[str, Metric] = {}
    for worker in sorted(texts, key=int):
        for family in text_string_to_metric_families(texts[worker]):
            known = families.setdefault(family.name, family)
            samples = [
                sample._replace(labels={**sample.labels, "worker": worker})
                for sample in family.samples
            ]
            known.samples = samples if known is family else known.samples + samples
    registry = CollectorRegistry()
    registry.register(_Families(families.values()))
    return generate_latest(registry)
