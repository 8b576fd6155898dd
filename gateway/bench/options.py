"""What the commands of `duet bench` can be told, and the part of it that all have in common."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gateway.bench.stage import Plan


class Peer(StrEnum):
    """The servers of `gateway.bench.peers`."""

    BUN = "bun"
    SOCKET_IO = "socket.io"
    WS = "ws"
    C = "c"


Json = Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")]
MongoDB = Annotated[
    str | None,
    typer.Option(envvar="DUET_MONGODB_URL", help="A replica set, instead of an embedded one."),
]
Redis = Annotated[
    str | None, typer.Option(envvar="DUET_REDIS_URL", help="A Redis, instead of an embedded one.")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What every run can be told.

    Attributes:
        mongodb_url: Of a replica set; None: an embedded one.
        redis_url: None: an embedded one.
    """

    plan: "Plan"
    against: tuple[Peer, ...]
    json_file: Path | None
    plot_file: Path | None
    mongodb_url: str | None
    redis_url: str | None


def shape_command(
    app: typer.Typer, *, repeats: int, seconds: float, warmup: float, has_peers: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function a command that has, behind its own options, those of every run.

    The function's first argument is the `RunOptions` that they come to.

    Args:
        app: What the command is added to.
        repeats: What it is without the option; so are the next two.
        seconds: Of a repeat.
        warmup: Seconds.
        has_peers: Whether it can be told `--against`.
    """
    defaults = {"repeats": repeats, "seconds": seconds, "warmup": warmup}
    common = [
        parameter.replace(default=defaults.get(name, parameter.default))
        for name, parameter in signature(_run_options).parameters.items()
        if has_peers or name != "against"
    ]

    def add(function: Callable[..., None]) -> Callable[..., None]:
        _, *own = signature(function).parameters.values()

        def command(**given: Any) -> None:
            told = {one.name: given.pop(one.name) for one in common}
            function(_run_options(**told), **given)

        # typer reads from the signature which options there are.
        parameters = [one.replace(kind=Parameter.KEYWORD_ONLY) for one in (*own, *common)]
        command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        app.command(name=function.__name__, help=function.__doc__)(command)
        return function

    return add


def _run_options(
    *,
    against: Annotated[
        list[Peer],
        typer.Option(help="A server to measure in turn with Duet, in the same run; repeatable."),
    ] = [],  # noqa: B006 - typer copies it
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Measured repeats of each row.")],
    seconds: Annotated[
        float, typer.Option(min=0.05, max=3600, help="At least so long is each repeat, in seconds.")
    ],
    warmup: Annotated[
        float, typer.Option(min=0, max=600, help="Seconds before each row that are not measured.")
    ],
    json_file: Json = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Write a plot: .png, .svg or .pdf.")
    ] = None,
    mongodb_url: MongoDB = None,
    redis_url: Redis = None,
) -> RunOptions:
    from gateway.bench.stage import Plan

    return RunOptions(
        plan=Plan(repeats=repeats, seconds=seconds, warmup_s=warmup),
        against=tuple(against),
        json_file=json_file,
        plot_file=plot_file,
        mongodb_url=mongodb_url,
        redis_url=redis_url,
    )
