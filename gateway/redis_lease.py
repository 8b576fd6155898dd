"""A node's lease in Redis, and what stands as long as it does.

Presence and occupancy keep entries in Redis that belong to one node; they are tenants of its lease.
Names, behind the prefix: `nodes` (node -> end of its lease), `nodes:whole` (node -> 1 when its
entries stand), `nodes:epoch`.

A node renews its lease three times in its length, and at once when its link to Redis is new. The
same call tells it what to make good:

- another **epoch**: Redis has lost its data. The tenants enter their entries again, unannounced,
  because every client still knows them. Until the nodes that stood before have done so too (but
  at most `PEERS_WAIT_S`) the node is not `settled`: whoever asked Redis for members or sums now
  would be told a part, and would never hear of the rest.
- its **lease had run out** (the process was stopped for long): survivors have announced that its
  entries are gone. The tenants enter them again and announce them.
- a **new link**: behind it may be a server that was started again, or another one after a failover,
  with the data of a while ago. The tenants enter their entries again, which only webhooks are told
  of, and remove those that have gone since.
- **dead nodes**: the tenants remove their entries, so that survivors may do so at the same time
  and die half-way.

Every script that changes entries compares the epoch that the node knows with the one in Redis, so
that no change slips in between a loss and its discovery.

Source: docs/architecture.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from gateway.broker import BrokerUnavailable
from gateway.outage import Outage
from gateway.redis_commands import Script
from gateway.redis_link import packed
from gateway.tasks import Tasks, for_ever

if TYPE_CHECKING:
    from gateway.redis_commands import RedisCommands

log = structlog.get_logger(__name__)

_RENEW: Final = Script.load("lease_renew", 3)
_BURY: Final = Script.load("lease_bury", 2)

# How long a node waits for the entries of those that stood with it before a loss: each of them is
# connected again within about two seconds, or is not alive.
PEERS_WAIT_S: Final = 3.0
_LOOK_FOR_PEERS_EVERY_S: Final = 0.05

# What scripts answer instead of a change.
EPOCH_IS_ANOTHER: Final = -2
NODE_IS_ALIVE: Final = -1


class Entering(Enum):
    """Who hears of entries that are made again, where Redis did not have them.

    Attributes:
        UNTOLD: Nobody: all know what Redis has lost.
        QUIETLY: Webhooks, whose record of it may be lost with it; the channels' clients know.
        ANNOUNCED: Everybody: survivors have announced that it is gone.
    """

    UNTOLD = 0
    QUIETLY = 1
    ANNOUNCED = 2


class Tenant(Protocol):
    """What keeps entries in Redis under a node's lease."""

    def node_key(self, node_id: str) -> str:
        """The key that holds a node's entries; it is gone when the last of them is."""

    async def enter_again(self, entering: Entering) -> None:
        """Makes this node's entries again; raises `BrokerUnavailable`."""

    async def catch_up(self) -> None:
        """Makes the changes that could not be made; raises `BrokerUnavailable`."""

    async def reap(self, node_id: str) -> bool:
        """Removes a dead node's entries, False if it is alive; raises `BrokerUnavailable`."""


