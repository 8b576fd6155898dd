// A viewer's panel: invite the streamer, take the invitation back, finish the show.

import { fromTemplate, setText, whileBusy } from "./dom.js";
import { money, parseMoney } from "./format.js";
import { stateOf } from "./goal-card.js";
import { Panel } from "./panel.js";

const COMMANDS = {
  withdraw: { label: "Withdraw", event: "client-goal.withdraw" },
  finish: { label: "Finish show", event: "client-exclusive.finish" },
};

export class ViewerPanel extends Panel {
  #form;
  #streamerName;

  constructor({ streamer, ...options }) {
    super(options);
    this.#streamerName = streamer.name;
    this.#form = fromTemplate("invite-template");
    const { root, parts } = this.#form;
    for (const name of ["amount", "duration"]) {
      parts[name].id = `panel-${this.user.id}-${name}`;
      parts[`${name}Label`].htmlFor = parts[name].id;
    }
    setText(parts.invite, `Invite ${this.#streamerName}`);
    parts.inviteError.id = `panel-${this.user.id}-invite-error`;
    for (const name of ["amount", "duration", "invite"]) {
      parts[name].setAttribute("aria-describedby", parts.inviteError.id);
    }
    root.addEventListener("submit", (submit) => {
      submit.preventDefault();
      whileBusy(parts.invite, () => this.#invite());
    });
    this.parts.work.append(root);
  }

  get channelNames() {
    const { streamerId } = this.stage;
    return {
      always: [
        `private-user@${this.user.id}`,
        `presence-stream-viewer@${streamerId}.preview.${this.user.id}`,
      ],
      onAir: [`presence-stream@${streamerId}`],
    };
  }

  get statusText() {
    const [goal] = this.board.openGoals;
    const name = this.#streamerName;
    switch (goal?.state) {
      case "invited":
        return `Waiting for ${name}’s answer.`;
      case "agreed":
        return `${name} agreed. The show starts when ${name} is ready.`;
      case "live":
        return `Your private show with ${name} is live.`;
      default:
        return this.#idleText(this.board.endedGoals[0]);
    }
  }

  titleOf(_goal) {
    return `Invitation to ${this.#streamerName}`;
  }

  actionsOf({ state }) {
    if (state === "invited") return [{ name: "withdraw", label: "Withdraw", primary: false }];
    if (state === "live") return [{ name: "finish", label: "Finish show", primary: false }];
    return [];
  }

  async perform(name, goal) {
    const { label, event } = COMMANDS[name];
    await this.command(label, event, { goal_id: goal.id }, { goalId: goal.id, sessionId: goal.sessionId });
  }

  refreshWork() {
    const { root, parts } = this.#form;
    root.hidden = this.stage.sessionId === null || this.board.openGoals.length > 0;
    if (root.hidden) this.#showInviteError(null);
  }

  #idleText(last) {
    const name = this.#streamerName;
    if (this.stage.sessionId === null) return `${name} is off air.`;
    if (this.board.exclusiveTo && this.board.exclusiveTo !== this.user.id) {
      return `${name} is in a private show with another viewer.`;
    }
    if (last === undefined) return `${name} is live. Invite ${name} to a private show.`;
    if (last.outcome === "captured") return `The show is over. ${money(last.captured)} went to ${name}.`;
    const why = stateOf(last).label.toLowerCase();
    if (last.released === 0) return `Your invitation is over: ${why}.`;
    return `Your invitation is over: ${why}. ${money(last.released)} came back to you.`;
  }

  async #invite() {
    const { parts } = this.#form;
    const amount = parseMoney(parts.amount.value);
    const duration = Number(parts.duration.value);
    if (amount === null) return this.#showInviteError({ message: "Amount: a number like 25.00." }, parts.amount);
    if (!Number.isInteger(duration) || parts.duration.value.trim() === "") {
      return this.#showInviteError({ message: "Prepaid: whole seconds, like 120." }, parts.duration);
    }
    this.#showInviteError(null);
    const { sessionId } = this.stage;
    try {
      const goal = await this.command(
        "Invite",
        "client-goal.invite",
        { session_id: sessionId, prepaid_duration: duration, amount },
        { sessionId, viewerId: this.user.id },
      );
      this.focusCard(goal.id);
    } catch (error) {
      this.#showInviteError(error);
    }
  }

  #showInviteError(error, field = null) {
    const { parts } = this.#form;
    parts.inviteError.hidden = error === null;
    setText(parts.inviteError, error?.message ?? "");
    for (const name of ["amount", "duration"]) {
      if (parts[name] === field) parts[name].setAttribute("aria-invalid", "true");
      else parts[name].removeAttribute("aria-invalid");
    }
    field?.focus();
  }
}
