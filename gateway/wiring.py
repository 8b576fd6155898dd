"""Builds the parts of one process, in the order in which they need each other.

Whatever was started is registered to be stopped, in reverse: first the sockets are sent elsewhere
and what is under way ends, then the connections to Redis and MongoDB are closed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway.deliver import Deliverer
from gateway.escrow_client import EscrowClient
from gateway.escrow_worker import EscrowCounter, EscrowWorker
from gateway.extensions import ExtensionError, receivers_with
from gateway.goal_commands import GoalCommands
from gateway.lookout import Lookout
from gateway.node import Node
from gateway.parts import Parts
from gateway.publisher import NodePublisher
from gateway.redis_parts import redis_parts
from gateway.settings import SettingsError
from gateway.tasks import for_ever
from gateway.telemetry import Telemetry
from gateway.token_keys import authorizer_of
from gateway.webhook_sender import WebhookSender
from persistence.clock import Clock
from persistence.deadlines import Deadlines
from persistence.errors import StoreUnavailable
from persistence.escrow_calls import EscrowBook, EscrowCalls
from persistence.goals import Goals
from persistence.sessions import Sessions
from persistence.store import Store, StoreOptions
from statemachine.goal import Limits

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from gateway.apps import Apps
    from gateway.redis_parts import RedisParts
    from gateway.settings import Settings
    from gateway.token_keys import FixedAuthorizer, JwksAuthorizer
    from statemachine.receivers import Registry

# Of a command's time, what the database may take; the rest is for the reply.
_STORE_SHARE: Final = 0.8
# A claim ends sooner than the lease, so that whoever takes it over has also done the work by then.
_CLAIM_SHARE: Final = 0.8
# Of a command's time, what dropping cached views may take before the reply goes out without.
_DROP_SHARE: Final = 0.15
# Nobody tells a node that a webhook is due, so it looks as often as a webhook may be late.
_WEBHOOKS_EVERY_S: Final = 0.25


class StartError(Exception):
    """The gateway can't be started; the message is one line for a person."""


async def open_parts(
    stack: AsyncExitStack,
    settings: Settings,
    apps: Apps,
    clock: Clock | None = None,
    registry: Registry | None = None,
) -> Parts:
    """Starts everything; `stack` stops it again.

    Args:
        stack: Closed when the process ends, or when this raises.
        settings: Already found good by `gateway.preflight`, or the demo's.
        apps: The first carries the invitations' channels.
        clock: Another one than the process's, for tests that shift it.
        registry: The receivers, the platform's own among them; by default Duet's alone.

    Raises:
        StartError: MongoDB can't be used, or a setting is missing or wrong.
    """
    settings = settings.named()
    clock = clock or Clock()
    telemetry = Telemetry()
    registry = registry or _receivers(settings)
    authorizer = _authorizer(settings)
    stack.push_async_callback(authorizer.close)
    redis = _redis_parts(settings, apps)
    stack.push_async_callback(redis.client.aclose)
    store = await open_store(settings, clock)
    stack.push_async_callback(store.close)
    node = _node(settings, apps, redis, clock, authorizer, telemetry)
    escrow = _escrow_client(settings, clock, telemetry)
    if escrow is not None:
        stack.push_async_callback(escrow.close)
    goals = Goals(store, registry, _limits(settings), escrow)
    publisher = NodePublisher(node, redis.presence)
    escrow_looks = None if escrow is None else Lookout(clock, settings.poll_interval_s)
    deliverer = Deliverer(
        store=store,
        registry=registry,
        deadlines=Deadlines(store, goals),
        passes=redis.passes,
        publisher=publisher,
        telemetry=telemetry,
        app_id=apps.first.id,
        poll_interval_s=settings.poll_interval_s,
        room_pass_s=settings.room_pass_s,
        cache_deadline_s=settings.command_timeout_s * _DROP_SHARE,
        escrow_looks=escrow_looks,
    )
    commands = GoalCommands(
        goals=goals,
        sessions=Sessions(store, goals),
        deliverer=deliverer,
        passes=redis.passes,
        clock=clock,
        telemetry=telemetry,
        pass_secret=_pass_key(settings),
        room_pass_s=settings.room_pass_s,
    )
    node.commands = commands
    await _start(stack, settings, clock, node, redis, publisher, deliverer)
    if escrow is not None and escrow_looks is not None:
        worker = _escrow_worker(settings, store, goals, escrow, escrow_looks)
        publisher.spawn(for_ever(worker.run, "escrow calls"), "escrow calls")
    counter = EscrowCounter(EscrowBook(store), telemetry, has_service=escrow is not None)
    publisher.spawn(for_ever(counter.run, "escrow counts"), "escrow counts")
    publisher.started()
    return Parts(
        settings,
        apps,
        clock,
        telemetry,
        authorizer,
        store,
        commands,
        node,
        redis.once,
        redis.rates,
    )


