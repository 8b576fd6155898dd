"""The parts of a node, without a gateway around them, whose answers the checker judges."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from persistence.errors import StoreUnavailable
from persistence.escrow_port import EscrowAnswer, Verdict
from persistence.intents import Refused
from statemachine.receivers import Push
from tests.e2e.books import Books
from tests.e2e.gateway_process import Stores
from tests.faults.checker import judge
from tests.faults.evidence import Run, Timing
from tests.faults.history import History, Row
from tests.faults.players import read_truth
from tests.persistence.world import STREAMER, VIEWER, World

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from pymongo.database import Database

    from persistence.documents import EscrowCall, Session
    from persistence.intents import Answer
    from statemachine.goal import CommandName
    from tests.faults.checker import Violation

_DELIVERED_WITHIN_S = 60.0


class Acknowledging:
    """A payment service that says yes."""

    async def ask(self, call: EscrowCall, within_s: float) -> EscrowAnswer:
        return EscrowAnswer(Verdict.ACKNOWLEDGED)


class JudgedWorld(World):
    """Writes down what its nodes are asked and what they answer."""

    def __init__(self, url: str, raw: Database[Row]) -> None:
        super().__init__(url, raw)
        self.history = History()

    async def invite(
        self,
        session: Session,
        viewer_id: str = VIEWER,
        *,
        request_id: str | None = None,
        **more: Any,
    ) -> Answer:
        number = self.history.ask(
            viewer_id, "invite", request_id=request_id, session_id=str(session.id)
        )
        asked = super().invite(session, viewer_id, request_id=request_id, **more)
        return await self._answered(number, asked)

    async def ask(
        self,
        name: CommandName,
        goal_id: str,
        *,
        by: str | None = STREAMER,
        request_id: str | None = None,
        **more: Any,
    ) -> Answer:
        number = self.history.ask(by or "", name, request_id=request_id, goal_id=goal_id)
        asked = super().ask(name, goal_id, by=by, request_id=request_id, **more)
        return await self._answered(number, asked)

    async def end(self, session: Session) -> Session:
        """Ends a Session."""
        number = self.history.ask(session.user.id, "close", session_id=str(session.id))
        ended, _ = await self.node.sessions.end(session)
        self.history.answer(number, ok=True)
        return ended

    async def _answered(self, number: int, asked: Awaitable[Answer]) -> Answer:
        try:
            answer = await asked
        except StoreUnavailable:
            self.history.answer(number, ok=False, code="unavailable", retryable=True)
            raise
        code = answer.code if isinstance(answer, Refused) else None
        self.history.answer(number, ok=code is None, goal=answer.goal, code=code)
        return answer

    async def _deliver_everything(self) -> None:
        """Delivers until nothing is left; the primary may still have to find its majority again."""
        async with asyncio.timeout(_DELIVERED_WITHIN_S):
            while True:
                with contextlib.suppress(StoreUnavailable):
                    if not await self.node.deliver_due():
                        return

    async def verdict(self) -> list[Violation]:
        """What the checker says, once everything has been delivered."""
        self.clock.shift(self.node.store.options.lease_s)
        await self._deliver_everything()
        sessions = [str(row["_id"]) for row in self.raw["sessions"].find()]
        async with Books(Stores(self.url, self.raw.name, "", "")) as books:
            truth = await read_truth(books, sessions)
        for _, effects in self.node.recorder.performed:
            for effect in effects:
                if isinstance(effect, Push):
                    for channel in effect.channels:
                        self.history.hear("recorder", channel, effect.event, effect.data)
        for one in Run(self.history, truth, Timing()).invitations.values():
            self.history.watch("recorder", {channel for channel, _, _ in one.pushes()})
        return judge(self.history, truth)
