// A card: all that is shown of one task.

import { element, fill, problemWords, say } from "./dom.js";
import { Plot } from "./plot.js";
import { STATUS, ago, percent, timeLeft } from "./words.js";

const template = document.getElementById("card");

export class TaskCard {
  taskId;
  node;
  report = null; // the last progress heard
  problem = null; // what stands in the way of a newer one
  #heard = null; // when, in seconds
  #parts = {};
  #plot;

  constructor(taskId, { onRemove }) {
    this.taskId = taskId;
    this.node = template.content.firstElementChild.cloneNode(true);
    for (const part of this.node.querySelectorAll("[data-part]")) this.#parts[part.dataset.part] = part;
    const { id, bar, remove, plot, span } = this.#parts;
    say(id, taskId);
    bar.setAttribute("aria-label", `Progress of ${taskId}`);
    remove.setAttribute("aria-label", `Stop watching ${taskId}`);
    remove.title = "Stop watching";
    remove.addEventListener("click", () => onRemove(taskId));
    this.#plot = new Plot(plot, span);
    this.#render(seconds());
  }

  get look() {
    return this.problem ? "problem" : this.report?.status ?? "asking";
  }

  get ended() {
    return this.report?.terminal ?? false;
  }

  get etaSeconds() {
    if (this.problem || this.ended || this.report?.etaSeconds == null) return null;
    return Math.max(this.report.etaSeconds - (seconds() - this.#heard), 0);
  }

  hearProgress(report) {
    this.report = report;
    this.problem = null;
    this.#heard = seconds();
    this.#plot.add(this.#heard, Math.min(Math.max(report.progress, 0), 1), report.terminal);
    this.#render(this.#heard);
  }

  hearProblem(problem) {
    this.problem = problem;
    this.#heard = seconds();
    this.#render(this.#heard);
  }

  focusRemove() {
    this.#parts.remove.focus();
  }

  /** Renew what changes with time alone. */
  tick(now = seconds()) {
    say(this.#parts.heard, this.#heard === null ? "" : ago(now - this.#heard));
    say(this.#parts.outlook, this.#outlook());
    this.#plot.draw(now);
  }

  #render(now) {
    const { status, percent: number, bar, problem, details } = this.#parts;
    const whole = this.report ? percent(this.report.progress) : null;
    this.node.dataset.look = this.look;
    this.node.querySelector(".status use").setAttribute("href", `#icon-${this.look}`);
    say(status, STATUS[this.look] ?? STATUS.unknown);
    say(number, whole === null ? "–" : `${whole} %`);
    fill(bar, whole, `${whole === null ? "not known" : `${whole} %`}, ${STATUS[this.look]}`);
    details.replaceChildren(...this.#details());
    problem.hidden = !this.problem;
    problem.replaceChildren(...(this.problem ? problemWords(this.problem) : []));
    this.tick(now);
  }

  #outlook() {
    if (!this.report) return this.problem ? "Nothing is known of this task" : "Asking the gateway";
    const { status, queueRemaining, progress } = this.report;
    if (this.problem) return `Last known: ${STATUS[status].toLowerCase()} at ${percent(progress)} %`;
    if (status === "succeeded") return "Finished";
    if (this.ended) return `${STATUS[status]} at ${percent(progress)} %`;
    const eta = this.etaSeconds;
    const place = queueRemaining === null ? "" : queueRemaining === 0 ? "next in the queue" : `${queueRemaining} ahead in the queue`;
    const words = [place, eta === null ? "" : timeLeft(eta)].filter(Boolean).join(", ") || "time left not known";
    return words.charAt(0).toUpperCase() + words.slice(1);
  }

  #details() {
    const { message, state } = this.report ?? {};
    const { job, job_no: number, job_count: many, sampling_step: step, sampling_steps: steps } = state ?? {};
    const known = [
      ["Sampling", Number.isFinite(step) ? `step ${step}${steps > 0 ? ` of ${steps}` : ""}` : ""],
      ["Message", message],
      ["Job", job && many > 1 ? `${job} (${number + 1} of ${many})` : job],
    ];
    return known
      .filter(([, value]) => typeof value === "string" && value !== "")
      // The vendor's message often says the same as its state.
      .filter(([, value], index, all) => all.findIndex(([, other]) => other === value) === index)
      .map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  }
}

function seconds() {
  return Date.now() / 1000;
}
