"""Runs as they should have been, told step by step, for a test to doctor."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from bson import ObjectId

from tests.faults.history import TIMER, Answered, Asked, Heard, History, Row, Snapshot, Truth

STREAMER = "sam"
AMOUNT = 500
PREPAID_S = 60
_BEGIN = datetime(2026, 11, 22, 12, tzinfo=UTC)

_STREAM, _ROOM, _USER = (
    f"private-stream@{STREAMER}",
    f"presence-stream@{STREAMER}",
    f"private-user@{STREAMER}",
)


@dataclass
class Tale:
    """One Session; each method is a second in which something happens and everyone hears of it."""

    history: History = field(default_factory=History)
    truth: Truth = field(default_factory=Truth)
    now_s: float = 0.0

    def __post_init__(self) -> None:
        self.session: Row = {
            "_id": ObjectId(),
            "user": {"id": STREAMER},
            "active": True,
            "status": {"exclusive_to": []},
            "exclusive_goal_pairs": {},
            "viewers": {},
        }
        self.truth.sessions.append(self.session)
        self.watch(_STREAM, _ROOM, _USER)

    def watch(self, *channels: str) -> None:
        self.history.watched |= {("ear", channel) for channel in channels}

    @property
    def at(self) -> datetime:
        return _BEGIN + timedelta(seconds=self.now_s)

    @property
    def session_id(self) -> str:
        return str(self.session["_id"])

    # --- what the parties do --------------------------------------------------------------------

    def invite(self, viewer: str) -> Row:
        goal: Row = {
            "_id": ObjectId(),
            "_cls": "TriggerExclusiveGoal",
            "active": True,
            "state": "invited",
            "amount": AMOUNT,
            "breakdown": {viewer: AMOUNT},
            "conditions": {"session_id": self.session["_id"], "exclusive_to": viewer},
            "metadata": {"user_id": STREAMER, "prepaid_duration": PREPAID_S},
            "created_at": self.at,
            "exp": self.at + timedelta(seconds=60),
            "due_at": self.at + timedelta(seconds=60),
            "due_command": "expire",
            "outbox": [],
            "version": 1,
        }
        self.watch(f"private-user@{viewer}", f"presence-stream-viewer@{STREAMER}.preview.{viewer}")
        self._say(viewer, "invite", goal, named=False)
        self.truth.goals.append(goal)
        self.session["exclusive_goal_pairs"][viewer] = {"trigger_exclusive_goal": goal["_id"]}
        self._post(goal, "hold", f"viewer:{viewer}", "escrow")
        self._tell(goal, "goal.added", _STREAM, _USER)
        self._tell(goal, "escrow.held", f"private-user@{viewer}")
        return goal

    def agree(self, goal: Row, *rivals: Row) -> None:
        viewer = _viewer(goal)
        goal |= {"state": "agreed", "active": False, "version": 2, "exp": self.at}
        agreed = goal["metadata"]["agreed"] = self.at
        goal |= {"due_at": agreed + timedelta(seconds=65), "due_command": "refund"}
        self._say(STREAMER, "agree", goal)
        self.session["status"]["exclusive_to"] = [viewer]
        self.session["viewers"][viewer] = {
            "nbf": agreed,
            "duration": 60.0 + PREPAID_S,
            "exp": agreed + timedelta(seconds=60 + PREPAID_S),
        }
        self.session["exclusive_goal_pairs"][viewer] |= {
            "trigger_exclusive_goal_ended": True,
            "trigger_exclusive_goal_agreed": agreed,
        }
        self._tell(goal, "stream.authorized", f"presence-stream-viewer@{STREAMER}.preview.{viewer}")
        self._end(goal)
        for rival in rivals:
            del self.session["exclusive_goal_pairs"][_viewer(rival)]
            self._decline(rival, "superseded")

    def disagree(self, goal: Row) -> None:
        self._say(STREAMER, "disagree", _declined(goal, "disagreed"))
        self._mark_pair(goal)
        self._decline(goal, "disagreed")

    def withdraw(self, goal: Row) -> None:
        self._say(_viewer(goal), "withdraw", _declined(goal, "withdrawn"))
        self._mark_pair(goal)
        self._decline(goal, "withdrawn")

    def expire(self, goal: Row) -> None:
        self._say(TIMER, "expire", goal, answered=False)
        self._mark_pair(goal)
        self._decline(goal, "expired")

    def start(self, goal: Row) -> Row:
        show: Row = {
            "_id": ObjectId(),
            "_cls": "ExclusiveGoal",
            "active": True,
            "state": "live",
            "conditions": goal["conditions"],
            "metadata": goal["metadata"],
            "trigger_goal": goal["_id"],
            "exp": self.at + timedelta(hours=1),
            "outbox": [],
            "version": 1,
        }
        goal |= {"state": "live", "version": 3, "exclusive_goal": show["_id"]}
        goal |= {"due_at": show["exp"], "due_command": "finish"}
        self._say(STREAMER, "start", goal)
        self.truth.goals.append(show)
        self.session["exclusive_goal_pairs"][_viewer(goal)]["exclusive_goal"] = show["_id"]
        self._post(goal, "capture", "escrow", f"streamer:{STREAMER}")
        self._tell(goal, "exclusive.started", _STREAM, _ROOM)
        self._tell(goal, "escrow.captured", f"private-user@{_viewer(goal)}")
        return show

    def finish(self, goal: Row, show: Row) -> None:
        goal |= {"state": "ended", "version": 4, "outcome": "captured"}
        _is_due_no_more(goal)
        self._say(_viewer(goal), "finish", goal)
        show |= {"state": "ended", "active": False, "exp": self.at}
        self.session["exclusive_goal_pairs"][_viewer(goal)]["exclusive_goal_ended"] = True
        self._free()
        self._tell(goal, "exclusive.ended", _STREAM, _ROOM)
        self._end(goal)

    def refund(self, goal: Row) -> None:
        self._say(TIMER, "refund", goal, answered=False)
        goal |= {"state": "ended", "version": 3, "outcome": "refunded", "reason": "not_started"}
        _is_due_no_more(goal)
        del self.session["exclusive_goal_pairs"][_viewer(goal)]
        self._free()
        self._release(goal)

    def close(self, *standing: Row) -> None:
        number = self._ask(STREAMER, "close", session_id=self.session_id)
        self.session["active"] = False
        self.history.answered.append(Answered(number, self._tick(), ok=True))
        for goal in standing:
            self._mark_pair(goal)
            self._decline(goal, "stream_ended")

    def look(self, user_id: str, *goals: Row, final: bool = True) -> None:
        """Gives a user a snapshot of these goals."""
        asked_at_s = self._tick()
        views = tuple(_view(goal) for goal in goals)
        as_of = self.at
        self.history.snapshots.append(
            Snapshot(self._tick(), asked_at_s, user_id, views, final, as_of)
        )

    # --- what comes of it -----------------------------------------------------------------------

    def _tick(self) -> float:
        self.now_s += 1.0
        return self.now_s

    def _ask(
        self, user_id: str, command: str, goal_id: str | None = None, session_id: str | None = None
    ) -> int:
        number = len(self.history.asked)
        request_id = None if command == "close" or user_id == TIMER else f"r{number}"
        amount = AMOUNT if command == "invite" else None
        self.history.asked.append(
            Asked(number, self._tick(), user_id, command, request_id, goal_id, session_id, amount)
        )
        return number

    def _say(
        self, user_id: str, command: str, goal: Row, *, named: bool = True, answered: bool = True
    ) -> None:
        """Sends a command and, unless it is the timer's, answers it."""
        goal_id = str(goal["_id"]) if named else None
        session_id = None if named else self.session_id
        number = self._ask(user_id, command, goal_id, session_id)
        if answered:
            self.history.answered.append(Answered(number, self._tick(), ok=True, goal=_view(goal)))

    def _tell(self, goal: Row, event: str, *channels: str) -> None:
        event_id = f"{goal['_id']}:{goal['version']}:{event}"
        data = _said(goal, event) | {"event_id": event_id}
        for channel in channels:
            self.history.heard.append(Heard(self._tick(), "ear", channel, event, data))

    def _end(self, goal: Row) -> None:
        self._tell(goal, "goal.ended", _STREAM, _ROOM, _USER)
        self.truth.records.append(
            {
                "_id": f"{goal['_id']}:{goal['version']}:goal.ended",
                "goal_id": str(goal["_id"]),
                "viewer_id": _viewer(goal),
                "streamer_id": STREAMER,
                "agreed": "agreed" in goal["metadata"],
            }
        )

    def _decline(self, goal: Row, reason: str) -> None:
        goal |= _declined(goal, reason)
        _is_due_no_more(goal)
        self._end(goal)
        self._release(goal)
        goal |= {"state": "ended", "outcome": "refunded", "version": 3}  # settled

    def _release(self, goal: Row) -> None:
        self._post(goal, "release", "escrow", f"viewer:{_viewer(goal)}")
        self._tell(goal, "escrow.released", f"private-user@{_viewer(goal)}")

    def _post(self, goal: Row, movement: str, debit: str, credit: str) -> None:
        self.truth.postings.append(
            {
                "_id": f"{goal['_id']}:{movement}",
                "goal_id": goal["_id"],
                "session_id": self.session["_id"],
                "viewer_id": _viewer(goal),
                "streamer_id": STREAMER,
                "movement": movement,
                "reason": _reason(goal, movement),
                "debit": debit,
                "credit": credit,
                "amount": goal["amount"],
                "at": self.at,
            }
        )

    def _mark_pair(self, goal: Row) -> None:
        pair = self.session["exclusive_goal_pairs"][_viewer(goal)]
        pair["trigger_exclusive_goal_ended"] = True

    def _free(self) -> None:
        self.session["status"]["exclusive_to"] = []
        self.session["viewers"] = {}


