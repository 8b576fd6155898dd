"""The parts of one or more nodes on a real MongoDB, put together as the gateway does it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from bson import ObjectId

from persistence.clock import Clock
from persistence.deadlines import Deadlines
from persistence.goals import Goals
from persistence.intents import Done, Intent, Refused, Terms
from persistence.outbox import DeliveryFailed, Outbox
from persistence.sessions import Sessions
from persistence.store import Store, StoreOptions
from statemachine.goal import CommandName, Limits, Role
from statemachine.receivers import Push, Track, standard_receivers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pymongo.database import Database

    from persistence.documents import Session
    from persistence.escrow_port import EscrowPort
    from persistence.faults import Step
    from persistence.intents import Answer
    from statemachine.receivers import Effect, Occurrence, Registry

Row = dict[str, Any]

STREAMER = "anna"
VIEWER = "ben"


class StandingClock(Clock):
    """Stands still until a test moves it, so that documents can be compared as a whole."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        super().__init__()
        self.at = super().now()

    def now(self) -> datetime:
        return self.at

    def shift(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)


@dataclass
class Recorder:
    """Writes down what it is given to perform; fails where a test tells it to."""

    outbox: Outbox | None = None
    performed: list[tuple[Occurrence, Sequence[Effect]]] = field(default_factory=list)
    fails: Callable[[Occurrence, Sequence[Effect]], bool] = lambda _occurrence, _effects: False

    async def perform(self, occurrence: Occurrence, effects: Sequence[Effect]) -> None:
        if self.fails(occurrence, effects):
            raise DeliveryFailed("the test says so")
        self.performed.append((occurrence, effects))
        for effect in effects:
            if isinstance(effect, Track):
                assert self.outbox is not None
                await self.outbox.track(effect)

    @property
    def pushed(self) -> list[tuple[str, tuple[str, ...]]]:
        """Events and their channels, in order."""
        return [
            (effect.event, effect.channels)
            for _, effects in self.performed
            for effect in effects
            if isinstance(effect, Push)
        ]

    @property
    def events(self) -> list[str]:
        """The pushed events alone."""
        return [event for event, _ in self.pushed]


@dataclass
class Node:
    """The parts of one process."""

    store: Store
    registry: Registry
    goals: Goals
    sessions: Sessions
    recorder: Recorder
    outbox: Outbox
    deadlines: Deadlines
    port: EscrowPort | None = None

    async def deliver(self, answer: Answer) -> None:
        """Delivers what a commit left to do."""
        assert isinstance(answer, Done), answer
        for delivery in answer.deliveries:
            await self.outbox.deliver(delivery)

    async def deliver_due(self) -> int:
        """Takes over what is due and delivers it; tells how many outboxes that were."""
        deliveries = await self.outbox.claim_due(100)
        for delivery in deliveries:
            await self.outbox.deliver(delivery)
        return len(deliveries)

    async def fire_due(self) -> list[Answer]:
        """Claims what is due and sends it its timer command."""
        return [await self.deadlines.fire(due) for due in await self.deadlines.claim_due(100)]


@dataclass
class Steps:
    """What the code has reached, and what a test does when it gets there."""

    reached: list[tuple[Step, str]] = field(default_factory=list)
    actions: dict[tuple[Step, str], Callable[[], None]] = field(default_factory=dict)

    def once(self, step: Step, detail: str, action: Callable[[], None]) -> None:
        """Runs `action` the first time that this step is reached."""
        self.actions[step, detail] = action

    def __call__(self, step: Step, detail: str) -> None:
        self.reached.append((step, detail))
        action = self.actions.pop((step, detail), None)
        if action is not None:
            action()

    def details(self, step: Step) -> list[str]:
        """The commands or receivers that came to this step, in order."""
        return [detail for reached, detail in self.reached if reached is step]