async def _start(
    stack: AsyncExitStack,
    settings: Settings,
    clock: Clock,
    node: Node,
    redis: RedisParts,
    publisher: NodePublisher,
    deliverer: Deliverer,
) -> None:
    """Lets them begin, in this order; `stack` ends them in reverse."""
    await node.start()
    stack.push_async_callback(node.stop, settings.drain_s)
    redis.rates.start()
    stack.push_async_callback(redis.rates.stop)
    sender = WebhookSender(
        redis.webhooks,
        node.apps,
        clock,
        node.telemetry,
        settings.webhook_timeout_s,
        min(settings.poll_interval_s, _WEBHOOKS_EVERY_S),
    )
    sender.start()
    stack.push_async_callback(sender.stop)
    stack.push_async_callback(publisher.stop_loops)
    await deliverer.start()


def _escrow_client(settings: Settings, clock: Clock, telemetry: Telemetry) -> EscrowClient | None:
    """The way to the platform's payment service, if there is one."""
    if settings.escrow_url is None:
        return None
    if settings.escrow_secret is None:
        raise StartError("DUET_ESCROW_SECRET: must be set together with DUET_ESCROW_URL")
    return EscrowClient(
        settings.escrow_url, settings.escrow_secret, settings.escrow_timeout_s, clock, telemetry
    )


def _escrow_worker(
    settings: Settings, store: Store, goals: Goals, port: EscrowClient, looks: Lookout
) -> EscrowWorker:
    """What says to the payment service what waits for it."""
    calls = EscrowCalls(
        store,
        goals,
        port,
        timeout_s=settings.escrow_timeout_s,
        give_up_s=settings.escrow_give_up_s,
    )
    return EscrowWorker(calls, store.clock, looks)


def _authorizer(settings: Settings) -> FixedAuthorizer | JwksAuthorizer:
    try:
        return authorizer_of(settings)
    except SettingsError as error:
        raise StartError(str(error)) from None


def _redis_parts(settings: Settings, apps: Apps) -> RedisParts:
    try:
        return redis_parts(settings, apps)
    except SettingsError as error:
        raise StartError(str(error)) from None


def _node(
    settings: Settings,
    apps: Apps,
    redis: RedisParts,
    clock: Clock,
    authorizer: FixedAuthorizer | JwksAuthorizer,
    telemetry: Telemetry,
) -> Node:
    """The node without its commands, which need it before it has them."""
    node = Node(
        settings,
        apps,
        redis.broker,
        redis.presence,
        clock,
        authorizer,
        None,
        telemetry,
        occupancy=redis.occupancy,
        online=redis.online,
        cache=redis.cache,
        app_connections=redis.app_connections,
    )
    node.webhooks = redis.webhooks
    return node


def _pass_key(settings: Settings) -> str:
    if settings.pass_key is None:
        raise StartError("DUET_PASS_SECRET: must be set when DUET_JWT_SECRET is not")
    return settings.pass_key


async def open_store(settings: Settings, clock: Clock, *, with_indexes: bool = True) -> Store:
    """MongoDB as the settings say; missing indexes are made unless it is said otherwise.

    Raises:
        StartError: There is no address, or nothing usable answers there.
    """
    if settings.mongodb_url is None:
        raise StartError("DUET_MONGODB_URL: must be the address of a MongoDB replica set")
    options = StoreOptions(
        pool_size=settings.mongodb_pool_size,
        # Half the pool, so that a command in a transaction never waits for its own connection.
        concurrency=max(1, settings.mongodb_pool_size // 2),
        deadline_s=settings.command_timeout_s * _STORE_SHARE,
        lease_s=settings.lease_s * _CLAIM_SHARE,
        node_name=settings.node_name,
    )
    try:
        return await Store.open(
            settings.mongodb_url,
            settings.mongodb_database,
            clock,
            options,
            with_indexes=with_indexes,
        )
    except StoreUnavailable as error:
        raise StartError(f"DUET_MONGODB_URL: {error}") from None


def _receivers(settings: Settings) -> Registry:
    try:
        return receivers_with(settings.receivers)
    except ExtensionError as error:
        raise StartError(f"DUET_RECEIVERS: {error}") from None


def _limits(settings: Settings) -> Limits:
    return Limits(
        invitation_ttl_s=settings.invitation_ttl_s,
        refund_delay_s=settings.refund_delay_s,
        show_grace_s=settings.show_grace_s,
        amount_max_minor=settings.amount_max_minor,
        prepaid_duration_max_s=settings.prepaid_duration_max_s,
    )
