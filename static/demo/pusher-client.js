// A small client of the Pusher Channels protocol, version 7, for one user on one socket.
//
// It connects with a JWT, so the user's own channels need no signature from a backend, and it
// sends goal commands as client events whose replies come back as promises. A command that was
// in flight when the socket broke is sent again with the same request_id after the reconnect:
// the gateway answers it a second time without doing it a second time.

const HANDSHAKE_TIMEOUT_MS = 10_000;
const PONG_TIMEOUT_MS = 30_000;
const REPLY_TIMEOUT_MS = 10_000;
const BACKOFF_FIRST_MS = 500;
const BACKOFF_MAX_MS = 5_000;
const CLOSED_BY_US = 1000;

/** What a goal command was refused with. */
export class CommandError extends Error {
  constructor({ code, message, retryable = false }, goal = null) {
    super(message);
    this.name = "CommandError";
    this.code = code;
    this.retryable = retryable;
    this.goal = goal;
  }
}

/**
 * One connection. Dispatches:
 *   `state`    {state, reason, retryInMs}: idle, connecting, connected, waiting, offline, failed
 *   `frame`    {event, channel, data, receivedAt}: every frame from the server, decoded
 *   `channel`  {name, state, members, reason}: a subscription changed
 *   `refused`  {code, message}: a pusher:error, which belongs to no command
 */
export class PusherClient extends EventTarget {
  #url;
  #userChannel;
  #socket = null;
  #state = "idle";
  #attempt = 0;
  #retryTimer = 0;
  #silenceTimer = 0;
  #activityTimeout_ms = 120_000;
  #fatalReason = "";
  #channels = new Map(); // name -> {state, members, reason}
  #pending = new Map(); // request_id -> {event, data, resolve, reject, timer, sentAt}

