// How numbers and statuses are said to people.

export const STATUS = {
  asking: "Asking",
  waiting: "Waiting",
  running: "Running",
  succeeded: "Succeeded",
  failed: "Failed",
  canceled: "Canceled",
  unknown: "Unknown",
  problem: "No answer",
};

/** Whole percent, never above 100, and never 100 before it is reached. */
export function percent(progress) {
  return Math.floor(Math.min(Math.max(progress, 0), 1) * 100 + 1e-6);
}

export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  // Beyond a few minutes nobody wants the seconds.
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

export function timeLeft(seconds) {
  return seconds < 1 ? "any moment now" : `about ${duration(seconds)} left`;
}
