"""Webhooks: what an app's backend is told of, as it is told. Contract and bodies.

What an implementation promises:

- **Durable.** What happens and its record are one atomic step; from then on it is told, whichever
  node dies.
- **At least once, in order.** Events of one endpoint leave in the order of their records, many in
  one call. A node that dies between the endpoint's answer and its own note makes another node send
  that batch again.
- **Ends wait.** `channel_vacated` and `member_removed` count after `DUET_WEBHOOK_DELAY_S`; who
  comes back before has never left, and neither the end nor the coming is told.
- **Given up** is an event that is older than `DUET_WEBHOOK_GIVE_UP_S` when a call with it fails.
- **Bounded.** Of more than about 10,000 waiting events of an endpoint the oldest are dropped, and
  counted.
- Endpoints wait for nobody but themselves.

Source: docs/pusher-compatibility.md 2.3.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec

from gateway.auth import hmac_hex

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.apps import App

# What comes takes back the end of the same name.
END_OF: Final = {"channel_occupied": "channel_vacated", "member_added": "member_removed"}

# The functions of the scripts that record what webhooks tell of.
BEHIND: Final = ("webhook_facts",)

_encode = msgspec.json.Encoder().encode


class Endpoint(NamedTuple):
    """Where one app wants to hear of some events.

    Attributes:
        digest: Names the address in Redis.
    """

    url: str
    digest: str
    events: frozenset[str]


class Webhooks(Protocol):
    """Whom the scripts that change something are to tell of it."""

    def hook(self, app_id: str, event: str) -> bytes:
        """What a script is given that may see `event` or its end happen; empty: nobody asks."""


class NoWebhooks:
    """Tells nobody anything: for nodes without a queue."""

    def hook(self, app_id: str, event: str) -> bytes:
        """See `Webhooks`."""
        del app_id, event
        return b""


def endpoints(app: App) -> tuple[Endpoint, ...]:
    """The app's endpoints; an address that is named twice is one, which hears of all."""
    wanted: dict[str, frozenset[str]] = {}
    for hook in app.webhooks:
        wanted[hook.url] = wanted.get(hook.url, frozenset()) | frozenset(hook.events)
    return tuple(Endpoint(url, _digest(url), events) for url, events in wanted.items())


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def signed_call(app: App, events: Sequence[bytes], now_ms: int) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of one call; `events` are JSON.

    `time_ms` is the time of this call, not of the first one: pusher-http-python refuses what is
    five minutes old.
    """
    body = b'{"time_ms":%d,"events":[%b]}' % (now_ms, b",".join(events))
    return body, {
        # pusher-http-node compares it with exactly this.
        "Content-Type": "application/json",
        "X-Pusher-Key": app.key,
        "X-Pusher-Signature": hmac_hex(app.secret, body),
    }


class _Relayed(msgspec.Struct):
    """The body of a relayed client event."""

    event: str
    channel: str
    data: msgspec.Raw
    user_id: str | msgspec.UnsetType = msgspec.UNSET


_decode_relayed = msgspec.json.Decoder(_Relayed).decode


def client_event(body: bytes, socket_id: str) -> bytes:
    """The JSON of what is told of a client event that was relayed as `body`.

    Its `data` is always a string, as in a publication: the text itself when the client sent text,
    else its JSON. Typed libraries read nothing else.
    """
    relayed = _decode_relayed(body)
    data = bytes(relayed.data)
    told: dict[str, object] = {
        "name": "client_event",
        "channel": relayed.channel,
        "event": relayed.event,
        "data": msgspec.json.decode(data) if data[:1] == b'"' else data.decode(),
        "socket_id": socket_id,
    }
    if relayed.user_id is not msgspec.UNSET:
        told["user_id"] = relayed.user_id
    return _encode(told)


def event_bytes(name: str, channel: str, user_id: str | None = None) -> bytes:
    """The JSON of an event that has nothing to say beside whom it is about."""
    told = {"name": name, "channel": channel}
    if user_id is not None:
        told["user_id"] = user_id
    return _encode(told)


def fact_text(app_id: str, event: str, channel: str, user_id: str = "") -> str:
    """The end that `event` takes back, as the scripts know it."""
    return f"{app_id} {END_OF[event]} {channel} {user_id}"
