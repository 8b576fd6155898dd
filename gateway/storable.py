"""Which JSON of a platform's own MongoDB can keep. Pure.

Source: the BSON specification (names end at a null byte, integers have 64 bits); MongoDB takes
100 levels, of which a document's own fields need some.
"""

from typing import Any, Final

NESTING_MAX: Final = 32
_INTEGERS: Final = range(-(2**63), 2**63)


def why_not_storable(value: Any) -> str | None:
    """What about a decoded JSON value MongoDB could not keep; None when nothing."""
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if depth > NESTING_MAX:
            return f"it is nested deeper than {NESTING_MAX} levels"
        if isinstance(one, dict):
            if any("\0" in name for name in one):
                return "a name in it has a null character"
            waiting.extend((inner, depth + 1) for inner in one.values())
        elif isinstance(one, list):
            waiting.extend((inner, depth + 1) for inner in one)
        elif isinstance(one, int) and one not in _INTEGERS:
            return "a number in it has more than 64 bits"
    return None
