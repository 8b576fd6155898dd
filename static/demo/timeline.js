// What one socket received, newest first. An event that came on several channels is one entry.

import { h, setText } from "./dom.js";
import { latency, money, timeOfDay } from "./format.js";

const ENTRIES_KEPT = 200;

/** The part of the protocol that carries no news of goals. */
export function isProtocolFrame(event) {
  return event.startsWith("pusher:") || event.startsWith("pusher_internal:");
}

export class Timeline {
  #list;
  #entries = new Map(); // event_id, or a number for what has none -> entry
  #frames = 0;
  #parts;

  /** @param {object} parts the panel's elements by name */
  constructor(parts) {
    this.#parts = parts;
    this.#list = parts.timeline;
    parts.protocolFrames.addEventListener("change", () => this.#showCount());
  }

  /**
   * Adds a frame.
   *
   * @param {{event: string, channel: string|null, data: object}} frame
   * @param {{ms: number, from: string}|null} delay how long it took, and since when
   */
  add(frame, delay) {
    const key = frame.data?.event_id ?? `frame-${(this.#frames += 1)}`;
    let entry = this.#entries.get(key);
    if (entry === undefined) {
      entry = this.#create(frame, delay);
      this.#entries.set(key, entry);
      this.#list.prepend(entry.item);
      this.#trim();
    }
    entry.channel(frame.channel, delay);
    this.#showCount();
  }

  #create({ event, channel, data }, delay) {
    const channels = h("ul", { class: "on" });
    const received = new Map(); // channel -> times
    const item = h(
      "li",
      {
        class: "entry",
        data: { event, family: event.split(/[.:_]/, 1)[0], protocol: String(isProtocolFrame(event)) },
      },
      h(
        "details",
        {},
        h(
          "summary",
          {},
          h("span", { class: "name" }, event),
          h("span", { class: "took", title: delay && `after ${delay.from}` }, delay ? latency(delay.ms) : ""),
          h("span", { class: "gist" }, gist(event, data)),
          h("span", { class: "since" }, delay ? `after ${delay.from}` : ""),
          channels,
        ),
        h("p", { class: "at" }, `Received ${timeOfDay(new Date())}`),
        h("pre", { tabindex: "0", "aria-label": `Data of ${event}` }, JSON.stringify(data, null, 2)),
      ),
    );
    return {
      item,
      channel(name, took) {
        if (name === null) return;
        const before = received.get(name);
        if (before !== undefined) {
          before.times += 1;
          before.element.dataset.times = before.times;
          setText(before.element, `${name} ×${before.times}`);
          return;
        }
        const title = took ? `${latency(took.ms)} after ${took.from}` : null;
        const element = h("li", { title, data: { channel: name } }, name);
        received.set(name, { element, times: 1 });
        channels.append(element);
      },
    };
  }

  #trim() {
    if (this.#entries.size <= ENTRIES_KEPT) return;
    const [key, oldest] = this.#entries.entries().next().value;
    this.#entries.delete(key);
    oldest.item.remove();
  }

  #showCount() {
    const all = this.#parts.protocolFrames.checked;
    this.#list.dataset.protocol = String(all);
    let shown = 0;
    for (const { item } of this.#entries.values()) shown += all || item.dataset.protocol === "false" ? 1 : 0;
    setText(this.#parts.eventCount, String(shown));
    this.#parts.noEvents.hidden = shown > 0;
  }
}

/** One line about the data, for those who don't open it. */
function gist(event, data) {
  switch (event) {
    case "goal.added":
      return `${data.context.exclusive_to} invites for ${money(data.amount)}`;
    case "goal.ended":
      if (data._cls === "ExclusiveGoal") return "the show is over";
      return `${data.context.exclusive_to}: ${data.metadata?.agreed ? "agreed" : "not agreed"}`;
    case "goal.reply":
      return data.ok ? `ok: ${data.goal?.state ?? ""}` : data.error.code;
    case "goal.snapshot":
      return ["no open goals", "1 open goal"][data.goals.length] ?? `${data.goals.length} open goals`;
    case "stream.authorized":
      return `${data.viewer_id} may watch for ${data.duration} s`;
    case "exclusive.started":
    case "exclusive.ended":
      return `with ${[data.exclusive_to].flat().join(", ")}`;
    case "escrow.held":
    case "escrow.captured":
    case "escrow.released":
      return data.reason ? `${money(data.amount)}, ${words(data.reason)}` : money(data.amount);
    case "pusher_internal:subscription_succeeded":
      return data?.presence ? `${data.presence.count} present` : "subscribed";
    case "pusher_internal:member_added":
    case "pusher_internal:member_removed":
      return String(data.user_id);
    case "pusher:error":
      return String(data?.message ?? "");
    default:
      return "";
  }
}

function words(code) {
  return code.replaceAll("_", " ");
}
