"""Random commands, crashes and clock moves on two nodes, against a model of a page."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from bson import ObjectId
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from persistence.intents import Done
from statemachine.goal import CommandName, Role
from tests.persistence.world import World, code_of, goal_id_of

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from datetime import datetime

    from pymongo.database import Database

    from persistence.documents import Session
    from persistence.intents import Answer

T = TypeVar("T")

VIEWERS = ("ben", "cleo", "dora")
OVER = ("declined", "ended")


@dataclass
class Modelled:
    """One goal as the model sees it; `declined` counts as over, whether settled or not."""

    goal_id: str
    session: Session
    viewer: str
    amount: int
    exp: datetime
    state: str = "invited"
    reason: str | None = None
    due_at: datetime | None = None
    movements: list[str] = field(default_factory=lambda: ["hold"])

    def over(self, reason: str | None, movement: str | None = None) -> None:
        self.state, self.reason, self.due_at = "over", reason, None
        if movement is not None:
            self.movements.append(movement)


class TwoNodes(RuleBasedStateMachine):
    """The model decides what each command must answer; MongoDB has to agree after each step."""

    def __init__(self, url: str, raw: Database[Any]) -> None:
        super().__init__()
        for name in raw.list_collection_names():
            raw[name].delete_many({})
        self.runner = asyncio.Runner()
        self.world = World(url, raw)
        for _ in range(2):
            self.run(self.world.add_node())
        self.session = self.run(self.world.session())
        self.goals: list[Modelled] = []

    def run(self, awaitable: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(awaitable)

    @property
    def now(self) -> datetime:
        return self.world.clock.now()

    def taken(self) -> bool:
        return any(
            goal.state in ("agreed", "live") and goal.session is self.session for goal in self.goals
        )

    def after(self, answer: Answer, crashes: bool) -> None:
        """Delivers what a commit left to do, unless the node dies right behind the commit."""
        if isinstance(answer, Done) and not crashes:
            self.run(self.world.nodes[0].deliver(answer))

    # Commands

    @rule(
        viewer=st.sampled_from(VIEWERS),
        amount=st.integers(1, 1000),
        node=st.integers(0, 1),
        crashes=st.booleans(),
    )
    def invite(self, viewer: str, amount: int, node: int, crashes: bool) -> None:
        stands = any(
            goal.viewer == viewer and goal.state == "invited" and goal.session is self.session
            for goal in self.goals
        )
        expected = "ok"
        if self.taken():
            expected = "session_busy"
        elif stands:
            expected = "already_invited"

        answer = self.run(
            self.world.invite(
                self.session, viewer, amount_minor=amount, node=self.world.nodes[node]
            )
        )

        assert code_of(answer) == expected
        if expected == "ok":
            exp = self.now + timedelta(seconds=60)
            goal_id = goal_id_of(answer)
            self.goals.append(Modelled(goal_id, self.session, viewer, amount, exp, due_at=exp))
        self.after(answer, crashes)

    @precondition(lambda self: self.goals)
    @rule(
        data=st.data(),
        name=st.sampled_from(
            [
                CommandName.AGREE,
                CommandName.DISAGREE,
                CommandName.WITHDRAW,
                CommandName.START,
                CommandName.FINISH,
            ]
        ),
        node=st.integers(0, 1),
        crashes=st.booleans(),
    )
    def command(self, data: st.DataObject, name: CommandName, node: int, crashes: bool) -> None:
        # The latest goals are the ones to which anything can still happen.
        goal = self.goals[-data.draw(st.integers(1, min(4, len(self.goals))))]
        by_viewer = name is CommandName.WITHDRAW
        allowed = self.allowed(goal, name)

        answer = self.run(
            self.world.ask(
                name,
                goal.goal_id,
                by=goal.viewer if by_viewer else "anna",
                role=Role.VIEWER if by_viewer else Role.STREAMER,
                node=self.world.nodes[node],
            )
        )

        assert (code_of(answer) == "ok") is allowed, (name, goal, answer)
        if allowed:
            self.carried_out(goal, name)
        self.after(answer, crashes)

    def allowed(self, goal: Modelled, name: CommandName) -> bool:
        on_air = goal.session is self.session
        match name:
            case CommandName.AGREE:
                return goal.state == "invited" and self.now < goal.exp and on_air
            case CommandName.DISAGREE | CommandName.WITHDRAW:
                return goal.state == "invited"
            case CommandName.START:
                return goal.state == "agreed" and on_air
            case _:
                return goal.state == "live"

    def carried_out(self, goal: Modelled, name: CommandName) -> None:
        match name:
            case CommandName.AGREE:
                goal.state = "agreed"
                goal.exp = self.now
                goal.due_at = self.now + timedelta(seconds=65)
                for other in self.goals:
                    if other.state == "invited" and other.session is goal.session:
                        other.over("superseded", "release")
            case CommandName.DISAGREE:
                goal.over("disagreed", "release")
            case CommandName.WITHDRAW:
                goal.over("withdrawn", "release")
            case CommandName.START:
                goal.state = "live"
                goal.due_at = goal.exp + timedelta(seconds=90)
                goal.movements.append("capture")
            case _:
                goal.over(None)

    @rule(crashes=st.booleans())
    def the_stream_ends_and_another_begins(self, crashes: bool) -> None:
        ended, deliveries = self.run(self.world.node.sessions.end(self.session))
        self.after(Done({}, str(ended.id), deliveries), crashes)
        for goal in self.goals:
            if goal.state == "invited" and goal.session is self.session:
                goal.over("stream_ended", "release")
        self.session = self.run(self.world.session())

    # Time and faults

    @rule(seconds=st.sampled_from([0.5, 5.0, 30.0, 60.0, 65.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.clock.shift(seconds)

    @rule(node=st.integers(0, 1), crashes=st.booleans())
    def the_timers_run(self, node: int, crashes: bool) -> None:
        answers = self.run(self.world.nodes[node].fire_due())

        due = [goal for goal in self.goals if goal.due_at and goal.due_at <= self.now]
        assert [code_of(answer) for answer in answers] == ["ok"] * len(due)
        for goal in due:
            match goal.state:
                case "invited":
                    goal.over("expired", "release")
                case "agreed":
                    goal.over("not_started", "release")
                case _:
                    goal.over(None)
        for answer in answers:
            self.after(answer, crashes)

    @rule(node=st.integers(0, 1))
    def what_was_left_behind_is_delivered(self, node: int) -> None:
        self.world.clock.shift(5.0)
        self.run(self.world.nodes[node].deliver_due())

    # What must hold after each step

    @invariant()
    def mongodb_agrees_with_the_model(self) -> None:
        for goal in self.goals:
            row = self.world.goal_row(goal.goal_id)
            if goal.state == "over":
                assert row["state"] in OVER
            else:
                assert row["state"] == goal.state
            assert row.get("reason") == goal.reason
            assert row.get("due_at") == goal.due_at
            assert row["active"] is (goal.state == "invited")
            assert self.world.movements(goal.goal_id) == goal.movements

    @invariant()
    def money_is_conserved(self) -> None:
        accounts: Counter[str] = Counter()
        for row in self.world.raw["escrow"].find():
            accounts[row["debit"]] -= row["amount"]
            accounts[row["credit"]] += row["amount"]
        assert sum(accounts.values()) == 0
        assert accounts["escrow"] == sum(
            goal.amount for goal in self.goals if goal.movements == ["hold"]
        )

    @invariant()
    def the_sessions_pairs_name_what_stands(self) -> None:
        row = self.world.session_row(self.session)
        ours = [goal for goal in self.goals if goal.session is self.session]
        for goal in ours:
            if goal.state in ("invited", "agreed", "live"):
                pair = row["exclusive_goal_pairs"][goal.viewer]
                assert pair["trigger_exclusive_goal"] == ObjectId(goal.goal_id)
        taken = [goal.viewer for goal in ours if goal.state in ("agreed", "live")]
        assert row["status"]["exclusive_to"] == taken
        assert list(row["viewers"]) == taken

    def teardown(self) -> None:
        """A day later everything has ended, and every signal was delivered."""
        try:
            self.world.clock.shift(86_400)
            self.the_timers_run(0, crashes=True)
            self.what_was_left_behind_is_delivered(1)
            self.all_has_ended()
        finally:
            self.run(self.world.close())
            self.runner.close()

    def all_has_ended(self) -> None:
        delivered = {
            occurrence.event_id
            for node in self.world.nodes
            for occurrence, _ in node.recorder.performed
        }
        for goal in self.goals:
            row = self.world.goal_row(goal.goal_id)
            captured = "capture" in goal.movements
            assert row["state"] == "ended"
            assert row["outcome"] == ("captured" if captured else "refunded")
            assert row["outbox"] == []
            assert {f"{goal.goal_id}:1:goal.added", f"{goal.goal_id}:2:goal.ended"} <= delivered
        assert self.run(self.world.node.outbox.pending()) == 0


def test_two_nodes_do_what_the_model_says(mongodb_url: str, worlds_database: Database[Any]) -> None:
    run_state_machine_as_test(
        lambda: TwoNodes(mongodb_url, worlds_database),  # type: ignore[arg-type] # any factory will do
        settings=settings(
            max_examples=15,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
