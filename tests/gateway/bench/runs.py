"""`duet bench` as a person runs it, but short."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from typer.testing import CliRunner

from gateway.bench.cli import app

if TYPE_CHECKING:
    from pathlib import Path


def run(shape: str, *arguments: str, report: Path, stores: tuple[str, str]) -> dict[str, Any]:
    mongodb_url, redis_url = stores
    result = CliRunner().invoke(
        app,
        [
            shape,
            *(*arguments, "--repeats", "1", "--warmup", "0", "--json", str(report)),
            *("--mongodb-url", mongodb_url, "--redis-url", redis_url),
        ],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    assert "delivered: 100.0000% of what was expected" in result.output
    found: dict[str, Any] = json.loads(report.read_bytes())
    return found


def medians(report: dict[str, Any], row_name: str) -> dict[str, float]:
    row = next(row for row in report["rows"] if row["name"] == row_name)
    return {measure["name"]: measure["median"] for measure in row["measures"]}
