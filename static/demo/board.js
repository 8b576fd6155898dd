// What one party knows of its goals and their money, learned from its own socket alone.
//
// Pushes move a goal forward, never back, and each event_id counts once. A snapshot says which
// goals are open; those that were open here and are not in it have ended while nobody listened,
// and are asked for by id. No DOM, no network.

import { instant_ms } from "./format.js";

const RANK = { invited: 1, agreed: 2, live: 3, declined: 4, ended: 5 };
const OPEN_STATES = new Set(["invited", "agreed", "live"]);
const GOALS_KEPT = 12;
const EVENT_IDS_KEPT = 500;

/** Whether something may still happen to the goal that a person waits for. */
export function isOpen(goal) {
  return OPEN_STATES.has(goal.state);
}

export class Board {
  /** The viewer whom the stream's show is reserved for, as the stream's channels told. */
  exclusiveTo = null;

  #userId;
  #role;
  #timing;
  #goals = new Map(); // goal id -> goal, oldest first
  #endings = 0; // goals that ended here so far: numbers them
  #eventIds = new Set();

  constructor({ userId, role, timing }) {
    this.#userId = userId;
    this.#role = role;
    this.#timing = timing;
  }

  /** The oldest first. */
  get openGoals() {
    return [...this.#goals.values()].filter(isOpen);
  }

  /** The one that ended last first. */
  get endedGoals() {
    return [...this.#goals.values()].filter((goal) => !isOpen(goal)).sort((a, b) => b.ending - a.ending);
  }

  goal(goalId) {
    return this.#goals.get(goalId) ?? null;
  }

  /** The open goal between a stream and a viewer: stream.authorized names no goal. */
  goalOf(sessionId, viewerId) {
    return this.openGoals.find((goal) => goal.sessionId === sessionId && goal.viewerId === viewerId) ?? null;
  }

  /** Takes the goal as the gateway's documents say it is: reply, snapshot, goal.added, GET. */
  learn(json) {
    const known = this.#goals.get(json.id);
    if (known && (json.version < known.version || RANK[json.state] < RANK[known.state])) return;
    const viewerId = json.context.exclusive_to;
    const agreedAt = instant_ms(json.metadata.agreed);
    this.#put({
      showEndsAt: null,
      held: 0,
      captured: 0,
      released: 0,
      ...known,
      id: json.id,
      viewerId,
      streamerId: json.metadata.user_id,
      sessionId: json.conditions.session_id,
      amount: json.amount ?? json.breakdown?.[viewerId] ?? 0,
      prepaid_s: json.metadata.prepaid_duration,
      state: json.state,
      reason: json.reason ?? known?.reason ?? null,
      outcome: json.outcome ?? null,
      expiresAt: instant_ms(json.exp),
      agreedAt,
      version: json.version ?? 0,
    });
    const goal = this.#goals.get(json.id);
    goal.held = goal.amount;
    if (json.state === "live" || json.outcome === "captured") goal.captured = goal.amount;
    if (json.outcome === "refunded") goal.released = goal.amount;
    this.#numberEnding(goal);
  }