  /**
   * @param {string} url the WebSocket's address with its path, without a query
   * @param {string} userId whose commands these are
   * @param {string} token the JWT that proves it
   */
  constructor({ url, userId, token }) {
    super();
    const address = new URL(url);
    address.searchParams.set("protocol", "7");
    address.searchParams.set("client", "duet-demo");
    address.searchParams.set("version", "1.0");
    address.searchParams.set("token", token);
    this.#url = address.href;
    this.#userChannel = `private-user@${userId}`;
    // A laptop that wakes up need not wait for the rest of the backoff.
    globalThis.addEventListener?.("online", () => this.#state === "waiting" && this.#open());
  }

  /** Where it connects to, without the query. */
  get address() {
    return this.#url.split("?", 1)[0];
  }

  get state() {
    return this.#state;
  }

  get channels() {
    return this.#channels;
  }

  connect() {
    if (this.#state === "connecting" || this.#state === "connected") return;
    this.#attempt = 0;
    this.#open();
  }

  /** Closes the socket and stays away until connect() is called. */
  disconnect() {
    clearTimeout(this.#retryTimer);
    this.#drop(CLOSED_BY_US);
    this.#setState("offline");
    for (const requestId of [...this.#pending.keys()]) {
      this.#settle(requestId, (command) =>
        command.reject(new CommandError({ code: "offline", message: "You are disconnected.", retryable: true })),
      );
    }
  }

  /** Subscribes now, or as soon as there is a connection, and again after every reconnect. */
  subscribe(name) {
    if (this.#channels.has(name) && this.#channels.get(name).state !== "refused") return;
    this.#setChannel(name, { state: "waiting", members: null, reason: "" });
    if (this.#state === "connected") this.#sendSubscribe(name);
  }

  unsubscribe(name) {
    if (!this.#channels.delete(name)) return;
    if (this.#state === "connected") this.#send("pusher:unsubscribe", { channel: name });
    this.#emit("channel", { name, state: "left", members: null, reason: "" });
  }

  /** When the command of this request_id was sent first, in performance.now() milliseconds. */
  sentAt(requestId) {
    return this.#pending.get(requestId)?.sentAt ?? null;
  }

  /**
   * Sends a goal command; resolves with the goal of its reply, rejects with CommandError.
   *
   * @param {string} event one of the `client-…` commands
   * @param {object} data its fields without request_id
   */
  command(event, data) {
    if (this.#state === "offline" || this.#state === "failed" || this.#state === "idle") {
      return Promise.reject(
        new CommandError({ code: "offline", message: "You are disconnected.", retryable: true }),
      );
    }
    const requestId = randomId();
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        const message = `No answer within ${REPLY_TIMEOUT_MS / 1000} s.`;
        this.#settle(requestId, () => reject(new CommandError({ code: "timeout", message, retryable: true })));
      }, REPLY_TIMEOUT_MS);
      this.#pending.set(requestId, { event, data, resolve, reject, timer, sentAt: performance.now() });
      if (this.#channels.get(this.#userChannel)?.state === "subscribed") this.#sendCommand(requestId);
    });
  }

  // Opening, closing, coming back

  #open() {
    clearTimeout(this.#retryTimer);
    this.#drop(CLOSED_BY_US);
    this.#fatalReason = "";
    this.#setState("connecting");
    const socket = new WebSocket(this.#url);
    this.#socket = socket;
    socket.onmessage = (message) => this.#socket === socket && this.#receive(message.data);
    socket.onclose = (close) => this.#socket === socket && this.#closed(close.code, close.reason);
    this.#expectWithin(HANDSHAKE_TIMEOUT_MS);
  }

  #drop(code) {
    clearTimeout(this.#silenceTimer);
    const socket = this.#socket;
    this.#socket = null;
    if (socket !== null) {
      socket.onmessage = null;
      socket.onclose = null;
      socket.close(code);
    }
    for (const [name, channel] of this.#channels) {
      if (channel.state !== "waiting") this.#setChannel(name, { state: "waiting", members: null, reason: "" });
    }
  }

  #closed(code, reason) {
    this.#drop(CLOSED_BY_US);
    // Pusher's ranges: 4000-4099 never come back, 4100-4199 after a while, 4200-4299 at once.
    if (this.#fatalReason !== "" || (code >= 4000 && code < 4100)) {
      this.#setState("failed", { reason: this.#fatalReason || reason || `closed with ${code}` });
      return;
    }
    const atOnce = code >= 4200 && code < 4300;
    const ceiling_ms = atOnce ? BACKOFF_FIRST_MS : Math.min(BACKOFF_MAX_MS, BACKOFF_FIRST_MS * 2 ** this.#attempt);
    // Jitter over half of the wait, so that a restarted gateway is not met by everybody at once.
    const retryInMs = Math.round(ceiling_ms * (0.5 + Math.random() / 2));
    this.#attempt += 1;
    this.#setState("waiting", { reason, retryInMs });
    this.#retryTimer = setTimeout(() => this.#open(), retryInMs);
  }

  #expectWithin(timeout_ms) {
    clearTimeout(this.#silenceTimer);
    this.#silenceTimer = setTimeout(() => this.#closed(1006, "nothing heard"), timeout_ms);
  }

  #heard() {
    clearTimeout(this.#silenceTimer);
    this.#silenceTimer = setTimeout(() => {
      this.#send("pusher:ping", {});
      this.#expectWithin(PONG_TIMEOUT_MS);
    }, this.#activityTimeout_ms);
  }

  // Frames

  #receive(text) {
    const receivedAt = performance.now();
    const frame = decode(text);
    if (frame === null) return;
    if (this.#state === "connected") this.#heard();
    const { event, channel, data } = frame;
    // Listeners see a reply before its promise settles: the log can still ask sentAt().
    this.#emit("frame", { event, channel, data, receivedAt });
    switch (event) {
      case "pusher:connection_established":
        this.#established(data);
        break;
      case "pusher:ping":
        this.#send("pusher:pong", {});
        break;
      case "pusher:error":
        if (data?.code >= 4000 && data.code < 4100) this.#fatalReason = data.message;
        this.#emit("refused", { code: data?.code ?? null, message: data?.message ?? "refused" });
        break;
      case "pusher_internal:subscription_succeeded":
        this.#subscribed(channel, data);
        break;
      case "pusher:subscription_error":
        this.#setChannel(channel, { state: "refused", members: null, reason: data?.error ?? "refused" });
        break;
      case "pusher_internal:member_added":
      case "pusher_internal:member_removed":
        this.#memberChanged(event, channel, data);
        break;
      case "goal.reply":
        this.#replied(data);
        break;
    }
  }

  #established(data) {
    this.#attempt = 0;
    this.#activityTimeout_ms = (data?.activity_timeout || 120) * 1000;
    this.#setState("connected");
    this.#heard();
    for (const name of this.#channels.keys()) this.#sendSubscribe(name);
  }

  #subscribed(name, data) {
    if (!this.#channels.has(name)) return;
    const members = name.startsWith("presence-") ? new Set(data?.presence?.ids ?? []) : null;
    this.#setChannel(name, { state: "subscribed", members, reason: "" });
    if (name === this.#userChannel) {
      for (const requestId of this.#pending.keys()) this.#sendCommand(requestId);
    }
  }

  #memberChanged(event, name, data) {
    const channel = this.#channels.get(name);
    if (!channel?.members) return;
    if (event.endsWith("added")) channel.members.add(data.user_id);
    else channel.members.delete(data.user_id);
    this.#setChannel(name, channel);
  }

  #replied(reply) {
    this.#settle(reply?.request_id, (command) => {
      if (reply.ok) command.resolve(reply.goal);
      else command.reject(new CommandError(reply.error, reply.goal ?? null));
    });
  }

  #settle(requestId, finish) {
    const command = this.#pending.get(requestId);
    if (command === undefined) return;
    clearTimeout(command.timer);
    this.#pending.delete(requestId);
    finish(command);
  }

  #sendCommand(requestId) {
    const { event, data } = this.#pending.get(requestId);
    this.#send(event, { request_id: requestId, ...data }, this.#userChannel);
  }

  #sendSubscribe(name) {
    this.#setChannel(name, { state: "joining", members: null, reason: "" });
    this.#send("pusher:subscribe", { channel: name });
  }

  #send(event, data, channel) {
    if (this.#socket?.readyState === WebSocket.OPEN) {
      this.#socket.send(JSON.stringify({ event, channel, data }));
    }
  }

  // Telling listeners

  #setState(state, { reason = "", retryInMs = 0 } = {}) {
    this.#state = state;
    this.#emit("state", { state, reason, retryInMs });
  }

  #setChannel(name, channel) {
    if (!this.#channels.has(name) && channel.state !== "waiting") return;
    this.#channels.set(name, channel);
    this.#emit("channel", { name, ...channel });
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

/** The frame with its `data` decoded: Pusher wraps most, but not all, data in a JSON string. */
function decode(text) {
  const frame = parse(text);
  if (frame === undefined || typeof frame.event !== "string") return null;
  const data = typeof frame.data === "string" ? (parse(frame.data) ?? frame.data) : frame.data;
  return { event: frame.event, channel: frame.channel ?? null, data: data ?? null };
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** 32 hex digits; crypto.randomUUID would need HTTPS when the page is not on localhost. */
function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
