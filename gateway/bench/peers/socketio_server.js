// Socket.IO on Node with its Redis adapter: each publication is an HTTP call, as Duet's are.
// Arguments: port, then the URL of a Redis or the path of its Unix socket.
import { createServer } from "node:http";
import { createAdapter } from "@socket.io/redis-adapter";
import { createClient } from "redis";
import { Server } from "socket.io";

const [port, redis] = process.argv.slice(2);
const publisher = createClient(redis.startsWith("/") ? { socket: { path: redis } } : { url: redis });
const subscriber = publisher.duplicate();
await Promise.all([publisher.connect(), subscriber.connect()]);

const server = createServer((request, response) => {
  const [, first, , channel] = request.url.split("/");
  const parts = [];
  request.on("data", (part) => parts.push(part));
  request.on("end", () => {
    if (first === "publish") {
      const { event, data } = JSON.parse(Buffer.concat(parts));
      io.to(channel).emit(event, data);
    }
    response.setHeader("Content-Length", 2);
    response.end("{}");
  });
});

const io = new Server(server, {
  adapter: createAdapter(publisher, subscriber),
  transports: ["websocket"],
  serveClient: false,
  perMessageDeflate: false,
  pingInterval: 3_600_000,
});
io.on("connection", (socket) => {
  socket.on("join", async (channel, acknowledge) => {
    await socket.join(channel);
    acknowledge();
  });
});

server.keepAliveTimeout = 3_600_000;
server.listen({ host: "127.0.0.1", port: Number(port), backlog: 4096 });
