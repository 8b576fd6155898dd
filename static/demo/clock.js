// The gateway's clock, as far as this page knows it.
//
// Deadlines are instants of the gateway. A phone's clock may be minutes away from it, so each
// goal.snapshot, which says when it was made, corrects the difference.

let ahead_ms = 0;

/** Epoch milliseconds on the gateway's clock. */
export function gatewayNow() {
  return Date.now() + ahead_ms;
}

/** Learns the difference from an instant that the gateway has just sent. */
export function setGatewayClock(now_ms) {
  ahead_ms = now_ms - Date.now();
}
