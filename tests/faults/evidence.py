"""The history and the truth of a run, arranged as the checker's rules need them. Pure."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from tests.faults.history import TIMER

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.faults.history import Answered, Asked, History, Row, Truth

OPEN: Final = ("invited", "agreed", "live", "declined")
SHOWING: Final = ("agreed", "live")
CAUSE_OF_REASON: Final = {
    "disagreed": "disagree",
    "withdrawn": "withdraw",
    "expired": "expire",
}
# How runs name him who lets a deadline come.
_TIMERS: Final = (TIMER, "")
_FOREVER: Final = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Timing:
    """What the run's gateways were told of time.

    Attributes:
        invitation_ttl_s: before that, only a test can let an invitation expire.
        refund_delay_s: so long after an agreement, at the earliest, comes its refund.
        show_s: so long after an agreement, at the earliest, the timer ends the show.
        clock_doubt_s: by how much two processes' clocks may differ.
        commit_s: from the instant that a command is dated with to its commit, at the most.
    """

    invitation_ttl_s: float = 60.0
    refund_delay_s: float = 65.0
    show_s: float = 60.0
    clock_doubt_s: float = 0.05
    commit_s: float = 10.0


@dataclass(frozen=True)
class Invitation:
    """One invitation with its show and its postings, as the truth has them."""

    row: Row
    show: Row | None
    postings: tuple[Row, ...]

    @cached_property
    def id(self) -> str:
        return str(self.row["_id"])

    @property
    def session_id(self) -> str:
        return str(self.row["conditions"]["session_id"])

    @property
    def streamer_id(self) -> str:
        return str(self.row["metadata"]["user_id"])

    @property
    def viewer_id(self) -> str:
        return str(self.row["conditions"]["exclusive_to"])

    @property
    def state(self) -> str:
        return str(self.row["state"])

    @property
    def reason(self) -> str | None:
        return self.row.get("reason")

    @property
    def agreed_at(self) -> datetime | None:
        return self.row["metadata"].get("agreed")

    @property
    def finished(self) -> bool:
        return self.row.get("outcome") == "captured"

    @property
    def exclusive_until(self) -> datetime:
        """When an agreed goal gave the stream back."""
        if self.state in SHOWING:
            return _FOREVER
        if self.show is not None:
            ended_at: datetime = self.show["exp"]
            return ended_at
        return max((row["at"] for row in self.postings), default=_FOREVER)

    def did(self, command: str) -> bool:
        """Whether the goal shows the effect of a command."""
        match command:
            case "invite":
                return True
            case "agree":
                return self.agreed_at is not None
            case "start":
                return self.row.get("exclusive_goal") is not None
            case "finish":
                return self.finished
            case "refund":
                return self.reason == "not_started"
            case _:
                return CAUSE_OF_REASON.get(self.reason or "") == command

    @property
    def parties(self) -> tuple[str, str]:
        return self.streamer_id, self.viewer_id

    def lets(self, asked: Asked) -> bool:
        """Whether the command is for him who asked to give; a timer's is for the timer."""
        match asked.command:
            case "invite" | "withdraw":
                return asked.user_id == self.viewer_id
            case "agree" | "disagree" | "start":
                return asked.user_id == self.streamer_id
            case "finish":
                return asked.user_id in {*self.parties, *_TIMERS}
            case "close":
                return asked.user_id == self.streamer_id
            case _:
                return asked.user_id in _TIMERS

    @cached_property
    def life(self) -> tuple[tuple[str, str | None, str | None], ...]:
        """State, reason and outcome at each of its versions, from the first one on."""
        steps: list[tuple[str, str | None, str | None]] = [("invited", None, None)]
        if self.agreed_at is not None:
            steps.append(("agreed", None, None))
            if self.did("start"):
                steps.append(("live", None, None))
                if self.finished:
                    steps.append(("ended", None, "captured"))
            elif self.did("refund"):
                steps.append(("ended", "not_started", "refunded"))
        elif self.state != "invited":
            steps.append(("declined", self.reason, None))
            if self.state == "ended":
                steps.append(("ended", self.reason, "refunded"))
        return tuple(steps)

    @property
    def asked_for(self) -> int:
        """The last of its versions that somebody asked for; settling comes of itself."""
        return min(len(self.life), 2) if self.agreed_at is None else len(self.life)

    def pushes(self) -> Iterator[tuple[str, str, str]]:
        """Every (channel, event, event id) that its life so far has caused, in order."""
        streamer, viewer, goal_id = self.streamer_id, self.viewer_id, self.id
        private_stream, presence = f"private-stream@{streamer}", f"presence-stream@{streamer}"
        to_streamer, to_viewer = f"private-user@{streamer}", f"private-user@{viewer}"
        preview = f"presence-stream-viewer@{streamer}.preview.{viewer}"
        ended = (private_stream, presence, to_streamer)
        steps: list[tuple[int, str, tuple[str, ...]]] = [
            (1, "goal.added", (private_stream, to_streamer)),
            (1, "escrow.held", (to_viewer,)),
        ]
        if self.state != "invited":
            agreed = self.agreed_at is not None
            steps.append((2, "goal.ended", ended))
            steps.append(
                (2, "stream.authorized", (preview,))
                if agreed
                else (2, "escrow.released", (to_viewer,))
            )
        if self.did("start"):
            steps.append((3, "exclusive.started", (private_stream, presence)))
            steps.append((3, "escrow.captured", (to_viewer,)))
        elif self.did("refund"):
            steps.append((3, "escrow.released", (to_viewer,)))
        if self.finished:
            steps.append((4, "exclusive.ended", (private_stream, presence)))
            steps.append((4, "goal.ended", ended))
        for version, event, channels in steps:
            for channel in channels:
                yield channel, event, f"{goal_id}:{version}:{event}"


