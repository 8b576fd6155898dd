// The package `ws` on Node: a loop of `send` over the channel's sockets, one call for a burst.
// Arguments: port.
import { createServer } from "node:http";
import { WebSocketServer } from "ws";

const GREETING = '{"event":"pusher:connection_established","data":"{}"}';
const channels = new Map();

function publish(count, channel, text) {
  for (let left = count; left > 0; left--) {
    for (const socket of channels.get(channel) ?? []) socket.send(text, { binary: false });
  }
}

const server = createServer((request, response) => {
  const [, first, count, channel] = request.url.split("/");
  const parts = [];
  request.on("data", (part) => parts.push(part));
  request.on("end", () => {
    if (first === "publish") publish(Number(count), channel, Buffer.concat(parts));
    response.setHeader("Content-Length", 2);
    response.end("{}");
  });
});

new WebSocketServer({ server, perMessageDeflate: false }).on("connection", (socket) => {
  socket.on("message", (text) => {
    const { channel } = JSON.parse(text).data;
    let sockets = channels.get(channel);
    if (sockets === undefined) channels.set(channel, (sockets = new Set()));
    sockets.add(socket);
    socket.on("close", () => sockets.delete(socket));
    socket.send(
      JSON.stringify({ event: "pusher_internal:subscription_succeeded", channel, data: "{}" }),
    );
  });
  socket.on("error", () => socket.terminate());
  socket.send(GREETING);
});

server.keepAliveTimeout = 3_600_000;
server.listen({ host: "127.0.0.1", port: Number(process.argv[2]), backlog: 4096 });
