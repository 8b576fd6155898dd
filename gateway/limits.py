"""What one connection may do: the part of the settings that the pure protocol needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from gateway.settings import Settings


class Limits(msgspec.Struct, frozen=True):
    """What one connection may do; one instance for all connections of a node."""

    channel_name_max: int
    event_name_max: int
    max_event_bytes: int
    user_info_max_bytes: int
    client_events_per_s: int
    commands_per_s: int
    commands_in_flight: int
    strict: bool

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """The limits that the settings set."""
        return cls(
            channel_name_max=settings.channel_name_max,
            event_name_max=settings.event_name_max,
            max_event_bytes=settings.max_event_bytes,
            user_info_max_bytes=settings.presence_user_info_max_bytes,
            client_events_per_s=settings.client_event_rate_per_s,
            commands_per_s=settings.command_rate_per_s,
            commands_in_flight=settings.commands_in_flight,
            strict=settings.strict_protocol,
        )
