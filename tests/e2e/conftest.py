"""Every test here needs Node and the clients from npm, the ones with bare sockets aside."""

from __future__ import annotations

from tests.e2e.fixtures import (  # noqa: F401  pytest finds fixtures by name
    apps_file,
    books,
    gateway_with,
    shared_gateway,
    stage,
    stage_with,
    stores,
)
