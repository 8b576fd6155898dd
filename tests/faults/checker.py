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

from tests.faults import contents
from tests.faults.evidence import OPEN, SHOWING, Run, Timing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.faults.evidence import Invitation
    from tests.faults.history import Answered, Asked, Heard, History, Row, Snapshot, Truth


class Rule(StrEnum):
    """What must hold whatever crashed."""

    ACKNOWLEDGED = "no acknowledged command is lost"
    REFUSED = "no refused command has an effect"
    ONE_ANSWER = "one request has one answer"
    ONE_EFFECT = "one request has one effect"
    PARTIES = "a goal is its parties' business"
    CONTENT = "what is told is so"
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
# Without it nothing would ever end them.
_TIMER_OF: Final = {"invited": "expire", "agreed": "refund", "live": "finish"}
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
            (Rule.ONE_EFFECT, _one_effect),
            (Rule.PARTIES, _parties),
            (Rule.CONTENT, _content),
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
        elif invitation.agreed_at and invitation.reason not in {None, "not_started"}:
            yield f"{goal_id} was agreed and {invitation.reason}"
    yield from _gone_back(run)


def _gone_back(run: Run) -> Iterator[str]:
    """A goal at an older version than an answer before had it; repetitions are as they were."""
    first_asked_at_s: dict[tuple[str, str], float] = {}
    for asked in run.history.asked:
        if asked.request_id is not None:
            first_asked_at_s.setdefault((asked.user_id, asked.request_id), asked.at_s)
    shown: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for asked, answer in run.answers():
        if answer.goal is not None:
            request = (asked.user_id, asked.request_id or "")
            since_s = first_asked_at_s.get(request, asked.at_s)
            shown[answer.goal["id"]].append((since_s, answer.at_s, answer.goal["version"]))
    for goal_id, answers in shown.items():
        for (_, until_s, before), (since_s, _, after) in itertools.permutations(answers, 2):
            if until_s < since_s and after < before:
                yield f"{goal_id} was at version {before}, and later at {after}"


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
    for (user_id, request_id), different in answers.items():
        if len(different) > 1:
            yield f"request {request_id} of {user_id} was answered {' and '.join(different)}"

    for ask, count in Counter(answer.ask for answer in run.history.answered).items():
        if count > 1:
            yield f"ask {ask} was answered {count} times"


def _one_effect(run: Run) -> Iterator[str]:
    done: dict[tuple[str, str], set[str]] = defaultdict(set)
    for asked, answer in run.answers():
        if answer.ok and asked.command != "close":
            done[_goal_id_of(asked, answer) or "", asked.command].add(_request_of(asked))
    for (goal_id, command), requests in done.items():
        if len(requests) > 1:
            yield f"{command} of {goal_id} was acknowledged to {len(requests)} requests"
    wanted: dict[tuple[str, str], set[str]] = defaultdict(set)
    refused: dict[tuple[str, str], set[str]] = defaultdict(set)
    for asked in run.history.asked:
        if asked.command == "invite":
            told = run.answer_of.get(asked.ask)
            final = told is not None and not told.ok and not told.retryable
            key = (asked.session_id or "", asked.user_id)
            (refused if final else wanted)[key].add(_request_of(asked))
    stand = Counter((one.session_id, one.viewer_id) for one in run.invitations.values())
    for key, count in stand.items():
        most = len(wanted[key] - refused[key])
        if count > most:
            yield f"{most} requests of {key[1]} in session {key[0]} made {count} invitations"


def _request_of(asked: Asked) -> str:
    return asked.request_id or f"ask {asked.ask}"


def _parties(run: Run) -> Iterator[str]:
    owner_of = {str(row["_id"]): row["user"]["id"] for row in run.truth.sessions}
    for asked, answer in run.answers():
        if asked.command == "close":
            if answer.ok and owner_of.get(asked.session_id or "") != asked.user_id:
                yield f"{asked.user_id} ended the session {asked.session_id} of somebody else"
            continue
        one = run.invitations.get(_goal_id_of(asked, answer) or "")
        if one is not None and answer.ok and not one.lets(asked):
            yield f"{asked.command} of {one.id} was acknowledged to {asked.user_id}"
        if answer.goal is not None and not answer.ok:
            yield from _strange(run, asked.user_id, answer.goal)
    for snapshot in run.history.snapshots:
        for goal in snapshot.goals:
            yield from _strange(run, snapshot.user_id, goal)


def _strange(run: Run, user_id: str, goal: Row) -> Iterator[str]:
    one = run.invitations.get(goal["id"])
    if one is not None and user_id and user_id not in one.parties:
        yield f"{user_id} was shown {one.id}, which is none of his"


def _content(run: Run) -> Iterator[str]:
    for asked, answer in run.answers():
        yield from contents.answered(run, asked, answer)
    for snapshot in run.history.snapshots:
        for goal in snapshot.goals:
            yield from contents.shown(run, goal)
    for heard in run.history.heard:
        yield from contents.told(run, heard)


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
    for one in run.invitations.values():
        for number in range(1, one.asked_for + 1):
            if run.caused_at_s(one, number) is None:
                yield f"{one.id} came to version {number}, and nobody asked for it"


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
        for row in one.postings:
            yield from _posting(one, row)
        if one.row["breakdown"] != {one.viewer_id: one.row["amount"]}:
            yield f"{one.id} is paid by {one.row['breakdown']}"


