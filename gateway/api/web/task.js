// What the page knows of one task, and how it words it. card.js shows it.
//
// Three times are kept apart: `confirmedAt`, when the vendor last confirmed the state, `changedAt`, when the state last
// changed, and `firstSeen`, when this browser first received it. All are in seconds.

import { submittedAt } from "./ulid.js";
import { STATUS, TIME_LEFT_UNKNOWN, ago, clock, duration, percent, timeLeft, upperFirst } from "./words.js";

const STUCK_SECONDS = 120;
const MOST_POINTS = 240;
// The largest values that a gateway sends. One of an earlier version passes on whatever the vendor sends.
const LONGEST_ETA_SECONDS = 30 * 24 * 3600;
const LONGEST_QUEUE = 100_000_000;
// A vendor's refusal of the task itself, unlike an outage. Without an earlier response, the vendor does not know the ID.
const REJECTED = "upstream-rejected";
const GROUP = { failed: "problems", missing: "problems", problem: "problems", unknown: "running", loading: "waiting" };

export class Task {
  id;
  api;
  report = null; // the last progress received
  problem = null; // the current problem, if the last query failed
  stale = null; // {code, title} while an old state is shown because updates fail
  confirmedAt = null;
  changedAt = null;
  firstSeen = null;
  endedAt = null; // only if the page saw the end
  points = []; // [seconds, progress], or [seconds, tasks ahead, "queue"]
  #receivedAt = null;
  #eta = null; // at #receivedAt

  /** `remembered` has the fields that remember() returned, before the page was loaded again. */
  constructor(id, api, remembered) {
    this.id = id;
    this.api = api;
    Object.assign(this, remembered);
  }

  remember() {
    const { firstSeen, changedAt, endedAt, points } = this;
    return { firstSeen, changedAt, endedAt, points };
  }

  get look() {
    if (!this.problem) return this.report?.status ?? "loading";
    return this.problem.code === REJECTED && !this.report ? "missing" : "problem";
  }

  /** Return the group of the filters: problems, running, waiting, done or canceled. */
  get group() {
    if (this.stale) return "problems";
    return GROUP[this.look] ?? (this.look === "succeeded" ? "done" : this.look);
  }

  get ended() {
    return !this.problem && (this.report?.terminal ?? false);
  }

  get progress() {
    return this.report ? Math.min(Math.max(this.report.progress, 0), 1) : null;
  }

