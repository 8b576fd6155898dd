"""Takes whatever has been imported out of the garbage collector's sight, for good.

The server from which gateways are forked imports this last. Otherwise each of them would soon look
through all of it, and so copy all of it: a third of the work of its start.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