def _posting(one: Invitation, row: Row) -> Iterator[str]:
    accounts = {
        "hold": (f"viewer:{one.viewer_id}", "escrow"),
        "capture": ("escrow", f"streamer:{one.streamer_id}"),
        "release": ("escrow", f"viewer:{one.viewer_id}"),
    }
    if row["amount"] != one.row["amount"] or row["amount"] <= 0:
        yield f"posting {row['_id']} moves {row['amount']} of {one.row['amount']}"
    if (row["debit"], row["credit"]) != accounts[row["movement"]]:
        yield f"posting {row['_id']} goes from {row['debit']} to {row['credit']}"
    if row["reason"] != contents.reason_of(one, row["movement"]):
        yield f"posting {row['_id']} says {row['reason']}, and its goal {one.reason}"
    said = (str(row["session_id"]), row["streamer_id"], row["viewer_id"])
    if said != (one.session_id, *one.parties):
        yield f"posting {row['_id']} is in the books of others: {said}"


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
        passes = session.get("viewers", {})
        if set(passes) != {one.viewer_id for one in showing}:
            yield f"session {session_id} has passes for {sorted(passes)}"
        for one in showing:
            yield from _pass(one, passes.get(one.viewer_id, {}))


def _pass(one: Invitation, row: Row) -> Iterator[str]:
    nbf, duration_s = row.get("nbf"), row.get("duration", 0.0)
    if nbf is None or nbf != one.agreed_at:
        yield f"the pass of {one.viewer_id} begins {nbf}"
    elif duration_s < one.row["metadata"]["prepaid_duration"]:
        yield f"the pass of {one.viewer_id} lasts for {duration_s} s"
    elif row.get("exp") != nbf + timedelta(seconds=duration_s):
        yield f"the pass of {one.viewer_id} ends {row.get('exp')}"


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
        due = (one.row.get("due_command"), "due_at" in one.row)
        if due != (command := _TIMER_OF.get(one.state), command is not None):
            yield f"{one.id} is {one.state}, and its timer is {due}"
        if one.row["version"] != len(one.life):
            yield f"{one.id} is {one.state} at version {one.row['version']}"
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
        if len(seen) < len(snapshot.goals):
            yield f"{who} sees a goal twice"
        for goal_id, (state, _) in seen.items():
            if state not in OPEN:
                yield f"{who} sees {goal_id}, which is {state}"
        his = {one.id: one for one in run.invitations.values() if who in one.parties}
        mine = {
            one.id: (one.state, one.row["version"]) for one in his.values() if one.state in OPEN
        }
        if snapshot.final:
            if seen != mine:
                yield f"{who} sees {seen}, and true is {mine}"
            continue
        yield from _older_than_it_may_be(run, snapshot, his, seen)


def _older_than_it_may_be(
    run: Run, snapshot: Snapshot, his: dict[str, Invitation], seen: dict[str, tuple[str, int]]
) -> Iterator[str]:
    """What he knew before he asked, and what had long been so at the snapshot's own `as_of`."""
    who = snapshot.user_id
    for goal_id, version in run.known_to(who, snapshot.asked_at_s).items():
        if goal_id in seen and seen[goal_id][1] < version:
            yield f"{who} knew version {version} of {goal_id}, his snapshot an older one"
        elif goal_id in his and goal_id not in seen and _was_open(run, his[goal_id], snapshot):
            yield f"{who} knew of {goal_id}, and his snapshot does not"
    by_then = snapshot.as_of - timedelta(seconds=run.timing.commit_s)
    for one in his.values():
        is_in = one.id in seen
        if one.row["created_at"] < by_then and not is_in and _was_open(run, one, snapshot):
            yield f"{who} has a snapshot of {snapshot.as_of} without {one.id}"
        if is_in and one.row["created_at"] > snapshot.as_of:
            yield f"{who} has a snapshot of {snapshot.as_of} with {one.id}, which came later"


def _was_open(run: Run, one: Invitation, snapshot: Snapshot) -> bool:
    """Whether a goal stood still when a snapshot had come."""
    ended_at_s = run.ended_at_s(one)
    return one.state in OPEN or (ended_at_s is not None and ended_at_s > snapshot.at_s)


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
    said: dict[tuple[str, str], str] = {}
    for heard in run.history.heard:
        if heard.event_id is not None:
            content = json.dumps(heard.data, sort_keys=True)
            # What authorizes a room says to each who he is.
            where = heard.channel if heard.event == "stream.authorized" else ""
            if said.setdefault((where, heard.event_id), content) != content:
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
    for row in run.truth.records:
        its = run.invitations.get(row["goal_id"])
        said = (row["streamer_id"], row["viewer_id"], row["agreed"])
        if its is not None and said != (*its.parties, its.agreed_at is not None):
            yield f"{row['_id']} was recorded as {said}"
    for event_id in sorted(wanted - found):
        yield f"{event_id} was not recorded"
    for event_id in sorted(found - wanted):
        yield f"{event_id} was recorded, and never came to pass"


__all__ = ["Rule", "Timing", "Violation", "judge"]
