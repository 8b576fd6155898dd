// How long a frame took to a socket, and since what: a click in this page, or a deadline.

import { gatewayNow } from "./clock.js";
import { instant_ms } from "./format.js";

const TIMER_MAX_AGE_MS = 10_000; // what comes later after a deadline was not caused by it
const CLOCKS_DIFFER_MS = 50; // a push may seem to come a little before its cause

/**
 * The delay of a frame as `{ms, from}`, or null when nothing is known to have caused it.
 *
 * @param {object} frame as PusherClient dispatches it
 * @param {import("./panel.js").Panel} panel whose socket received it, not yet told of it
 */
export function delayOf({ event, data, receivedAt }, { client, board, causes, user }) {
  if (event === "goal.reply") {
    const sentAt = client.sentAt(data?.request_id);
    return sentAt === null ? null : { ms: receivedAt - sentAt, from: "the command" };
  }
  if (event === "goal.snapshot") return since(instant_ms(data.as_of), Date.now(), "its as_of");
  if (data?.event_id === undefined) return null;
  const goalId = data.goal_id ?? data.id ?? board.goalOf(data.session_id, data.viewer_id)?.id;
  const goal = board.goal(goalId);
  const cause = causes.of({
    goalId,
    sessionId: data.session_id ?? data.conditions?.session_id ?? goal?.sessionId,
    viewerId: invitedBy(event, data, user),
    receivedAt,
  });
  if (cause !== null) return { ms: cause.ms, from: `“${cause.label}”` };
  const deadlines = [goal && board.deadline(goal)?.at, goal?.expiresAt, instant_ms(data.exp)];
  const now_ms = gatewayNow();
  const passed = deadlines.filter((at) => at && at <= now_ms + CLOCKS_DIFFER_MS);
  return since(Math.max(...passed), now_ms, "the deadline");
}

/** Whose invitation a push tells of: it can have no goal that a click already named. */
function invitedBy(event, data, user) {
  if (event === "goal.added") return data.context?.exclusive_to;
  return event === "escrow.held" ? user.id : undefined;
}

function since(then_ms, now_ms, from) {
  const ms = now_ms - then_ms;
  return Number.isFinite(ms) && ms >= -CLOCKS_DIFFER_MS && ms < TIMER_MAX_AGE_MS ? { ms, from } : null;
}
