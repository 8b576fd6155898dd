"""The `info` attributes of the Pusher HTTP API: which may be asked for, and their values.

`user_count` is distinct users of a presence channel, `subscription_count` connections, both across
the cluster.

Source: docs/pusher-compatibility.md 2.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway.api_call import Answer, refused
from gateway.channels import ChannelKind, channel_kind

if TYPE_CHECKING:
    from collections.abc import Collection

    from gateway.api_call import ApiCall

USER_COUNT: Final = "user_count"
SUBSCRIPTION_COUNT: Final = "subscription_count"
CACHE: Final = "cache"

CHANNEL_COUNTS: Final = frozenset({USER_COUNT, SUBSCRIPTION_COUNT})


def info_attributes(info: str, known: frozenset[str]) -> frozenset[str] | Answer:
    """The attributes of a comma-separated list, or the refusal of one that is not `known`."""
    names = frozenset(name.strip() for name in info.split(",")) - {""}
    for name in sorted(names - known):
        return refused(400, f"there is no such info here: {name[:64]!a}")
    return names


def is_presence(channel: str) -> bool:
    """Whether the channel has users."""
    return channel_kind(channel) is ChannelKind.PRESENCE


async def channel_counts(
    call: ApiCall, channels: Collection[str], attributes: frozenset[str]
) -> dict[str, dict[str, int]]:
    """The counts asked for, of each channel; users where there can be any.

    Raises:
        BrokerUnavailable: They could not be read in time.
    """
    counts: dict[str, dict[str, int]] = {channel: {} for channel in channels}
    node, app_id = call.parts.node, call.app.id
    if USER_COUNT in attributes:
        present = [channel for channel in channels if is_presence(channel)]
        users = await node.presence.user_counts(app_id, present) if present else {}
        for channel, count in users.items():
            counts[channel][USER_COUNT] = count
    if SUBSCRIPTION_COUNT in attributes:
        connections = await node.occupancy.counts(app_id, channels)
        for channel in channels:
            counts[channel][SUBSCRIPTION_COUNT] = connections.get(channel, 0)
    return counts