class RedisLease:
    """The lease of one node.

    Attributes:
        node_id: Whose lease it is.
        key: The nodes and the ends of their leases, for scripts that ask whether one is alive.
        epoch_key: Where the epoch is, for scripts that compare it.
        epoch: The one that this node knows, empty before it has ever reached Redis.
    """

    __slots__ = (
        "_commands",
        "_lease_s",
        "_links",
        "_links_known",
        "_outage",
        "_peers",
        "_reap_from",
        "_renewed_at",
        "_renewing",
        "_settled",
        "_started",
        "_tasks",
        "_tenants",
        "_to_enter",
        "_wait_until",
        "_wake",
        "_whole",
        "_whole_key",
        "epoch",
        "epoch_key",
        "key",
        "node_id",
    )

    def __init__(self, commands: RedisCommands, prefix: str, node_id: str, lease_s: float) -> None:
        self.node_id = node_id
        self.key = f"{prefix}:nodes"
        self.epoch_key = f"{prefix}:nodes:epoch"
        self.epoch = b""
        self._whole_key = f"{prefix}:nodes:whole"
        self._commands = commands
        self._lease_s = lease_s
        self._tenants: list[Tenant] = []
        self._started: set[Tenant] = set()
        self._tasks = Tasks()
        # Kept until it has worked: the answer that asks for it comes once.
        self._to_enter: Entering | None = None
        # Whether this node's entries are known to stand in this epoch.
        self._whole = False
        # Nodes whose entries stood at the last look, this one among them.
        self._peers: frozenset[str] = frozenset()
        self._wait_until = 0.0
        # When it renewed last, and from when on it believes that others are dead.
        self._renewed_at = math.inf
        self._reap_from = 0.0
        self._settled = asyncio.Event()
        self._settled.set()
        self._wake = asyncio.Event()
        self._renewing = asyncio.Lock()
        self._outage = Outage(log, "lease_not_renewed", "lease_renewed_again")
        commands.use_scripts(_RENEW, _BURY)
        # Links made so far, and how many of them a renewal has gone over.
        self._links = self._links_known = 0
        commands.when_connected(self._on_new_link)

    def add(self, tenant: Tenant) -> None:
        """Keeps a tenant's entries under this lease; before `start`."""
        self._tenants.append(tenant)

    async def start(self, tenant: Tenant) -> None:
        """Takes the lease with the first tenant; when Redis can't be reached it does so later."""
        if not self._started:
            await self._renew_or_log()
            self._tasks.spawn(for_ever(self._keep_renewing, "lease"), "lease")
        self._started.add(tenant)

    async def stop(self, tenant: Tenant) -> None:
        """Ends the lease with the last tenant; what is left is removed now, or by the others."""
        self._started.discard(tenant)
        if self._started:
            return
        await self._tasks.stop()
        try:
            await self._commands.run(packed("ZADD", self.key, "XX", 0, self.node_id))
            await self._reap(self.node_id)
        except BrokerUnavailable as error:
            log.warning("lease_left", error=str(error))

    @property
    def settled(self) -> bool:
        """Whether the entries in Redis are all there, as far as this node can know."""
        return self._settled.is_set()

    async def when_settled(self) -> None:
        """Returns when the entries in Redis are all there, which they are within `PEERS_WAIT_S`.

        Raises:
            BrokerUnavailable: Redis is gone again.
        """
        if self.settled:
            return
        try:
            async with asyncio.timeout(2 * PEERS_WAIT_S):
                await self._settled.wait()
        except TimeoutError:
            raise BrokerUnavailable("Redis has lost its data and does not answer") from None

    def look(self) -> None:
        """Renews at once, because a script has told of another epoch."""
        self._wake.set()

    async def lost(self) -> None:
        """Makes good a loss of Redis' data that a script has told of, and waits for the others.

        Raises:
            BrokerUnavailable: Redis did not answer in time.
        """
        await self.renew()
        self.look()
        await self.when_settled()

    def _on_new_link(self) -> None:
        self._links += 1
        self._wake.set()

    async def _keep_renewing(self) -> None:
        while True:
            wait_s = self._lease_s / 3 if self.settled else _LOOK_FOR_PEERS_EVERY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            self._wake.clear()
            await self._renew_or_log()

    async def _renew_or_log(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await self.renew()
        except BrokerUnavailable as error:
            self._outage.failed(loop.time(), error)
        else:
            self._outage.worked(loop.time())

    async def renew(self) -> None:
        """Renews the lease and makes good what the answer tells.

        Raises:
            BrokerUnavailable: Redis did not answer in time; the next renewal does the rest.
        """
        async with self._renewing:
            dead, whole = await self._ask()
            if self._to_enter is not None:
                for tenant in self._tenants:
                    await tenant.enter_again(self._to_enter)
                self._to_enter = None
            if not self._whole:
                entered = packed("HSET", self._whole_key, self.node_id, 1)
                await self._commands.send(entered, all_or_none=True)
                self._whole = True
            self._settle(whole)
            if self.settled:
                for tenant in self._tenants:
                    await tenant.catch_up()
                if self._may_reap():
                    for node_id in dead:
                        await self._reap(node_id)

    async def _ask(self) -> tuple[list[str], frozenset[str]]:
        """Renews and notes what is to be done; returns the dead nodes and the whole ones."""
        lease_ms = int(self._lease_s * 1000)
        links = self._links
        epoch, stood, dead, whole = await self._commands.run_script(
            _RENEW,
            *(self.key, self.epoch_key, self._whole_key),
            *(self.node_id, lease_ms, secrets.token_hex(8)),
        )
        if self.epoch and epoch != self.epoch:
            log.warning("redis_data_lost", nodes=len(self._peers))
            self._to_enter, self._whole = Entering.UNTOLD, False
            self._settled.clear()
            wait_s = min(PEERS_WAIT_S, self._lease_s)
            self._wait_until = asyncio.get_running_loop().time() + wait_s
        elif self.epoch and not stood:
            log.warning("lease_had_run_out")
            self._to_enter, self._whole = Entering.ANNOUNCED, False
        elif self.epoch and links != self._links_known and self._to_enter is None:
            self._to_enter = Entering.QUIETLY
        if self.epoch and links != self._links_known:
            # The others' leases may be as old as the data.
            self._renewed_at = -math.inf
        self.epoch, self._links_known = epoch, links
        dead_ids = [one.decode() for one in dead]
        return (
            [one for one in dead_ids if one != self.node_id],
            frozenset(one.decode() for one in whole) | {self.node_id},
        )

    def _may_reap(self) -> bool:
        """Whether a lease that has run out tells of a dead node.

        While Redis could not be reached nobody's lease was renewed: then the others are given as
        long as this node would take to come back.
        """
        now = asyncio.get_running_loop().time()
        silent_s, self._renewed_at = now - self._renewed_at, now
        if silent_s > self._lease_s / 2:
            self._reap_from = now + self._lease_s / 3
        return now >= self._reap_from

    def _settle(self, whole: frozenset[str]) -> None:
        """Ends the wait after a loss, if all are back that stood before, or have not come."""
        waited = asyncio.get_running_loop().time() >= self._wait_until
        if self.settled or waited or self._peers <= whole:
            self._peers = whole
            self._settled.set()

    async def _reap(self, node_id: str) -> None:
        """Removes what a dead node has left, and then the node, unless it turns out to be alive."""
        for tenant in self._tenants:
            if not await tenant.reap(node_id):
                return
        keys = [tenant.node_key(node_id) for tenant in self._tenants]
        bury = replace(_BURY, key_count=_BURY.key_count + len(keys))
        await self._commands.run_script(bury, self.key, self._whole_key, *keys, node_id)
