"""Judges a run: a pure function from its history and the truth to what was wrong with it.

It knows the product's promises, and nothing of how they are kept. `test_checker.py` doctors
histories in every way that it must notice.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from tests.faults.evidence import OPEN, SHOWING, Run, Timing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.faults.history import Answered, Asked, Heard, History, Row, Truth


class Rule(StrEnum):
    """What must hold whatever crashed."""

    ACKNOWLEDGED = "no acknowledged command is lost"
    REFUSED = "no refused command has an effect"
    ONE_ANSWER = "one request has one answer"
    ONE_SHOW = "a Session has one agreed or live goal at a time"
    CAUSE = "no event comes before its cause"
    ESCROW = "escrow is conserved"
    SESSION = "a Session says of its goals what they say of themselves"
    SETTLED = "no goal is stuck"
    SNAPSHOT = "a snapshot equals the truth"
    DELIVERED = "each event is delivered to its channels once"
    ORDER = "a channel keeps the order of one goal's events"
    RECORDS = "each ended goal is recorded once"


@dataclass(frozen=True, slots=True)
class Violation:
    """One promise that was not kept."""

    rule: Rule
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.text}"


_CLOSED_BY: Final = {
    "invited": {},
    "agreed": {},
    "live": {"capture": 1},
    "declined": {"release": 1},
}
_CLOSED_WITH: Final = {"captured": {"capture": 1}, "refunded": {"release": 1}}


def judge(history: History, truth: Truth, timing: Timing | None = None) -> list[Violation]:
    """Everything that was wrong with a run; empty when every promise was kept."""
    run = Run(history, truth, timing or Timing())
    return [
        Violation(rule, text)
        for rule, check in (
            (Rule.ACKNOWLEDGED, _acknowledged),
            (Rule.REFUSED, _refused),
            (Rule.ONE_ANSWER, _one_answer),
            (Rule.ONE_SHOW, _one_show),
            (Rule.CAUSE, _cause),
            (Rule.ESCROW, _escrow),
            (Rule.SESSION, _session),
            (Rule.SETTLED, _settled),
            (Rule.SNAPSHOT, _snapshot),
            (Rule.DELIVERED, _delivered),
            (Rule.ORDER, _order),
            (Rule.RECORDS, _records),
        )
        for text in check(run)
    ]


def _goal_id_of(asked: Asked, answer: Answered) -> str | None:
    if asked.goal_id is not None:
        return asked.goal_id
    return answer.goal["id"] if answer.goal else None


def _acknowledged(run: Run) -> Iterator[str]:
    sessions = {str(row["_id"]): row for row in run.truth.sessions}
    for asked, answer in run.answers():
        if not answer.ok:
            continue
        if asked.command == "close":
            session = sessions.get(asked.session_id or "")
            if session is None or session["active"]:
                yield f"session {asked.session_id} was ended, and is not"
            continue
        goal_id = _goal_id_of(asked, answer)
        invitation = run.invitations.get(goal_id or "")
        if invitation is None:
            yield f"{asked.command} of {goal_id} was acknowledged, and there is no such goal"
        elif not invitation.did(asked.command):
            yield f"{asked.command} of {goal_id} was acknowledged, and it is {invitation.state}"
        elif answer.goal is not None and invitation.row["version"] < answer.goal["version"]:
            yield f"{goal_id} was at version {answer.goal['version']}, and is before it"


def _refused(run: Run) -> Iterator[str]:
    asks: dict[tuple[str, str], list[Asked]] = defaultdict(list)
    for asked in run.history.asked:
        # A show ends by many hands: by either party, the end of the Session, the timer.
        if asked.goal_id is not None and asked.command != "finish":
            asks[asked.goal_id, asked.command].append(asked)
    for (goal_id, command), asked_ones in asks.items():
        invitation = run.invitations.get(goal_id)
        answers = [run.answer_of.get(asked.ask) for asked in asked_ones]
        final = all(answer and not answer.ok and not answer.retryable for answer in answers)
        if final and invitation and invitation.did(command):
            yield f"{command} of {goal_id} was refused every time, and took place"


def _one_answer(run: Run) -> Iterator[str]:
    answers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for asked, answer in run.answers():
        if asked.request_id is not None and not answer.retryable:
            content = json.dumps([answer.ok, answer.code, answer.goal], sort_keys=True)
            answers[asked.user_id, asked.request_id].add(content)
    for (user_id, request_id), contents in answers.items():
        if len(contents) > 1:
            yield f"request {request_id} of {user_id} was answered {' and '.join(contents)}"


def _one_show(run: Run) -> Iterator[str]:
    doubt = timedelta(seconds=run.timing.clock_doubt_s)
    for session_id, invitations in run.of_session.items():
        agreed = sorted(
            (one.agreed_at, one.exclusive_until, one.id)
            for one in invitations
            if one.agreed_at is not None
        )
        for (_, until, first), (since, _, second) in itertools.pairwise(agreed):
            if since + doubt < until:
                yield f"{first} and {second} of session {session_id} were agreed at once"
    for snapshot in run.history.snapshots:
        showing = Counter(
            goal["conditions"]["session_id"]
            for goal in snapshot.goals
            if goal["state"] in SHOWING and goal["metadata"]["user_id"] == snapshot.user_id
        )
        for session_id, count in showing.items():
            if count > 1:
                yield f"{snapshot.user_id} saw {count} shows of session {session_id}"


def _cause(run: Run) -> Iterator[str]:
    first: dict[str, Heard] = {}
    for heard in run.history.heard:
        if (event_id := heard.event_id) is not None:
            first.setdefault(event_id, heard)
    for event_id, heard in first.items():
        goal_id, version, _ = event_id.split(":", 2)
        invitation = run.invitations.get(goal_id)
        if invitation is None:
            yield f"{event_id} was told, and there is no such goal"
            continue
        since_s = run.caused_at_s(invitation, int(version))
        if since_s is None:
            yield f"{event_id} was told, and nobody asked for it"
        elif heard.at_s < since_s:
            yield f"{event_id} was told {since_s - heard.at_s:.3f} s before its cause"


def _escrow(run: Run) -> Iterator[str]:
    for row in run.orphans:
        yield f"posting {row['_id']} is of no goal"
    for one in run.invitations.values():
        moved = Counter(row["movement"] for row in one.postings)
        closed = _CLOSED_WITH.get(one.row.get("outcome", ""), _CLOSED_BY.get(one.state))
        if closed is None:
            yield f"{one.id} is {one.state} without an outcome"
        elif moved != {"hold": 1} | closed:
            yield f"{one.id} is {one.state}, and its postings are {dict(moved)}"
        accounts = {
            "hold": (f"viewer:{one.viewer_id}", "escrow"),
            "capture": ("escrow", f"streamer:{one.streamer_id}"),
            "release": ("escrow", f"viewer:{one.viewer_id}"),
        }
        for row in one.postings:
            if row["amount"] != one.row["amount"] or row["amount"] <= 0:
                yield f"posting {row['_id']} moves {row['amount']} of {one.row['amount']}"
            if (row["debit"], row["credit"]) != accounts[row["movement"]]:
                yield f"posting {row['_id']} goes from {row['debit']} to {row['credit']}"


def _session(run: Run) -> Iterator[str]:
    for session in run.truth.sessions:
        session_id = str(session["_id"])
        pairs = session.get("exclusive_goal_pairs", {})
        for viewer_id, pair in pairs.items():
            yield from _pair(run, session_id, viewer_id, pair)
        showing = [one for one in run.of_session[session_id] if one.state in SHOWING]
        invited = [one for one in run.of_session[session_id] if one.state == "invited"]
        for one in [*showing, *invited]:
            named = pairs.get(one.viewer_id, {}).get("trigger_exclusive_goal")
            if str(named) != one.id:
                yield f"session {session_id} has no pair for {one.id}, which is {one.state}"
        if invited and not session["active"]:
            yield f"session {session_id} has ended, and {invited[0].id} still stands"
        exclusive_to = session["status"]["exclusive_to"]
        if exclusive_to != [one.viewer_id for one in showing]:
            yield f"session {session_id} is exclusive to {exclusive_to}"
        passes = set(session.get("viewers", {}))
        if passes != {one.viewer_id for one in showing}:
            yield f"session {session_id} has passes for {sorted(passes)}"


def _pair(run: Run, session_id: str, viewer_id: str, pair: Row) -> Iterator[str]:
    one = run.invitations.get(str(pair["trigger_exclusive_goal"]))
    where = f"the pair of {viewer_id} in session {session_id}"
    if one is None or one.viewer_id != viewer_id:
        yield f"{where} names a goal that is not his"
        return
    over = pair.get("trigger_exclusive_goal_ended") is True
    if over != (one.state != "invited"):
        yield f"{where} says ended: {over}, and the goal is {one.state}"
    if pair.get("trigger_exclusive_goal_agreed") != one.agreed_at:
        yield f"{where} was agreed at another time than its goal"
    if one.reason in {"superseded", "not_started"}:
        yield f"{where} is left over: its goal was {one.reason}"
    if pair.get("exclusive_goal") != one.row.get("exclusive_goal"):
        yield f"{where} names another show than its goal"
    if (pair.get("exclusive_goal_ended") is True) != one.finished:
        yield f"{where} does not say what became of the show"


def _settled(run: Run) -> Iterator[str]:
    for row in run.truth.goals:
        if row.get("outbox") or "outbox_due_at" in row:
            left = [entry["event_id"] for entry in row.get("outbox", ())]
            yield f"{row['_id']} still has {left} in its outbox"
        if row["state"] == "declined":
            yield f"{row['_id']} is declined and was never settled"
        if row["active"] != (row["state"] == "invited" or _is_running(row)):
            yield f"{row['_id']} is {row['state']} with active = {row['active']}"
    for one in run.invitations.values():
        if one.did("start") != (one.show is not None):
            yield f"{one.id} and its show do not know each other"
        elif one.show is not None and (one.show["state"] == "ended") != (one.state == "ended"):
            yield f"{one.id} is {one.state} and its show {one.show['state']}"


def _is_running(row: Row) -> bool:
    return row["_cls"] == "ExclusiveGoal" and row["state"] == "live"


def _snapshot(run: Run) -> Iterator[str]:
    for snapshot in run.history.snapshots:
        seen = {goal["id"]: (goal["state"], goal["version"]) for goal in snapshot.goals}
        who = snapshot.user_id
        mine = {
            one.id: (one.state, one.row["version"])
            for one in run.invitations.values()
            if who in {one.streamer_id, one.viewer_id} and one.state in OPEN
        }
        if snapshot.final:
            if seen != mine:
                yield f"{who} sees {seen}, and true is {mine}"
            continue
        for goal_id, (_, version) in run.known_to(who, snapshot.asked_at_s).items():
            if goal_id in mine and goal_id not in seen:
                yield f"{who} knew of {goal_id}, and his snapshot does not"
            elif goal_id in seen and seen[goal_id][1] < version:
                yield f"{who} knew version {version} of {goal_id}, his snapshot an older one"


def _delivered(run: Run) -> Iterator[str]:
    wanted: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for one in run.invitations.values():
        for channel, event, event_id in one.pushes():
            wanted[channel].add((event, event_id))
    told: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    for heard in run.history.heard:
        if (event_id_heard := heard.event_id) is not None:
            told[heard.listener, heard.channel].add((heard.event, event_id_heard))
    for (listener, channel), events in told.items():
        for event, event_id in sorted(events - wanted[channel]):
            if not _is_for_the_room(run, channel, event, event_id):
                yield f"{listener} got {event} {event_id} on {channel}, which it should not"
    for listener, channel in sorted(run.history.watched):
        for event, event_id in sorted(wanted[channel] - told[listener, channel]):
            yield f"{listener} never got {event} {event_id} on {channel}"
    yield from _told_in_two_ways(run)


def _told_in_two_ways(run: Run) -> Iterator[str]:
    contents: dict[tuple[str, str], str] = {}
    for heard in run.history.heard:
        if heard.event_id is not None:
            content = json.dumps(heard.data, sort_keys=True)
            if contents.setdefault((heard.channel, heard.event_id), content) != content:
                yield f"{heard.event_id} was told on {heard.channel} in two ways"


def _is_for_the_room(run: Run, channel: str, event: str, event_id: str) -> bool:
    """After a show everyone present may watch again; who was present, nobody wrote down."""
    goal_id, version, _ = event_id.split(":", 2)
    one = run.invitations.get(goal_id)
    return (
        one is not None
        and one.finished
        and (event, version) == ("stream.authorized", "4")
        and channel.startswith(f"presence-stream-viewer@{one.streamer_id}.preview.")
    )


def _order(run: Run) -> Iterator[str]:
    told: dict[tuple[str, str, str], dict[str, None]] = defaultdict(dict)
    for heard in run.history.heard:
        if (event_id := heard.event_id) is not None:
            goal_id = event_id.partition(":")[0]
            told[heard.listener, heard.channel, goal_id][event_id] = None
    for (listener, channel, goal_id), event_ids in told.items():
        one = run.invitations.get(goal_id)
        if one is None:
            continue
        in_order = [event_id for where, _, event_id in one.pushes() if where == channel]
        came = [event_id for event_id in event_ids if event_id in in_order]
        if came != [event_id for event_id in in_order if event_id in event_ids]:
            yield f"{listener} got on {channel} {came}"


def _records(run: Run) -> Iterator[str]:
    wanted = set()
    for one in run.invitations.values():
        if one.state != "invited":
            wanted.add(f"{one.id}:2:goal.ended")
        if one.finished:
            wanted.add(f"{one.id}:4:goal.ended")
    found = {row["_id"] for row in run.truth.records}
    for event_id in sorted(wanted - found):
        yield f"{event_id} was not recorded"
    for event_id in sorted(found - wanted):
        yield f"{event_id} was recorded, and never came to pass"


__all__ = ["Rule", "Timing", "Violation", "judge"]
