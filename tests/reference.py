"""`docs/reference.md`, made from the code: error codes, close codes, metrics, commands.

`python -m tests.reference` writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer.main

from gateway.cli import app
from gateway.errors import DISCONNECTS, ERRORS, CloseCode
from gateway.telemetry import Telemetry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"

INTRODUCTION = """# Reference

This page is made from the code (`python -m tests.reference`).
Settings are in [settings.md](settings.md), channels, events and HTTP calls in
[protocol.md](protocol.md), the Pusher HTTP API and webhooks in [backends.md](backends.md).
"""

ERRORS_TEXT = """The `code` of a `goal.reply` and of a problem document, the same in both.
*Again* means that the same command, with the same `request_id`, may succeed later unchanged."""

CLOSE_TEXT = """What a client does when it reads one: 4000-4099 stay away (4000: use TLS),
4100-4199 come back after a second, 4200-4299 come back at once.
1009 follows a message that is too long, 1002 and 1007 a broken frame."""

METRICS_TEXT = """At `/metrics`, beside those of the process (`process_…`, `python_…`).
What to watch of them is in [operations.md](operations.md)."""


def page() -> str:
    """The whole page."""
    parts = [
        INTRODUCTION,
        _section("Error codes", ERRORS_TEXT, "code | HTTP | again | means", _errors()),
        _section("Close codes", CLOSE_TEXT, "code | reason", _disconnects()),
        _section("Metrics", METRICS_TEXT, "metric | type | labels | means", _metrics()),
        _section("Commands", "", "command | does", _commands()),
    ]
    return "\n".join(parts)


def _section(title: str, text: str, columns: str, rows: Iterable[str]) -> str:
    line = "|".join(["---"] * len(columns.split("|")))
    head = [f"## {title}", "", *([text, ""] if text else [])]
    return "\n".join([*head, f"| {columns} |", f"|{line}|", *(f"| {row} |" for row in rows), ""])


def _errors() -> Iterator[str]:
    for code, spec in ERRORS.items():
        again = "yes" if spec.retryable else "no"
        yield f"`{code.value}` | {spec.http_status} | {again} | {spec.sentence}"


def _disconnects() -> Iterator[str]:
    for code in CloseCode:
        yield f"{int(code)} | {DISCONNECTS[code].reason}"


def _metrics() -> Iterator[str]:
    for metric in sorted(Telemetry().registry.collect(), key=lambda one: one.name):
        if metric.name.startswith("duet_"):
            name = metric.name + ("_total" if metric.type == "counter" else "")
            labels = ", ".join(f"`{label}`" for label in _labels(metric.name))
            yield f"`{name}` | {metric.type} | {labels} | {metric.documentation}"


def _labels(name: str) -> tuple[str, ...]:
    telemetry = Telemetry()
    found: tuple[str, ...] = telemetry.registry._names_to_collectors[name]._labelnames  # type: ignore[attr-defined]
    return found


def _commands() -> Iterator[str]:
    yield from _below("duet", typer.main.get_command(app))


def _below(path: str, command: Any) -> Iterator[str]:
    commands = getattr(command, "commands", None)
    if commands is None:
        sentence = (command.help or "").partition("\n\n")[0]
        yield f"`{path}` | {' '.join(sentence.split())}"
        return
    for name, one in commands.items():
        yield from _below(f"{path} {name}", one)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
