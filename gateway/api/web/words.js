// Display texts for statuses, numbers, durations and times. No function throws: for a number that it cannot show, such
// as one from a damaged session, it returns "".

export const STATUS = {
  loading: "Loading",
  waiting: "Waiting",
  running: "Running",
  succeeded: "Succeeded",
  failed: "Failed",
  canceled: "Canceled",
  unknown: "Unknown",
  missing: "Not found",
  problem: "Error",
};

export const API = { sd: "Stable Diffusion", comfy: "ComfyUI" };

// The titles of the problems that make an update overdue, for responses that have only the code. A test compares them.
export const PROBLEM_TITLE = {
  "upstream-rejected": "The upstream rejected the query",
  "upstream-credentials": "The upstream did not authorize the query",
  "upstream-invalid": "Invalid response from the upstream",
  "upstream-unreachable": "Upstream unreachable",
  "upstream-throttled": "Rate limit for upstream calls reached",
  "upstream-open": "Circuit breaker open: the upstream has been failing",
  "upstream-timeout": "Upstream timeout",
  overloaded: "Gateway overloaded",
  internal: "Internal error",
};

/** Return a sentence for an entry of `reasons` or `degraded` in /readyz, as `sd-gateway watch` does. */
export function troubleText(trouble) {
  if (trouble === "no credentials") return "The gateway has no credentials";
  if (trouble === "draining") return "The gateway is shutting down";
  const [, part, rest] = /^(upstream|store): (.*)$/.exec(trouble) ?? [];
  if (part === "store") return `Tasks are updated without the shared store: ${rest}`;
  if (!part) return upperFirst(trouble);
  const [code, ...cause] = rest.split(": ");
  return [PROBLEM_TITLE[code] ?? code, ...cause].join(": ");
}

/** Return whole percent, rounded down, so 100 % appears only at the end. */
export function percent(progress) {
  return Math.floor(Math.min(Math.max(progress, 0), 1) * 100 + 1e-6);
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "";
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  // From five minutes on, seconds are left out.
  if (whole < 300) return whole % 60 ? `${Math.floor(whole / 60)} min ${whole % 60} s` : `${whole / 60} min`;
  const minutes = Math.round(whole / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  return `${Math.round(hours / 24)} days`;
}

export function ago(seconds) {
  return seconds < 1 ? "just now" : `${duration(Math.floor(seconds))} ago`;
}

export const TIME_LEFT_UNKNOWN = "time left unknown";

export function timeLeft(seconds) {
  return seconds < 1 ? shortTimeLeft(seconds) : `about ${shortTimeLeft(seconds)}`;
}

/** Return the text of `timeLeft` without "about", for the title of the tab. */
export function shortTimeLeft(seconds) {
  return seconds < 1 ? "any moment now" : `${duration(seconds)} left`;
}

const CLOCK = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
const DATE = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

/** Return the time of day, such as 14:32. */
export function clock(seconds) {
  return isTime(seconds) ? CLOCK.format(seconds * 1000) : "";
}

/** Return date and time. */
export function absolute(seconds) {
  return isTime(seconds) ? DATE.format(seconds * 1000) : "";
}

/** Return whether a Date can represent the time. All functions for dates throw an error for any other number. */
export function isTime(seconds) {
  return Math.abs(seconds) <= 8.64e12;
}

export function upperFirst(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
