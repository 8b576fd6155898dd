// One person: a socket, what it received, and what the person knows and can do.
//
// A panel learns everything from its own socket and its own HTTP calls. Two things are shared
// with the other panels: the stage (which stream is on air) and the causes (who clicked what).

import { Api } from "./api.js";
import { Board } from "./board.js";
import { gatewayHasPassed, gatewayNow, setGatewayClock } from "./clock.js";
import { delayOf } from "./delay.js";
import { fromTemplate, h, setText } from "./dom.js";
import { instant_ms, money } from "./format.js";
import { GoalCard } from "./goal-card.js";
import { PusherClient } from "./pusher-client.js";
import { Timeline } from "./timeline.js";

const ENDED_SHOWN = 3;
const OVERDUE_ASK_MS = 2_000; // a deadline has passed and no push came: ask this often
// A reply and its pushes come within milliseconds of each other on three sockets of this one
// thread. Drawing each at once takes longer than that and would be counted as their latency.
const DRAW_AFTER_MS = 30;
const UNCLEAR_ASK_MS = 250;

const CONNECTION = {
  idle: { label: "Not connected", tone: "calm" },
  connecting: { label: "Connecting", tone: "wait" },
  connected: { label: "Connected", tone: "good" },
  waiting: { label: "Reconnecting", tone: "wait" },
  offline: { label: "Disconnected", tone: "calm" },
  failed: { label: "Refused", tone: "bad" },
};

const AWAY = {
  waiting: "The connection is lost. Trying again.",
  offline: "You are disconnected. What you see may be out of date.",
  failed: "The gateway refuses this socket.",
};

export class Panel extends EventTarget {
  root;
  board;
  api;
  client;
  user;
  stage;
  causes;
  parts;
  #timeline;
  #cards = new Map(); // goal id -> card
  #asked = new Map(); // goal id -> performance.now() of the last question
  #storageKey;
  #drawing = null;
  #undrawn = []; // frames for the timeline

  constructor({ user, config, stage, causes }) {
    super();
    this.user = user;
    this.stage = stage;
    this.causes = causes;
    this.api = new Api(user.token);
    this.board = new Board({ userId: user.id, role: user.role, timing: config.timing });
    this.#storageKey = `duet-demo/${config.run}/${user.id}`;
    this.#restore();
    const { root, parts } = fromTemplate("panel-template");
    this.root = root;
    this.parts = parts;
    this.#label();
    this.#timeline = new Timeline(parts);
    const url = new URL(config.ws_path, location.href);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    this.client = new PusherClient({ url: url.href, userId: user.id, token: user.token });
    this.#listen();
  }

  // What the two roles fill in

  /** One sentence on where things stand; screen readers hear it when it changes. */
  get statusText() {
    return "";
  }

  /** The channels to be in, always and while the stream is on air. */
  get channelNames() {
    return { always: [], onAir: [] };
  }

  /** A card's title for this reader. */
  titleOf(_goal) {
    return "";
  }

  /** The buttons of a goal's card: `{name, label, primary}`. */
  actionsOf(_goal) {
    return [];
  }

  /** Performs an action of a card. */
  async perform(_name, _goal) {}

  /** Called after everything that may have changed what is shown. */
  refreshWork() {}

  // Life

  start() {
    for (const name of this.channelNames.always) this.client.subscribe(name);
    this.#followStage();
    this.client.connect();
    this.#draw();
  }

  /** Moves the countdowns, and asks for goals whose deadline passed without a push. */
  tick() {
    const now_ms = gatewayNow();
    for (const [goalId, card] of this.#cards) {
      if (card.tick(now_ms)) this.#askIfStale(goalId);
    }
  }

  /** Sends a goal command and takes the goal of its reply; rejects with CommandError. */
  async command(label, event, data, concerns) {
    this.causes.click(label, concerns);
    try {
      const goal = await this.client.command(event, data);
      this.board.learn(goal);
      return goal;
    } catch (error) {
      if (error.goal) this.board.learn(error.goal);
      throw error;
    } finally {
      await this.refresh();
    }
  }