class Run:
    """A history and its truth, looked at from all the sides that the rules need."""

    def __init__(self, history: History, truth: Truth, timing: Timing) -> None:
        self.history = history
        self.truth = truth
        self.timing = timing
        shows = {row["trigger_goal"]: row for row in truth.goals if row.get("trigger_goal")}
        postings: dict[Any, list[Row]] = defaultdict(list)
        for row in truth.postings:
            postings[row["goal_id"]].append(row)
        self.invitations = {
            str(row["_id"]): Invitation(
                row, shows.get(row["_id"]), tuple(postings.pop(row["_id"], ()))
            )
            for row in truth.goals
            if row["_cls"] == "TriggerExclusiveGoal"
        }
        self.shows = shows
        self.orphans = [row for rows in postings.values() for row in rows]
        self.answer_of = {answer.ask: answer for answer in history.answered}
        self.asks_on: dict[str, list[Asked]] = defaultdict(list)
        for asked in history.asked:
            if asked.goal_id is not None:
                self.asks_on[asked.goal_id].append(asked)
        self.of_session: dict[str, list[Invitation]] = defaultdict(list)
        for invitation in self.invitations.values():
            self.of_session[invitation.session_id].append(invitation)
        self.asks_about: dict[str, list[Asked]] = defaultdict(list)
        for asked in history.asked:
            if asked.session_id is not None:
                self.asks_about[asked.session_id].append(asked)

    def answers(self) -> Iterator[tuple[Asked, Answered]]:
        """Every ask that was answered, with its answer."""
        for asked in self.history.asked:
            if (answer := self.answer_of.get(asked.ask)) is not None:
                yield asked, answer

    def closing_asks(self, invitation: Invitation) -> list[Asked]:
        """Asks to end the Session, which also finish its show."""
        return [
            one
            for one in self.asks_about[invitation.session_id]
            if one.command == "close" and invitation.lets(one)
        ]

    def known_to(self, user_id: str, before_s: float) -> dict[str, int]:
        """The newest version of each goal that a user was answered, or told of, by an instant."""
        known: dict[str, int] = defaultdict(int)
        for asked, answer in self.answers():
            goal = answer.goal
            if asked.user_id == user_id and goal is not None and answer.at_s < before_s:
                known[goal["id"]] = max(known[goal["id"]], goal["version"])
        for heard in self.history.heard:
            event_id = heard.event_id
            if event_id is not None and heard.at_s < before_s:
                goal_id, version, _ = event_id.split(":", 2)
                if heard.channel in {f"private-user@{user_id}", f"private-stream@{user_id}"}:
                    known[goal_id] = max(known[goal_id], int(version))
        return known

    def ended_at_s(self, invitation: Invitation) -> float | None:
        """When it was asked for what ended a goal, at the earliest; none for one that has not."""
        if invitation.state in OPEN:
            return None
        return self.caused_at_s(invitation, invitation.asked_for)

    def caused_at_s(self, invitation: Invitation, version: int) -> float | None:
        """When the earliest ask was sent that can have moved a goal to this version."""
        asks = self._asks_by_right(invitation)
        match version:
            case 1:
                return _earliest(self._invites(invitation))
            case 2 if invitation.agreed_at is not None:
                return _earliest(asks, "agree")
            case 2:
                return self._declined_at_s(invitation)
            case 3 if invitation.did("refund"):
                by_itself = _after(_earliest(asks, "agree"), self.timing.refund_delay_s)
                return self._first(_earliest(asks, "refund"), by_itself)
            case 3:
                return _earliest(asks, "start")
            case _:
                by_itself = _after(_earliest(asks, "agree"), self.timing.show_s)
                asked_at_s = _earliest([*asks, *self.closing_asks(invitation)], "finish", "close")
                return self._first(asked_at_s, by_itself)

    def _first(self, asked_at_s: float | None, by_itself_at_s: float | None) -> float | None:
        """When it was asked for, or came by itself: the earlier of what there is."""
        if by_itself_at_s is None:
            return asked_at_s
        by_itself_at_s -= self.timing.clock_doubt_s
        return by_itself_at_s if asked_at_s is None else min(asked_at_s, by_itself_at_s)

    def _declined_at_s(self, invitation: Invitation) -> float | None:
        asks = self._asks_by_right(invitation)
        match invitation.reason:
            case "superseded":
                rivals = [one for one in self.of_session[invitation.session_id] if one.agreed_at]
                return _earliest(
                    (ask for one in rivals for ask in self._asks_by_right(one)), "agree"
                )
            case "stream_ended":
                return _earliest(self.closing_asks(invitation))
            case "expired":
                by_itself = _after(
                    _earliest(self._invites(invitation)), self.timing.invitation_ttl_s
                )
                return self._first(_earliest(asks, "expire"), by_itself)
            case reason:
                return _earliest(asks, CAUSE_OF_REASON.get(reason or "", ""))

    def _asks_by_right(self, invitation: Invitation) -> list[Asked]:
        return [one for one in self.asks_on[invitation.id] if invitation.lets(one)]

    def _invites(self, invitation: Invitation) -> list[Asked]:
        return [
            one
            for one in self.asks_about[invitation.session_id]
            if one.command == "invite" and one.user_id == invitation.viewer_id
        ]


def _earliest(asks: Iterable[Asked], *commands: str) -> float | None:
    return min((one.at_s for one in asks if not commands or one.command in commands), default=None)


def _after(at_s: float | None, seconds: float) -> float | None:
    return None if at_s is None else at_s + seconds
