"""Channel names: which are valid, what their prefixes mean. Pure.

Source: docs/pusher-compatibility.md 1.6.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final

_NAME: Final = re.compile(r"[A-Za-z0-9_\-=@,.;]+", re.ASCII)

# "#" is reserved; this family is the only use of it.
USER_EVENTS: Final = "#server-to-user-"
# Characters of a user's id in `pusher:signin` and on presence channels, of any kind. Not worth a
# setting.
USER_ID_MAX: Final = 128

# The families whose last event from the HTTP API is kept for those who subscribe later.
_CACHE: Final = ("cache-", "private-cache-", "private-encrypted-cache-", "presence-cache-")
# Hidden channels on which a user's coming and going is published (`gateway.users`).
WATCHED: Final = "#watch-"


class ChannelKind(Enum):
    """What subscribing to a channel takes.

    `private-encrypted-` is private to a server, which passes its payload through; the `cache-`
    families have the kind of their base (`presence-cache-x` is a presence channel).
    """

    PUBLIC = 1
    PRIVATE = 2
    PRESENCE = 3
    USER_EVENTS = 4


def channel_kind(name: str) -> ChannelKind:
    """The kind that a valid name's prefix says; prefixes count at the beginning only."""
    if name.startswith("private-"):
        return ChannelKind.PRIVATE
    if name.startswith("presence-"):
        return ChannelKind.PRESENCE
    if name.startswith(USER_EVENTS):
        return ChannelKind.USER_EVENTS
    return ChannelKind.PUBLIC


def is_cache_channel(name: str) -> bool:
    """Whether the last event that was published to the channel is kept."""
    # Most names are settled by the first half, at a tenth of the cost.
    return "cache-" in name and name.startswith(_CACHE)


def is_channel_name(name: str, longest: int) -> bool:
    """Whether `name` has at most `longest` characters, all of them allowed.

    A user's own channel is named after the id that the user signs in with, whatever that is:
    platforms have ids such as `auth0|5f7c` or `ann+news@example.com`.
    """
    if name.startswith(USER_EVENTS):
        return 0 < len(name) - len(USER_EVENTS) <= USER_ID_MAX
    return len(name) <= longest and _NAME.fullmatch(name) is not None