class World:
    """One database, the nodes on it, and its documents as MongoDB has them."""

    def __init__(self, url: str, raw: Database[Row], limits: Limits | None = None) -> None:
        self.url = url
        self.raw = raw
        self.clock = StandingClock()
        self.limits = limits or Limits()
        self.nodes: list[Node] = []

    async def add_node(
        self,
        registry: Registry | None = None,
        port: EscrowPort | None = None,
        clock: Clock | None = None,
        **options: Any,
    ) -> Node:
        """Opens the database once more, as another process would."""
        plain = StoreOptions(deadline_s=20.0, node_name=f"node{len(self.nodes)}")
        clock = clock or self.clock
        store = await Store.open(self.url, self.raw.name, clock, replace(plain, **options))
        registry = registry or standard_receivers()
        goals = Goals(store, registry, self.limits, port)
        recorder = Recorder()
        outbox = recorder.outbox = Outbox(store, registry, recorder)
        node = Node(
            store=store,
            registry=registry,
            goals=goals,
            sessions=Sessions(store, goals),
            recorder=recorder,
            outbox=outbox,
            deadlines=Deadlines(store, goals),
            port=port,
        )
        self.nodes.append(node)
        return node

    async def close(self) -> None:
        for node in self.nodes:
            await node.store.close()

    @property
    def node(self) -> Node:
        """The first node."""
        return self.nodes[0]

    # Commands

    async def session(self, streamer_id: str = STREAMER, rtc_sources: Any = ()) -> Session:
        session, _ = await self.node.sessions.create(streamer_id, list(rtc_sources))
        return session

    async def invite(
        self,
        session: Session,
        viewer_id: str = VIEWER,
        *,
        amount_minor: int = 500,
        prepaid_duration_s: int = 30,
        request_id: str | None = None,
        node: Node | None = None,
    ) -> Answer:
        return await (node or self.node).goals.execute(
            Intent(
                CommandName.INVITE,
                Role.VIEWER,
                viewer_id,
                terms=Terms(str(session.id), prepaid_duration_s, amount_minor),
                client_id="viewer-app",
                request_id=request_id,
            )
        )

    async def invited(self, session: Session, viewer_id: str = VIEWER, **terms: Any) -> str:
        """Puts up an invitation, delivers it and tells the goal's id."""
        answer = await self.invite(session, viewer_id, **terms)
        await self.node.deliver(answer)
        return goal_id_of(answer)

    async def agreed(self, session: Session, viewer_id: str = VIEWER) -> str:
        """As `invited`, and the streamer has agreed."""
        goal_id = await self.invited(session, viewer_id)
        await self.node.deliver(await self.ask(CommandName.AGREE, goal_id, by=session.user.id))
        return goal_id

    async def started(self, session: Session, viewer_id: str = VIEWER) -> str:
        """As `agreed`, and the show is live."""
        goal_id = await self.agreed(session, viewer_id)
        await self.node.deliver(await self.ask(CommandName.START, goal_id, by=session.user.id))
        return goal_id

    async def ask(
        self,
        name: CommandName,
        goal_id: str,
        *,
        by: str | None = STREAMER,
        role: Role | None = Role.STREAMER,
        request_id: str | None = None,
        node: Node | None = None,
    ) -> Answer:
        return await (node or self.node).goals.execute(
            Intent(
                name,
                role,
                by,
                goal_id=goal_id,
                client_id="streamer-app" if role is Role.STREAMER else "viewer-app",
                request_id=request_id,
            )
        )

    async def withdraw(self, goal_id: str, by: str = VIEWER, **more: Any) -> Answer:
        return await self.ask(CommandName.WITHDRAW, goal_id, by=by, role=Role.VIEWER, **more)

    # Documents as MongoDB has them

    def goal_row(self, goal_id: str) -> Row:
        row = self.raw["goals"].find_one({"_id": ObjectId(goal_id)})
        assert row is not None
        return row

    def session_row(self, session: Session) -> Row:
        row = self.raw["sessions"].find_one({"_id": session.id})
        assert row is not None
        return row

    def ledger(self, goal_id: str) -> list[Row]:
        return list(self.raw["escrow"].find({"goal_id": ObjectId(goal_id)}).sort("_id", -1))

    def movements(self, goal_id: str) -> list[str]:
        return [row["movement"] for row in self.ledger(goal_id)]

    def documents(self) -> dict[str, list[Row]]:
        """Everything, for comparing before and after."""
        return {
            name: list(self.raw[name].find().sort("_id"))
            for name in ("goals", "sessions", "escrow", "requests", "goal_records")
        }


def goal_id_of(answer: Answer) -> str:
    assert isinstance(answer, Done), answer
    goal_id = answer.goal["id"]
    assert isinstance(goal_id, str)
    return goal_id


def code_of(answer: Answer) -> str:
    """`ok` or the code of the refusal."""
    return answer.code if isinstance(answer, Refused) else "ok"
