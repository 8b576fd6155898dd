"""Why a benchmark can't be run, or not be trusted."""

from __future__ import annotations


class BenchError(Exception):
    """Says in one line, for a person, what is wrong and what to do."""


class RefusedError(BenchError):
    """The server refuses what it would refuse each time."""
