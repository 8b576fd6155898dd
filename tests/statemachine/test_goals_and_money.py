"""Goals of one Session and their escrow under random commands: what may never break, never does."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from statemachine.escrow import Posting, posting
from statemachine.goal import (
    Command,
    CommandName,
    Decision,
    Due,
    GoalFacts,
    GoalState,
    Limits,
    Movement,
    Outcome,
    RejectionCode,
    Role,
    decide,
)
from statemachine.receivers import (
    TRIGGER_EXCLUSIVE_GOAL,
    MakeDue,
    Phase,
    Signal,
    UnsetOtherPairs,
    standard_receivers,
)
from tests.statemachine.builders import NOW, occurrence

if TYPE_CHECKING:
    from datetime import datetime

LIMITS = Limits(invitation_ttl_s=10, refund_delay_s=15, show_grace_s=5)
STREAMER = "anna"
VIEWERS = ("ben", "cleo", "dora")
TAKEN = (GoalState.AGREED, GoalState.LIVE)
ANSWERS = [name for name in CommandName if name is not CommandName.INVITE]


@dataclass
class Book:
    """One goal, its deadline and its part of the ledger, as a shell would keep them."""

    facts: GoalFacts
    due: Due | None = None
    outcome: Outcome | None = None
    agreed_at: datetime | None = None
    postings: dict[str, Posting] = field(default_factory=dict)
    history: list[GoalState] = field(default_factory=list)

    def moved_minor(self) -> tuple[int, int, int]:
        """What was held, captured and released."""
        sums = dict.fromkeys(Movement, 0)
        for entry in self.postings.values():
            sums[entry.movement] += entry.amount_minor
        return sums[Movement.HOLD], sums[Movement.CAPTURE], sums[Movement.RELEASE]

    @property
    def open_minor(self) -> int:
        """What still lies in escrow."""
        held, captured, released = self.moved_minor()
        return held - captured - released


class GoalsAndMoney(RuleBasedStateMachine):
    """A shell without a database: what `decide` allows is done, at once and as a whole."""

    goals = Bundle("goals")

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.stream_on = True
        self.books: list[Book] = []
        self.registry = standard_receivers()

    @rule(
        target=goals,
        viewer=st.sampled_from(VIEWERS),
        amount_minor=st.integers(1, 10**6),
        duration_s=st.integers(1, 20),
    )
    def invite(self, viewer: str, amount_minor: int, duration_s: int) -> Book:
        fresh = GoalFacts(
            state=GoalState.NONE,
            streamer_id=STREAMER,
            viewer_id=viewer,
            amount_minor=amount_minor,
            prepaid_duration_s=duration_s,
            expires_at=self.now,
        )
        book = Book(fresh, history=[GoalState.NONE])
        self.books.append(book)
        self.carry_out(book, Command(CommandName.INVITE, Role.VIEWER, viewer))
        return book

    @rule(
        book=goals,
        name=st.sampled_from(ANSWERS),
        role=st.sampled_from(Role),
        user=st.sampled_from([STREAMER, *VIEWERS, None]),
    )
    def anyone_asks_anything(
        self, book: Book, name: CommandName, role: Role, user: str | None
    ) -> None:
        self.carry_out(book, Command(name, role, user))

    @rule(book=goals, name=st.sampled_from(ANSWERS))
    def the_right_person_asks(self, book: Book, name: CommandName) -> None:
        user, role = {
            CommandName.AGREE: (STREAMER, Role.STREAMER),
            CommandName.DISAGREE: (STREAMER, Role.STREAMER),
            CommandName.START: (STREAMER, Role.STREAMER),
            CommandName.WITHDRAW: (book.facts.viewer_id, Role.VIEWER),
            CommandName.FINISH: (book.facts.viewer_id, Role.VIEWER),
            CommandName.EXPIRE: (None, Role.TIMER),
            CommandName.REFUND: (None, Role.TIMER),
        }.get(name, (None, Role.SYSTEM))
        self.carry_out(book, Command(name, role, user))

    @rule(seconds=st.integers(0, 20_000).map(lambda ms: ms / 1000))
    def time_passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    @rule()
    def the_timer_looks(self) -> None:
        for book in self.books:
            if book.due is not None and book.due.at <= self.now:
                done = self.carry_out(book, Command(book.due.command, Role.TIMER))
                assert done, "a due goal refused its own timer"

    @rule()
    def the_stream_ends(self) -> None:
        self.stream_on = False
        for book in self.books:
            if book.facts.state is GoalState.INVITED:
                assert self.carry_out(book, Command(CommandName.CLOSE, Role.SYSTEM))

    def carry_out(self, book: Book, command: Command) -> bool:
        """Decides, and when allowed writes all that follows."""
        others = [other for other in self.books if other is not book]
        goal = replace(
            book.facts,
            session_active=self.stream_on,
            session_taken=any(other.facts.state in TAKEN for other in others),
            due_at=book.due.at if book.due else None,
            viewer_nbf=book.agreed_at,
        )
        answer = decide(goal, command, self.now, LIMITS)
        if not isinstance(answer, Decision):
            assert isinstance(answer.code, RejectionCode)
            return False
        if command.name is CommandName.AGREE:
            assert self.now < book.facts.expires_at, "an expired goal was agreed"
        book.facts = replace(
            goal, state=answer.target, expires_at=answer.expires_at, reason=answer.reason
        )
        book.history.append(answer.target)
        book.outcome = answer.outcome or book.outcome
        book.agreed_at = answer.agreed_at or book.agreed_at
        book.due = answer.due
        self.post(book, answer)
        if answer.deactivates:
            self.signal_ended(book, others)
        return True

    def post(self, book: Book, answer: Decision) -> None:
        if answer.movement is None:
            return
        entry = posting(
            answer.movement,
            goal_id=str(self.books.index(book)),
            viewer_id=book.facts.viewer_id,
            streamer_id=STREAMER,
            amount_minor=book.facts.amount_minor,
        )
        assert entry.key not in book.postings, "the ledger refuses the same key twice"
        book.postings[entry.key] = entry

    def signal_ended(self, book: Book, others: list[Book]) -> None:
        """The commit-phase receivers of `goal.ended`, as far as they concern goals."""
        about = occurrence(
            at=self.now,
            exp=book.facts.expires_at,
            agreed_at=book.agreed_at,
            refund_delay_s=LIMITS.refund_delay_s,
            show_grace_s=LIMITS.show_grace_s,
        )
        for receiver in self.registry.of(Signal.GOAL_ENDED, TRIGGER_EXCLUSIVE_GOAL, Phase.COMMIT):
            for effect in receiver.react(about):
                if isinstance(effect, MakeDue):
                    book.due = effect.due
                elif isinstance(effect, UnsetOtherPairs):
                    for other in others:
                        self.carry_out(other, Command(CommandName.SUPERSEDE, Role.SYSTEM))

    @invariant()
    def money_is_conserved(self) -> None:
        accounts: Counter[str] = Counter()
        for book in self.books:
            for entry in book.postings.values():
                accounts[entry.debit] -= entry.amount_minor
                accounts[entry.credit] += entry.amount_minor
        still_open = sum(book.open_minor for book in self.books)
        assert sum(accounts.values()) == 0
        assert accounts["escrow"] == still_open >= 0

    @invariant()
    def what_was_held_is_either_captured_or_released_once_the_goal_has_ended(self) -> None:
        for book in self.books:
            held, captured, released = book.moved_minor()
            assert not (captured and released)
            match book.facts.state:
                case GoalState.NONE:
                    assert not book.postings
                case GoalState.INVITED | GoalState.AGREED:
                    assert book.open_minor == book.facts.amount_minor
                case GoalState.LIVE:
                    assert captured == book.facts.amount_minor
                case GoalState.DECLINED:
                    assert released == book.facts.amount_minor
                case GoalState.ENDED:
                    assert held == captured + released == book.facts.amount_minor
                    assert bool(captured) is (book.outcome is Outcome.CAPTURED)

    @invariant()
    def nothing_leaves_ended(self) -> None:
        for book in self.books:
            assert GoalState.ENDED not in book.history[:-1]

    @invariant()
    def at_most_one_goal_is_agreed_or_live_and_then_no_other_invitation_stands(self) -> None:
        states = [book.facts.state for book in self.books]
        taken = [state for state in states if state in TAKEN]
        assert len(taken) <= 1
        assert not (taken and GoalState.INVITED in states)

    @invariant()
    def whoever_holds_money_has_a_deadline(self) -> None:
        for book in self.books:
            if Movement.HOLD in {entry.movement for entry in book.postings.values()}:
                waits = book.facts.state in (GoalState.INVITED, *TAKEN)
                assert (book.due is not None) is waits

    def teardown(self) -> None:
        """However it went: when the timers have run, all money is where it belongs."""
        self.the_stream_ends()
        self.now += timedelta(days=1)
        for _ in range(2):
            self.the_timer_looks()
        for book in self.books:
            if book.facts.state is GoalState.DECLINED:
                assert self.carry_out(book, Command(CommandName.SETTLE, Role.SYSTEM))
            assert book.facts.state in (GoalState.NONE, GoalState.ENDED)
            assert book.open_minor == 0


TestGoalsAndMoney = GoalsAndMoney.TestCase
TestGoalsAndMoney.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
