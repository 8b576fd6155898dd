// One app in a browser: an unmodified pusher-js, in the page or in a worker that the page has made.
// Everything it is told is put into `happened`, in order.
/* global Pusher */

const inWorker = typeof document === "undefined";
if (inWorker) importScripts(new URLSearchParams(self.location.search).get("library"));

const happened = [];
let told = () => {};
let pusher = null;

function record(kind, fields) {
  const entry = { kind, ...fields };
  if (inWorker) {
    self.postMessage({ happened: entry });
  } else {
    happened.push(entry);
    told();
  }
}

const orders = {
  connect({ key, options, gateway, token }) {
    pusher = new Pusher(key, {
      cluster: "none",
      forceTLS: false,
      disableStats: true,
      channelAuthorization: {
        transport: "ajax",
        endpoint: `${gateway}/pusher/auth`,
        headers: { Authorization: `Bearer ${token}` },
      },
      ...options,
    });
    pusher.connection.bind("state_change", ({ current }) => {
      const transport = pusher.connection.connection?.transport?.name ?? null;
      record("state", { state: current, transport, socket_id: pusher.connection.socket_id ?? null });
    });
    pusher.connection.bind("error", (error) => {
      record("error", { code: error?.data?.code ?? error?.error?.data?.code ?? null });
    });
  },
  subscribe({ channel }) {
    pusher.subscribe(channel).bind_global((event, data) => {
      if (!event.startsWith("pusher_internal:")) record("event", { channel, event, data });
    });
  },
  trigger({ channel, event, data }) {
    return pusher.channel(channel).trigger(event, data);
  },
  disconnect() {
    pusher.disconnect();
  },
};

let worker = null;

// In the page: hands orders on to the worker, if there is one.
function order(name, args) {
  return worker === null ? orders[name](args) : worker.postMessage({ name, args });
}

function startWorker(library) {
  worker = new Worker(`/client.js?library=${encodeURIComponent(library)}`);
  worker.onmessage = ({ data }) => {
    happened.push(data.happened);
    told();
  };
}

// Resolves with the first entry that is not older than `since` and has these fields.
function expected(since, fields, timeoutMs) {
  const wanted = Object.entries(fields);
  return new Promise((resolve, reject) => {
    const look = () => {
      const at = happened.findIndex(
        (entry, index) => index >= since && wanted.every(([name, value]) => entry[name] === value),
      );
      if (at < 0) return;
      clearTimeout(timer);
      told = () => {};
      resolve({ at, entry: happened[at] });
    };
    const timer = setTimeout(
      () => reject(new Error(`no ${JSON.stringify(fields)} in ${JSON.stringify(happened)}`)),
      timeoutMs,
    );
    told = look;
    look();
  });
}

if (inWorker) self.onmessage = ({ data }) => orders[data.name](data.args);
