"""`duet migrate`: moves documents that an older Duet wrote on to this version's schema."""

from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gateway.cli_escrow import with_store
from persistence.documents import SCHEMA_VERSION
from persistence.errors import StoreUnavailable
from persistence.indexes import (
    drop_replaced_indexes,
    make_indexes,
    missing_indexes,
    replaced_indexes,
)
from persistence.migrations import Migrator
from persistence.store import Store

# Of what could not be migrated; somebody who changes by hand makes the same mistake often.
_UNFIT_SHOWN: Final = 20


def migrate(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tells what would be changed, and changes nothing.")
    ] = False,
    indexes: Annotated[
        bool,
        typer.Option("--indexes", help="Makes missing indexes, and changes nothing else."),
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, max=10_000, help="Documents that are changed at a time.")
    ] = 500,
) -> None:
    """Migrates the database; safe beside running gateways, and to run again after any end."""

    async def work(store: Store) -> int:
        console = Console(highlight=False, markup=False)
        await _make_indexes(store, console, dry_run=dry_run)
        if indexes:
            return 0
        await _drop_indexes(store, console, dry_run=dry_run)
        return await _migrate(Migrator(store, batch_size=batch_size), console, dry_run=dry_run)

    if with_store(work, with_indexes=False):
        raise typer.Exit(1)


async def _make_indexes(store: Store, console: Console, *, dry_run: bool) -> None:
    missing = ", ".join(await missing_indexes(store))
    if dry_run:
        if missing:
            console.print(f"indexes to be made: {missing}", soft_wrap=True)
        return
    if missing:
        console.print(f"making indexes: {missing}", soft_wrap=True)
    await make_indexes(store)


async def _drop_indexes(store: Store, console: Console, *, dry_run: bool) -> None:
    """Not before the last old gateway has gone: one that starts makes its indexes again."""
    replaced = ", ".join(await replaced_indexes(store))
    if not replaced:
        return
    if dry_run:
        console.print(f"indexes to be dropped: {replaced}", soft_wrap=True)
        return
    console.print(f"dropping indexes: {replaced}", soft_wrap=True)
    try:
        await drop_replaced_indexes(store)
    except StoreUnavailable as error:
        # They only cost time and room.
        console.print(f"not dropped: {error}", soft_wrap=True)


async def _migrate(migrator: Migrator, console: Console, *, dry_run: bool) -> int:
    """Tells how many documents it had to leave as they are."""
    strangers = await migrator.strangers()
    if strangers:
        console.print(f"run by a newer Duet on this database: {', '.join(strangers)}")
    waiting = [progress for progress in await migrator.plan() if progress.total]
    if not waiting:
        console.print(f"nothing to migrate: no document is older than version {SCHEMA_VERSION}")
        return 0
    if dry_run:
        for progress in waiting:
            name, total = progress.migration.name, progress.total
            console.print(f"{name}: {total} documents of {progress.migration.collection}")
        return 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as bars:
        tasks = {
            progress.migration.name: bars.add_task(progress.migration.name, total=progress.total)
            for progress in waiting
        }
        async for progress in migrator.run():
            task = tasks.get(progress.migration.name)
            if task is not None:
                bars.update(task, completed=progress.done, total=progress.total)
    unfit = list(migrator.unfit.values())
    for one in unfit[:_UNFIT_SHOWN]:
        text = f"{one.collection} {one.document_id} is left as it is: {one.why}"
        console.print(text, soft_wrap=True)
    if unfit:
        count = len(unfit)
        console.print(f"{count} of the documents could not be migrated; mend them, run it again")
    else:
        console.print(f"migrated to schema version {SCHEMA_VERSION}")
    return len(unfit)