  showError(error) {
    this.parts.error.hidden = error === null;
    setText(this.parts.error, error?.message ?? "");
  }

  /** Draws soon what has changed; resolves when it is drawn. */
  refresh() {
    this.#drawing ??= new Promise((resolve) => {
      setTimeout(() => {
        this.#drawing = null;
        this.#draw();
        resolve();
      }, DRAW_AFTER_MS);
    });
    return this.#drawing;
  }

  #draw() {
    for (const { frame, delay } of this.#undrawn.splice(0)) this.#timeline.add(frame, delay);
    this.#showCards();
    this.#showLedger();
    this.#showChannels();
    this.refreshWork();
    setText(this.parts.status, AWAY[this.client.state] ?? this.statusText);
    this.#keep();
    this.tick();
    this.dispatchEvent(new Event("change"));
  }

  // What the socket tells

  #listen() {
    this.client.addEventListener("state", ({ detail }) => {
      this.#showConnection(detail);
      this.refresh();
    });
    this.client.addEventListener("channel", () => this.refresh());
    this.client.addEventListener("refused", ({ detail }) => this.showError(detail));
    this.client.addEventListener("frame", ({ detail }) => this.#received(detail));
    this.stage.addEventListener("change", () => {
      this.#followStage();
      this.refresh();
    });
    this.parts.toggle.addEventListener("click", () => {
      if (this.client.state === "offline" || this.client.state === "failed") this.client.connect();
      else this.client.disconnect();
    });
  }

  #received(frame) {
    const { event, data } = frame;
    // An invitation that is over has as its `exp` the earlier one of its deadline and of its end.
    const overAt = event === "goal.ended" && data._cls === "TriggerExclusiveGoal" ? instant_ms(data.exp) : null;
    if (overAt !== null) gatewayHasPassed(overAt);
    this.#undrawn.push({ frame, delay: delayOf(frame, this) });
    if (event === "goal.snapshot") {
      setGatewayClock(instant_ms(data.as_of) ?? Date.now());
      for (const goalId of this.board.snapshot(data)) this.ask(goalId);
    } else if (event !== "goal.reply") {
      const goalId = this.board.push(event, data);
      if (goalId !== null) this.#askIfUnclear(goalId);
    }
    this.refresh();
  }

  /** Asks the gateway for a goal that the pushes did not tell all about. */
  async ask(goalId) {
    this.#asked.set(goalId, performance.now());
    try {
      const goal = await this.api.goal(goalId);
      if (goal === null) this.board.forget(goalId);
      else this.board.learn(goal);
      this.refresh();
    } catch (error) {
      this.showError(error);
    }
  }

  /** Gives the push that belongs to this one a moment to come, then asks. */
  #askIfUnclear(goalId) {
    setTimeout(() => this.board.isUnclear(goalId) && this.ask(goalId), UNCLEAR_ASK_MS);
  }

  #askIfStale(goalId) {
    const last = this.#asked.get(goalId) ?? -Infinity;
    if (this.client.state === "connected" && performance.now() - last > OVERDUE_ASK_MS) this.ask(goalId);
  }

  #followStage() {
    for (const name of this.channelNames.onAir) {
      if (this.stage.sessionId === null) this.client.unsubscribe(name);
      else this.client.subscribe(name);
    }
  }

  // Showing

  #label() {
    const { root, parts, user } = this;
    const titleId = `panel-${user.id}-name`;
    root.id = `panel-${user.id}`;
    root.dataset.role = user.role;
    root.dataset.user = user.id;
    root.setAttribute("aria-labelledby", titleId);
    parts.name.id = titleId;
    setText(parts.name, user.name);
    setText(parts.role, user.role === "streamer" ? "Streamer" : "Viewer");
    setText(parts.avatar, user.name.slice(0, 1));
    parts.eventsTitle.id = `panel-${user.id}-events`;
    parts.events.setAttribute("aria-labelledby", parts.eventsTitle.id);
    parts.scroll.setAttribute("aria-labelledby", parts.eventsTitle.id);
    this.#showConnection({ state: "idle", reason: "" });
  }

  #showConnection({ state, reason }) {
    const { label, tone } = CONNECTION[state];
    setText(this.parts.connection, label);
    this.parts.connection.dataset.tone = tone;
    this.parts.connection.dataset.state = state;
    this.parts.connection.title = reason;
    const away = state === "offline" || state === "failed";
    setText(this.parts.toggle, away ? "Connect" : "Disconnect");
    this.parts.toggle.setAttribute("aria-label", `${away ? "Connect" : "Disconnect"} ${this.user.name}`);
    if (state === "connected") this.showError(null);
    if (state === "failed") this.showError({ message: reason });
  }

  #showChannels() {
    const { always, onAir } = this.channelNames;
    const items = [...always, ...onAir].map((name) => {
      const channel = this.client.channels.get(name);
      const state = channel === undefined ? "off air" : channel.state;
      const watching = channel?.members ? `, ${channel.members.size} present` : "";
      return h(
        "li",
        { data: { channel: name, state } },
        h("code", {}, name),
        h("span", {}, channel?.reason ? `${state}: ${channel.reason}` : state + watching),
      );
    });
    this.parts.channels.replaceChildren(...items);
    const joined = items.filter((item) => item.dataset.state === "subscribed").length;
    setText(this.parts.channelCount, `${joined} of ${items.length}`);
  }

  #showCards() {
    // The oldest open goal first: a new invitation must not move the buttons of those before it.
    const shown = [...this.board.openGoals, ...this.board.endedGoals.slice(0, ENDED_SHOWN)];
    const ids = new Set(shown.map((goal) => goal.id));
    for (const [goalId, card] of this.#cards) {
      if (ids.has(goalId)) continue;
      card.root.remove();
      this.#cards.delete(goalId);
    }
    for (const [place, goal] of shown.entries()) {
      const card = this.#cards.get(goal.id) ?? this.#createCard(goal);
      card.update(goal, this.board.deadline(goal), this.actionsOf(goal));
      const there = this.parts.goals.children[place];
      // Moving an element takes its focus away, so only what is out of place is moved.
      if (there !== card.root) this.parts.goals.insertBefore(card.root, there ?? null);
    }
  }

  #createCard(goal) {
    const run = (name, goalId) => this.perform(name, this.board.goal(goalId));
    const card = new GoalCard(goal, { title: this.titleOf(goal), run });
    this.#cards.set(goal.id, card);
    return card;
  }

  /** The card of a goal, to put the focus on. */
  focusCard(goalId) {
    this.#cards.get(goalId)?.root.focus();
  }

  #showLedger() {
    const { open, captured, released } = this.board.ledger();
    const streamer = this.user.role === "streamer";
    const figures = [
      ["In escrow", open, "open"],
      [streamer ? "Earned" : "Paid", captured, "captured"],
      [streamer ? "Given back" : "Returned", released, "released"],
    ];
    this.parts.ledger.replaceChildren(
      ...figures.map(([label, amount, name]) =>
        h("div", {}, h("dt", {}, label), h("dd", { data: { figure: name } }, money(amount))),
      ),
    );
  }

  // A reload of the tab

  #restore() {
    try {
      const kept = sessionStorage.getItem(this.#storageKey);
      if (kept !== null) this.board.restore(JSON.parse(kept));
    } catch {
      // A tab without storage starts from the snapshot alone.
    }
  }

  #keep() {
    try {
      sessionStorage.setItem(this.#storageKey, JSON.stringify(this.board));
    } catch {
      // As in #restore.
    }
  }
}
