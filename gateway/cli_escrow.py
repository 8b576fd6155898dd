"""`duet escrow`: what has still to be said to the payment service, and saying it again."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gateway.settings import load_settings
from gateway.wiring import StartError, open_store
from persistence.clock import Clock
from persistence.documents import EscrowCall
from persistence.errors import StoreError
from persistence.escrow_calls import EscrowBook
from persistence.escrow_port import CallStatus
from persistence.migrations import MigrationRefused
from persistence.store import Store

T = TypeVar("T")

app = typer.Typer(
    help="Calls to the platform's payment service: what waits, and what waits for you.",
    no_args_is_help=True,
)

# Wide enough for every column when nobody looks at a terminal but a file is written.
_FILE_WIDTH = 200
# Below that the table's columns would be two letters wide.
_NARROWEST_TABLE = 130


def with_store(work: Callable[[Store], Awaitable[T]], *, with_indexes: bool = True) -> T:
    """Opens MongoDB as the settings say, does `work`, closes it.

    Raises:
        StartError: MongoDB can't be used; one line for a person.
    """

    async def run() -> T:
        store = await open_store(load_settings(), Clock(), with_indexes=with_indexes)
        try:
            return await work(store)
        except MigrationRefused as error:
            raise StartError(str(error)) from None
        except StoreError as error:
            raise StartError(f"DUET_MONGODB_URL: {error}") from None
        finally:
            await store.close()

    return asyncio.run(run())


@app.command(name="list")
def show(
    dead: Annotated[bool, typer.Option("--dead", help="Dead letters alone.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many lines.")] = 100,
) -> None:
    """Lists what the payment service has not acknowledged, the oldest first."""
    statuses = {CallStatus.DEAD} if dead else {CallStatus.DEAD, CallStatus.PENDING}

    async def read(store: Store) -> tuple[list[EscrowCall], datetime, int]:
        book = EscrowBook(store)
        backlog = await book.backlog()
        total = backlog.dead if dead else backlog.dead + backlog.pending
        return await book.waiting(statuses, limit), store.clock.now(), total

    calls, now, total = with_store(read)
    if not calls:
        typer.echo("no dead letters" if dead else "nothing waits for the payment service")
        return
    console = _console()
    if console.width >= _NARROWEST_TABLE:
        console.print(_table(calls, now))
    else:
        for call in calls:
            _print_lines(console, call, now)
    if total > len(calls):
        console.print(f"… and {total - len(calls)} more (--limit)")


@app.command()
def retry(
    key: Annotated[str | None, typer.Argument(help="The dead letter's key, as listed.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All dead letters.")] = False,
) -> None:
    """Has dead letters said again by the running gateways, with the same keys as before."""
    if (key is None) is not everything:
        raise typer.BadParameter("either a KEY or --all is needed")

    async def work(store: Store) -> tuple[int, EscrowCall | None]:
        book = EscrowBook(store)
        return await book.retry(key), await book.call(key) if key else None

    count, call = with_store(work)
    if key is not None and count == 0:
        why = "there is no such call" if call is None else f"it is {call.status}, not dead"
        typer.echo(f"duet: {key}: {why}", err=True)
        raise typer.Exit(1)
    typer.echo(f"{count} call{'' if count == 1 else 's'} will be said again")


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=_FILE_WIDTH)
    return console


def _table(calls: list[EscrowCall], now: datetime) -> Table:
    table = Table()
    table.add_column("key", no_wrap=True)
    table.add_column("call")
    table.add_column("amount", justify="right")
    table.add_column("viewer")
    table.add_column("streamer")
    table.add_column("status")
    table.add_column("in vain", justify="right")
    table.add_column("for", justify="right")
    table.add_column("last answer", overflow="fold")
    for call in calls:
        table.add_row(
            call.id,
            call.call.value,
            str(call.amount),
            # What others have written is no markup of ours.
            Text(call.viewer_id),
            Text(call.streamer_id),
            _status(call),
            str(call.attempts),
            _age(call, now),
            Text(call.answer or ""),
        )
    return table


def _print_lines(console: Console, call: EscrowCall, now: datetime) -> None:
    """A call where there is no room for a table: its key alone in a line, to be copied."""
    console.print(Text(call.id), soft_wrap=True)
    about = Text(f"{call.call.value} of {call.amount}, {call.viewer_id} to {call.streamer_id}, ")
    about.append_text(_status(call)).append(f", {call.attempts} in vain, for {_age(call, now)}")
    console.print(Padding(about, (0, 0, 0, 2)))
    if call.answer:
        console.print(Padding(Text(call.answer), (0, 0, 0, 2)))


def _status(call: EscrowCall) -> Text:
    return Text(call.status, "red" if call.status == CallStatus.DEAD else "")


def _age(call: EscrowCall, now: datetime) -> str:
    return _span((now - call.since).total_seconds())


def _span(seconds: float) -> str:
    """A span as a person says it, in its largest unit."""
    for unit, length_s in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
