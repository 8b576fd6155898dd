// One goal as a card: its state, its countdown and what one can do about it.

import { isOpen } from "./board.js";
import { fromTemplate, h, setText, whileBusy } from "./dom.js";
import { countdown, money, span } from "./format.js";

const CLOCK_LABELS = {
  expiry: "Expires in",
  refund: "Refunded unless started in",
  end: "Show ends in",
};

const STATES = {
  invited: { label: "Invited", tone: "wait", step: "invited" },
  agreed: { label: "Agreed", tone: "good", step: "agreed" },
  live: { label: "Live", tone: "live", step: "live" },
};

const REASONS = {
  disagreed: "Declined",
  withdrawn: "Withdrawn",
  expired: "Expired",
  superseded: "Superseded",
  stream_ended: "Stream ended",
  not_started: "Not started",
};

/** How a goal is called in one or two words, and in which tone. */
export function stateOf(goal) {
  if (isOpen(goal)) return STATES[goal.state];
  if (goal.outcome === "captured") return { label: "Completed", tone: "done", step: "ended" };
  return { label: REASONS[goal.reason] ?? "Declined", tone: "calm", step: "declined" };
}

export class GoalCard {
  root;
  #parts;
  #actions = new Map(); // name -> button
  #deadline = null;

  /**
   * @param {object} goal
   * @param {{title: string, run: (name: string, goal: object) => Promise<void>}} options
   *   `run` performs an action, and rejects with an error that the card shows
   */
  constructor(goal, { title, run }) {
    const { root, parts } = fromTemplate("goal-template");
    this.root = root;
    this.#parts = parts;
    root.dataset.goal = goal.id;
    root.setAttribute("aria-label", `${title}, ${money(goal.amount)}`);
    setText(parts.title, title);
    setText(parts.amount, money(goal.amount));
    setText(parts.prepaid, `${span(goal.prepaid_s)} prepaid`);
    this.run = run;
  }

  /**
   * @param {object} goal
   * @param {{kind: string, at: number, total_s: number}|null} deadline
   * @param {{name: string, label: string, primary: boolean}[]} actions
   */
  update(goal, deadline, actions) {
    const { label, tone, step } = stateOf(goal);
    this.root.dataset.state = goal.state;
    setText(this.#parts.chip, label);
    this.#parts.chip.dataset.tone = tone;
    this.#mark(step);
    this.#deadline = deadline;
    this.#parts.clock.hidden = deadline === null;
    if (deadline !== null) setText(this.#parts.clockLabel, CLOCK_LABELS[deadline.kind]);
    this.#setActions(goal, actions);
  }

  /** Shows how much time is left. Returns true once when the deadline has passed. */
  tick(now_ms) {
    if (this.#deadline === null) return false;
    const left_ms = this.#deadline.at - now_ms;
    setText(this.#parts.clockLeft, countdown(left_ms));
    const share = Math.min(1, Math.max(0, left_ms / (this.#deadline.total_s * 1000)));
    this.#parts.clockBar.style.setProperty("--left", share.toFixed(4));
    return left_ms < 0;
  }

  #mark(step) {
    let passed = true;
    for (const item of this.#parts.steps.children) {
      const here = item.dataset.step === step;
      item.dataset.passed = String(passed && step !== "declined");
      if (here) {
        item.setAttribute("aria-current", "step");
        passed = false;
      } else item.removeAttribute("aria-current");
    }
    this.#parts.steps.hidden = step === "declined";
  }

  #setActions(goal, actions) {
    const wanted = new Map(actions.map((action) => [action.name, action]));
    const hadFocus = this.#parts.actions.contains(document.activeElement);
    for (const [name, button] of this.#actions) {
      if (wanted.has(name)) continue;
      button.remove();
      this.#actions.delete(name);
    }
    for (const { name, label, primary } of actions) {
      if (this.#actions.has(name)) continue;
      const button = h(
        "button",
        {
          type: "button",
          class: primary ? "button primary" : "button",
          data: { action: name },
          on: { click: () => this.#perform(name, goal.id, button) },
        },
        label,
      );
      this.#actions.set(name, button);
      this.#parts.actions.append(button);
    }
    this.#parts.actions.hidden = actions.length === 0;
    // The button that was pressed is gone; the card keeps the place of a keyboard user.
    if (hadFocus && !this.#parts.actions.contains(document.activeElement)) this.root.focus();
  }

  #perform(name, goalId, button) {
    return whileBusy(button, async () => {
      this.showError(null);
      try {
        await this.run(name, goalId);
      } catch (error) {
        this.showError(error);
      }
    });
  }

  showError(error) {
    const { goalError } = this.#parts;
    goalError.hidden = error === null;
    setText(goalError, error?.message ?? "");
  }
}
