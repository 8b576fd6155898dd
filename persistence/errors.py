"""What can go wrong with the database.

StoreError
├── StoreUnavailable   MongoDB can't be reached or does not answer in time; ask again
│   └── EscrowUnavailable   the platform's payment service does not; ask again
├── StoreOverloaded    too many commands wait for the database already; ask again
└── StoreDamaged       the documents contradict each other; asking again is no use
"""

from __future__ import annotations


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
