// The connection of the page: an EventSource that is opened again after HTTP errors, or else queries.
//
//   connecting -> live -> ended                       every task has ended
//                  |-> reconnecting -> live           the connection broke: EventSource reconnects
//                  |-> retrying -> connecting         EventSource stopped, as after every HTTP error: open a new one
//                  |-> polling -> ended               a proxy buffers the stream: no event, but queries succeed
//                  |-> checking -> connecting         other tabs use the connections, or this one is in the background
//                  '-> refused                        the request is invalid: a retry would not help
//
// An EventSource cannot read the body of an error. When it has stopped, one request to the batch path with the same
// tasks returns either the error or their progress.

import { PROBLEM_TITLE } from "./words.js";

const FIRST_RETRY_MS = 1000;
const LONGEST_RETRY_MS = 30_000;
const QUERY_TIMEOUT_MS = 15_000;
// A stream sends what the gateway knows of each task at once. If nothing arrives in this time, a query tells whether a
// proxy holds the stream back. GRACE_MS is for an event that arrives at the same time as the response.
const OPENING_MS = 5000;
const GRACE_MS = 1000;
const POLL_SECONDS = 25; // shorter than the read timeout of most proxies
const POLL_PAUSE_MS = 500;
const CHECK_MS = 5000; // between the queries of a tab without a stream
const HIDDEN_CHECK_MS = 15_000;
const UNKNOWN_TASK_MS = 30_000; // the default of watch.unknown_task_seconds: then a rejected task counts as ended
// EventSource hides heartbeats, because they are comments. A dead connection therefore looks like tasks that do not
// change. After this time without an event the connection is opened again.
const SILENCE_MS = 60_000;

export class Stream {
  #query;
  #handlers;
  #source = null;
  #failures = 0;
  #lastEventAt = 0;
  #closed = new AbortController(); // aborted by close(); ends listeners and requests
  #attempt = new AbortController(); // aborted when another way of connecting is chosen
  #retry = 0;
  #watchdog = 0;
  #opening = 0; // timer until the first event
  #buffered = false; // a proxy holds streams back
  #slow; // the tab has no stream
  #etag = "";
  #rejectedSince = new Map();
  #unended = []; // task IDs

