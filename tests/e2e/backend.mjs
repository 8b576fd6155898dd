// A customer's backend: the unmodified `pusher` library for Node, driven by JSON lines.
import Pusher from "pusher";

import { serve } from "./lines.mjs";

let pusher = null;

async function answer(response) {
  return { status: response.status, body: await response.text() };
}

serve({
  connect({ options }) {
    pusher = new Pusher(options);
  },
  async trigger({ channels, event, data, params }) {
    return answer(await pusher.trigger(channels, event, data, params));
  },
  async trigger_batch({ batch }) {
    return answer(await pusher.triggerBatch(batch));
  },
  async get({ path, params }) {
    return answer(await pusher.get({ path, params }));
  },
  async post({ path, params, body }) {
    return answer(await pusher.post({ path, params, body }));
  },
  async terminate({ user }) {
    return answer(await pusher.terminateUserConnections(user));
  },
  webhook({ headers, body }) {
    const hook = pusher.webhook({ headers, rawBody: body });
    const valid = hook.isValid();
    return valid ? { valid, events: hook.getEvents(), time: hook.getTime().toJSON() } : { valid };
  },
  async send_to_user({ user, event, data }) {
    return answer(await pusher.sendToUser(user, event, data));
  },
});
