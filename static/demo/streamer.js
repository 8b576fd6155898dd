// The streamer's panel: go on air, answer invitations, start and finish the show.

import { fromTemplate, setText, whileBusy } from "./dom.js";
import { instant_ms, money } from "./format.js";
import { stateOf } from "./goal-card.js";
import { Panel } from "./panel.js";

const COMMANDS = {
  agree: { label: "Agree", event: "client-goal.agree", primary: true },
  disagree: { label: "Disagree", event: "client-goal.disagree", primary: false },
  start: { label: "Start show", event: "client-exclusive.start", primary: true },
  finish: { label: "Finish show", event: "client-exclusive.finish", primary: false },
};

const ACTIONS = { invited: ["agree", "disagree"], agreed: ["start"], live: ["finish"] };

export class StreamerPanel extends Panel {
  #stageParts;
  #nameOf;
  #shows = new Set(); // ids of goals whose show's end the session has been asked for

  /** @param {(userId: string) => string} nameOf what people call a viewer */
  constructor({ nameOf, ...options }) {
    super(options);
    this.#nameOf = nameOf;
    const { root, parts } = fromTemplate("stage-template");
    this.#stageParts = parts;
    this.parts.work.append(root);
    parts.goLive.addEventListener("click", () => this.#onAir(parts.goLive, () => this.#goLive()));
    parts.endStream.addEventListener("click", () => this.#onAir(parts.endStream, () => this.#endStream()));
    // After every (re)connect: the stream may have ended, or the gateway begun anew, meanwhile.
    this.client.addEventListener("state", ({ detail }) => {
      if (detail.state === "connected") this.#checkSession();
    });
  }

  get channelNames() {
    const { id } = this.user;
    return {
      always: [`private-user@${id}`, `private-stream@${id}`],
      onAir: [`presence-stream@${id}`],
    };
  }

  get statusText() {
    if (this.stage.sessionId === null) return "You are off air. Go live to receive invitations.";
    const goals = this.board.openGoals;
    const running = goals.find((goal) => goal.state === "live") ?? goals.find((goal) => goal.state === "agreed");
    const waiting = goals.filter((goal) => goal.state === "invited");
    if (running?.state === "live") return `In a private show with ${this.titleOf(running)}.`;
    if (running) return `You agreed to ${this.titleOf(running)}. Start the show when you are ready.`;
    if (waiting.length === 1) {
      return `${this.titleOf(waiting[0])} invites you for ${money(waiting[0].amount)}.`;
    }
    if (waiting.length > 1) return `${waiting.length} invitations wait for your answer.`;
    return this.#idleText(this.board.endedGoals[0]);
  }

  titleOf(goal) {
    return this.#nameOf(goal.viewerId);
  }

  actionsOf({ state }) {
    return (ACTIONS[state] ?? []).map((name) => ({ name, ...COMMANDS[name] }));
  }

  async perform(name, goal) {
    const { label, event } = COMMANDS[name];
    await this.command(label, event, { goal_id: goal.id }, { goalId: goal.id, sessionId: goal.sessionId });
  }

  refreshWork() {
    const { goLive, endStream, audience } = this.#stageParts;
    const live = this.stage.sessionId !== null;
    const hadFocus = document.activeElement === goLive || document.activeElement === endStream;
    goLive.hidden = live;
    endStream.hidden = !live;
    if (hadFocus && document.activeElement !== (live ? endStream : goLive)) (live ? endStream : goLive).focus();
    const members = this.client.channels.get(`presence-stream@${this.user.id}`)?.members;
    const watching = [...(members ?? [])].filter((id) => id !== this.user.id).map(this.#nameOf);
    setText(audience, watching.length > 0 ? `Watching: ${watching.sort().join(", ")}` : "");
    for (const goal of this.board.openGoals) {
      if (goal.state !== "invited" && goal.showEndsAt === null && !this.#shows.has(goal.id)) {
        this.#shows.add(goal.id);
        this.#checkSession();
      }
    }
  }

  #idleText(last) {
    if (last === undefined || last.sessionId !== this.stage.sessionId) return "You are live. Waiting for invitations.";
    if (last.outcome === "captured") return `The show is over. You earned ${money(last.captured)}.`;
    return `${this.titleOf(last)}: ${stateOf(last).label.toLowerCase()}. Waiting for invitations.`;
  }

  #onAir(button, action) {
    return whileBusy(button, async () => {
      this.showError(null);
      try {
        await action();
      } catch (error) {
        this.showError(error);
      }
    });
  }

  async #goLive() {
    const session = await this.api.goLive();
    this.stage.sessionId = session.id;
  }

  async #endStream() {
    const { sessionId } = this.stage;
    this.causes.click("End stream", { sessionId });
    await this.api.endStream(sessionId);
    this.stage.sessionId = null;
  }

  /** Reads the session: is it still live, and when does whose show end. */
  async #checkSession() {
    const { sessionId } = this.stage;
    if (sessionId === null) return;
    try {
      const session = await this.api.session(sessionId);
      if (this.stage.sessionId !== sessionId) return;
      if (session === null || !session.active) {
        this.stage.sessionId = null;
        return;
      }
      for (const [viewerId, viewer] of Object.entries(session.viewers ?? {})) {
        this.board.showEnds(viewerId, sessionId, instant_ms(viewer.exp));
      }
      this.refresh();
    } catch (error) {
      this.showError(error);
    }
  }
}
