"""What the commands of `duet bench` can be told."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Peer(StrEnum):
    """The servers of `gateway.bench.peers`."""

    BUN = "bun"
    SOCKET_IO = "socket.io"
    WS = "ws"
    C = "c"


# What every shape can be told.
Repeats = Annotated[int, typer.Option(min=1, max=1000, help="Measured repeats of each row.")]
Seconds = Annotated[
    float, typer.Option(min=0.05, max=3600, help="At least so long is each repeat, in seconds.")
]
Warmup = Annotated[
    float, typer.Option(min=0, max=600, help="Seconds before each row that are not measured.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Write a plot: .png, .svg or .pdf.")]
MongoDB = Annotated[
    str | None,
    typer.Option(envvar="DUET_MONGODB_URL", help="A replica set, instead of an embedded one."),
]
Redis = Annotated[
    str | None, typer.Option(envvar="DUET_REDIS_URL", help="A Redis, instead of an embedded one.")
]
Against = Annotated[
    list[Peer],
    typer.Option(help="A server to measure in turn with Duet, in the same run; repeatable."),
]

EventBytes = Annotated[
    int, typer.Option(min=64, max=60_000, help="Length of an event as a subscriber gets it.")
]
Processes = Annotated[
    int | None,
    typer.Option(min=1, max=64, help="Processes that count; default: cores - 1, at most 4."),
]


def processes_for(wanted: int | None, sockets: int) -> int:
    """Processes of the generator: one core is the server's."""
    return min(wanted or max(1, min(4, (os.cpu_count() or 2) - 1)), sockets)
