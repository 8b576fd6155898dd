"""What the clients of a stage sent and received, put down as a history for the checker. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tests.faults.history import TIMER, Answered, Asked, Heard, History

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tests.e2e.gateway_process import Call
    from tests.e2e.inbox import Inbox, Received, Sent

_SUBSCRIBED = frozenset({"pusher:subscription_succeeded", "pusher_internal:subscription_succeeded"})


@dataclass(frozen=True, slots=True)
class Line:
    """A command and its answer, if one came; numbered when all are known."""

    asked: Asked
    answered: Answered | None = None


def written(
    calls: Iterable[Call], inboxes: Sequence[Inbox], moved: Iterable[tuple[float, str]]
) -> History:
    """Everything in the order in which it was sent.

    Args:
        calls: What was asked over HTTP.
        inboxes: Every socket: its commands, their answers, its pushes.
        moved: When the deadline of which goal was moved; any of its timers may come then.
    """
    lines = [*_over_http(calls), *_over_sockets(inboxes), *_timers(moved)]
    history = History()
    for number, line in enumerate(sorted(lines, key=lambda line: line.asked.at_s)):
        history.asked.append(replace(line.asked, ask=number))
        if line.answered is not None:
            history.answered.append(replace(line.answered, ask=number))
    first_s = min((one.at_s for one in history.asked), default=float("inf"))
    for number, inbox in enumerate(inboxes):
        listener = f"{inbox.name}#{number}"
        history.heard += pushes(listener, inbox)
        if was_open_throughout(inbox):
            history.watch(listener, subscribed(inbox, before_s=first_s))
    return history


def was_open_throughout(inbox: Inbox) -> bool:
    """Whether its connection never broke; else it may have missed something."""
    states = [record.fields["current"] for record in inbox.received if record.kind == "state"]
    return inbox.closed is None and "connected" not in states[:-1]


def subscribed(inbox: Inbox, before_s: float = float("inf")) -> set[str]:
    """The channels that it had subscribed to by then."""
    return {
        record.channel
        for record in inbox.received
        if record.kind == "event"
        and record.event in _SUBSCRIBED
        and record.channel is not None
        and record.at_s < before_s
    }


def pushes(listener: str, inbox: Inbox) -> Iterator[Heard]:
    """What a socket received on channels."""
    for record in inbox.received:
        if record.kind == "event" and record.event is not None and record.channel is not None:
            yield Heard(record.at_s, listener, record.channel, record.event, record.data)


def opened_sessions(calls: Iterable[Call]) -> set[str]:
    """The Sessions that streamers opened."""
    return {
        call.response.json()["id"]
        for call in calls
        if (call.method, call.path) == ("POST", "/sessions")
        and call.response is not None
        and call.response.is_success
    }


def _over_http(calls: Iterable[Call]) -> Iterator[Line]:
    for call in calls:
        if (named := _command(call)) is None or call.user_id is None:
            continue
        request_id = call.headers.get("Idempotency-Key")
        asked = Asked(0, call.at_s, call.user_id, request_id=request_id, **named)
        yield Line(asked, _answer(call, named["command"]))


def _command(call: Call) -> dict[str, Any] | None:
    """What a call asks for; none when it is no command on a goal."""
    match call.method, call.path.strip("/").split("/"):
        case "POST", ["goals"]:
            return {
                "command": "invite",
                "session_id": call.body["session_id"],
                "amount": call.body["amount"],
            }
        case "DELETE", ["goals", goal_id]:
            return {"command": "agree" if call.body["agree"] else "disagree", "goal_id": goal_id}
        case "POST", ["goals", goal_id, "withdraw"]:
            return {"command": "withdraw", "goal_id": goal_id}
        case "POST" | "DELETE", ["sessions", _, "exclusive"]:
            command = "start" if call.method == "POST" else "finish"
            return {"command": command, "goal_id": call.body["goal_id"]}
        case "DELETE", ["sessions", session_id]:
            return {"command": "close", "session_id": session_id}
    return None


def _answer(call: Call, command: str) -> Answered | None:
    response = call.response
    if response is None:
        return None
    said = response.json()
    if response.is_success:
        return Answered(0, call.answered_at_s, ok=True, goal=None if command == "close" else said)
    return Answered(
        0,
        call.answered_at_s,
        ok=False,
        goal=said.get("goal"),
        code=said["code"],
        retryable=said["retryable"],
    )


def _over_sockets(inboxes: Iterable[Inbox]) -> Iterator[Line]:
    for inbox in inboxes:
        replies: dict[str, list[Received]] = {}
        for record in inbox.received:
            if (record.kind, record.event) == ("event", "goal.reply"):
                replies.setdefault(record.data["request_id"], []).append(record)
        for sent in inbox.sent:
            told = replies.get(sent.data["request_id"])
            yield Line(_asked(inbox.name, sent), _reply(told.pop(0)) if told else None)


def _asked(user_id: str, sent: Sent) -> Asked:
    command = sent.name.partition(".")[2]
    return Asked(
        0,
        sent.at_s,
        user_id,
        command,
        sent.data["request_id"],
        sent.data.get("goal_id"),
        sent.data.get("session_id"),
        sent.data.get("amount"),
    )


def _reply(record: Received) -> Answered:
    said = record.data
    error = said.get("error", {})
    return Answered(
        0,
        record.at_s,
        said["ok"],
        said.get("goal"),
        error.get("code"),
        error.get("retryable", False),
    )


def _timers(moved: Iterable[tuple[float, str]]) -> Iterator[Line]:
    for at_s, goal_id in moved:
        for command in ("expire", "refund", "finish"):
            yield Line(Asked(0, at_s, TIMER, command, goal_id=goal_id))
