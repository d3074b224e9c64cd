// Display texts for statuses, numbers and durations.

export const STATUS = {
  loading: "Loading",
  waiting: "Waiting",
  running: "Running",
  succeeded: "Succeeded",
  failed: "Failed",
  canceled: "Canceled",
  unknown: "Unknown",
  problem: "Error",
};

/** Return whole percent, rounded down, so 100 % appears only at the end. */
export function percent(progress) {
  return Math.floor(Math.min(Math.max(progress, 0), 1) * 100 + 1e-6);
}

export function duration(seconds) {
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
  return seconds < 1 ? "any moment now" : `about ${duration(seconds)} left`;
}