def _viewer(goal: Row) -> str:
    return str(goal["conditions"]["exclusive_to"])


def _is_due_no_more(goal: Row) -> None:
    del goal["due_at"], goal["due_command"]


def _declined(goal: Row, reason: str) -> Row:
    return goal | {"active": False, "state": "declined", "version": 2, "reason": reason}


def _reason(goal: Row, movement: str) -> str:
    """Why the money moved, as ledger and viewer are told."""
    return {"hold": "invited", "capture": "started"}.get(movement) or str(goal["reason"])


def _view(goal: Row) -> dict[str, Any]:
    return {
        "id": str(goal["_id"]),
        "state": goal["state"],
        "reason": goal.get("reason"),
        "outcome": goal.get("outcome"),
        "amount": goal["amount"],
        "breakdown": goal["breakdown"],
        "version": goal["version"],
        "conditions": _conditions(goal),
        "metadata": {"user_id": STREAMER},
    }


def _conditions(goal: Row) -> dict[str, str]:
    return {
        "session_id": str(goal["conditions"]["session_id"]),
        "exclusive_to": _viewer(goal),
    }


def _said(goal: Row, event: str) -> dict[str, Any]:
    """The data of an event, without its id."""
    conditions = _conditions(goal)
    match event.partition("."):
        case "goal", _, "added":
            return _view(goal)
        case "goal", _, "ended":
            over = goal["version"] == 4
            return {
                "goal_id": str(goal["exclusive_goal"] if over else goal["_id"]),
                "_cls": "ExclusiveGoal" if over else goal["_cls"],
                "active": False,
                "conditions": conditions,
                "metadata": {name: str(value) for name, value in goal["metadata"].items()},
            }
        case "stream", _, _:
            viewer = conditions["exclusive_to"]
            return {
                "session_id": conditions["session_id"],
                "streamer_id": STREAMER,
                "viewer_id": viewer,
            }
        case "exclusive", _, _:
            return {"goal_id": str(goal["_id"]), **conditions}
        case _, _, what:
            movement = {"held": "hold", "captured": "capture", "released": "release"}[what]
            return {
                "goal_id": str(goal["_id"]),
                "amount": goal["amount"],
                "reason": _reason(goal, movement),
            }
