"""The deliver phase in a gateway process: performs effects, and finishes what others left behind.

Right after a commit its outbox is delivered here. Outboxes whose delivery has not finished within
its lease are looked for (`gateway.outbox_loop`), and goals whose deadline comes
(`gateway.deadline_loop`).
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

import structlog

from gateway.broker import BrokerUnavailable, Publication
from gateway.deadline_loop import DeadlineLoop
from gateway.frames import push_body
from gateway.outage import Outage
from gateway.outbox_loop import OutboxLoop
from gateway.platform_code import PlatformCode
from gateway.tasks import for_ever
from persistence.abandoned import AbandonedTransactions
from persistence.errors import StoreError
from persistence.faults import Step, reached
from persistence.intents import Delivery, Done, Refused
from persistence.outbox import DeliveryFailed, Outbox
from persistence.repeated import Repeated
from statemachine.goal import GoalState
from statemachine.receivers import (
    AuthorizeRoom,
    DropChannelData,
    DropSessionToken,
    Effect,
    Invoke,
    Occurrence,
    Push,
    Track,
    authorization,
    preview_channel,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from gateway.lookout import Lookout
    from gateway.redis_passes import PassCache
    from gateway.telemetry import Telemetry
    from persistence.deadlines import Deadlines, DueGoal
    from persistence.store import Store
    from statemachine.receivers import Registry

_log = structlog.get_logger(__name__)

# Run by the commit's own process before the reply, so that the outbox need not run it again.
_DROPS_PASSES = "invalidate_get_session_token_view_cache"
_DROPPED_BEFORE_REPLY = frozenset({_DROPS_PASSES})
_DELIVERIES_AT_ONCE = 16
_PUBLICATIONS_AT_ONCE = 500
# After a commit; those of one moment share a look.
_ESCROW_WITHIN_S = 0.05
_LOOK_AT_MONGODB_EVERY_S = 10.0
_FREE_ABANDONED_EVERY_S = 1.0


class Publisher(Protocol):
    """What the deliver phase needs of the node."""

    async def publish(self, publications: Sequence[Publication]) -> None:
        """Publishes; raises `BrokerUnavailable`."""

    async def drop_channel_data(self, streamer_id: str) -> None:
        """Drops cached channel data on every node; raises `BrokerUnavailable`."""

    async def presence_user_ids(self, app_id: str, channel: str) -> list[str]:
        """The users present in a channel; raises `BrokerUnavailable`."""

    def spawn(self, coroutine: Coroutine[object, object, None], name: str) -> None:
        """Runs an owned task."""


class Deliverer:
    """Performs what commits left to do."""

    def __init__(
        self,
        *,
        store: Store,
        registry: Registry,
        deadlines: Deadlines,
        passes: PassCache,
        publisher: Publisher,
        telemetry: Telemetry,
        app_id: str,
        poll_interval_s: float,
        room_pass_s: float,
        cache_deadline_s: float,
        escrow_looks: Lookout | None = None,
    ) -> None:
        self.outbox = Outbox(store, registry, self)
        self._store = store
        self._abandoned = AbandonedTransactions(store)
        self._deadlines = deadlines
        self._passes = passes
        self._publisher = publisher
        self._telemetry = telemetry
        self._app_id = app_id
        self._escrow_looks = escrow_looks
        self._deadline_loop = DeadlineLoop(
            deadlines=deadlines,
            clock=store.clock,
            interval_s=poll_interval_s,
            spawn=publisher.spawn,
            fire=self._fire,
        )
        self._outbox_loop = OutboxLoop(
            outbox=self.outbox,
            clock=store.clock,
            interval_s=poll_interval_s,
            spawn=publisher.spawn,
            deliver=self._deliver,
        )
        # Well within the lease, so that nobody takes over what is still running.
        self._platform = PlatformCode(store.options.lease_s / 2, store.clock.monotonic_s)
        self._room_pass_s = room_pass_s
        self._cache_deadline_s = cache_deadline_s
        self._passes_kept = Repeated(_log, "pass_cache_not_dropped")
        self._unrecorded = Repeated(_log, "outbox_not_recorded")
        self._unmet = Repeated(_log, "deadline_not_met")
        # Bounds what a burst (a stream that ends with a thousand invitations) asks of MongoDB.
        self._slots = asyncio.Semaphore(_DELIVERIES_AT_ONCE)

    async def start(self) -> None:
        """Takes over what an earlier process of this node's name left, and starts the loops."""
        try:
            await self._abandoned.free_predecessors()
            taken = await self.outbox.take_over()
        except StoreError as error:
            # Another dead node's transaction may lock what this one had claimed. That is no reason
            # not to serve: the claims run out.
            _log.warning("not_taken_over", why=str(error))
        else:
            _log.info("taken_over", goals=taken)
            self._telemetry.mongodb_alive.set(1)
        for loop, name in (
            (self._outbox_loop.run, "outboxes"),
            (self._deadline_loop.run, "deadlines"),
            (self._look_at_mongodb, "database time"),
            (self._free_abandoned, "abandoned transactions"),
        ):
            self._publisher.spawn(for_ever(loop, name), name)

    async def after_commit(self, done: Done) -> None:
        """Drops the cached passes before anyone hears of the commit, then delivers in a task.

        Also when nothing is left to deliver here: then another process delivers this commit behind
        earlier ones, or a Session has ended that no invitation stood in.
        """
        self._note(done)
        ran: frozenset[str] = frozenset()
        reached(Step.BEFORE_RECEIVER, _DROPS_PASSES)
        try:
            async with asyncio.timeout(self._cache_deadline_s):
                await self._passes.drop(done.session_id)
            reached(Step.AFTER_RECEIVER, _DROPS_PASSES)
            ran = _DROPPED_BEFORE_REPLY
        except (BrokerUnavailable, TimeoutError) as error:
            self._passes_kept.met(session=done.session_id, why=str(error))
        for delivery in done.deliveries:
            self._publisher.spawn(self._deliver_own(delivery, ran), "deliver")

    async def stream_changed(self, streamer_id: str) -> None:
        """Tells the nodes that a stream went on or off; without Redis their caches run out."""
        try:
            await self._publisher.drop_channel_data(streamer_id)
        except BrokerUnavailable as error:
            _log.warning("channel_data_not_dropped", streamer=streamer_id, why=str(error))

    async def perform(self, occurrence: Occurrence, effects: Sequence[Effect]) -> None:
        """Performs one receiver's effects.

        Raises:
            DeliveryFailed: something it needs does not answer; it is to be tried again.
        """
        try:
            pushes = [effect for effect in effects if isinstance(effect, Push)]
            if pushes:
                await self._publisher.publish(
                    [
                        Publication(
                            self._app_id, channel, push_body(push.event, channel, push.data)
                        )
                        for push in pushes
                        for channel in push.channels
                    ]
                )
            for effect in effects:
                await self._perform_one(occurrence, effect)
        except (BrokerUnavailable, StoreError) as error:
            raise DeliveryFailed(str(error)) from error

    async def _perform_one(self, occurrence: Occurrence, effect: Effect) -> None:
        match effect:
            case DropSessionToken():
                await self._passes.drop(effect.session_id)
            case DropChannelData():
                await self._publisher.drop_channel_data(effect.streamer_id)
            case AuthorizeRoom():
                await self._authorize_room(effect)
            case Track():
                if await self.outbox.track(effect):
                    agreed = "agreed" if effect.record["agreed"] else "not_agreed"
                    self._telemetry.goals_ended.labels(agreed).inc()
            case Invoke():
                await self._platform.run(effect.handler, occurrence)
            case _:
                pass

    async def _authorize_room(self, effect: AuthorizeRoom) -> None:
        """Pushes `stream.authorized` to everyone who is in the streamer's room at present."""
        room = f"presence-stream@{effect.streamer_id}"
        user_ids = await self._publisher.presence_user_ids(self._app_id, room)
        publications = []
        for user_id in user_ids:
            if user_id == effect.streamer_id:
                continue
            channel = preview_channel(effect.streamer_id, user_id)
            data = authorization(
                session_id=effect.session_id,
                streamer_id=effect.streamer_id,
                viewer_id=user_id,
                nbf=effect.nbf,
                duration_s=self._room_pass_s,
            ) | {"event_id": effect.event_id}
            body = push_body("stream.authorized", channel, data)
            publications.append(Publication(self._app_id, channel, body))
        for first in range(0, len(publications), _PUBLICATIONS_AT_ONCE):
            await self._publisher.publish(publications[first : first + _PUBLICATIONS_AT_ONCE])

    def _note(self, done: Done) -> None:
        """Has the loops look in time for what a commit has made due."""
        if due_at := done.goal.get("due_at"):
            self._deadline_loop.note(datetime.fromisoformat(due_at))
        if self._escrow_looks is not None and done.goal.get("state") != GoalState.INVITED:
            self._escrow_looks.within(_ESCROW_WITHIN_S)

    async def _deliver_own(self, delivery: Delivery, ran: frozenset[str]) -> None:
        """Delivers what a commit of this process has left, unless its turn comes too late."""
        over_at_s = self._store.clock.monotonic_s() + self._store.options.lease_s
        async with self._slots:
            if self._store.clock.monotonic_s() < over_at_s:
                await self._deliver(delivery, ran)

    async def _deliver(self, delivery: Delivery, ran: frozenset[str] = frozenset()) -> bool:
        """Delivers an outbox; tells whether all of it is."""
        try:
            finished = await self.outbox.deliver(delivery, ran)
        except StoreError as error:
            # What ran is not written down; the lease runs out and it runs once more.
            self._unrecorded.met(goal=str(delivery.goal_id), why=str(error))
            return False
        except Exception:  # noqa: BLE001 - once per task, logged with the goal
            # One goal that can't be delivered must not keep the others waiting.
            _log.exception("delivery_failed", goal=str(delivery.goal_id))
            return False
        if not finished:
            # It is tried again before the next look would have come.
            self._outbox_loop.soon()
            self._telemetry.outbox_retries.inc()
        return finished

    async def _fire(self, due: DueGoal) -> None:
        late_s = (self._store.clock.now() - due.due_at).total_seconds()
        try:
            answer = await self._deadlines.fire(due)
        except StoreError as error:
            # The claim's lease runs out and the deadline is found again.
            self._unmet.met(goal=str(due.goal_id), why=str(error))
            return
        except Exception:  # noqa: BLE001 - once per task, logged with the goal
            # As above: the loop lives on, and the goal is found again.
            _log.exception("deadline_failed", goal=str(due.goal_id), command=due.command)
            return
        self._telemetry.deadline_lateness.observe(late_s)
        if isinstance(answer, Refused):
            _log.info("deadline_was_over", goal=str(due.goal_id), code=answer.code)
            return
        await self.after_commit(answer)
        reached(Step.BEFORE_REPLY, due.command)

    async def _free_abandoned(self) -> None:
        outage = Outage(
            _log, "abandoned_transactions_not_freed", "abandoned_transactions_freed_again"
        )
        while True:
            await asyncio.sleep(_FREE_ABANDONED_EVERY_S)
            try:
                await self._abandoned.free_left()
            except StoreError as error:
                outage.failed(self._store.clock.monotonic_s(), error)
            else:
                outage.worked(self._store.clock.monotonic_s())

    async def _look_at_mongodb(self) -> None:
        outage = Outage(_log, "mongodb_lost", "mongodb_answers_again")
        while True:
            await asyncio.sleep(_LOOK_AT_MONGODB_EVERY_S)
            try:
                await self._store.follow_time()
                await self._count()
            except StoreError as error:
                self._telemetry.mongodb_alive.set(0)
                outage.failed(self._store.clock.monotonic_s(), error)
            else:
                self._telemetry.mongodb_alive.set(1)
                outage.worked(self._store.clock.monotonic_s())

    async def _count(self) -> None:
        """Counts what is left to do in the whole installation."""
        overdue = await self._deadlines.overdue()
        pending = await self.outbox.pending()
        oldest_at = await self.outbox.oldest_at() if pending else None
        age_s = (self._store.clock.now() - oldest_at).total_seconds() if oldest_at else 0.0
        self._telemetry.deadlines_overdue.set(overdue)
        self._telemetry.outbox_pending.set(pending)
        self._telemetry.outbox_oldest.set(max(0.0, age_s))
