"""The door for the platform's own code: receivers of its own beside Duet's.

`DUET_RECEIVERS=my_platform.duet:register` names a function that is called with the registry of
receivers once, when a process starts (docs/receivers.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from statemachine.receivers import standard_receivers

if TYPE_CHECKING:
    from collections.abc import Callable

    from statemachine.receivers import Registry


class ExtensionError(Exception):
    """The platform's own receivers can't be registered; the message is one line."""


def receivers_with(extension: str | None) -> Registry:
    """Duet's receivers and, behind them, those that `extension` registers.

    Args:
        extension: `module:function`, or none.

    Raises:
        ExtensionError: there is no such function, or it refused or was refused a registration.
    """
    registry = standard_receivers()
    if extension is not None:
        register = registering_function(extension)
        try:
            register(registry)
        except Exception as error:
            raise ExtensionError(f"{extension} raised {type(error).__name__}: {error}") from error
    return registry


def registering_function(extension: str) -> Callable[[Registry], object]:
    """The function that `module:function` names, not called yet.

    Raises:
        ExtensionError: there is no such function.
    """
    module_name, colon, name = extension.partition(":")
    if not (module_name and colon and name):
        raise ExtensionError(f"{extension!r} is not of the form module:function")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ExtensionError(f"{extension} can't be imported: {error}") from error
    if not callable(function):
        raise ExtensionError(f"{extension} is not a function")
    found: Callable[[Registry], object] = function
    return found
