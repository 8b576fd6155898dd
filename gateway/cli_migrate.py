"""`duet migrate`: moves documents that an older Duet wrote on to this version's schema."""

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gateway.cli_escrow import with_store
from persistence.documents import SCHEMA_VERSION
from persistence.migrations import Migrator
from persistence.store import Store


def migrate(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tells what would be changed, and changes nothing.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, max=10_000, help="Documents that are changed at a time.")
    ] = 500,
) -> None:
    """Migrates the database; safe beside running gateways, and to run again after any end."""

    async def work(store: Store) -> None:
        await _migrate(Migrator(store, batch_size=batch_size), dry_run=dry_run)

    with_store(work)


async def _migrate(migrator: Migrator, *, dry_run: bool) -> None:
    console = Console(highlight=False)
    strangers = await migrator.strangers()
    if strangers:
        console.print(f"run by a newer Duet on this database: {', '.join(strangers)}")
    waiting = [progress for progress in await migrator.plan() if progress.total]
    if not waiting:
        console.print(f"nothing to migrate: every document has schema version {SCHEMA_VERSION}")
        return
    if dry_run:
        for progress in waiting:
            name, total = progress.migration.name, progress.total
            console.print(f"{name}: {total} documents of {progress.migration.collection}")
        return
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
    console.print(f"migrated to schema version {SCHEMA_VERSION}")
