"""What can go wrong with the database.

StoreError
├── StoreUnavailable   MongoDB can't be reached or does not answer in time; ask again
│   └── EscrowUnavailable   the platform's payment service does not; ask again
├── StoreOverloaded    too many commands wait for the database already; ask again
└── StoreDamaged       the documents contradict each other; asking again is no use
"""

from __future__ import annotations

import re
from typing import Final

from pymongo.errors import BulkWriteError, PyMongoError

# What the driver raises for an address that it can't make sense of, or for a file of
# certificates in it that can't be read.
UNUSABLE_ADDRESS: Final = (PyMongoError, ValueError, OSError)

# The server repeats the whole command, with what is in it.
_REFUSED_COMMAND = re.compile(r" to execute command \{ (\w+).*", re.DOTALL)


class StoreError(Exception):
    """Base of this package's errors."""


class StoreUnavailable(StoreError):
    """MongoDB can't be reached, or did not answer within the deadline."""


class EscrowUnavailable(StoreUnavailable):
    """The platform's payment service has not said in time whether it holds the money."""


class StoreOverloaded(StoreError):
    """The queue in front of the database is full."""


class StoreDamaged(StoreError):
    """What is in the database contradicts itself, such as a ledger entry that is there already."""


class Conflict(Exception):
    """Another write came between a decision and its commit."""


def in_short(error: BaseException) -> str:
    """What the driver's error says, in one line.

    Its own text goes on with the server's whole answer, with topologies and timeouts, and of a
    command that the user is not allowed with all that was to be written.
    """
    text = str(error)
    if isinstance(error, BulkWriteError):
        faults = [*error.details["writeErrors"], *error.details["writeConcernErrors"]]
        text = str(faults[0]["errmsg"]) if faults else text
    for aside in (", full error: ", ", Timeout:", " (configured timeouts: ", "\n"):
        text = text.partition(aside)[0]
    return _REFUSED_COMMAND.sub(r" to run \1", text)[:300] or type(error).__name__
