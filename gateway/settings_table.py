"""Writes `docs/settings.md` from the settings themselves: `python -m gateway.settings_table`."""

from __future__ import annotations

import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Union, get_args, get_origin

from gateway.settings import Settings, variable_name

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

TARGET: Final = Path("docs/settings.md")

_GROUPS: Final = {
    "host": "Listening",
    "mongodb_url": "MongoDB, Redis and the apps",
    "jwt_secret": "Identity",
    "invitation_ttl_s": "Invitations",
    "escrow_url": "Payment service",
    "activity_timeout_s": "Sockets",
    "max_message_bytes": "Limits of the wire",
    "webhook_timeout_s": "Webhooks",
    "lease_s": "Workers and leases",
    "log_format": "Logs",
}
_UNITS: Final = {
    "_per_s": "per second",
    "_s": "seconds",
    "_ms": "milliseconds",
    "_bytes": "bytes",
    "_minor": "minor units",
    "_name_max": "characters",
}

_HEAD: Final = """\
# Settings

Duet is set by environment variables with the prefix `DUET_`, read once when a process starts.
An empty variable counts as unset. A value out of range, or a `DUET_…` variable that is
nearly the name of a setting, stops the start; each is named in one line, and another that nothing
reads is warned of. `duet doctor` looks at all of them.
What Kubernetes tells pods of services whose names begin with `duet` (`DUET_SERVICE_HOST` and the
like) is passed over; but a service named `duet` also makes a `DUET_PORT` that is no port, unless
the pod has its own or says `enableServiceLinks: false`.

`duet serve` needs `DUET_MONGODB_URL`, `DUET_REDIS_URL`, `DUET_APPS_FILE` ([apps.md](apps.md)) and
exactly one of `DUET_JWT_SECRET`, `DUET_JWT_PUBLIC_KEY` and `DUET_JWT_JWKS_URL`. It refuses the
demo's secrets, HS256 secrets under 32 bytes, a certificate without its key, and servers that don't
answer.

This page is made from `gateway/settings.py` (`python -m gateway.settings_table`).
"""

_TABLE_HEAD: Final = """\
| variable | unit | default | range | meaning |
|---|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    lines = [_HEAD]
    for name, field in Settings.model_fields.items():
        if name in _GROUPS:
            lines.append(f"\n## {_GROUPS[name]}\n\n{_TABLE_HEAD}")
        lines.append(_row(name, field))
    return "".join(lines)


def _row(name: str, field: FieldInfo) -> str:
    cells = (
        f"`{variable_name(name)}`",
        _unit(name, field),
        _default(field),
        _range(field),
        field.description or "",
    )
    return f"| {' | '.join(cells)} |\n"


def _unit(name: str, field: FieldInfo) -> str:
    for suffix, unit in _UNITS.items():
        if name.endswith(suffix):
            return unit
    kinds = {int: "number", bool: "true or false", Path: "path"}
    return next((word for kind, word in kinds.items() if kind in _types(field)), "text")


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int | float):
        return f"{value:,}".replace(",", " ") if value >= 10_000 else f"{value:g}"
    return f"`{value}`" if value else "empty"


def _range(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(field.annotation))
    bounds: dict[str, Any] = {}
    for constraint in field.metadata:
        for bound in ("gt", "ge", "le", "max_length", "pattern"):
            value = getattr(constraint, bound, None)
            if value is not None:
                bounds[bound] = value
    if "le" in bounds:
        low = f"over {bounds['gt']:g}" if "gt" in bounds else f"{bounds['ge']:g}"
        return f"{low} to {bounds['le']:,}".replace(",", " ")
    if "pattern" in bounds:
        return f"`{bounds['pattern']}`".replace("|", "\\|")
    return f"up to {bounds['max_length']} characters" if "max_length" in bounds else ""


def _types(field: FieldInfo) -> tuple[Any, ...]:
    if get_origin(field.annotation) in (Union, types.UnionType):
        return get_args(field.annotation)
    return (field.annotation,)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
