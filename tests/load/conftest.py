"""Load tests take minutes and a quiet machine: `pytest -m load` runs them, nothing else does.

They run as the gateway's process does: on uvloop, with its setting of Python's collector.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
import uvloop

from gateway.server import calm_collector

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Mapping


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "load" in config.getoption("markexpr"):
        return
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        (left_out if item.get_closest_marker("load") else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def collector_of_the_gateway() -> Iterator[None]:
    before = gc.get_threshold()
    calm_collector()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()
