// Shares the connections of a browser between the tabs of this origin.
//
// Over HTTP/1.1 a browser opens at most six connections to an origin, for all tabs together. A stream occupies one. With
// six streams every further request waits for ever, even that for the page. So at most MOST_STREAMS tabs have a stream:
// those that were used last. The others query now and then.
//
// Each tab announces when it is used. A tab that has heard MOST_STREAMS others since its own use lets go of its stream.
// A tab in the background lets go after a few seconds.

const MOST_STREAMS = 4;
const HIDDEN_MS = 5000; // a short look at another tab does not close the stream

export class Slot {
  #channel = "BroadcastChannel" in window ? new BroadcastChannel("sd-gateway:streams") : null;
  #me = `${Date.now()}-${Math.random()}`;
  #others = new Set(); // tabs that were used after this one
  #hidden = 0; // timer
  #onChange;

  held = false;

  /** `onChange` is called when `held` has changed. */
  constructor(onChange) {
    this.#onChange = onChange;
    this.#channel?.addEventListener("message", ({ data }) => this.#hear(data));
    document.addEventListener("visibilitychange", () => this.#look());
    for (const use of ["focus", "pointerdown", "keydown"]) addEventListener(use, () => this.#take(), { capture: true });
    this.#look({ atStart: true });
  }

  #look({ atStart = false } = {}) {
    clearTimeout(this.#hidden);
    if (!document.hidden) this.#take();
    else if (!atStart) this.#hidden = setTimeout(() => this.#set(false), HIDDEN_MS);
  }

  #take() {
    if (document.hidden || (this.held && this.#others.size === 0)) return;
    this.#others.clear();
    this.#channel?.postMessage({ used: this.#me });
    this.#set(true);
  }

  #hear({ used }) {
    this.#others.add(used);
    if (this.#others.size >= MOST_STREAMS) this.#set(false);
  }

  #set(held) {
    if (this.held === held) return;
    this.held = held;
    this.#onChange();
  }
}