  /**
   * `handlers` has state(name, problem), progress(report), problem(problem with a taskId), stale({taskId, stale, title,
   * ageSeconds}) and unchanged(). `slow`: begin without a stream.
   */
  constructor(query, handlers, { slow = false } = {}) {
    this.#query = query;
    this.#handlers = handlers;
    this.#slow = slow;
    addEventListener("online", () => this.#retry && this.again(), { signal: this.#closed.signal });
    this.#watchdog = setInterval(() => this.#checkSilence(), SILENCE_MS / 6);
    this.#handlers.state("connecting");
    this.#begin();
  }

  close() {
    this.#closed.abort();
    this.#attempt.abort();
    this.#source?.close();
    clearTimeout(this.#retry);
    clearTimeout(this.#opening);
    clearInterval(this.#watchdog);
  }

  /** Replace the stream by a query now and then, or open it again. */
  set slow(slow) {
    if (this.#closed.signal.aborted || slow === this.#slow) return;
    this.#slow = slow;
    this.#begin();
  }

  /** Query now, and connect again without waiting. */
  async again() {
    if (this.#closed.signal.aborted) return;
    if (this.#source?.readyState !== EventSource.OPEN) return this.#begin();
    const { batch } = await this.#queryBatch();
    if (!this.#closed.signal.aborted) this.#show(batch);
  }

  #begin() {
    this.#attempt.abort();
    this.#attempt = new AbortController();
    clearTimeout(this.#retry);
    clearTimeout(this.#opening);
    this.#retry = 0;
    this.#source?.close();
    this.#source = null;
    if (this.#slow || this.#buffered) {
      this.#etag = ""; // the first query does not wait
      this.#poll(this.#attempt.signal);
    } else {
      this.#open();
    }
  }

  #open() {
    this.#lastEventAt = Date.now();
    const source = new EventSource(`v1/events?${this.#query}`);
    this.#source = source;
    this.#opening = setTimeout(() => this.#checkOpening(source), OPENING_MS);
    source.addEventListener("open", () => this.#live());
    for (const kind of ["progress", "problem", "stale"]) {
      source.addEventListener(kind, (event) => this.#receive(kind, event));
    }
    source.addEventListener("end", () => this.#end());
    source.addEventListener("error", () => {
      if (source !== this.#source) return;
      if (source.readyState === EventSource.CONNECTING) this.#handlers.state("reconnecting");
      else this.#diagnose(this.#attempt.signal);
    });
  }

  #live() {
    this.#lastEventAt = Date.now();
    this.#handlers.state("live");
  }

  #receive(kind, event) {
    this.#lastEventAt = Date.now();
    clearTimeout(this.#opening);
    this.#opening = 0;
    this.#failures = 0;
    this.#handlers[kind](JSON.parse(event.data));
  }

  #end() {
    this.close();
    this.#handlers.state("ended");
  }

  #checkSilence() {
    if (this.#source?.readyState === EventSource.OPEN && Date.now() - this.#lastEventAt > SILENCE_MS) this.#begin();
  }

  async #diagnose(signal) {
    clearTimeout(this.#opening);
    this.#handlers.state("retrying");
    const { batch, problem } = await this.#queryBatch({ signal });
    if (signal.aborted) return;
    this.#show(batch);
    if (batch?.summary.terminal) this.#end();
    else if (isPermanent(problem)) this.#refuse(problem);
    else this.#retryLater(problem, () => this.#begin());
  }

  #show(batch) {
    for (const item of batch?.items ?? []) {
      const { taskId, api, stale, ageSeconds } = item;
      if (item.error) {
        this.#handlers.problem({ taskId, ...item.error });
        continue;
      }
      this.#handlers.progress(item);
      // A gateway of an earlier version sends no age.
      if (ageSeconds !== undefined) this.#handlers.stale({ taskId, api, stale: stale ?? null, ageSeconds, title: PROBLEM_TITLE[stale] ?? stale });
    }
  }

  #refuse(problem) {
    this.close();
    this.#handlers.state("refused", problem);
  }

  #retryLater(problem, retry) {
    this.#handlers.state("retrying", problem);
    const longest = Math.min(FIRST_RETRY_MS * 2 ** this.#failures, LONGEST_RETRY_MS);
    this.#failures += 1;
    // Jitter: after a restart of the gateway the pages do not reconnect all at once.
    this.#retry = setTimeout(retry, longest * (0.5 + Math.random() / 2));
  }

  /** Replace a stream without any event by long polls, if the gateway responds to a query. */
  async #checkOpening(source) {
    const { signal } = this.#attempt;
    const { batch } = await this.#queryBatch({ signal });
    if (batch) await pause(GRACE_MS, signal);
    // A closed source has failed, and its error is being handled.
    if (signal.aborted || source !== this.#source || !this.#opening) return;
    if (source.readyState === EventSource.CLOSED) return;
    if (batch) {
      this.#buffered = true;
      this.#begin();
    } else {
      this.#opening = setTimeout(() => this.#checkOpening(source), OPENING_MS);
    }
  }

  async #poll(signal) {
    for (;;) {
      const wait = this.#etag && !this.#slow ? POLL_SECONDS : 0;
      const { batch, unchanged, problem } = await this.#queryBatch({ wait, signal });
      if (signal.aborted) return;
      if (isPermanent(problem)) return this.#refuse(problem);
      if (!batch && !unchanged) return this.#retryLater(problem, () => this.#poll(signal));
      this.#failures = 0;
      this.#handlers.state(this.#slow ? "checking" : "polling");
      this.#show(batch);
      if (unchanged) this.#handlers.unchanged();
      if (this.#haveEnded(batch)) return this.#end();
      await pause(this.#slow ? (document.hidden ? HIDDEN_CHECK_MS : CHECK_MS) : POLL_PAUSE_MS, signal);
      if (signal.aborted) return;
    }
  }

  /** Return whether every task has ended, or has been rejected for too long. Without a batch nothing has changed. */
  #haveEnded(batch) {
    if (batch) {
      const rejected = batch.items.filter((item) => item.error?.code === "upstream-rejected");
      const known = this.#rejectedSince;
      this.#rejectedSince = new Map(rejected.map(({ taskId }) => [taskId, known.get(taskId) ?? Date.now()]));
      this.#unended = batch.items.filter((item) => !item.terminal).map((item) => item.taskId);
    }
    return this.#unended.every((taskId) => Date.now() - this.#rejectedSince.get(taskId) >= UNKNOWN_TASK_MS);
  }

  /** Return {batch}, {unchanged} or {problem}; an empty object if there is no readable response. */
  async #queryBatch({ wait = 0, signal = this.#closed.signal } = {}) {
    try {
      const timeout = AbortSignal.timeout(wait * 1000 + QUERY_TIMEOUT_MS);
      const headers = this.#etag ? { "If-None-Match": this.#etag } : {};
      const query = wait ? `${this.#query}&wait=${wait}` : this.#query;
      const response = await fetch(`v1/progress?${query}`, { signal: AbortSignal.any([signal, timeout]), headers, cache: "no-store" });
      if (response.status === 304) return { unchanged: true };
      const body = await response.json();
      if (!response.ok) return { problem: { status: response.status, ...body } };
      if (!Array.isArray(body.items)) return {};
      if (this.#slow || this.#buffered) this.#etag = response.headers.get("ETag") ?? "";
      return { batch: body };
    } catch {
      return {}; // no connection, or a response from a proxy
    }
  }
}

/** Wait; the end of `signal` is noticed by the caller. */
function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(done, ms);
    function done() {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    }
    signal.addEventListener("abort", done);
  });
}

function isPermanent(problem) {
  return Boolean(problem) && problem.status >= 400 && problem.status < 500 && problem.status !== 429;
}
