// One party of an invitation: an unmodified pusher-js, driven by JSON lines.
//
// Two records of the same thing are kept apart: "frame" is every message of the connection in the
// order of the wire, "event" is what an app sees that has bound itself to its channels.
import PusherServer from "pusher";
import Pusher from "pusher-js";

import { emit, serve } from "./lines.mjs";

let pusher = null;

// How the app proves to the gateway who its user is; docs/protocol.md names the ways.
const authorizers = {
  // The gateway signs for the bearer of a JWT.
  endpoint: ({ url, token }) => ({
    channelAuthorization: {
      transport: "ajax",
      endpoint: `${url}/pusher/auth`,
      headers: { Authorization: `Bearer ${token}` },
    },
    userAuthentication: {
      transport: "ajax",
      endpoint: `${url}/pusher/user-auth`,
      headers: { Authorization: `Bearer ${token}` },
    },
  }),
  // Signed in by the gateway; the channels are then asked for without any signature.
  signin: ({ url, token }) => ({
    channelAuthorization: { customHandler: (_params, done) => done(null, { auth: "" }) },
    userAuthentication: {
      transport: "ajax",
      endpoint: `${url}/pusher/user-auth`,
      headers: { Authorization: `Bearer ${token}` },
    },
  }),
  // The customer's own backend signs, with the `pusher` library for Node.
  backend: ({ app, user }) => {
    const backend = new PusherServer(app);
    return {
      channelAuthorization: {
        customHandler: ({ socketId, channelName }, done) => {
          const member = channelName.startsWith("presence-")
            ? { user_id: user.id, user_info: user.info }
            : undefined;
          done(null, backend.authorizeChannel(socketId, channelName, member));
        },
      },
      userAuthentication: {
        customHandler: ({ socketId }, done) =>
          done(null, backend.authenticateUser(socketId, { id: user.id, user_info: user.info })),
      },
    };
  },
  none: () => ({}),
};

function watch(channel) {
  channel.unbind_global();
  channel.bind_global((event, data) => {
    if (event.startsWith("pusher_internal:")) return;
    emit("event", { channel: channel.name, event, data: plain(data) });
  });
}

// pusher-js hands its Members object to subscription_succeeded of presence channels.
function plain(data) {
  if (data !== null && typeof data === "object" && "members" in data && "myID" in data) {
    return { me: data.myID, count: data.count, members: data.members };
  }
  return data ?? null;
}

serve({
  connect({ key, options, authorize }) {
    const { by, ...rest } = authorize;
    pusher = new Pusher(key, { ...options, ...authorizers[by](rest) });
    pusher.connection.bind("state_change", (states) => {
      emit("state", { ...states, socket_id: pusher.connection.socket_id ?? null });
    });
    pusher.connection.bind("message", ({ event, channel, data, user_id }) => {
      emit("frame", { event, channel: channel ?? null, data: data ?? null, user_id: user_id ?? null });
    });
    pusher.connection.bind("error", (error) => {
      emit("error", { type: error?.type ?? null, data: error?.data ?? error?.error?.data ?? null });
    });
    pusher.user.bind_global((event, data) => emit("user", { event, data: data ?? null }));
  },
  subscribe({ channel }) {
    watch(pusher.subscribe(channel));
  },
  unsubscribe({ channel }) {
    pusher.unsubscribe(channel);
  },
  trigger({ channel, event, data }) {
    return pusher.channel(channel).trigger(event, data);
  },
  signin() {
    pusher.signin();
  },
  disconnect() {
    pusher.disconnect();
  },
  reconnect() {
    pusher.connect();
  },
});
