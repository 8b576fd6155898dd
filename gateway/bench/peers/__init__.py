"""The servers that Duet is measured beside (`duet bench --against`).

| name | what it is |
|---|---|
| `bun` | Bun's own WebSocket server (uWebSockets, C++) and its native `publish` |
| `ws` | the package `ws` on Node, a loop of `send` |
| `socket.io` | Socket.IO on Node with its Redis adapter, over the benchmark's own Redis |
| `c` | a C loop of `write(2)`: of each burst one per socket, what the kernel alone costs |

`bun`, `ws` and `c` publish **in process**: one call says "publish this 300-byte event n times", and
no publication passes a signature, an HTTP call of its own or a Redis. That favours the peer: Duet
always gets n signed calls of its HTTP API, and each goes through Redis. `socket.io` gets a minimal
HTTP call, unsigned, for each publication, and publishes to Redis too, though its own sockets don't
wait for that round trip as Duet's do.

The sources are small and in this package; what they run on comes from npm, on demand (`install`).
"""
