"""What an app may ask about its channels through the Pusher HTTP API.

Source: docs/pusher-compatibility.md 2.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from gateway.api_call import UNREACHABLE, Answer, answered, refused
from gateway.api_info import (
    CACHE,
    CHANNEL_COUNTS,
    SUBSCRIPTION_COUNT,
    USER_COUNT,
    channel_counts,
    info_attributes,
    is_presence,
)
from gateway.broker import BrokerUnavailable
from gateway.channels import is_cache_channel, is_channel_name

if TYPE_CHECKING:
    from gateway.api_call import ApiCall

_PRESENCE: Final = "presence-"
_OF_ONE: Final = CHANNEL_COUNTS | {CACHE}
_USERS_ONLY: Final = refused(400, "user_count is for channels that begin with presence-")


async def channel_list(call: ApiCall) -> Answer:
    """`GET /apps/{id}/channels`: the occupied channels, by prefix."""
    prefix = call.query.get("filter_by_prefix", "")
    attributes = info_attributes(call.query.get("info", ""), CHANNEL_COUNTS)
    if isinstance(attributes, Answer):
        return attributes
    if USER_COUNT in attributes and not prefix.startswith(_PRESENCE):
        return _USERS_ONLY
    try:
        found = await call.parts.node.occupancy.occupied(call.app.id, prefix)
        # What begins with "#" is a way to one user, not a channel that backends know of.
        occupied = {name: count for name, count in found.items() if name[:1] != "#"}
        counts = await channel_counts(call, list(occupied), attributes - {SUBSCRIPTION_COUNT})
    except BrokerUnavailable:
        return UNREACHABLE
    if SUBSCRIPTION_COUNT in attributes:
        for channel, count in occupied.items():
            counts[channel][SUBSCRIPTION_COUNT] = count
    return answered({"channels": counts})


async def channel_info(call: ApiCall) -> Answer:
    """`GET /apps/{id}/channels/{name}`: whether anyone is there, and what else is asked for."""
    attributes = info_attributes(call.query.get("info", ""), _OF_ONE)
    if isinstance(attributes, Answer):
        return attributes
    return await _info(call, attributes)


async def channel_stats(call: ApiCall) -> Answer:
    """`GET /apps/{id}/channels/{name}/stats`: deprecated; the counts, without being asked."""
    [channel] = call.arguments
    every = CHANNEL_COUNTS if is_presence(channel) else CHANNEL_COUNTS - {USER_COUNT}
    return await _info(call, every)


async def channel_users(call: ApiCall) -> Answer:
    """`GET /apps/{id}/channels/{name}/users`: the ids of a presence channel's members."""
    [channel] = call.arguments
    if not is_presence(channel) or not _is_name(call, channel):
        return refused(400, "users are asked of channels that begin with presence-")
    try:
        members = await call.parts.node.presence.members(call.app.id, channel)
    except BrokerUnavailable:
        return UNREACHABLE
    return answered({"users": [{"id": user_id} for user_id in members]})


async def _info(call: ApiCall, attributes: frozenset[str]) -> Answer:
    [channel] = call.arguments
    if not _is_name(call, channel):
        return refused(400, f"not the name of a channel: {channel[:64]!a}")
    if USER_COUNT in attributes and not is_presence(channel):
        return _USERS_ONLY
    if CACHE in attributes and not is_cache_channel(channel):
        return refused(400, "cache is for cache channels")
    try:
        found = await channel_counts(call, [channel], attributes | {SUBSCRIPTION_COUNT})
        counts = found[channel]
        document: dict[str, Any] = {"occupied": counts[SUBSCRIPTION_COUNT] > 0}
        document |= {name: counts[name] for name in sorted(attributes & CHANNEL_COUNTS)}
        if CACHE in attributes:
            document[CACHE] = await _cached(call, channel)
    except BrokerUnavailable:
        return UNREACHABLE
    return answered(document)


async def _cached(call: ApiCall, channel: str) -> dict[str, Any] | None:
    cached = await call.parts.node.cache.cached(call.app.id, channel)
    if cached is None:
        return None
    data, ttl_s = cached
    return {"data": data, "ttl": ttl_s}


def _is_name(call: ApiCall, channel: str) -> bool:
    return is_channel_name(channel, call.parts.settings.channel_name_max)
