// Which click caused what a socket received.
//
// The three panels live in one page and share one clock, so the time from a click in one panel
// to the frame in another is measured exactly, across both sockets and the gateway.

const CAUSE_MAX_AGE_MS = 5_000; // what comes later came from a timer and not from a click
const CAUSES_KEPT = 50;

export class Causes {
  #clicks = [];

  /**
   * Remembers a click.
   *
   * @param {string} label what was clicked, e.g. "Agree"
   * @param {{goalId?: string, sessionId?: string, viewerId?: string}} concerns
   */
  click(label, concerns) {
    this.#clicks.unshift({ label, at: performance.now(), ...concerns });
    this.#clicks.length = Math.min(this.#clicks.length, CAUSES_KEPT);
  }

  /**
   * The latest click that a push can come from, with the time since, or null.
   * One about the same goal is the better match; an invitation has no goal yet when it is
   * clicked, and an agreement supersedes other goals of its session.
   */
  of({ goalId, sessionId, viewerId, receivedAt }) {
    const fresh = this.#clicks.filter(({ at }) => at <= receivedAt && receivedAt - at < CAUSE_MAX_AGE_MS);
    const cause =
      fresh.find((click) => goalId && click.goalId === goalId) ??
      fresh.find((click) => !click.goalId && viewerId && click.viewerId === viewerId) ??
      fresh.find((click) => sessionId && click.sessionId === sessionId && !click.viewerId);
    return cause ? { label: cause.label, ms: receivedAt - cause.at } : null;
  }
}
