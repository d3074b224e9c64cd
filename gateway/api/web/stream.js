// The connection of the page: an EventSource that is opened again after HTTP errors.
//
//   connecting -> live -> ended                       every task has ended
//                  |-> reconnecting -> live           the connection broke: EventSource reconnects
//                  |-> retrying -> connecting         EventSource stopped, as after every HTTP error: open a new one
//                  '-> refused                        the request is invalid: a retry would not help
//
// An EventSource cannot read the body of an error. When it has stopped, one request to the batch path with the same
// tasks returns either the error or their progress.

const FIRST_RETRY_MS = 1000;
const LONGEST_RETRY_MS = 30_000;
const QUERY_TIMEOUT_MS = 15_000;
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

  /** `handlers` has state(name, problem), progress(report), problem(problem with a taskId). */
  constructor(query, handlers) {
    this.#query = query;
    this.#handlers = handlers;
    addEventListener("online", () => this.#retry && this.#open(), { signal: this.#closed.signal });
    this.#watchdog = setInterval(() => this.#checkSilence(), SILENCE_MS / 6);
    this.#handlers.state("connecting");
    this.#open();
  }

  close() {
    this.#closed.abort();
    this.#source?.close();
    clearTimeout(this.#retry);
    clearInterval(this.#watchdog);
  }

  #open() {
    clearTimeout(this.#retry);
    this.#retry = 0;
    this.#source?.close();
    this.#lastEventAt = Date.now();
    const source = new EventSource(`v1/events?${this.#query}`);
    this.#source = source;
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
    this.#handlers.state("retrying");
    const { batch, problem } = await this.#queryBatch();
    if (this.#closed.signal.aborted) return;
    for (const item of batch?.items ?? []) {
      if (item.error) this.#handlers.problem({ taskId: item.taskId, ...item.error });
      else this.#handlers.progress(item);
    }
    if (batch?.summary.terminal) {
      this.#end();
    } else if (problem && problem.status >= 400 && problem.status < 500 && problem.status !== 429) {
      this.close();
      this.#handlers.state("refused", problem);
    } else {
      this.#handlers.state("retrying", problem);
      const longest = Math.min(FIRST_RETRY_MS * 2 ** this.#failures, LONGEST_RETRY_MS);
      this.#failures += 1;
      // Jitter: after a restart of the gateway the pages do not reconnect all at once.
      this.#retry = setTimeout(() => this.#open(), longest * (0.5 + Math.random() / 2));
    }
  }

  /** Return {batch} or {problem}; an empty object if there is no readable response. */
  async #queryBatch() {
    try {
      const signal = AbortSignal.any([this.#closed.signal, AbortSignal.timeout(QUERY_TIMEOUT_MS)]);
      const response = await fetch(`v1/progress?${this.#query}`, { signal, cache: "no-store" });
      const body = await response.json();
      return response.ok ? { batch: body } : { problem: { status: response.status, ...body } };
    } catch {
      return {}; // no connection, or a response from a proxy
    }
  }
}
