// The connection of the page: an EventSource that is opened again after HTTP errors, or else long polls.
//
//   connecting -> live -> ended                       every task has ended
//                  |-> reconnecting -> live           the connection broke: EventSource reconnects
//                  |-> retrying -> connecting         EventSource stopped, as after every HTTP error: open a new one
//                  |-> polling -> ended               a proxy buffers the stream: no event, but queries succeed
//                  '-> refused                        the request is invalid: a retry would not help
//
// An EventSource cannot read the body of an error. When it has stopped, one request to the batch path with the same
// tasks returns either the error or their progress.

const FIRST_RETRY_MS = 1000;
const LONGEST_RETRY_MS = 30_000;
const QUERY_TIMEOUT_MS = 15_000;
// A stream sends what the gateway knows of each task at once. If nothing arrives in this time, a query tells whether a
// proxy holds the stream back. GRACE_MS is for an event that arrives at the same time as the response.
const OPENING_MS = 5000;
const GRACE_MS = 1000;
const POLL_SECONDS = 25; // shorter than the read timeout of most proxies
const POLL_PAUSE_MS = 500;
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
  #retry = 0;
  #watchdog = 0;
  #opening = 0; // timer until the first event
  #polling = false;
  #etag = "";
  #rejectedSince = new Map();
  #unended = []; // task IDs

  /** `handlers` has state(name, problem), progress(report), problem(problem with a taskId). */
  constructor(query, handlers) {
    this.#query = query;
    this.#handlers = handlers;
    addEventListener("online", () => this.#retry && !this.#polling && this.#open(), { signal: this.#closed.signal });
    this.#watchdog = setInterval(() => this.#checkSilence(), SILENCE_MS / 6);
    this.#handlers.state("connecting");
    this.#open();
  }

  close() {
    this.#closed.abort();
    this.#source?.close();
    clearTimeout(this.#retry);
    clearTimeout(this.#opening);
    clearInterval(this.#watchdog);
  }

  #open() {
    clearTimeout(this.#retry);
    this.#retry = 0;
    this.#source?.close();
    this.#lastEventAt = Date.now();
    const source = new EventSource(`v1/events?${this.#query}`);
    this.#source = source;
    clearTimeout(this.#opening);
    this.#opening = setTimeout(() => this.#checkOpening(source), OPENING_MS);
    source.addEventListener("open", () => this.#live());
    source.addEventListener("progress", (event) => this.#receive("progress", event));
    source.addEventListener("problem", (event) => this.#receive("problem", event));
    source.addEventListener("end", () => this.#end());
    source.addEventListener("error", () => {
      if (source !== this.#source) return;
      if (source.readyState === EventSource.CONNECTING) this.#handlers.state("reconnecting");
      else this.#diagnose();
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
    if (this.#source?.readyState === EventSource.OPEN && Date.now() - this.#lastEventAt > SILENCE_MS) this.#open();
  }

  async #diagnose() {
    clearTimeout(this.#opening);
    this.#handlers.state("retrying");
    const { batch, problem } = await this.#queryBatch();
    if (this.#closed.signal.aborted) return;
    this.#show(batch);
    if (batch?.summary.terminal) this.#end();
    else if (isPermanent(problem)) this.#refuse(problem);
    else this.#retryLater(problem, () => this.#open());
  }

  #show(batch) {
    for (const item of batch?.items ?? []) {
      if (item.error) this.#handlers.problem({ taskId: item.taskId, ...item.error });
      else this.#handlers.progress(item);
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
    const { batch } = await this.#queryBatch();
    if (batch) await new Promise((resolve) => setTimeout(resolve, GRACE_MS));
    // A closed source has failed, and its error is being handled.
    if (this.#closed.signal.aborted || source !== this.#source || !this.#opening) return;
    if (source.readyState === EventSource.CLOSED) return;
    if (batch) {
      source.close();
      clearInterval(this.#watchdog);
      this.#polling = true;
      this.#etag = ""; // the first poll does not wait
      this.#poll();
    } else {
      this.#opening = setTimeout(() => this.#checkOpening(source), OPENING_MS);
    }
  }

  async #poll() {
    for (;;) {
      const { batch, unchanged, problem } = await this.#queryBatch({ wait: this.#etag ? POLL_SECONDS : 0 });
      if (this.#closed.signal.aborted) return;
      if (isPermanent(problem)) return this.#refuse(problem);
      if (!batch && !unchanged) return this.#retryLater(problem, () => this.#poll());
      this.#failures = 0;
      this.#handlers.state("polling");
      this.#show(batch);
      if (this.#haveEnded(batch)) return this.#end();
      await new Promise((resolve) => setTimeout(resolve, POLL_PAUSE_MS));
      if (this.#closed.signal.aborted) return;
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
  async #queryBatch({ wait = 0 } = {}) {
    try {
      const timeout = AbortSignal.timeout(wait * 1000 + QUERY_TIMEOUT_MS);
      const signal = AbortSignal.any([this.#closed.signal, timeout]);
      const headers = wait ? { "If-None-Match": this.#etag } : {};
      const query = wait ? `${this.#query}&wait=${wait}` : this.#query;
      const response = await fetch(`v1/progress?${query}`, { signal, headers, cache: "no-store" });
      if (response.status === 304) return { unchanged: true };
      const body = await response.json();
      if (!response.ok) return { problem: { status: response.status, ...body } };
      this.#etag = response.headers.get("ETag") ?? "";
      return { batch: body };
    } catch {
      return {}; // no connection, or a response from a proxy
    }
  }
}

function isPermanent(problem) {
  return Boolean(problem) && problem.status >= 400 && problem.status < 500 && problem.status !== 429;
}
