// Announces changes to screen readers: short, and at most once in five seconds.

const FIRST_MS = 1000;
const PAUSE_MS = 5000;

export class Announcer {
  #log;
  #summary;
  #pending = [];
  #timer = 0;

  /** `summary()` returns the text that replaces the details of many changes. */
  constructor(log, summary) {
    this.#log = log;
    this.#summary = summary;
  }

  say(text) {
    this.#pending.push(text);
    this.#timer ||= setTimeout(() => this.#flush(), FIRST_MS);
  }

  #flush() {
    const many = this.#pending.length;
    const text = many > 3 ? `${many} changes. ${this.#summary()}` : this.#pending.join(". ");
    if (text) {
      const line = document.createElement("span");
      line.textContent = `${text}. `;
      this.#log.replaceChildren(line);
    }
    this.#timer = text ? setTimeout(() => this.#flush(), PAUSE_MS) : 0;
    this.#pending = [];
  }
}
