// The form: reads task IDs from what is pasted, shows the entries that are none, and offers the recent ones.

import { element, setText } from "./dom.js";
import { readIds } from "./ids.js";
import { clearRecent, recentTasks } from "./storage.js";
import { API } from "./words.js";

const MOST_SHOWN = 8; // recent tasks
const narrow = matchMedia("(max-width: 40rem)");
const at = (id) => document.getElementById(id);

export class TaskForm {
  #form = at("form");
  #field = at("task-ids");
  #panel = at("add");
  #watched = { taskIds: [], api: "sd" };

  /** `onAdd({taskIds, api, rejected})` receives what the user entered; `onDismiss(text)` a removed entry. */
  constructor({ onAdd, onDismiss }) {
    this.onAdd = onAdd;
    this.onDismiss = onDismiss;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.#field.addEventListener("keydown", (event) => {
      // While an input method composes a character, Enter belongs to it.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#form.requestSubmit();
    });
    this.#field.addEventListener("input", () => this.#showError(""));
    narrow.addEventListener("change", () => this.#unfold());
    at("recent-clear").addEventListener("click", () => {
      clearRecent();
      this.#showRecent();
      this.focus();
    });
  }

  focus() {
    this.#panel.open = true;
    this.#field.focus();
  }

  /** Adapt the form to the tasks that are watched. */
  show(watched) {
    const began = this.#watched.taskIds.length === 0;
    this.#watched = watched;
    if (watched.api in API) this.#form.elements.api.value = watched.api;
    if (began || watched.taskIds.length === 0) this.#unfold();
    this.#showRecent();
  }

  /** Show the entries that are no task IDs, how many tasks are beyond the limit, and a note. */
  showRejected(rejected, { beyond, limit, note }) {
    const words = [
      note,
      beyond ? `Only the first ${limit} of ${limit + beyond} tasks are watched. The others follow when you remove some.` : "",
      rejected.length === 1 ? "One entry is not a task ID:" : rejected.length ? `${rejected.length} entries are not task IDs:` : "",
    ];
    at("rejected").hidden = !words.some(Boolean);
    setText(at("rejected-words"), words.filter(Boolean).join(" "));
    at("rejected-list").replaceChildren(...rejected.map(({ text, reason }) => {
      const short = text.length > 40 ? `${text.slice(0, 39)}…` : text;
      const dismiss = element("button", { type: "button", "aria-label": `Dismiss ${short}`, title: "Dismiss" }, "×");
      dismiss.addEventListener("click", () => this.onDismiss(text));
      return element("li", { class: "chip" }, element("bdi", { title: text }, short), element("span", { class: "reason" }, reason), dismiss);
    }));
  }

  #submit() {
    const found = readIds(this.#field.value);
    if (found.taskIds.length === 0 && found.rejected.length === 0) {
      this.#showError(this.#field.value.trim() ? "There is no task ID in this text." : "Enter or paste at least one task ID.");
      this.#field.focus();
      return;
    }
    this.#showError("");
    this.#field.value = "";
    this.onAdd({ ...found, api: found.api ?? this.#form.elements.api.value });
    if (narrow.matches && found.taskIds.length) {
      this.#panel.open = false;
      at("tasks").focus();
    }
  }

  #showError(text) {
    at("task-ids-error").hidden = !text;
    setText(at("task-ids-error"), text);
    if (text) this.#field.setAttribute("aria-invalid", "true");
    else this.#field.removeAttribute("aria-invalid");
  }

  /** On a phone, the form makes room for the tasks. */
  #unfold() {
    this.#panel.open = !narrow.matches || this.#watched.taskIds.length === 0;
  }

  #showRecent() {
    const { taskIds, api } = this.#watched;
    const others = recentTasks().filter((one) => one.api !== api || !taskIds.includes(one.id)).slice(0, MOST_SHOWN);
    at("recent").hidden = others.length === 0;
    at("recent-list").replaceChildren(...others.map((one) => {
      const button = element("button", { type: "button", class: "chip", title: `Watch ${one.id} (${API[one.api]})` }, one.id);
      button.addEventListener("click", () => this.onAdd({ taskIds: [one.id], api: one.api, rejected: [] }));
      return element("li", {}, button);
    }));
  }
}
