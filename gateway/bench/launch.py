"""From a command line to a report: starts every server, runs the shape, shows what it found."""

import contextlib
import os
import secrets
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from gateway.bench.errors import BenchError
from gateway.bench.options import RunOptions

if TYPE_CHECKING:
    from gateway.bench.results import Report
    from gateway.bench.stage import Stage
    from gateway.bench.target import GatewayTarget

Shape = Callable[["GatewayTarget", "Stage"], Coroutine[Any, Any, "Report"]]


def launch(
    shape: Shape,
    run: RunOptions,
    *,
    sockets: int,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Starts everything, runs the shape, shows what it found; exit code 1 on errors and losses."""
    from gateway.bench.show import plot_report, print_report
    from persistence.embedded import EmbeddedError
    from persistence.errors import StoreUnavailable

    fault: BaseException | None = None
    try:
        check_files(run.json_file, run.plot_file)
        report = _measured(shape, run, sockets, settings)
        print_report(report)
        if run.json_file is not None:
            run.json_file.write_bytes(report.json())
        if run.plot_file is not None:
            plot_report(report, run.plot_file)
        if report.delivery_ratio < 1:
            fault = BenchError("not everything was delivered")
    except* (BenchError, EmbeddedError, StoreUnavailable) as errors:
        fault = _first(errors)
    if fault is not None:
        give_up(fault)


def give_up(fault: BaseException) -> NoReturn:
    """Ends the process with code 1, after one line that says why."""
    typer.echo(f"duet: {' '.join(str(fault).split())}", err=True)
    raise SystemExit(1)


def check_files(json_file: Path | None, plot_file: Path | None) -> None:
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


def _measured(shape: Shape, run: RunOptions, sockets: int, settings: Mapping[str, str]) -> "Report":
    from gateway.bench import loop
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
        names = [peer.value for peer in dict.fromkeys(run.against)]
        servers = stack.enter_context(
            start_embedded(mongodb_url=run.mongodb_url, redis_url=run.redis_url)
        )
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
        return loop.run(shape(target, Stage(run.plan, progress, peers)))


def _first(error: BaseException) -> BaseException:
    """The fault inside nested groups that a person can do something about."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
