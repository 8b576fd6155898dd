// Bun's own WebSocket server and its `publish`, in one process: no Redis, one call for a burst.
// Arguments: port.
const TEXT = { headers: { "Content-Type": "text/plain" } };
const GREETING = '{"event":"pusher:connection_established","data":"{}"}';

const server = Bun.serve({
  hostname: "127.0.0.1",
  port: Number(process.argv[2]),
  async fetch(request, server) {
    const [, first, count, channel] = new URL(request.url).pathname.split("/");
    if (first === "publish") {
      const text = await request.text();
      for (let left = Number(count); left > 0; left--) server.publish(channel, text);
      return new Response("{}", TEXT);
    }
    if (first === "ready") return new Response("{}", TEXT);
    if (server.upgrade(request)) return undefined;
    return new Response("no such path", { status: 404 });
  },
  websocket: {
    idleTimeout: 0,
    sendPings: false,
    perMessageDeflate: false,
    open(socket) {
      socket.send(GREETING);
    },
    message(socket, text) {
      const { channel } = JSON.parse(text).data;
      socket.subscribe(channel);
      socket.send(
        JSON.stringify({ event: "pusher_internal:subscription_succeeded", channel, data: "{}" }),
      );
    },
  },
});
console.log(`listening on ${server.port}`);
