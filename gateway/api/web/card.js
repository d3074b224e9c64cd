// The card of one task: the elements that show a Task.

import { copyButton } from "./copy.js";
import { describeProblem, element, setBar, setText, timeElement } from "./dom.js";
import { Gallery } from "./images.js";
import { Plot } from "./plot.js";
import { API, STATUS, ago, duration, percent } from "./words.js";

const LONG_TEXT = 200; // characters; a longer message is shown in part
const template = document.getElementById("card");

export class TaskCard {
  task;
  node;
  #parts = {};
  #plot;
  #gallery;
  #clocks = {};

  constructor(task, { onRemove, onTryOther }) {
    this.task = task;
    this.node = template.content.firstElementChild.cloneNode(true);
    for (const part of this.node.querySelectorAll("[data-part]")) this.#parts[part.dataset.part] = part;
    const { id, bar, remove, plot, span, other, images } = this.#parts;
    setText(id, task.id);
    id.title = task.id;
    bar.setAttribute("aria-label", `Progress of ${task.id}`);
    remove.setAttribute("aria-label", `Stop watching ${task.id}`);
    remove.title = "Stop watching";
    remove.addEventListener("click", () => onRemove(task.id));
    setText(other, `Try as ${API[otherApi(task.api)]}`);
    other.addEventListener("click", () => onTryOther(task.id, otherApi(task.api)));
    for (const name of ["updated", "changed", "submitted", "seen"]) this.#clocks[name] = timeElement(this.#parts[name]);
    this.#plot = new Plot(plot, span);
    this.#gallery = new Gallery(images, task.id, task.api);
    this.#parts.more.addEventListener("toggle", () => this.#fillMore());
  }

  focusRemove() {
    this.#parts.remove.focus();
  }

  close() {
    this.#gallery.close();
    this.node.remove();
  }

  /** Show the state of the task. `view` has `offline` and `axis`, the edges of the plots. */
  render(now, view) {
    const { task } = this;
    const { status, percent: number, bar, problem, details, other, more } = this.#parts;
    const whole = task.report ? percent(task.progress) : null;
    this.node.dataset.look = task.look;
    this.node.querySelector(".status use").setAttribute("href", `#icon-${task.look in STATUS ? task.look : "unknown"}`);
    setText(status, STATUS[task.look] ?? STATUS.unknown);
    setText(number, whole === null ? "–" : `${whole} %`);
    setBar(bar, whole, `${whole === null ? "unknown" : `${whole} %`}, ${STATUS[task.look] ?? STATUS.unknown}`);
    details.replaceChildren(...this.#details());
    problem.hidden = !task.problem;
    problem.classList.toggle("missing", task.look === "missing");
    problem.replaceChildren(...(task.problem ? this.#describeProblem() : []));
    other.hidden = task.look !== "missing";
    if (task.look === "succeeded") this.#gallery.want();
    if (more.open) this.#fillMore();
    this.tick(now, view);
  }

  /** Update the parts that change with time. */
  tick(now, { offline, axis }) {
    const { task } = this;
    const { outlook, overdue } = this.#parts;
    const late = task.overdue(now, { offline });
    this.node.classList.toggle("overdue", late !== "");
    setText(overdue, late);
    setText(outlook, task.outlook(now, { offline }));
    this.#clock("updated", late || !task.report || task.ended ? null : task.confirmedAt, (at) => `Updated ${ago(now - at)}`);
    const stuck = task.stuckSeconds(now);
    this.#clock("changed", stuck === null || late ? null : task.changedAt, () => `No progress for ${duration(stuck)}`);
    const submitted = task.submittedAt(now);
    this.#clock("submitted", submitted, (at) => `Submitted ${ago(now - at)}`);
    this.#clock("seen", task.firstSeen, (at) => `First seen ${ago(now - at)}`);
    this.#plot.draw(task.points, axis, task.ended);
    this.#gallery.tick(now);
  }

  #clock(name, at, text) {
    this.#clocks[name](at, at === null ? "" : text(at));
  }

  #describeProblem() {
    const { task } = this;
    if (task.look !== "missing") return describeProblem(task.problem);
    const { title, detail, ...rest } = task.problem;
    return describeProblem({
      ...rest,
      title: "Not found: the vendor does not know this ID",
      detail: "A new task can take some seconds to appear. Check the ID, and the API that the task was submitted to.",
    });
  }

  #details() {
    const { message, state } = this.task.report ?? {};
    const { job, job_no: number, job_count: many, sampling_step: step, sampling_steps: steps } = state ?? {};
    const known = [
      ["Sampling", Number.isFinite(step) ? `step ${step}${steps > 0 ? ` of ${steps}` : ""}` : ""],
      ["Message", message],
      ["Job", job && many > 1 ? `${job} (${number + 1} of ${many})` : job],
    ];
    return known
      .filter(([, value]) => typeof value === "string" && value !== "")
      // The vendor's message often repeats its state.
      .filter(([, value], index, all) => all.findIndex(([, other]) => other === value) === index)
      .map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", { dir: "auto" }, this.#clamped(name, value))));
  }

  #unclamped = new Set();

  /** Return a text, or the beginning of a long one with a button that shows it all. */
  #clamped(name, text) {
    if (text.length <= LONG_TEXT || this.#unclamped.has(name)) return text;
    const all = element("button", { type: "button", class: "quiet" }, "Show all");
    const shown = element("span", {}, element("span", { class: "clamp" }, text), all);
    all.addEventListener("click", () => {
      this.#unclamped.add(name);
      shown.replaceChildren(text);
    });
    return shown;
  }

  #fillMore() {
    const { task } = this;
    const address = (path) => new URL(path, document.baseURI).href;
    const id = encodeURIComponent(task.id);
    const texts = [
      ["task ID", task.id],
      ["link", address(`./?taskId=${id}&api=${task.api}`)],
      ["curl", `curl '${address(`v1/progress/${id}?api=${task.api}`)}'`],
      ["request ID", task.problem?.requestId],
      ["invoke ID", task.problem?.upstream?.invokeId],
    ].filter(([, text]) => text);
    const shown = texts.map(([, text]) => text).join("\n");
    const list = this.#parts.copies;
    if (list.dataset.shown === shown) return; // a button keeps its focus
    list.dataset.shown = shown;
    list.replaceChildren(...texts.map(([name, text]) => element("div", {},
      element("dt", {}, name.charAt(0).toUpperCase() + name.slice(1)),
      element("dd", {}, element("code", {}, text), copyButton(name, () => text)))));
  }
}

function otherApi(api) {
  return api === "sd" ? "comfy" : "sd";
}
