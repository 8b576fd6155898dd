"""What each thing on the hot paths may cost: the one table of the guard.

The figures are those that were measured on Python 3.11 when they were last written here. A change
that costs more than `MARGIN` fails. If the cost is meant, write the new figure, with the reason in
the commit; if it became cheaper, write that down as well, so that it stays so.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Final

from tests.guard.counting import Costs, opcodes_of

MARGIN: Final = 0.10

BUDGETS: Final = {
    # One publication to one more socket of a channel: one write to its descriptor, no more.
    "delivery": Costs(opcodes=21.4, calls=1.02, turns=0.004),
    # The same where the bytes have to go through the transport: TLS, HTTP, a peer that lags.
    "delivery by transport": Costs(opcodes=18.4, calls=1.02, turns=0.004),
    # From Redis' bytes to the frames of a channel with two sockets, the deliveries included.
    "publication": Costs(opcodes=512, calls=41, timers=1.1, turns=1),
    # The plain call of the HTTP API, to a channel without subscribers: its body is read, the event
    # is built once (event, channel and data are encoded), nothing more.
    "http publish": Costs(opcodes=1306, calls=126, json=4, futures=1, turns=1),
    # A browser's upgrade, to connection_established; a tenth is the deadline of its first word.
    "connect": Costs(opcodes=1625, calls=172, json=3),
    # A signed subscription to a channel that the node hears already.
    "subscribe": Costs(opcodes=1116, calls=101, json=5, turns=1),
    "ping": Costs(opcodes=305, calls=21, json=1),
    # From the sender's frame through a broker in memory to the channel's other socket.
    "client event": Costs(opcodes=1275, calls=97, json=3, futures=1, timers=1, turns=2),
    # What an idle subscribed socket keeps, its transport aside.
    "idle socket": Costs(blocks=6, turns=1),
    # A second of a node, however many idle sockets it has.
    "idle second": Costs(opcodes=401, calls=37, futures=1, timers=5, turns=1),
}


# Of these blocks, without the tables that all sockets share; on Python 3.11 to 3.13.
IDLE_SOCKET_BYTES: Final = 550


def _reference() -> int:
    """Plain Python of the kind that the gateway is made of, to see how this version counts."""
    total = 0
    known = {"a": 1, "b": 2}
    for index in range(20):
        if index % 3 and (value := known.get("a")) is not None:
            total += value + len(str(index))
        elif index > 10:
            total -= max(index, 3)
    return total + sum(one for one in (1, 2, 3) if one)


_REFERENCE_OPCODES_3_11: Final = 505


def over_budget(what: str, costs: Costs) -> dict[str, str]:
    """What of `costs` is more than the table allows -> a sentence that says by how much."""
    budget = BUDGETS[what]
    # Other versions of Python cut the same code into fewer or more instructions.
    # The first time prepares: some of them miss the instructions of a new function.
    opcodes_of(_reference)
    scale = opcodes_of(_reference) / _REFERENCE_OPCODES_3_11
    faults: dict[str, str] = {}
    for field in fields(Costs):
        allowed = getattr(budget, field.name) * (scale if field.name == "opcodes" else 1.0)
        counted = getattr(costs, field.name)
        if counted > allowed * (1 + MARGIN):
            grown = f"{counted / allowed - 1:+.0%}" if allowed else "new"
            faults[field.name] = (
                f"{what}: {counted:g} {field.name}, the budget is {allowed:g} ({grown}); "
                "see tests/guard/budgets.py"
            )
    return faults
