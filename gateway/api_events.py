"""Publishing through the Pusher HTTP API: one event, a batch, and the deprecated form.

With an idempotency key the publications and the record of the answer are one atomic step in Redis,
so a caller who heard no answer may ask again: within two minutes the same key gets the same answer
and publishes nothing, whatever its body.

Source: docs/pusher-compatibility.md 1.6 (names), 2.2.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.api_call import NOTHING, UNREACHABLE, Answer, answered, refused
from gateway.api_info import CHANNEL_COUNTS, channel_counts, info_attributes
from gateway.broker import BrokerUnavailable, Publication
from gateway.channels import is_channel_name
from gateway.frames import encode_event

if TYPE_CHECKING:
    from gateway.api_call import ApiCall
    from gateway.settings import Settings

MAX_CHANNELS: Final = 100
MAX_BATCH: Final = 10
MAX_KEY: Final = 128

_SOCKET_ID: Final = re.compile(r"\d{1,20}\.\d{1,20}", re.ASCII)
_RESERVED: Final = ("pusher:", "pusher_internal:")
_ENCRYPTED: Final = "private-encrypted-"


class Event(msgspec.Struct, frozen=True):
    """The body of `POST /apps/{id}/events`."""

    name: str
    data: str
    channels: list[str] | None = None
    channel: str | None = None
    socket_id: str | None = None
    info: str | None = None


class BatchEvent(msgspec.Struct, frozen=True):
    """One event of `POST /apps/{id}/batch_events`."""

    name: str
    data: str
    channel: str
    socket_id: str | None = None
    info: str | None = None


class Batch(msgspec.Struct, frozen=True):
    """The body of `POST /apps/{id}/batch_events`."""

    batch: list[BatchEvent]


_decode_event = msgspec.json.Decoder(Event).decode
_decode_batch = msgspec.json.Decoder(Batch).decode
_encode = msgspec.json.Encoder().encode


async def publish(call: ApiCall) -> Answer:
    """`POST /apps/{id}/events`: one event to up to a hundred channels."""
    try:
        event = _decode_event(call.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return refused(400, f"the body is not an event: {error}")
    channels = _channels(event)
    fault = _event_fault(event, channels, call.parts.settings)
    if fault is not None:
        return fault
    try:
        answer = NOTHING
        if event.info:
            attributes = info_attributes(event.info, CHANNEL_COUNTS)
            if isinstance(attributes, Answer):
                return attributes
            answer = answered({"channels": await channel_counts(call, channels, attributes)})
        return await _hand_over(call, _publications(call.app.id, event, channels), answer)
    except BrokerUnavailable:
        return UNREACHABLE


def plain_event(app_id: str, body: bytes, settings: Settings) -> list[Publication] | None:
    """What an event's body publishes; None when it is wrong, or asks for something in return."""
    try:
        event = _decode_event(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    channels = _channels(event)
    if event.info or _event_fault(event, channels, settings) is not None:
        return None
    return _publications(app_id, event, channels)


async def publish_batch(call: ApiCall) -> Answer:
    """`POST /apps/{id}/batch_events`: up to ten events, each to its channel."""
    try:
        batch = _decode_batch(call.body).batch
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return refused(400, f"the body is not a batch of events: {error}")
    if not 0 < len(batch) <= MAX_BATCH:
        return refused(400, f"a batch has 1 to {MAX_BATCH} events")
    publications: list[Publication] = []
    infos: list[dict[str, int]] = []
    try:
        for number, event in enumerate(batch):
            fault = _event_fault(event, [event.channel], call.parts.settings)
            if fault is None and event.info:
                attributes = info_attributes(event.info, CHANNEL_COUNTS)
                if isinstance(attributes, Answer):
                    fault = attributes
                else:
                    counts = await channel_counts(call, [event.channel], attributes)
                    infos.append(counts[event.channel])
            else:
                infos.append({})
            if fault is not None:
                return Answer(fault.status, b"event %d: %b" % (number, fault.body))
            publications += _publications(call.app.id, event, [event.channel])
        asked = any(event.info for event in batch)
        answer = answered({"batch": infos}) if asked else NOTHING
        return await _hand_over(call, publications, answer)
    except BrokerUnavailable:
        return UNREACHABLE


def plain_batch(app_id: str, body: bytes, settings: Settings) -> list[Publication] | None:
    """What a batch's body publishes; None when it is wrong, or asks for something in return."""
    try:
        batch = _decode_batch(body).batch
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not 0 < len(batch) <= MAX_BATCH:
        return None
    publications: list[Publication] = []
    for event in batch:
        if event.info or _event_fault(event, [event.channel], settings) is not None:
            return None
        publications += _publications(app_id, event, [event.channel])
    return publications


async def publish_to_channel(call: ApiCall) -> Answer:
    """`POST /apps/{id}/channels/{name}/events?name=`: deprecated; the body is the data."""
    [channel] = call.arguments
    try:
        data = call.body.decode()
    except UnicodeDecodeError:
        return refused(400, "the body is not UTF-8")
    event = Event(
        call.query.get("name", ""), data, channel=channel, socket_id=call.query.get("socket_id")
    )
    fault = _event_fault(event, [channel], call.parts.settings)
    if fault is not None:
        return fault
    try:
        return await _hand_over(
            call, _publications(call.app.id, event, [channel]), Answer(202, b"{}", True)
        )
    except BrokerUnavailable:
        return UNREACHABLE


def _channels(event: Event) -> list[str]:
    return event.channels or ([event.channel] if event.channel else [])


def _publications(app_id: str, event: Event | BatchEvent, channels: list[str]) -> list[Publication]:
    data = _encode(event.data)
    return [
        Publication(app_id, channel, encode_event(event.name, channel, data), event.socket_id)
        # One named twice gets the event once.
        for channel in (dict.fromkeys(channels) if len(channels) > 1 else channels)
    ]


async def _hand_over(call: ApiCall, publications: list[Publication], answer: Answer) -> Answer:
    """Hands publications to the broker; returns `answer` when it has accepted all.

    Raises:
        BrokerUnavailable: It has not, or not all, in time.
    """
    key = call.idempotency_key
    if key is None:
        await call.parts.node.publish(publications)
        return answer
    if not 0 < len(key) <= MAX_KEY or not key.isascii() or not key.isprintable():
        return refused(400, f"an idempotency key has 1 to {MAX_KEY} printable ASCII characters")
    given = await call.parts.once.publish(call.app.id, key, publications, answer.body)
    if given is None:
        call.parts.telemetry.publications_sent.inc(len(publications))
    return answer if given is None else Answer(answer.status, given, is_json=True)


def _event_fault(
    event: Event | BatchEvent, channels: list[str], settings: Settings
) -> Answer | None:
    if not 0 < len(event.name) <= settings.event_name_max:
        return refused(400, f"name must have 1 to {settings.event_name_max} characters")
    if event.name.startswith(_RESERVED):
        return refused(400, f"names beginning with {' or '.join(_RESERVED)} are the server's own")
    fault = _channels_fault(channels, settings.channel_name_max)
    if fault is not None:
        return fault
    if event.socket_id is not None and not _SOCKET_ID.fullmatch(event.socket_id):
        return refused(400, "socket_id must be two numbers with a dot between them")
    return _size_fault(event.data, settings.max_event_bytes)


def _channels_fault(channels: list[str], name_max: int) -> Answer | None:
    if not 0 < len(channels) <= MAX_CHANNELS:
        return refused(400, f"an event goes to 1 to {MAX_CHANNELS} channels")
    for channel in channels:
        if not is_channel_name(channel, name_max):
            return refused(400, f"not the name of a channel: {channel[:64]!a}")
    if any(name.startswith(_ENCRYPTED) for name in channels) and len(set(channels)) > 1:
        return refused(400, "an encrypted event goes to one channel, whose key it is made with")
    return None


def _size_fault(data: str, max_bytes: int) -> Answer | None:
    """Counts bytes only where the number of characters leaves a doubt."""
    if len(data) * 4 > max_bytes and len(data.encode()) > max_bytes:
        return refused(413, f"data is over {max_bytes} bytes")
    return None
