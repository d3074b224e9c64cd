// Reads /readyz, which says what the gateway itself knows of its troubles: its credentials, the upstream, the store.

import { troubleText } from "./words.js";

const PERIOD_MS = 2000; // no event of a stream tells that the store is lost
const TROUBLED_PERIOD_MS = 1000; // the end of a trouble is shown soon

export class Health {
  #onTroubles;
  #timer = 0;
  #watching = false;
  #asking = false;

  /** `onTroubles` receives a list of {text, upstream}, empty if all is well. */
  constructor(onTroubles) {
    this.#onTroubles = onTroubles;
    document.addEventListener("visibilitychange", () => this.#watching && !document.hidden && this.check());
  }

  /** Check now and then, or no longer. */
  watch(watching) {
    if (watching === this.#watching) return;
    this.#watching = watching;
    if (watching) {
      this.check();
    } else {
      clearTimeout(this.#timer);
      this.#onTroubles([]);
    }
  }

  async check() {
    if (this.#asking) return;
    this.#asking = true;
    clearTimeout(this.#timer);
    const troubles = await read();
    this.#asking = false;
    if (!this.#watching) return;
    this.#onTroubles(troubles);
    if (!document.hidden) this.#timer = setTimeout(() => this.check(), troubles.length ? TROUBLED_PERIOD_MS : PERIOD_MS);
  }
}

async function read() {
  try {
    const response = await fetch("readyz", { cache: "no-store", signal: AbortSignal.timeout(10_000) });
    const { reasons = [], degraded = [] } = await response.json();
    return [...reasons, ...degraded].map((trouble) => ({ text: troubleText(trouble), upstream: trouble.startsWith("upstream: ") }));
  } catch {
    return []; // the state of the connection is shown elsewhere
  }
}