  onProgress(received, now) {
    const { report: before } = this;
    const report = plausible(received);
    this.firstSeen ??= now;
    if (!before || before.progress !== report.progress || before.status !== report.status
      || before.queueRemaining !== report.queueRemaining) {
      // The first response after a reload may repeat the remembered state.
      if (before || !this.changedAt || !this.#repeats(report)) this.changedAt = now;
    }
    if (report.terminal && before && !before.terminal) this.endedAt = now;
    this.report = report;
    this.problem = null;
    this.stale = null;
    this.confirmedAt = now;
    this.#receivedAt = now;
    this.#eta = report.etaSeconds;
    this.#record(report, now);
  }

  onProblem(problem) {
    this.problem = problem;
    this.stale = null;
    this.#eta = null;
  }

  /** `code` null: updates have resumed. */
  onStale({ code, title, ageSeconds }, now) {
    if (!this.report || this.report.terminal) return;
    this.#eta = code ? this.etaSeconds(now) : this.#eta;
    this.confirmedAt = now - (Number.isFinite(ageSeconds) ? ageSeconds : 0);
    this.#receivedAt = now;
    this.stale = code ? { code, title } : null;
  }

  /** The connection to the gateway vouches for the state until now. */
  confirm(now) {
    if (this.report && !this.stale && !this.problem && !this.ended) this.confirmedAt = now;
  }

  /** Return the time left, frozen while the state is not confirmed; null if unknown. */
  etaSeconds(now) {
    if (this.problem || this.ended || this.#eta == null) return null;
    const until = this.stale ? this.#receivedAt : Math.min(now, Math.max(this.confirmedAt, this.#receivedAt));
    return Math.max(this.#eta - (until - this.#receivedAt), 0);
  }

  /** Return the seconds without any change, if a running task seems stuck; otherwise null. */
  stuckSeconds(now) {
    if (this.look !== "running" || this.stale || !this.changedAt) return null;
    const seconds = now - this.changedAt;
    return seconds >= STUCK_SECONDS ? seconds : null;
  }

  /** Return when the task was submitted according to its ID, or null. */
  submittedAt(now) {
    return submittedAt(this.id, now);
  }

  /** Return the sentence about what comes next. `offline` is true while the gateway is not reachable. */
  outlook(now, { offline = false } = {}) {
    if (!this.report) return { loading: "Waiting for the first response", missing: "The vendor does not know this ID" }[this.look] ?? "No data for this task";
    const { status, queueRemaining } = this.report;
    const at = `${percent(this.progress)} %`;
    if (this.problem) return `Last known: ${STATUS[status].toLowerCase()} at ${at}`;
    // Without the time of the submission, only a part of the task was seen.
    const took = this.endedAt && this.submittedAt(now) && duration(this.endedAt - this.submittedAt(now));
    if (status === "succeeded") return took ? `Finished after ${took}` : "Finished";
    if (this.ended) return `${STATUS[status] ?? STATUS.unknown} at ${at}`;
    const eta = this.etaSeconds(now);
    const left = eta === null ? "" : timeLeft(eta);
    const place = this.place(queueRemaining);
    // The time of day is worth its space only if it is not near, and true only while updates arrive.
    const until = eta >= 60 && !this.stale && !offline ? `, until ${clock(now + eta)}` : "";
    return upperFirst([place, left && `${left}${until}`].filter(Boolean).join(", ") || TIME_LEFT_UNKNOWN);
  }

  place(queueRemaining) {
    if (queueRemaining === null || queueRemaining === undefined) return "";
    const longest = Math.max(...this.points.filter(([, , kind]) => kind).map(([, ahead]) => ahead));
    const was = longest > queueRemaining ? `, was ${longest}` : "";
    return queueRemaining === 0 ? "next in the queue" : `${queueRemaining} ahead in the queue${was}`;
  }

  /** Return why the state is old: "Last update 25 s ago: …", or "" if it is not. */
  overdue(now, { offline = false } = {}) {
    if (!this.report || this.report.terminal || this.problem || !(this.stale || offline)) return "";
    return `Last update ${ago(now - this.confirmedAt)}: ${offline ? "no connection to the gateway" : this.stale.title}`;
  }

  #repeats(report) {
    const last = this.points[this.points.length - 1];
    return last !== undefined && last[1] === (report.queueRemaining ?? round(report.progress));
  }

  #record(report, now) {
    const at = Math.round(now * 10) / 10;
    const queued = report.queueRemaining !== null && report.queueRemaining !== undefined;
    this.points.push(queued ? [at, report.queueRemaining, "queue"] : [at, round(this.progress)]);
    // When the list is full, every second point is dropped; the shape of the line stays.
    if (this.points.length > MOST_POINTS) {
      const last = this.points.length - 1;
      this.points = this.points.filter((_, index) => index % 2 === 0 || index === last);
    }
  }
}

/** Return the report with null in the place of numbers that cannot be true. */
function plausible(report) {
  const within = (value, largest) => (Number.isFinite(value) && value >= 0 && value <= largest ? value : null);
  return {
    ...report,
    progress: Number.isFinite(report.progress) ? report.progress : 0,
    etaSeconds: within(report.etaSeconds, LONGEST_ETA_SECONDS),
    queueRemaining: within(report.queueRemaining, LONGEST_QUEUE),
  };
}

function round(progress) {
  return Math.round(progress * 1000) / 1000;
}
