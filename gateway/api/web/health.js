// Reads /readyz, which says what the gateway itself knows of its troubles: its credentials, the upstream, the store.

import { NO_CREDENTIALS, UPSTREAM_PROBLEM, upperFirst } from "./words.js";

const PERIOD_MS = 30_000;
const TROUBLED_PERIOD_MS = 2000; // the end of a trouble is shown soon

export class Health {
  #onTroubles;
  #timer = 0;
  #watching = false;
  #asking = false;

  /** `onTroubles` receives a list of sentences, empty if all is well. */
  constructor(onTroubles) {
    this.#onTroubles = onTroubles;
    document.addEventListener("visibilitychange", () => this.#watching && !document.hidden && this.check());
  }

  /** Check now and then, or no longer. */
  watch(watching) {
    if (watching === this.#watching) return;
    this.#watching = watching;
    if (watching) this.check();
    else clearTimeout(this.#timer);
  }

  async check() {
    if (this.#asking) return;
    this.#asking = true;
    clearTimeout(this.#timer);
    const troubles = await read();
    this.#asking = false;
    this.#onTroubles(troubles);
    if (!this.#watching || document.hidden) return;
    this.#timer = setTimeout(() => this.check(), troubles.length ? TROUBLED_PERIOD_MS : PERIOD_MS);
  }
}

async function read() {
  try {
    const response = await fetch("readyz", { cache: "no-store", signal: AbortSignal.timeout(10_000) });
    const { reasons = [], degraded = [] } = await response.json();
    return [...new Set([...reasons, ...degraded].map(sentence))];
  } catch {
    return []; // the state of the connection is shown elsewhere
  }
}

function sentence(trouble) {
  if (trouble === "no credentials") return NO_CREDENTIALS;
  if (trouble === "draining") return "The gateway is shutting down";
  const [, code, cause = ""] = /^upstream: ([^\s:]+)(: .*)?$/.exec(trouble) ?? [];
  return code in UPSTREAM_PROBLEM ? UPSTREAM_PROBLEM[code] + cause : upperFirst(trouble);
}
