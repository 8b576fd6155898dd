"""`duet bench SHAPE`: the registry of shapes, each a command with the options that it has."""

from functools import partial
from typing import Annotated

import typer

from gateway.bench.errors import BenchError
from gateway.bench.launch import check_files, give_up, launch
from gateway.bench.options import (
    EventBytes,
    Json,
    MongoDB,
    Processes,
    Redis,
    RunOptions,
    processes_for,
    shape_command,
)

app = typer.Typer(
    help="Load tests on a real gateway, MongoDB and Redis: progress bar, table, JSON, plot.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@shape_command(app, repeats=5, seconds=1.0, warmup=0.5)
def fanout(
    run: RunOptions,
    sockets: Annotated[
        int, typer.Option(min=1, max=28_000, help="Subscribers of the one channel.")
    ] = 1000,
    burst: Annotated[
        list[int], typer.Option(min=1, max=1024, help="Publications outstanding; repeatable.")
    ] = [1, 8, 64],  # noqa: B006 - typer copies it
    event_bytes: EventBytes = 300,
    processes: Processes = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Time how long others wait meanwhile; costs CPU.")
    ] = False,
) -> None:
    """Deliveries a second and CPU per delivery of one public channel with many sockets."""
    from gateway.bench import fanout as shape

    options = shape.FanoutOptions(
        sockets=sockets,
        bursts=tuple(sorted(set(burst))),
        event_bytes=event_bytes,
        processes=processes_for(processes, sockets),
        probe=probe,
    )
    launch(partial(shape.run, options=options), run, sockets=sockets)


@shape_command(app, repeats=5, seconds=3.0, warmup=1.0)
def rooms(
    run: RunOptions,
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
    event_bytes: EventBytes = 300,
    processes: Processes = None,
) -> None:
    """Many channels with few sockets: what a publication costs, and apart from it a delivery."""
    from gateway.bench import rooms as shape

    options = shape.RoomsOptions(
        channels=channels,
        sockets=sockets,
        rate=rate,
        in_flight=in_flight,
        batch=batch,
        event_bytes=event_bytes,
        processes=processes_for(processes, channels),
    )
    launch(partial(shape.run, options=options), run, sockets=(sockets + 1) * channels)


@shape_command(app, repeats=3, seconds=1.0, warmup=0.5)
def connect(
    run: RunOptions,
    sockets: Annotated[
        int, typer.Option(min=1, max=28_000, help="Sockets that come in each round.")
    ] = 10_000,
    in_flight: Annotated[
        int, typer.Option(min=1, max=28_000, help="Sockets on their way at the same time.")
    ] = 256,
    processes: Processes = None,
) -> None:
    """Connections and subscriptions a second, public and signed; memory of a socket."""
    from gateway.bench import connect as shape

    options = shape.ConnectOptions(
        sockets=sockets, in_flight=in_flight, processes=processes_for(processes, sockets)
    )
    launch(partial(shape.run, options=options), run, sockets=sockets)


@shape_command(app, repeats=3, seconds=30.0, warmup=5.0)
def idle(
    run: RunOptions,
    sockets: Annotated[int, typer.Option(min=2, max=28_000, help="Subscribed sockets.")] = 10_000,
    per_channel: Annotated[
        int, typer.Option(min=1, max=28_000, help="Sockets that share a channel.")
    ] = 10,
    ping_s: Annotated[
        float, typer.Option(min=1, max=3600, help="Silence after which a client pings, in seconds.")
    ] = 120,
    processes: Processes = None,
) -> None:
    """CPU and memory of subscribed sockets to which nothing is published."""
    from gateway.bench import idle as shape

    options = shape.IdleOptions(
        sockets=sockets,
        per_channel=per_channel,
        ping_s=ping_s,
        processes=processes_for(processes, sockets),
    )
    launch(
        partial(shape.run, options=options),
        run,
        sockets=sockets,
        settings={"DUET_ACTIVITY_TIMEOUT_S": str(ping_s)},
    )


@shape_command(app, repeats=3, seconds=5.0, warmup=1.0)
def storm(
    run: RunOptions,
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
    processes: Processes = None,
) -> None:
    """Everybody reconnects at once: how soon all are back, and what others notice of it."""
    from gateway.bench import storm as shape

    options = shape.StormOptions(
        sockets=sockets,
        restart=restart,
        witnesses=witnesses,
        rate=rate,
        deadline_s=deadline_s,
        retry_s=retry_s,
        processes=processes_for(processes, sockets),
    )
    launch(
        partial(shape.run, options=options),
        run,
        # A server may still hold some of those that were cut when they come back.
        sockets=sockets + sockets // 2 + witnesses,
    )


@shape_command(app, repeats=3, seconds=5.0, warmup=1.0, has_peers=False)
def agree(
    run: RunOptions,
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
    processes: Processes = None,
) -> None:
    """Latency of agree to `stream.authorized`, and agree transactions a second."""
    from gateway.bench import agree as shape

    options = shape.AgreeOptions(
        rate=rate,
        in_flight=in_flight,
        pairs=pairs,
        callers=callers if hot else 0,
        listeners=listeners,
        events=events,
        processes=processes_for(processes, max(1, listeners)),
    )
    launch(
        partial(shape.run, options=options),
        run,
        sockets=2 * shape.pairs_needed(run.plan, options) + callers + listeners,
    )


@app.command()
def chaos(
    kills: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Processes killed before it ends.")
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Of what is random on our side.")] = 0,
    gateways: Annotated[int, typer.Option(min=1, max=16, help="Gateway processes.")] = 2,
    streams: Annotated[int, typer.Option(min=1, max=200, help="Streams at the same time.")] = 6,
    json_file: Json = None,
    mongodb_url: MongoDB = None,
    redis_url: Redis = None,
) -> None:
    """Gateways killed at random under load; a verdict on every promise. Needs a checkout."""
    from gateway.bench import chaos as shape
    from persistence.embedded import EmbeddedError

    try:
        check_files(json_file, None)
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
        give_up(fault)
    if not kept:
        raise SystemExit(1)
