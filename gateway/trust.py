"""Whom outgoing HTTPS calls trust, whatever the environment says."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    import ssl


@cache
def trusted() -> ssl.SSLContext:
    """The public certificate authorities; read once, since that takes a fifth of a start's CPU."""
    return httpx.create_ssl_context(trust_env=False)
