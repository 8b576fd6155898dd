"""Does what the pure protocol of a connection asks for: the effects, in order.

What takes time runs as a task that the node owns; a connection that ends meanwhile takes no more
bytes, so tasks need not be told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, assert_never

import structlog

from gateway import frames
from gateway.broker import BrokerUnavailable, Publication
from gateway.commands import Reply, reply_frame
from gateway.errors import CommandError, ErrorCode
from gateway.messages import Execute, Relay, Send, SignedIn, Subscribe, Unsubscribe
from gateway.webhooks import client_event

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from gateway.connections import NodeConnection
    from gateway.messages import Effect

log = structlog.get_logger(__name__)

_NOT_DELIVERED: Final = frames.frame(
    frames.error_body("The client event could not be delivered; try again shortly")
)


def perform(connection: NodeConnection, effects: Sequence[Effect]) -> None:
    """Performs effects, or starts to."""
    node = connection.node
    for effect in effects:
        match effect:
            case Send():
                connection.write(effect.frames)
            case Subscribe():
                if node.subscribing.at_once(connection, effect):
                    connection.pusher.opened()
                else:
                    socket_id = connection.pusher.socket_id
                    node.spawn(_subscribe(connection, effect), "subscribe", socket_id=socket_id)
            case SignedIn():
                node.users.sign_in(connection, connection.pusher.app.id, effect.user_id)
                if effect.watchlist is not None:
                    node.users.watch(connection, effect.watchlist)
            case Unsubscribe():
                node.subscribing.end(connection, effect.channel)
            case Relay():
                _relay(connection, effect)
            case Execute():
                node.spawn(_execute(connection, effect), "command", channel=effect.channel)
            case _:
                assert_never(effect)


async def _subscribe(connection: NodeConnection, effect: Subscribe) -> None:
    """Subscribes, then goes on with the messages that waited for it."""
    pusher, node = connection.pusher, connection.node
    try:
        await node.subscribing.later(connection, effect)
    finally:
        pusher.opened()
        while connection.is_open:
            effects = pusher.resume(node.now())
            if effects is None:
                break
            perform(connection, effects)
        if not pusher.congested:
            connection.resume_reading()


def _relay(connection: NodeConnection, effect: Relay) -> None:
    """Publishes a client event, or tells its sender that it could not."""
    pusher, node = connection.pusher, connection.node
    publication = Publication(
        pusher.app.id, effect.channel, effect.body, pusher.socket_id, by_client=True
    )
    hook = node.webhooks.hook(pusher.app.id, "client_event")
    if hook:
        telling = _relay_told(connection, publication, hook)
        node.spawn(telling, "relay", channel=effect.channel)
        return
    try:
        accepted = node.send([publication])
    except BrokerUnavailable:
        connection.write(_NOT_DELIVERED)
        return

    def relayed(accepted: asyncio.Future[Any]) -> None:
        # Instead of a task that would wait for nothing else.
        if accepted.cancelled() or accepted.exception() is not None:
            connection.write(_NOT_DELIVERED)
        else:
            node.telemetry.publications_sent.inc()

    accepted.add_done_callback(relayed)


async def _relay_told(connection: NodeConnection, publication: Publication, hook: bytes) -> None:
    """Publishes a client event of which a webhook is told."""
    told = client_event(publication.body, connection.pusher.socket_id)
    try:
        await connection.node.publish_told(publication, hook, told)
    except BrokerUnavailable:
        connection.write(_NOT_DELIVERED)


async def _execute(connection: NodeConnection, effect: Execute) -> None:
    """Runs a goal command; whatever happens, the client gets its reply."""
    pusher, commands = connection.pusher, connection.node.commands
    identity, request_id = pusher.identity, effect.command.request_id
    try:
        if commands is None or identity is None:
            reply = Reply(request_id, None, CommandError.of(ErrorCode.UNAVAILABLE))
        else:
            reply = await commands.execute(effect.command, identity)
    except Exception:
        log.exception("command_failed", request_id=request_id, channel=effect.channel)
        reply = Reply(request_id, None, CommandError.of(ErrorCode.INTERNAL))
    finally:
        pusher.commands_running -= 1
    connection.write(reply_frame(effect.channel, reply))
