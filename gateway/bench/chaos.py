"""`duet bench chaos`: random kills under load, and whether any promise was broken.

The players and the checker are those of the fault tests, which only a checkout has.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from gateway.bench.errors import BenchError
from gateway.bench.show import progress_bar
from persistence.embedded import start_embedded
from persistence.scratch import drop_database

if TYPE_CHECKING:
    from tests.faults.chaos import Chaos, ChaosOptions, ChaosResult

_LOG_TAIL_CHARACTERS = 4_000


def run(
    *,
    kills: int,
    seed: int,
    gateways: int,
    streams: int,
    json_file: Path | None,
    mongodb_url: str | None,
    redis_url: str | None,
) -> bool:
    """Kills, shows the verdict, and tells whether every promise was kept.

    Raises:
        BenchError: This is no checkout.
        EmbeddedError: MongoDB or Redis can't be run here.
    """
    try:
        from tests.e2e.gateway_process import APPS_TOML, Stores
        from tests.faults.chaos import Chaos, ChaosOptions, result_json
    except ModuleNotFoundError as error:
        raise BenchError(
            f"duet bench chaos plays the fault tests, and they are not here ({error.name}): "
            "run it in a checkout, after `make install`"
        ) from error

    options = ChaosOptions(kills=kills, seed=seed, gateways=gateways, streams=streams)
    name = f"duet_chaos_{secrets.token_hex(4)}"
    with (
        progress_bar() as progress,
        start_embedded(mongodb_url=mongodb_url, redis_url=redis_url) as servers,
        tempfile.TemporaryDirectory() as directory,
    ):
        apps_file, log = Path(directory, "apps.toml"), Path(directory, "log")
        apps_file.write_text(APPS_TOML)
        bar = progress.add_task("killing", total=kills)
        stores = Stores(servers.mongodb_url, name, servers.redis_url, name)
        chaos = Chaos(
            options, stores, apps_file, log, lambda done: progress.update(bar, completed=done)
        )
        try:
            result = _played(chaos)
        finally:
            if servers.mongodb is None:
                drop_database(servers.mongodb_url, name)
        last_words = log.read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:]
    if json_file is not None:
        json_file.write_text(result_json(options, result) + "\n")
    _show(options, result)
    if result.violations:
        Console(stderr=True).print(last_words, highlight=False, markup=False)
    return not result.violations


def _played(chaos: Chaos) -> ChaosResult:
    try:
        return asyncio.run(chaos.run())
    except ExceptionGroup as early:
        # What was found until then counts, and so does that nothing more was.
        text = "".join(traceback.format_exception(early))
        chaos.result.violations.append(f"the run ended early: {text}")
        return chaos.result


def _show(options: ChaosOptions, result: ChaosResult) -> None:
    console = Console(highlight=False)
    table = Table(title=f"duet: chaos, seed {options.seed}", title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for name, value in (
        ("kills", f"{result.kills:,}"),
        ("kills a minute", f"{result.kills_per_minute:,.0f}"),
        *((f"  {where}", f"{count:,}") for where, count in sorted(result.killed_at.items())),
        ("streams judged", f"{result.streams:,}"),
        ("goals ended", f"{result.goals.total():,}"),
        *((f"  {how}", f"{count:,}") for how, count in sorted(result.goals.items())),
        ("commands sent, repetitions included", f"{result.asked:,}"),
        ("  without an answer", f"{result.unanswered:,}"),
        ("events", f"{result.told:,}"),
        ("  delivered again", f"{result.told_again:,}"),
        ("starts refused", f"{result.refused_starts:,}"),
        ("streams that were not heard in full", f"{result.half_heard:,}"),
        ("longest way to rest, s", f"{result.longest_rest_s:.1f}"),
        ("violations", f"{len(result.violations):,}"),
    ):
        table.add_row(name, value)
    console.print(table)
    for violation in result.violations:
        console.print(f"VIOLATION {violation}", style="red", markup=False, soft_wrap=True)
    if not result.violations:
        console.print(f"{result.kills:,} kills, every promise kept", style="green")
