// Money, spans of time and instants, for people.

/** 2500 -> "25.00". Money is an integer in minor units; the string is only for reading. */
export function money(amount_minor) {
  const sign = amount_minor < 0 ? "−" : "";
  const digits = String(Math.abs(amount_minor)).padStart(3, "0");
  const whole = digits.slice(0, -2).replace(/\B(?=(\d{3})+$)/g, ",");
  return `${sign}${whole}.${digits.slice(-2)}`;
}

/** "25", "25.5", "-3.00" -> 2500, 2550, -300; null if it is no such number. */
export function parseMoney(text) {
  const match = /^\s*(-?)(\d{1,12})(?:[.,](\d{1,2}))?\s*$/.exec(text);
  if (match === null) return null;
  const [, sign, whole, fraction = ""] = match;
  const amount_minor = Number(whole) * 100 + Number(fraction.padEnd(2, "0"));
  return sign === "-" ? -amount_minor : amount_minor;
}

/** 90 -> "1 min 30 s". */
export function span(seconds) {
  const minutes = Math.floor(seconds / 60);
  const rest = Math.round(seconds % 60);
  if (minutes === 0) return `${rest} s`;
  return rest === 0 ? `${minutes} min` : `${minutes} min ${rest} s`;
}

/** 65_400 -> "1:06": counts down to 0:00 and not to 0:01. */
export function countdown(left_ms) {
  const seconds = Math.max(0, Math.ceil(left_ms / 1000));
  const hours = Math.floor(seconds / 3600);
  const minutes = Math.floor((seconds % 3600) / 60);
  const rest = String(seconds % 60).padStart(2, "0");
  return hours === 0 ? `${minutes}:${rest}` : `${hours}:${String(minutes).padStart(2, "0")}:${rest}`;
}

/** 4.23 -> "4.2 ms", 1840 -> "1.84 s". */
export function latency(ms) {
  const positive = Math.max(0, ms);
  if (positive < 10) return `${positive.toFixed(1)} ms`;
  if (positive < 1000) return `${Math.round(positive)} ms`;
  return `${(positive / 1000).toFixed(2)} s`;
}

/** The wall clock's time of day with milliseconds. */
export function timeOfDay(date) {
  const part = (value, length = 2) => String(value).padStart(length, "0");
  return `${part(date.getHours())}:${part(date.getMinutes())}:${part(date.getSeconds())}.${part(date.getMilliseconds(), 3)}`;
}

/** An instant of the gateway as epoch milliseconds: RFC 3339 text, or epoch seconds. */
export function instant_ms(value) {
  if (typeof value === "number") return value * 1000;
  if (typeof value !== "string") return null;
  const parsed = Date.parse(value);
  return Number.isNaN(parsed) ? null : parsed;
}
