"""The apps: who may connect, publish and sign, read once from a TOML file.

Source: docs/pusher-compatibility.md 2.3 (webhook events).
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Final

import msgspec

WEBHOOK_EVENTS: Final = frozenset(
    {
        "channel_occupied",
        "channel_vacated",
        "member_added",
        "member_removed",
        "client_event",
        "cache_miss",
        "subscription_count",
    }
)

_Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
_Secret = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Url = Annotated[str, msgspec.Meta(pattern=r"^https?://[^\s]+$", max_length=2048)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
# A host with an optional port, as in an `Origin` header after the scheme; `*.` covers subdomains.
_Origin = Annotated[str, msgspec.Meta(pattern=r"^(\*\.)?[A-Za-z0-9.-]{1,253}(:[0-9]{1,5})?$")]


class AppsError(Exception):
    """Says in one line, with file and line number where known, why the apps can't be used."""


class Webhook(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where an app wants to hear of `events`."""

    url: _Url
    events: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.events) - WEBHOOK_EVENTS)
        if unknown:
            raise ValueError(f"no webhook event is called {unknown[0]!r}")


class App(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One app: its name for the HTTP API, its key for sockets, its secret for signatures.

    Attributes:
        previous_secret: Signatures made with it are still accepted while the secret is rotated.
        max_connections: Across the cluster, other nodes' as they were a second ago; 0 is no limit.
        tls_only: Connections without TLS are closed (4000); pusher-js comes back with it.
        authorized_only: Sockets that neither sign in nor join a private channel within
            `authorization_timeout_s` are closed (4009).
        api_rate_per_s: Calls of the Pusher HTTP API that all nodes together answer in a second;
            more get 429. 0 is no limit.
        origins: Allowed hosts of an `Origin` header, `*.` covering subdomains; empty allows any.
    """

    id: _Name
    key: _Name
    secret: _Secret
    previous_secret: _Secret | None = None
    client_events: bool = True
    subscription_count: bool = False
    max_connections: _Count = 0
    enabled: bool = True
    tls_only: bool = False
    authorized_only: bool = False
    authorization_timeout_s: _Seconds = 30.0
    api_rate_per_s: _Count = 0
    origins: tuple[_Origin, ...] = ()
    webhooks: tuple[Webhook, ...] = ()

    @property
    def secrets(self) -> tuple[str, ...]:
        """The secrets that are valid now, the one to sign with first."""
        if self.previous_secret is None:
            return (self.secret,)
        return (self.secret, self.previous_secret)

    def __repr__(self) -> str:
        return f"App(id={self.id!r}, key={self.key!r})"


DEMO_APP: Final = App(id="1", key="app-key", secret="app-secret")  # noqa: S106  public, demo only


class Apps:
    """All apps of an installation; `first` carries the invitations' channels."""

    __slots__ = ("_by_id", "_by_key", "first")

    first: App

    def __init__(self, apps: Iterable[App]) -> None:
        """Indexes `apps`.

        Raises:
            AppsError: There are none, or two share an id or a key.
        """
        self._by_id: dict[str, App] = {}
        self._by_key: dict[str, App] = {}
        for app in apps:
            if app.id in self._by_id:
                raise AppsError(f"two apps have the id {app.id!r}")
            if app.key in self._by_key:
                raise AppsError(f"two apps have the key {app.key!r}")
            self._by_id[app.id] = app
            self._by_key[app.key] = app
        if not self._by_id:
            raise AppsError("there is no [[apps]] entry")
        self.first = next(iter(self._by_id.values()))

    def become(self, other: "Apps") -> None:
        """Holds the apps of `other` from now on, for everyone who holds this object."""
        self._by_id = {app.id: app for app in other}
        self._by_key = {app.key: app for app in other}
        self.first = other.first

    def by_key(self, key: str) -> App | None:
        """The app that a WebSocket's path or an `auth_key` names."""
        return self._by_key.get(key)

    def by_id(self, app_id: str) -> App | None:
        """The app that an HTTP API path names."""
        return self._by_id.get(app_id)

    def __iter__(self) -> Iterator[App]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    apps: tuple[App, ...] = ()


def read_apps(path: Path) -> Apps:
    """The apps of the TOML file at `path`.

    Raises:
        AppsError: The file can't be read, is no TOML, or has unknown, missing or wrong keys.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise AppsError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise AppsError(f"{path}: not a text file in UTF-8") from None
    return parse_apps(text, str(path))


def parse_apps(text: str, name: str = "apps.toml") -> Apps:
    """The apps of TOML `text`; `name` is the file's name in messages.

    Raises:
        AppsError: As `read_apps`.
    """
    try:
        return Apps(msgspec.toml.decode(text, type=_File).apps)
    except msgspec.ValidationError as error:
        raise AppsError(_located(str(error), text, name)) from None
    except msgspec.DecodeError as error:
        raise AppsError(f"{name}: not TOML: {error}") from None
    except AppsError as error:
        raise AppsError(f"{name}: {error}") from None


def _located(message: str, text: str, name: str) -> str:
    """Adds the line to a message that ends in a path such as `$.apps[1].webhooks[0].url`."""
    what, _, where = message.partition(" - at `$")
    indexes = [int(index) for index in re.findall(r"\[(\d+)\]", where)]
    keys = [key for key in re.findall(r"\.([a-z_]+)", where) if key not in {"apps", "webhooks"}]
    unknown = re.search(r"unknown field `([^`]+)`", what)
    key = unknown.group(1) if unknown else (keys[0] if keys else None)
    line = _line_of(text.splitlines(), indexes, "webhooks" in where, key)
    sentence = f"{what[:1].lower()}{what[1:]}"
    path = where.strip("`.")
    return f"{name}:{line}: {path}: {sentence}" if path else f"{name}:{line}: {sentence}"


def _line_of(lines: list[str], indexes: list[int], in_webhook: bool, key: str | None) -> int:
    """The line, from 1, of `key` in the numbered table, or of the table's header."""
    at = 0
    if indexes:
        at = _header(lines, "[[apps]]", indexes[0], at)
    if in_webhook and len(indexes) > 1:
        at = _header(lines, "[[apps.webhooks]]", indexes[1], at)
    if key is not None:
        assignment = re.compile(rf"\s*{re.escape(key)}\s*=|\s*\[+{re.escape(key)}\]+")
        for number in range(at, len(lines)):
            if assignment.match(lines[number]):
                return number + 1
    return at + 1


def _header(lines: list[str], header: str, index: int, start: int) -> int:
    """The position of the `index`-th `header` line from `start` on."""
    found = [n for n in range(start, len(lines)) if lines[n].strip().startswith(header)]
    return found[index] if index < len(found) else start
