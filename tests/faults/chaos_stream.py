"""One stream of a chaos run: a streamer, his viewers, and clients that do not give up."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Final, Protocol

import httpx
from websockets.exceptions import WebSocketException

from tests.faults.forked_gateway import DIED
from tests.faults.history import History
from tests.faults.players import Act, ask, see

if TYPE_CHECKING:
    import random

    from tests.faults.forked_gateway import ForkedGateway
    from tests.faults.history import Answered
    from tests.faults.players import Witness

# Deadlines so short that they come by themselves within a stream's life.
INVITATION_TTL_S: Final = 2.0
PREPAID_S: Final = 1

# Between two attempts: doubled each time, as clients do it.
_RETRY_AFTER_S: Final = 0.05
_RETRY_AT_LAST_S: Final = 0.4
_MOST_ROUNDS: Final = 3
_UNANSWERED: Final = (*DIED, httpx.TimeoutException)


class Surroundings(Protocol):
    """What a stream needs of the run that it is part of."""

    witness: Witness

    def any_gateway(self) -> ForkedGateway: ...

    def on_answer(self) -> None: ...


class Stream:
    """One streamer, his viewers and what they do to each other, until he has had enough.

    Attributes:
        gaps_before: how often the witness had lost Redis when this began.
    """

    def __init__(self, chaos: Surroundings, dice: random.Random) -> None:
        self._chaos = chaos
        self._dice = dice
        self.history = History()
        self.gaps_before = chaos.witness.gaps
        suffix = secrets.token_hex(5)
        self.streamer = f"s-{suffix}"
        self.viewers = [f"v{number}-{suffix}" for number in range(dice.randint(1, 3))]
        self.session_id = ""

    @property
    def channels(self) -> list[str]:
        streamer = self.streamer
        return [
            f"private-stream@{streamer}",
            f"presence-stream@{streamer}",
            *(f"private-user@{user_id}" for user_id in (streamer, *self.viewers)),
            *(f"presence-stream-viewer@{streamer}.preview.{viewer}" for viewer in self.viewers),
        ]

    async def play(self) -> None:
        """Some rounds of invitations; the stream may end, or simply go on without any."""
        await self._open()
        for _ in range(self._dice.randint(1, _MOST_ROUNDS)):
            await self._round()
            if self._dice.random() < 0.3:
                await self._look()
        if self._dice.random() < 0.6:
            await self._ask("close", self.streamer)

    async def _open(self) -> None:
        await self._chaos.witness.watch(self.history, self.channels)
        pause_s = _RETRY_AFTER_S
        while True:
            try:
                response = await self._chaos.any_gateway().call(
                    "POST", "/sessions", user_id=self.streamer, role="streamer", body={}
                )
            except _UNANSWERED:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _RETRY_AT_LAST_S)
                continue
            if response.status_code in {200, 201}:
                self.session_id = response.json()["id"]
                return

    async def _round(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            invites = [tasks.create_task(self._ask("invite", viewer)) for viewer in self.viewers]
        goals = {
            viewer: answer.goal["id"]
            for viewer, task in zip(self.viewers, invites, strict=True)
            if (answer := task.result()).ok and answer.goal is not None
        }
        async with asyncio.TaskGroup() as tasks:
            for viewer, goal_id in goals.items():
                tasks.create_task(self._answer(viewer, goal_id))

    async def _answer(self, viewer: str, goal_id: str) -> None:
        """What becomes of one invitation: often two things at once."""
        choice = self._dice.random()
        if choice < 0.55:
            answer = await self._ask("agree", self.streamer, goal_id)
            if answer.ok and self._dice.random() < 0.75:
                await self._show(viewer, goal_id)
        elif choice < 0.7:
            await self._ask("disagree", self.streamer, goal_id)
        elif choice < 0.8:
            await self._ask("withdraw", viewer, goal_id)
        elif choice < 0.9:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._ask("withdraw", viewer, goal_id))
                tasks.create_task(self._ask("agree", self.streamer, goal_id))
        else:
            await asyncio.sleep(INVITATION_TTL_S)

    async def _show(self, viewer: str, goal_id: str) -> None:
        started = await self._ask("start", self.streamer, goal_id)
        if started.ok and self._dice.random() < 0.7:
            ender = self._dice.choice([viewer, self.streamer])
            await self._ask("finish", ender, goal_id)

    async def _ask(self, command: str, user_id: str, goal_id: str | None = None) -> Answered:
        """Sends a command, to any gateway and under one `request_id`, until it is answered."""
        act = Act(
            command,
            user_id,
            "streamer" if user_id == self.streamer else "viewer",
            self.session_id,
            goal_id,
            None if command == "close" else secrets.token_hex(8),
            prepaid_s=PREPAID_S,
        )
        pause_s = _RETRY_AFTER_S
        while True:
            try:
                answer = await ask(self.history, self._chaos.any_gateway(), act)
            except httpx.TimeoutException:
                answer = None
            if answer is not None:
                self._chaos.on_answer()
            if answer is not None and not answer.retryable:
                return answer
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RETRY_AT_LAST_S)

    async def _look(self) -> None:
        """Connects a socket for its snapshot, as long as the gateway lets it."""
        user_id = self._dice.choice([self.streamer, *self.viewers])
        role = "streamer" if user_id == self.streamer else "viewer"
        try:
            await see(self.history, self._chaos.any_gateway(), user_id, role)
        except (OSError, EOFError, AssertionError, WebSocketException):
            # It died over the handshake, or before it had sent everything.
            return
