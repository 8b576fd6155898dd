"""The platform's payment service beside the ledger: slow, wrong, twice, never; nothing is lost."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from gateway.escrow_client import EscrowClient
from gateway.telemetry import Telemetry
from persistence.claims import claim
from persistence.errors import EscrowUnavailable, StoreOverloaded
from persistence.escrow_calls import EscrowBook, EscrowCalls
from persistence.escrow_port import CallStatus
from persistence.faults import Step
from persistence.intents import Done
from statemachine.goal import CommandName
from tests.payment_service import SECRET, UNCLEAR, Fault, PaymentService
from tests.persistence.world import VIEWER, Node, Steps, World, code_of, goal_id_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from pymongo import MongoClient

    from persistence.documents import EscrowCall, Session
    from persistence.intents import Answer

TIMEOUT_S = 0.25
DEADLINE_S = 4.0
# For who is to find no answer anyway; six times what one call may take.
IMPATIENT_S = 1.5
GIVE_UP_S = 600.0
MILLISECOND = timedelta(milliseconds=1)
# What comes too late: no answer, none for so long that it is given up, a refusal.
LATE = [(Fault.ERROR, GIVE_UP_S), (Fault.ERROR, 0.0), (Fault.REFUSE, GIVE_UP_S)]


class Crash(BaseException):
    """Not an `Exception`: nothing may catch it on its way out, as nothing survives `kill -9`."""


def crash() -> None:
    raise Crash


@dataclass
class Till:
    """A world whose nodes know a payment service."""

    world: World
    service: PaymentService

    async def add_node(self, port: EscrowClient) -> Node:
        return await self.world.add_node(port=port, deadline_s=DEADLINE_S)

    def calls_of(self, node: Node, give_up_s: float = GIVE_UP_S) -> EscrowCalls:
        port = node.port
        assert port is not None
        return EscrowCalls(node.store, node.goals, port, timeout_s=TIMEOUT_S, give_up_s=give_up_s)

    @property
    def book(self) -> EscrowBook:
        return EscrowBook(self.world.node.store)

    async def work(self, node: Node | None = None, give_up_s: float = GIVE_UP_S) -> int:
        """Says what is due, once; tells how many calls that were."""
        calls = self.calls_of(node or self.world.node, give_up_s)
        due = await calls.claim_due(100)
        for call in due:
            await calls.say(call)
        return len(due)

    async def work_on(self, node: Node | None = None) -> None:
        """Says what is due and what falls due, until nothing is left that could."""
        while (await self.book.backlog()).pending:
            self.world.clock.shift(120.0)
            await self.work(node)

    async def until_asked(self, call: str) -> None:
        await self.service.until(f"{call} is asked", lambda: call in dict(self.service.asked))

    def call_rows(self) -> list[dict[str, Any]]:
        return list(self.world.raw["escrow_calls"].find())

    def statuses(self) -> list[tuple[str, str]]:
        return sorted((row["call"], row["status"]) for row in self.call_rows())

    def assert_books_agree(self) -> None:
        assert self.service.disagreements(self.world.raw) == []


@pytest.fixture
def service() -> Iterator[PaymentService]:
    with PaymentService() as service:
        yield service


@pytest_asyncio.fixture
async def port(world: World, service: PaymentService) -> AsyncIterator[EscrowClient]:
    client = EscrowClient(service.url, SECRET, TIMEOUT_S, world.clock, Telemetry())
    yield client
    await client.close()


@pytest_asyncio.fixture
async def till(world: World, service: PaymentService, port: EscrowClient) -> Till:
    """The first node has the service; a test that wants one without adds it."""
    await world.close()
    world.nodes.clear()
    till = Till(world, service)
    await till.add_node(port)
    return till


async def invite(till: Till, session: Session, request_id: str = "r", **more: Any) -> Answer:
    return await till.world.invite(session, request_id=request_id, **more)


async def invite_in_vain(till: Till, session: Session) -> None:
    """Invites, and gives up when the service has said nothing in time."""
    store = till.world.node.store
    patient = store.options
    store.options = replace(patient, deadline_s=IMPATIENT_S)
    with pytest.raises(EscrowUnavailable):
        await invite(till, session)
    store.options = patient


class TestHold:
    async def test_an_invitation_stands_once_the_service_holds_the_money(self, till: Till) -> None:
        session = await till.world.session()

        goal_id = goal_id_of(await invite(till, session))

        assert till.service.done == [("hold", f"{goal_id}:hold")]
        assert till.world.goal_row(goal_id)["held_by"] == "service"
        assert till.statuses() == [("hold", CallStatus.ACKNOWLEDGED)]
        (row,) = till.call_rows()
        assert not {"due_at", "request_key", "fingerprint"} & set(row)
        till.assert_books_agree()

    @pytest.mark.parametrize("fault", [*UNCLEAR, Fault.SLOW])
    async def test_a_service_that_fails_once_is_asked_again_with_the_same_key(
        self, till: Till, fault: Fault
    ) -> None:
        session = await till.world.session()
        till.service.plan("hold", fault)

        answer = await invite(till, session)

        assert code_of(answer) == "ok"
        assert len(set(till.service.asked)) == 1
        assert len(till.service.asked) == (1 if fault is Fault.SLOW else 2)
        assert till.service.times("hold") == 1
        till.assert_books_agree()

    async def test_a_refused_hold_refuses_the_invitation_and_is_not_asked_again(
        self, till: Till
    ) -> None:
        session = await till.world.session()
        till.service.plan("hold", Fault.REFUSE)

        first = await invite(till, session)
        again = await invite(till, session)
        await till.work_on()

        assert code_of(first) == code_of(again) == "payment_refused"
        assert len(till.service.asked) == 1
        assert till.statuses() == [("hold", CallStatus.REFUSED)]
        assert till.world.raw["goals"].count_documents({}) == 0
        till.assert_books_agree()

    @pytest.mark.parametrize("fault", UNCLEAR)
    async def test_a_hold_without_an_answer_is_unavailable_then_found_out_and_given_back(
        self, till: Till, fault: Fault
    ) -> None:
        session = await till.world.session()
        till.service.always("hold", fault)

        await invite_in_vain(till, session)
        till.service.always("hold", None)
        await till.work_on()

        assert len({key for call, key in till.service.asked if call == "hold"}) == 1
        assert till.statuses() == [
            ("hold", CallStatus.ABANDONED),
            ("release", CallStatus.ACKNOWLEDGED),
        ]
        assert till.world.raw["goals"].count_documents({}) == 0
        till.assert_books_agree()

    async def test_the_same_request_again_goes_on_with_the_same_hold(self, till: Till) -> None:
        session = await till.world.session()
        till.service.always("hold", Fault.HANG_AFTER)
        await invite_in_vain(till, session)
        till.service.always("hold", None)

        goal_id = goal_id_of(await invite(till, session))
        await till.work_on()

        assert set(till.service.asked) == {("hold", f"{goal_id}:hold")}
        assert till.statuses() == [("hold", CallStatus.ACKNOWLEDGED)]
        till.assert_books_agree()

    async def test_one_too_many_waits_for_the_service_and_is_refused_at_once(
        self, till: Till
    ) -> None:
        session = await till.world.session()
        store = till.world.node.store
        store.options = replace(store.options, queue_size=1)
        till.service.close_gate("hold")
        first = asyncio.create_task(till.world.invite(session))
        await till.until_asked("hold")

        with pytest.raises(StoreOverloaded):
            await till.world.invite(session, "cleo")

        till.service.open_gate("hold")
        assert code_of(await first) == "ok"
        assert code_of(await till.world.invite(session, "dora")) == "ok"

    async def test_a_hold_that_is_gone_on_with_falls_due_later(self, till: Till) -> None:
        """Else a worker gives it back while the service is asked for it."""
        session = await till.world.session()
        till.service.always("hold", Fault.HANG_AFTER)
        await invite_in_vain(till, session)
        [before] = till.call_rows()
        till.world.clock.shift(1.0)

        await invite_in_vain(till, session)

        [after] = till.call_rows()
        assert after["_id"] == before["_id"]
        # Not before the command's time is over, and once more for him who asks again.
        assert before["due_at"] == before["since"] + timedelta(seconds=2 * IMPATIENT_S)
        assert after["due_at"] == before["due_at"] + timedelta(seconds=1)

    async def test_a_new_hold_of_a_request_waits_until_the_old_one_is_given_back(
        self, till: Till
    ) -> None:
        session = await till.world.session()
        till.service.always("hold", Fault.DROP_AFTER)
        await invite_in_vain(till, session)
        till.service.always("hold", None)
        till.world.clock.shift(120.0)
        await till.work()

        with pytest.raises(EscrowUnavailable):
            await invite(till, session)
        await till.work_on()
        answer = await invite(till, session)

        assert code_of(answer) == "ok"
        assert till.service.times("hold") == 2
        assert till.service.times("release") == 1
        assert till.service.most_open == 1
        till.assert_books_agree()

    async def test_a_refusal_behind_the_hold_gives_the_money_back(self, till: Till) -> None:
        session = await till.world.session()
        till.service.close_gate("hold")
        inviting = asyncio.create_task(invite(till, session))
        await till.until_asked("hold")

        await till.world.node.sessions.end(session)
        till.service.open_gate("hold")
        answer = await inviting
        await till.work_on()

        assert code_of(answer) == "session_ended"
        assert till.service.done[-1][0] == "release"
        till.assert_books_agree()

    async def test_of_two_invitations_of_a_viewer_one_is_given_back(self, till: Till) -> None:
        session = await till.world.session()

        answers = await asyncio.gather(invite(till, session, "one"), invite(till, session, "two"))
        await till.work_on()

        assert sorted(code_of(answer) for answer in answers) == ["already_invited", "ok"]
        till.assert_books_agree()

    @pytest.mark.parametrize("step", [Step.AFTER_DECIDE, Step.IN_TRANSACTION, Step.BEFORE_COMMIT])
    async def test_a_crash_between_hold_and_commit_leaves_no_money_held(
        self, till: Till, port: EscrowClient, steps: Steps, step: Step
    ) -> None:
        other = await till.add_node(port)
        session = await till.world.session()
        steps.once(step, "invite", crash)
        with pytest.raises(Crash):
            await invite(till, session)
        assert till.service.times("hold") == 1

        await till.work_on(other)

        assert till.service.times("release") == 1
        assert till.world.raw["goals"].count_documents({}) == 0
        till.assert_books_agree()

    async def test_after_a_crash_behind_the_hold_the_request_needs_no_second_one(
        self, till: Till, steps: Steps
    ) -> None:
        session = await till.world.session()
        steps.once(Step.BEFORE_COMMIT, "invite", crash)
        with pytest.raises(Crash):
            await invite(till, session)

        answer = await invite(till, session)
        await till.work_on()

        assert code_of(answer) == "ok"
        assert till.service.done == [("hold", f"{goal_id_of(answer)}:hold")]
        till.assert_books_agree()

    async def test_a_crash_behind_the_commit_keeps_the_hold(self, till: Till, steps: Steps) -> None:
        session = await till.world.session()
        steps.once(Step.AFTER_COMMIT, "invite", crash)
        with pytest.raises(Crash):
            await invite(till, session)

        await till.work_on()
        answer = await invite(till, session)

        assert code_of(answer) == "ok"
        assert till.service.times("release") == 0
        till.assert_books_agree()

    async def test_a_caller_who_goes_away_leaves_no_money_held(self, till: Till) -> None:
        session = await till.world.session()
        till.service.close_gate("hold")
        inviting = asyncio.create_task(invite(till, session))
        await till.until_asked("hold")

        inviting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await inviting
        till.service.open_gate("hold")
        await till.work_on()

        assert till.service.times("release") == 1
        till.assert_books_agree()

    async def test_an_invitation_that_comes_behind_the_worker_does_not_stand(
        self, till: Till, port: EscrowClient
    ) -> None:
        other = await till.add_node(port)
        session = await till.world.session()
        till.service.plan("hold", Fault.SLOW)
        till.service.close_gate("hold")
        inviting = asyncio.create_task(invite(till, session))
        await till.until_asked("hold")
        till.world.clock.shift(120.0)
        calls = till.calls_of(other)
        (due,) = await calls.claim_due(10)

        assert await calls._holds.abandon(due)
        till.service.open_gate("hold")
        answer = await asyncio.gather(inviting, return_exceptions=True)
        await till.work_on()

        # Whoever writes first decides, and the other one sees it.
        assert isinstance(answer[0], EscrowUnavailable)
        assert till.service.times("release") == 1
        till.assert_books_agree()

    async def test_the_same_request_on_two_nodes_holds_once_and_is_answered_once(
        self, till: Till, port: EscrowClient
    ) -> None:
        other = await till.add_node(port)
        session = await till.world.session()

        answers = await asyncio.gather(
            invite(till, session), invite(till, session, node=other), return_exceptions=True
        )
        again = await invite(till, session)
        await till.work_on()

        goals = {answer.goal["id"] for answer in [*answers, again] if isinstance(answer, Done)}
        assert len(goals) == 1
        assert till.service.times("hold") == 1
        assert till.service.times("release") == 0
        till.assert_books_agree()

    async def test_an_answered_request_is_not_asked_for_again(self, till: Till) -> None:
        session = await till.world.session()
        first = await invite(till, session)
        # Its invitation is over, so nothing but the record of the request stands against a hold.
        await till.world.withdraw(goal_id_of(first))
        asked = len(till.service.asked)

        again = await invite(till, session)

        assert goal_id_of(again) == goal_id_of(first)
        assert len([call for call in till.service.asked[asked:] if call[0] == "hold"]) == 0

    async def test_the_id_of_a_request_under_way_is_not_taken_for_another(self, till: Till) -> None:
        session = await till.world.session()
        till.service.always("hold", Fault.HANG)
        await invite_in_vain(till, session)
        till.service.always("hold", None)

        other = await invite(till, session, amount_minor=501)

        assert code_of(other) == "request_id_reused"
        assert till.service.times("hold") == 0

    async def test_what_can_not_stand_is_refused_before_anyone_is_asked(self, till: Till) -> None:
        session = await till.world.session()

        answer = await invite(till, session, amount_minor=0)

        assert code_of(answer) == "amount_out_of_range"
        assert till.service.asked == []
        assert till.call_rows() == []


async def closing(till: Till, call: str) -> str:
    """A goal whose money is captured or released in the ledger, and not yet by the service."""
    session = await till.world.session()
    if call == "capture":
        return await till.world.started(session)
    goal_id = await till.world.invited(session)
    await till.world.node.deliver(await till.world.ask(CommandName.DISAGREE, goal_id))
    return goal_id


@pytest.mark.parametrize("call", ["capture", "release"])
class TestClosing:
    @pytest.mark.parametrize("fault", [*UNCLEAR, Fault.SLOW])
    async def test_it_is_said_until_acknowledged_and_done_once(
        self, till: Till, call: str, fault: Fault
    ) -> None:
        till.service.plan(call, fault, fault)
        goal_id = await closing(till, call)

        await till.work_on()

        asked = [key for name, key in till.service.asked if name == call]
        assert set(asked) == {f"{goal_id}:close"}
        assert len(asked) == (1 if fault is Fault.SLOW else 3)
        assert till.service.times(call) == 1
        assert {status for _, status in till.statuses()} == {CallStatus.ACKNOWLEDGED}
        till.assert_books_agree()

    async def test_refused_it_is_a_dead_letter_until_an_operator_has_it_said_again(
        self, till: Till, call: str
    ) -> None:
        till.service.plan(call, Fault.REFUSE)
        goal_id = await closing(till, call)
        await till.work_on()

        (dead,) = await till.book.waiting([CallStatus.DEAD], 10)
        backlog = await till.book.backlog()
        retried = await till.book.retry(dead.id)
        await till.work_on()

        assert dead.id == f"{goal_id}:close"
        assert "not enough money" in (dead.answer or "")
        assert (backlog.pending, backlog.dead) == (0, 1)
        assert retried == 1
        assert till.service.times(call) == 1
        till.assert_books_agree()

    async def test_unanswered_it_is_a_dead_letter_after_the_give_up_time(
        self, till: Till, call: str
    ) -> None:
        till.service.always(call, Fault.ERROR)
        await closing(till, call)

        await till.work()
        assert (await till.book.backlog()).dead == 0
        till.world.clock.shift(GIVE_UP_S)
        await till.work()
        assert (await till.book.backlog()).dead == 1
        assert (await till.book.backlog()).pending == 0

        assert await till.book.retry() == 1
        await till.work()
        assert (await till.book.backlog()).dead == 0, "its time begins anew"
        till.service.always(call, None)
        await till.work_on()
        assert till.service.times(call) == 1
        till.assert_books_agree()

    async def test_unanswered_it_is_said_less_and_less_often(self, till: Till, call: str) -> None:
        till.service.always(call, Fault.ERROR)
        await closing(till, call)

        for attempts in range(1, 5):
            assert await till.work() == 1
            (row,) = [row for row in till.call_rows() if row["status"] == CallStatus.PENDING]
            whole = timedelta(seconds=0.5 * 2 ** (attempts - 1))
            assert row["attempts"] == attempts
            # The instant is cut to a whole millisecond.
            assert whole / 2 <= row["due_at"] - till.world.clock.now() + MILLISECOND
            assert row["due_at"] - till.world.clock.now() <= whole
            till.world.clock.shift(whole.total_seconds())

    @pytest.mark.parametrize(("fault", "give_up_s"), LATE)
    async def test_what_a_slow_worker_is_told_undoes_no_acknowledgement(
        self, till: Till, port: EscrowClient, call: str, fault: Fault, give_up_s: float
    ) -> None:
        other = await till.add_node(port)
        await closing(till, call)
        slow = till.calls_of(till.world.node, give_up_s)
        (claimed,) = await slow.claim_due(10)
        till.world.clock.shift(120.0)
        assert await till.work(other) == 1
        acknowledged = till.call_rows()
        till.service.plan(call, fault)

        await slow.say(claimed)

        assert till.call_rows() == acknowledged

    async def test_a_dead_letter_that_a_slow_worker_has_acknowledged_is_none_any_more(
        self, till: Till, port: EscrowClient, call: str
    ) -> None:
        other = await till.add_node(port)
        await closing(till, call)
        slow = till.calls_of(till.world.node)
        (claimed,) = await slow.claim_due(10)
        till.world.clock.shift(120.0)
        till.service.plan(call, Fault.ERROR)
        await till.work(other, give_up_s=0.0)
        assert (await till.book.backlog()).dead == 1

        await slow.say(claimed)

        assert (await till.book.backlog()).dead == 0
        till.assert_books_agree()

    async def test_what_another_worker_claims_at_the_same_moment_stays_his(
        self, till: Till, port: EscrowClient, call: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = await till.add_node(port)
        await closing(till, call)
        theirs: list[EscrowCall] = []

        async def claim_behind_the_other(*found: Any) -> None:
            monkeypatch.undo()
            theirs.extend(await till.calls_of(other).claim_due(10))
            await claim(*found)

        monkeypatch.setattr("persistence.escrow_calls.claim", claim_behind_the_other)
        mine = await till.calls_of(till.world.node).claim_due(10)

        assert (len(theirs), mine) == (1, [])
        # Longer than the call takes, what follows from it and its record.
        at_least_s = TIMEOUT_S + 2 * till.world.node.store.options.deadline_s
        due_at = await till.calls_of(other).next_due_at()
        assert due_at is not None
        assert due_at - till.world.clock.now() >= timedelta(seconds=at_least_s)

    async def test_a_worker_that_dies_behind_the_answer_has_it_said_again_by_another(
        self, till: Till, port: EscrowClient, call: str
    ) -> None:
        other = await till.add_node(port)
        await closing(till, call)
        calls = till.calls_of(till.world.node)
        (claimed,) = await calls.claim_due(10)
        await port.ask(claimed, TIMEOUT_S)

        assert await till.work(other) == 0
        till.world.clock.shift(120.0)
        assert await till.work(other) == 1

        assert till.service.times(call) == 1
        assert (await till.book.backlog()).pending == 0
        till.assert_books_agree()


async def test_the_worker_knows_when_it_has_something_to_say_next(till: Till) -> None:
    calls = till.calls_of(till.world.node)
    assert await calls.next_due_at() is None
    till.service.always("release", Fault.ERROR)
    await closing(till, "release")
    assert await calls.next_due_at() == till.world.clock.now()

    await till.work()

    (row,) = [row for row in till.call_rows() if row["status"] == "pending"]
    assert row["due_at"] > till.world.clock.now()
    assert await calls.next_due_at() == row["due_at"]
    till.world.clock.shift(GIVE_UP_S)
    await till.work()
    assert (await till.book.backlog()).dead == 1
    assert await calls.next_due_at() is None


async def test_calls_behind_one_that_a_dead_process_locks_are_said(
    till: Till, mongodb_client: MongoClient[dict[str, Any]]
) -> None:
    session = await till.world.session()
    goal_ids = [await till.world.invited(session, viewer) for viewer in ("ben", "cleo")]
    await till.world.node.sessions.end(session)
    calls = till.world.raw["escrow_calls"]
    with mongodb_client.start_session() as transaction:
        transaction.start_transaction()
        calls.update_one(
            {"_id": f"{goal_ids[0]}:close"}, {"$set": {"attempts": 1}}, session=transaction
        )

        await till.work()

        assert [key for call, key in till.service.done if call == "release"] == [
            f"{goal_ids[1]}:close"
        ]
        transaction.abort_transaction()
    await till.work_on()
    till.assert_books_agree()


class TestSettle:
    async def test_a_declined_goal_ends_when_its_release_is_acknowledged(self, till: Till) -> None:
        till.service.plan("release", Fault.ERROR)
        goal_id = await closing(till, "release")
        row = till.world.goal_row(goal_id)
        assert (row["state"], row["outbox"]) == ("declined", [])
        await till.work()
        assert till.world.goal_row(goal_id)["state"] == "declined"

        await till.work_on()

        row = till.world.goal_row(goal_id)
        assert (row["state"], row["outcome"]) == ("ended", "refunded")
        assert till.world.movements(goal_id) == ["hold", "release"]

    async def test_a_declined_goal_does_not_wait_behind_a_flood_of_commands(
        self, till: Till, port: EscrowClient
    ) -> None:
        """Else the service would be told the same release again and again until it is over."""
        goal_id = await closing(till, "release")
        busy = await till.world.add_node(
            port=port, deadline_s=DEADLINE_S, concurrency=1, queue_size=1
        )

        async def wait_for_a_place() -> None:
            async with busy.store.turns.turn():
                pass

        async with busy.store.turns.turn():
            waiting = asyncio.create_task(wait_for_a_place())
            await asyncio.sleep(0)
            assert await till.work(busy) == 1
            assert not waiting.done()
        await waiting

        assert till.world.goal_row(goal_id)["state"] == "ended"

    async def test_a_crash_between_settling_and_the_record_settles_once(
        self, till: Till, port: EscrowClient, steps: Steps
    ) -> None:
        other = await till.add_node(port)
        goal_id = await closing(till, "release")
        steps.once(Step.AFTER_COMMIT, "settle", crash)
        with pytest.raises(Crash):
            await till.work()
        version = till.world.goal_row(goal_id)["version"]

        await till.work_on(other)

        row = till.world.goal_row(goal_id)
        assert (row["state"], row["version"]) == ("ended", version)
        assert till.service.times("release") == 1
        till.assert_books_agree()

    async def test_superseded_and_closed_invitations_are_released_by_the_service_too(
        self, till: Till
    ) -> None:
        session = await till.world.session()
        chosen = await till.world.invited(session)
        superseded = await till.world.invited(session, "cleo")
        await till.world.node.deliver(await till.world.ask(CommandName.AGREE, chosen))
        other = await till.world.session("dora")
        closed = await till.world.invited(other, "emil")
        await till.world.node.sessions.end(other)

        await till.work_on()
        till.world.clock.shift(600.0)
        await till.world.node.fire_due()
        await till.work_on()

        for goal_id in (superseded, closed, chosen):
            row = till.world.goal_row(goal_id)
            assert (row["state"], row["outcome"]) == ("ended", "refunded")
        assert till.service.times("release") == 3
        till.assert_books_agree()


class TestWithoutAService:
    async def test_nothing_is_recorded_and_a_goal_settles_by_the_ledger(self, world: World) -> None:
        goal_id = await world.invited(await world.session())
        await world.node.deliver(await world.ask(CommandName.DISAGREE, goal_id))

        row = world.goal_row(goal_id)
        assert row["state"] == "ended"
        assert "held_by" not in row
        assert world.raw["escrow_calls"].count_documents({}) == 0

    async def test_no_command_reads_or_writes_anything_more(self, world: World) -> None:
        world.raw.command("profile", 2)
        try:
            await world.started(await world.session())
            declined = await world.invited(await world.session("dora"), "emil")
            await world.node.deliver(await world.withdraw(declined, "emil"))
            asked = world.raw["system.profile"].distinct("ns")
        finally:
            world.raw.command("profile", 0)
            world.raw["system.profile"].drop()

        assert f"{world.raw.name}.goals" in asked
        assert f"{world.raw.name}.escrow_calls" not in asked

    async def test_a_node_without_the_service_leaves_its_calls_to_those_that_have_it(
        self, till: Till
    ) -> None:
        without = await till.world.add_node()
        goal_id = await till.world.invited(await till.world.session())

        answer = await till.world.withdraw(goal_id, node=without)
        await without.deliver(answer)
        state_before = till.world.goal_row(goal_id)["state"]
        await till.work_on()

        assert state_before == "declined"
        assert till.world.goal_row(goal_id)["state"] == "ended"
        till.assert_books_agree()

    async def test_what_was_held_before_the_service_came_is_closed_without_it(
        self, till: Till
    ) -> None:
        without = await till.world.add_node()
        session = await till.world.session()
        invited = await till.world.invite(session, VIEWER, node=without)
        await without.deliver(invited)
        goal_id = goal_id_of(invited)

        await till.world.node.deliver(await till.world.ask(CommandName.DISAGREE, goal_id))

        assert till.world.goal_row(goal_id)["state"] == "ended"
        assert till.service.asked == []
