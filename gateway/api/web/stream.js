// The one connection of the page: an EventSource that never gives up without a reason.
//
//   connecting -> live -> ended                       every task is over
//                  |-> reconnecting -> live           the connection dropped: EventSource comes back by itself
//                  |-> retrying -> connecting         EventSource gave up (it does on any HTTP error): we begin anew
//                  '-> refused                        the request itself is wrong: asking again is useless
//
// An EventSource cannot read an error's body. When it has given up, one ordinary request for the
// same tasks finds out why, or finds their progress.

const FIRST_RETRY_MS = 1000;
const LONGEST_RETRY_MS = 30_000;
const ASK_MS = 15_000;
// Heartbeats are comments, which EventSource hides. A connection that has died without a word looks
// just like tasks that do not change, so after so long a silence it is made anew.
const SILENCE_MS = 60_000;

export class Stream {
  #query;
  #hear;
  #source = null;
  #failures = 0;
  #heard = 0;
  #over = new AbortController(); // aborted by close(): of listeners, requests and timers
  #retry = 0;
  #watchdog = 0;

  /** `hear` has state(name, problem), progress(report), problem(problem with a taskId). */
  constructor(query, hear) {
    this.#query = query;
    this.#hear = hear;
    addEventListener("online", () => this.#retry && this.#open(), { signal: this.#over.signal });
    this.#watchdog = setInterval(() => this.#mindSilence(), SILENCE_MS / 6);
    this.#hear.state("connecting");
    this.#open();
  }

  close() {
    this.#over.abort();
    this.#source?.close();
    clearTimeout(this.#retry);
    clearInterval(this.#watchdog);
  }

  #open() {
    clearTimeout(this.#retry);
    this.#retry = 0;
    this.#source?.close();
    this.#heard = Date.now();
    const source = new EventSource(`v1/events?${this.#query}`);
    this.#source = source;
    source.addEventListener("open", () => this.#live());
    source.addEventListener("progress", (event) => this.#told("progress", event));
    source.addEventListener("problem", (event) => this.#told("problem", event));
    source.addEventListener("end", () => this.#end());
    source.addEventListener("error", () => {
      if (source !== this.#source) return;
      if (source.readyState === EventSource.CONNECTING) this.#hear.state("reconnecting");
      else this.#askWhy();
    });
  }

  #live() {
    this.#heard = Date.now();
    this.#hear.state("live");
  }

  #told(kind, event) {
    this.#heard = Date.now();
    this.#failures = 0;
    this.#hear[kind](JSON.parse(event.data));
  }

  #end() {
    this.close();
    this.#hear.state("ended");
  }

  #mindSilence() {
    if (this.#source?.readyState === EventSource.OPEN && Date.now() - this.#heard > SILENCE_MS) this.#open();
  }

  async #askWhy() {
    this.#hear.state("retrying");
    const { batch, problem } = await this.#ask();
    if (this.#over.signal.aborted) return;
    for (const item of batch?.items ?? []) {
      if (item.error) this.#hear.problem({ taskId: item.taskId, ...item.error });
      else this.#hear.progress(item);
    }
    if (batch?.summary.terminal) {
      this.#end();
    } else if (problem && problem.status >= 400 && problem.status < 500 && problem.status !== 429) {
      this.close();
      this.#hear.state("refused", problem);
    } else {
      this.#hear.state("retrying", problem);
      const longest = Math.min(FIRST_RETRY_MS * 2 ** this.#failures, LONGEST_RETRY_MS);
      this.#failures += 1;
      // By chance, so that a restarted gateway does not meet all its pages at once.
      this.#retry = setTimeout(() => this.#open(), longest * (0.5 + Math.random() / 2));
    }
  }

  /** Return {batch}, {problem}, or nothing when there was no answer that can be read. */
  async #ask() {
    try {
      const signal = AbortSignal.any([this.#over.signal, AbortSignal.timeout(ASK_MS)]);
      const answer = await fetch(`v1/progress?${this.#query}`, { signal, cache: "no-store" });
      const body = await answer.json();
      return answer.ok ? { batch: body } : { problem: { status: answer.status, ...body } };
    } catch {
      return {}; // no connection, or some proxy's page in place of an answer
    }
  }
}
