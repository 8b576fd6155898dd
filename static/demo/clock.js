// The gateway's clock, as far as this page knows it.
//
// Deadlines are instants of the gateway. A phone's clock may be minutes away from it, so what the
// gateway says of its own corrects the difference. What it says comes late and never early: of
// several differences the greatest is nearest to the truth.

const CLOCK_WAS_SET_MS = 2_000; // no frame is that late: one of the clocks was set meanwhile

let ahead_ms = null;

/** Epoch milliseconds on the gateway's clock. */
export function gatewayNow() {
  return Date.now() + (ahead_ms ?? 0);
}

/** Learns the difference from the instant at which the gateway made what has just come. */
export function setGatewayClock(now_ms) {
  const least_ms = now_ms - Date.now();
  if (ahead_ms === null || ahead_ms - least_ms > CLOCK_WAS_SET_MS) ahead_ms = least_ms;
  else ahead_ms = Math.max(ahead_ms, least_ms);
}

/** Learns that an instant, maybe of long ago, has passed at the gateway. */
export function gatewayHasPassed(instant_ms) {
  ahead_ms = Math.max(ahead_ms ?? -Infinity, instant_ms - Date.now());
}