  /**
   * Takes a push. Each event comes on several channels, and may come again after a reconnect:
   * it counts once.
   *
   * @returns {string|null} the id of the goal whose state may still be unclear after it
   */
  push(event, data) {
    if (data?.event_id !== undefined) {
      if (this.#eventIds.has(data.event_id)) return null;
      this.#eventIds.add(data.event_id);
      if (this.#eventIds.size > EVENT_IDS_KEPT) this.#eventIds.delete(this.#eventIds.values().next().value);
    }
    switch (event) {
      case "goal.added":
        this.learn(data);
        return null;
      case "goal.ended":
        return this.#goalEnded(data);
      case "stream.authorized":
        return this.#authorized(data);
      case "exclusive.started":
        this.exclusiveTo = first(data.exclusive_to);
        return this.#show(data, "live");
      case "exclusive.ended":
        this.exclusiveTo = null;
        return this.#show(data, "ended");
      case "escrow.held":
      case "escrow.captured":
      case "escrow.released":
        return this.#money(event.slice("escrow.".length), data);
      default:
        return null;
    }
  }

  /**
   * Whether the pushes so far leave open how a goal stands: it was invited from another tab, was
   * declined nobody said why, or its viewer was authorized but nobody said that it was agreed
   * (after somebody else's show the whole room is authorized again).
   */
  isUnclear(goalId) {
    const goal = this.goal(goalId);
    if (goal === null) return true;
    if (goal.state === "invited") return goal.showEndsAt !== null;
    return goal.state === "declined" && goal.reason === null;
  }

  /** Takes a goal.snapshot; returns the ids of goals that ended unheard. */
  snapshot({ goals }) {
    for (const goal of goals) this.learn(goal);
    const standing = new Set(goals.map((goal) => goal.id));
    return this.openGoals.filter((goal) => !standing.has(goal.id)).map((goal) => goal.id);
  }

  /** Forgets a goal that the gateway does not know. */
  forget(goalId) {
    this.#goals.delete(goalId);
  }

  /** Notes when a viewer's show ends, by the session's own account. */
  showEnds(viewerId, sessionId, endsAt) {
    const goal = this.goalOf(sessionId, viewerId);
    if (goal !== null && endsAt !== null) goal.showEndsAt = endsAt;
  }

  /** The instant at which a timer of the gateway acts on the goal, or null. */
  deadline(goal) {
    switch (goal.state) {
      case "invited":
        return { kind: "expiry", at: goal.expiresAt, total_s: this.#timing.invitation_ttl_s };
      case "agreed": {
        const total_s = this.#timing.refund_delay_s;
        return { kind: "refund", at: goal.expiresAt + total_s * 1000, total_s };
      }
      case "live": {
        const total_s = this.#timing.show_grace_s + goal.prepaid_s;
        return { kind: "end", at: goal.showEndsAt ?? goal.agreedAt + total_s * 1000, total_s };
      }
      default:
        return null;
    }
  }

  /** Money of one viewer's goals, or of all, in minor units. `open` is still in escrow. */
  ledger(viewerId = null) {
    const sums = { held: 0, captured: 0, released: 0, open: 0 };
    for (const goal of this.#goals.values()) {
      if (viewerId !== null && goal.viewerId !== viewerId) continue;
      sums.held += goal.held;
      sums.captured += goal.captured;
      sums.released += goal.released;
    }
    sums.open = sums.held - sums.captured - sums.released;
    return sums;
  }

  /** Whether of each ended goal all that was held went out once: captured or released, not both. */
  get balanced() {
    return [...this.#goals.values()].every(({ state, held, captured, released }) => {
      const out = captured + released;
      return Math.min(captured, released) === 0 && (state === "ended" ? out === held : out <= held);
    });
  }

  /** For the tab's storage, so that a reload keeps what has ended too. */
  toJSON() {
    return { goals: [...this.#goals.values()], exclusiveTo: this.exclusiveTo };
  }

  restore({ goals = [], exclusiveTo = null }) {
    for (const goal of goals) this.#goals.set(goal.id, goal);
    this.#endings = Math.max(0, ...goals.map(({ ending }) => ending ?? 0));
    this.exclusiveTo = exclusiveTo;
  }

  #goalEnded(data) {
    const goal = this.#goals.get(data.goal_id);
    if (data._cls !== "TriggerExclusiveGoal" || goal === undefined) return null;
    const agreedAt = instant_ms(data.metadata?.agreed);
    goal.expiresAt = instant_ms(data.exp) ?? goal.expiresAt;
    if (agreedAt !== null) {
      goal.agreedAt = agreedAt;
      this.#advance(goal, "agreed");
      return null;
    }
    this.#advance(goal, "declined");
    // The streamer hears nothing of the viewer's escrow; a declined goal's is always released.
    if (this.#role === "streamer") goal.released = goal.amount;
    return goal.id;
  }

  #authorized(data) {
    const goal = this.goalOf(data.session_id, data.viewer_id);
    if (goal === null || data.viewer_id !== this.#userId) return null;
    goal.showEndsAt = instant_ms(data.exp);
    return goal.id;
  }

  #show(data, state) {
    const goal = this.#goals.get(data.goal_id);
    if (goal === undefined) return null; // another viewer's show
    if (state === "ended") goal.outcome = "captured";
    // The streamer is told of the show, not of the viewer's escrow; the one implies the other.
    if (this.#role === "streamer") goal.captured = goal.amount;
    this.#advance(goal, state);
    return null;
  }

  #money(movement, data) {
    const goal = this.#goals.get(data.goal_id);
    if (goal === undefined) return data.goal_id;
    goal[movement] = data.amount;
    if (movement === "captured") this.#advance(goal, "live");
    if (movement === "released") {
      goal.reason = data.reason ?? goal.reason;
      goal.outcome = "refunded";
      this.#advance(goal, "ended");
    }
    return null;
  }

  #advance(goal, state) {
    if (RANK[state] > RANK[goal.state]) goal.state = state;
    this.#numberEnding(goal);
  }

  #numberEnding(goal) {
    if (!isOpen(goal)) goal.ending ??= this.#endings += 1;
  }

  #put(goal) {
    this.#goals.set(goal.id, goal);
    for (const old of this.#goals.values()) {
      if (this.#goals.size <= GOALS_KEPT) break;
      if (!isOpen(old)) this.#goals.delete(old.id);
    }
  }
}

function first(value) {
  return Array.isArray(value) ? (value[0] ?? null) : (value ?? null);
}
