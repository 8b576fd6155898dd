"""What an app may do about its users through the Pusher HTTP API.

Source: docs/pusher-compatibility.md 1.8, 2.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway.api_call import NOTHING, UNREACHABLE, Answer, refused
from gateway.broker import BrokerUnavailable

if TYPE_CHECKING:
    from gateway.api_call import ApiCall

MAX_USER_ID: Final = 200


async def terminate_connections(call: ApiCall) -> Answer:
    """`POST /apps/{id}/users/{id}/terminate_connections`: closes the user's sockets everywhere.

    The answer is the same whether the user has any.
    """
    [user_id] = call.arguments
    if len(user_id) > MAX_USER_ID:
        return refused(400, f"a user's id has at most {MAX_USER_ID} characters")
    try:
        await call.parts.node.terminate_user(call.app.id, user_id)
    except BrokerUnavailable:
        return UNREACHABLE
    return NOTHING
