"""`duet bench SHAPE`: the registry of shapes, each a command with the options that it has."""

import contextlib
import os
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.bench.errors import BenchError

if TYPE_CHECKING:
    from gateway.bench.results import Report
    from gateway.bench.stage import Stage
    from gateway.bench.target import GatewayTarget


class Peer(StrEnum):
    """The servers of `gateway.bench.peers`."""

    BUN = "bun"
    SOCKET_IO = "socket.io"
    WS = "ws"
    C = "c"


app = typer.Typer(
    help="Load tests on a real gateway, MongoDB and Redis: progress bar, table, JSON, plot.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# What every shape can be told.
_Repeats = Annotated[int, typer.Option(min=1, max=1000, help="Measured repeats of each row.")]
_Seconds = Annotated[
    float, typer.Option(min=0.05, max=3600, help="At least so long is each repeat, in seconds.")
]
_Warmup = Annotated[
    float, typer.Option(min=0, max=600, help="Seconds before each row that are not measured.")
]
_Json = Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")]
_Plot = Annotated[Path | None, typer.Option("--plot", help="Write a plot: .png, .svg or .pdf.")]
_MongoDB = Annotated[
    str | None,
    typer.Option(envvar="DUET_MONGODB_URL", help="A replica set, instead of an embedded one."),
]
_Redis = Annotated[
    str | None, typer.Option(envvar="DUET_REDIS_URL", help="A Redis, instead of an embedded one.")
]
_Against = Annotated[
    list[Peer],
    typer.Option(help="A server to measure in turn with Duet, in the same run; repeatable."),
]

_EventBytes = Annotated[
    int, typer.Option(min=64, max=60_000, help="Length of an event as a subscriber gets it.")
]
_Processes = Annotated[
    int | None,
    typer.Option(min=1, max=64, help="Processes that count; default: cores - 1, at most 4."),
]

Shape = Callable[["GatewayTarget", "Stage"], Coroutine[Any, Any, "Report"]]


@app.command()
def fanout(
    sockets: Annotated[
        int, typer.Option(min=1, max=60_000, help="Subscribers of the one channel.")
    ] = 1000,
    burst: Annotated[
        list[int], typer.Option(min=1, max=1024, help="Publications outstanding; repeatable.")
    ] = [1, 8, 64],  # noqa: B006 - typer copies it
    event_bytes: _EventBytes = 300,
    processes: _Processes = None,
    against: _Against = [],  # noqa: B006 - typer copies it
    repeats: _Repeats = 5,
    seconds: _Seconds = 1.0,
    warmup: _Warmup = 0.5,
    json_file: _Json = None,
    plot_file: _Plot = None,
    mongodb_url: _MongoDB = None,
    redis_url: _Redis = None,
) -> None:
    """Deliveries a second and CPU per delivery of one public channel with many sockets."""
    from gateway.bench import fanout as shape
    from gateway.bench.stage import Plan

    options = shape.FanoutOptions(
        sockets=sockets,
        bursts=tuple(sorted(set(burst))),
        event_bytes=event_bytes,
        processes=_processes(processes, sockets),
    )
    _run(
        lambda target, stage: shape.run(target, stage, options),
        Plan(repeats=repeats, seconds=seconds, warmup_s=warmup),
        sockets=sockets,
        against=against,
        json_file=json_file,
        plot_file=plot_file,
        mongodb_url=mongodb_url,
        redis_url=redis_url,
    )


@app.command()
def rooms(
    channels: Annotated[
        int, typer.Option(min=1, max=20_000, help="Channels; as many again with a single socket.")
    ] = 1000,
    sockets: Annotated[int, typer.Option(min=2, max=1000, help="Sockets on each channel.")] = 10,
    rate: Annotated[
        float, typer.Option(min=0.01, max=1000, help="Publications a second to each channel.")
    ] = 1,
    in_flight: Annotated[
        int, typer.Option(min=1, max=1024, help="Unanswered HTTP calls when run flat out.")
    ] = 64,
    batch: Annotated[
        int, typer.Option(min=1, max=10, help="Publications in an HTTP call; 1 against peers.")
    ] = 1,
    event_bytes: _EventBytes = 300,
    processes: _Processes = None,
    against: _Against = [],  # noqa: B006 - typer copies it
    repeats: _Repeats = 5,
    seconds: _Seconds = 3.0,
    warmup: _Warmup = 1.0,
    json_file: _Json = None,
    plot_file: _Plot = None,
    mongodb_url: _MongoDB = None,
    redis_url: _Redis = None,
) -> None:
    """Many channels with few sockets: what a publication costs, and apart from it a delivery."""
    from gateway.bench import rooms as shape
    from gateway.bench.stage import Plan

    options = shape.RoomsOptions(
        channels=channels,
        sockets=sockets,
        rate=rate,
        in_flight=in_flight,
        batch=batch,
        event_bytes=event_bytes,
        processes=_processes(processes, channels),
    )
    _run(
        lambda target, stage: shape.run(target, stage, options),
        Plan(repeats=repeats, seconds=seconds, warmup_s=warmup),
        sockets=(sockets + 1) * channels,
        against=against,
        json_file=json_file,
        plot_file=plot_file,
        mongodb_url=mongodb_url,
        redis_url=redis_url,
    )


@app.command()
def connect(
    sockets: Annotated[
        int, typer.Option(min=1, max=28_000, help="Sockets that come in each round.")
    ] = 10_000,
    in_flight: Annotated[
        int, typer.Option(min=1, max=28_000, help="Sockets on their way at the same time.")
    ] = 256,
    processes: _Processes = None,
    against: _Against = [],  # noqa: B006 - typer copies it
    repeats: _Repeats = 3,
    seconds: _Seconds = 1.0,
    warmup: _Warmup = 0.5,
    json_file: _Json = None,
    plot_file: _Plot = None,
    mongodb_url: _MongoDB = None,
    redis_url: _Redis = None,
) -> None:
    """Connections and subscriptions a second, public and signed; memory of a socket."""
    from gateway.bench import connect as shape
    from gateway.bench.stage import Plan

    options = shape.ConnectOptions(
        sockets=sockets, in_flight=in_flight, processes=_processes(processes, sockets)
    )
    _run(
        lambda target, stage: shape.run(target, stage, options),
        Plan(repeats=repeats, seconds=seconds, warmup_s=warmup),
        sockets=sockets,
        against=against,
        json_file=json_file,
        plot_file=plot_file,
        mongodb_url=mongodb_url,
        redis_url=redis_url,
    )


@app.command()
def idle(
    sockets: Annotated[int, typer.Option(min=2, max=28_000, help="Subscribed sockets.")] = 10_000,
    per_channel: Annotated[
        int, typer.Option(min=1, max=28_000, help="Sockets that share a channel.")
    ] = 10,
    ping_s: Annotated[
        float, typer.Option(min=1, max=3600, help="Silence after which a client pings, in seconds.")
    ] = 120,
    processes: _Processes = None,
    against: _Against = [],  # noqa: B006 - typer copies it
    repeats: _Repeats = 3,
    seconds: _Seconds = 30.0,
    warmup: _Warmup = 5.0,
    json_file: _Json = None,
    plot_file: _Plot = None,
    mongodb_url: _MongoDB = None,
    redis_url: _Redis = None,
) -> None:
    """CPU and memory of subscribed sockets to which nothing is published."""
    from gateway.bench import idle as shape
    from gateway.bench.stage import Plan

    options = shape.IdleOptions(
        sockets=sockets,
        per_channel=per_channel,
        ping_s=ping_s,
        processes=_processes(processes, sockets),
    )
    _run(
        lambda target, stage: shape.run(target, stage, options),
        Plan(repeats=repeats, seconds=seconds, warmup_s=warmup),
        sockets=sockets,
        against=against,
        settings={"DUET_ACTIVITY_TIMEOUT_S": str(ping_s)},
        json_file=json_file,
        plot_file=plot_file,
        mongodb_url=mongodb_url,
        redis_url=redis_url,
    )


@app.command()
def storm(
    sockets: Annotated[
        int, typer.Option(min=1, max=28_000, help="Sockets that are cut and come back at once.")
    ] = 10_000,
    restart: Annotated[
        bool, typer.Option("--restart", help="Stop and start the gateway instead of cutting them.")
    ] = False,
    witnesses: Annotated[
        int, typer.Option(min=1, max=1000, help="Sockets that get events meanwhile.")
    ] = 10,
    rate: Annotated[float, typer.Option(min=1, max=1000, help="Events a second to them.")] = 50,
    deadline_s: Annotated[
        float, typer.Option(min=1, max=600, help="How long an attempt may take, in seconds.")
    ] = 30,
    retry_s: Annotated[
        float, typer.Option(min=0.01, max=60, help="Wait after a failed attempt, in seconds.")
    ] = 1,
    processes: _Processes = None,
    against: _Against = [],  # noqa: B006 - typer copies it
    repeats: _Repeats = 3,
    seconds: _Seconds = 5.0,
    warmup: _Warmup = 1.0,
    json_file: _Json = None,
    plot_file: _Plot = None,
    mongodb_url: _MongoDB = None,
    redis_url: _Redis = None,
) -> None:
    """Everybody reconnects at once: how soon all are back, and what others notice of it."""
    from gateway.bench import storm as shape
    from gateway.bench.stage import Plan

    options = shape.StormOptions(
        sockets=sockets,
        restart=restart,
        witnesses=witnesses,
        rate=rate,
        deadline_s=deadline_s,
        retry_s=retry_s,
        processes=_processes(processes, sockets),
    )
    _run(
        lambda target, stage: shape.run(target, stage, options),
        Plan(repeats=repeats, seconds=seconds, warmup_s=warmup),
        # A server may still hold some of those that were cut when they come back.
        sockets=sockets + sockets // 2 + witnesses,
        against=against,
        json_file=json_file,
        plot_file=plot_file,
        mongodb_url=mongodb_url,
        redis_url=redis_url,
    )


@app.command()
def agree(
    rate: Annotated[
        float, typer.Option(min=0.1, max=10_000, help="Agrees a second, evenly spread.")
    ] = 50,
    in_flight: Annotated[
        int, typer.Option(min=1, max=10_000, help="Agrees in flight when run flat out.")
    ] = 64,
    pairs: Annotated[
        int,
        typer.Option(min=1, max=20_000, help="Streamers with a viewer each, agreed flat out."),
    ] = 500,
    hot: Annotated[
        bool, typer.Option("--hot", help="Also: one session whose 64 viewers all ask at once.")
    ] = False,
    callers: Annotated[int, typer.Option(min=2, max=1000, help="Viewers of the hot session.")] = 64,
    listeners: Annotated[
        int,
        typer.Option(
            min=0, max=20_000, help="Sockets that get events beside the agrees at a rate."
        ),
    ] = 0,
    events: Annotated[
        float, typer.Option(min=0.1, max=1000, help="Events a second to each listener.")
    ] = 10,
    processes: _Processes = None,
    repeats: _Repeats = 3,
    seconds: _Seconds = 5.0,
    warmup: _Warmup = 1.0,
    json_file: _Json = None,
    plot_file: _Plot = None,
    mongodb_url: _MongoDB = None,
    redis_url: _Redis = None,
) -> None:
    """Latency of agree to `stream.authorized`, and agree transactions a second."""
    from gateway.bench import agree as shape
    from gateway.bench.stage import Plan

    options = shape.AgreeOptions(
        rate=rate,
        in_flight=in_flight,
        pairs=pairs,
        callers=callers if hot else 0,
        listeners=listeners,
        events=events,
        processes=_processes(processes, max(1, listeners)),
    )
    plan = Plan(repeats=repeats, seconds=seconds, warmup_s=warmup)
    _run(
        lambda target, stage: shape.run(target, stage, options),
        plan,
        sockets=2 * shape.pairs_needed(plan, options) + callers + listeners,
        json_file=json_file,
        plot_file=plot_file,
        mongodb_url=mongodb_url,
        redis_url=redis_url,
    )


@app.command()
def chaos(
    kills: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Processes killed before it ends.")
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Of what is random on our side.")] = 0,
    gateways: Annotated[int, typer.Option(min=1, max=16, help="Gateway processes.")] = 2,
    streams: Annotated[int, typer.Option(min=1, max=200, help="Streams at the same time.")] = 6,
    json_file: _Json = None,
    mongodb_url: _MongoDB = None,
    redis_url: _Redis = None,
) -> None:
    """Gateways killed at random under load; a verdict on every promise. Needs a checkout."""
    from gateway.bench import chaos as shape
    from persistence.embedded import EmbeddedError

    try:
        _check_files(json_file, None)
        kept = shape.run(
            kills=kills,
            seed=seed,
            gateways=gateways,
            streams=streams,
            json_file=json_file,
            mongodb_url=mongodb_url,
            redis_url=redis_url,
        )
    except (BenchError, EmbeddedError) as fault:
        typer.echo(f"duet: {' '.join(str(fault).split())}", err=True)
        raise SystemExit(1) from None
    if not kept:
        raise SystemExit(1)


def _processes(wanted: int | None, sockets: int) -> int:
    """Processes of the generator: one core is the server's."""
    return min(wanted or max(1, min(4, (os.cpu_count() or 2) - 1)), sockets)


def _run(
    shape: Shape,
    plan: Any,
    *,
    sockets: int,
    json_file: Path | None,
    plot_file: Path | None,
    mongodb_url: str | None,
    redis_url: str | None,
    against: Sequence[Peer] = (),
    settings: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Starts everything, runs the shape, shows what it found; exit code 1 on errors and losses."""
    from gateway.bench.show import plot_report, print_report
    from persistence.embedded import EmbeddedError
    from persistence.errors import StoreUnavailable

    fault: BaseException | None = None
    try:
        _check_files(json_file, plot_file)
        report = _measured(shape, plan, sockets, mongodb_url, redis_url, against, settings)
        print_report(report)
        if json_file is not None:
            json_file.write_bytes(report.json())
        if plot_file is not None:
            plot_report(report, plot_file)
        if report.delivery_ratio < 1:
            fault = BenchError("not everything was delivered")
    except* (BenchError, EmbeddedError, StoreUnavailable) as errors:
        fault = _first(errors)
    if fault is not None:
        typer.echo(f"duet: {' '.join(str(fault).split())}", err=True)
        raise SystemExit(1)


def _check_files(json_file: Path | None, plot_file: Path | None) -> None:
    """Finds out before a run of minutes that its results can't be written after it.

    Raises:
        BenchError: A file can't be written, or not as a plot.
    """
    from gateway.bench.show import check_plot_file

    for file in filter(None, (json_file, plot_file)):
        if file.is_dir() or not os.access(
            file if file.exists() else file.absolute().parent, os.W_OK
        ):
            raise BenchError(f"{file} can't be written")
    if plot_file is not None:
        check_plot_file(plot_file)


def _measured(
    shape: Shape,
    plan: Any,
    sockets: int,
    mongodb_url: str | None,
    redis_url: str | None,
    against: Sequence[Peer],
    settings: Mapping[str, str],
) -> "Report":
    from gateway.bench.loop import run
    from gateway.bench.peers.server import running_peers
    from gateway.bench.show import progress_bar
    from gateway.bench.stage import Stage
    from gateway.bench.target import running_gateway_process
    from gateway.bench.usage import allow_files
    from persistence.embedded import start_embedded
    from persistence.scratch import drop_database

    allow_files(sockets)
    database = f"duet_bench_{secrets.token_hex(4)}"
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(progress_bar())
        starting = progress.add_task("starting", total=3)
        names = [peer.value for peer in dict.fromkeys(against)]
        servers = stack.enter_context(start_embedded(mongodb_url=mongodb_url, redis_url=redis_url))
        progress.advance(starting)
        redis_pid = None if servers.redis is None else servers.redis.process.pid
        peers = stack.enter_context(running_peers(names, servers.redis_url, redis_pid))
        progress.advance(starting)
        afterwards = stack.enter_context(contextlib.ExitStack())
        target = stack.enter_context(
            running_gateway_process(
                servers.mongodb_url, database, servers.redis_url, redis_pid, settings
            )
        )
        if servers.mongodb is None:
            # Somebody else's MongoDB is left as it was, once the gateway has ended.
            afterwards.callback(drop_database, servers.mongodb_url, database)
        progress.advance(starting)
        return run(shape(target, Stage(plan, progress, peers)))


def _first(error: BaseException) -> BaseException:
    """The fault inside nested groups that a person can do something about."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
