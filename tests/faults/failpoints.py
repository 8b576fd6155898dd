"""MongoDB's own failpoints: it answers the nodes of a test as it does when something is wrong."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from persistence.store import application_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.persistence.world import World

# Of the commands of a node that is met with them.
DEADLINE_S = 2.0


@contextmanager
def failing(world: World, mode: object, **data: Any) -> Iterator[None]:
    """Lets commands of the first node fail, and of nobody else."""
    application = application_name(world.raw.name, world.node.store.owner)
    admin = world.raw.client.admin
    admin.command(
        {
            "configureFailPoint": "failCommand",
            "mode": mode,
            "data": {"appName": application, **data},
        }
    )
    try:
        yield
    finally:
        admin.command({"configureFailPoint": "failCommand", "mode": "off"})


def once(**data: Any) -> dict[str, Any]:
    return {"mode": {"times": 1}, **data}
