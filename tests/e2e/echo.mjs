// A Laravel front end: the unmodified `laravel-echo` over pusher-js, driven by JSON lines.
import EchoModule from "laravel-echo";
import Pusher from "pusher-js";

import { emit, serve } from "./lines.mjs";

const Echo = EchoModule.default ?? EchoModule;
let echo = null;

serve({
  connect({ options }) {
    echo = new Echo({ broadcaster: "pusher", Pusher, ...options });
    echo.connector.pusher.connection.bind("state_change", (states) => {
      emit("state", { ...states, socket_id: echo.socketId() ?? null });
    });
  },
  listen({ channel, type, event }) {
    const target = { public: "channel", private: "private", presence: "join" }[type];
    const subscription = echo[target](channel);
    subscription.listen(event, (data) => emit("event", { channel, event, data }));
    subscription.listenForWhisper("typing", (data) => emit("whisper", { channel, data }));
    subscription.subscribed?.(() => emit("subscribed", { channel }));
    subscription.error?.((error) => emit("refused", { channel, error }));
    if (type === "presence") {
      subscription.here((users) => emit("here", { channel, users }));
      subscription.joining((user) => emit("joining", { channel, user }));
      subscription.leaving((user) => emit("leaving", { channel, user }));
    }
  },
  whisper({ channel, data }) {
    echo.join(channel).whisper("typing", data);
  },
  leave({ channel }) {
    echo.leave(channel);
  },
  disconnect() {
    echo.disconnect();
  },
});
