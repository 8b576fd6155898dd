"""Readies the process from which gateways are forked; imported there, as the last module.

What it has imported is taken out of the garbage collector's sight: otherwise each gateway would
soon look through all of it, and so copy all of it.
"""

from __future__ import annotations

import gc

from gateway.trust import trusted

trusted()
gc.collect()
gc.freeze()
