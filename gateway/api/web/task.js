// The card of one task.

import { element, setBar, describeProblem, setText } from "./dom.js";
import { Plot } from "./plot.js";
import { STATUS, TIME_LEFT_UNKNOWN, ago, percent, timeLeft } from "./words.js";

const template = document.getElementById("card");

export class TaskCard {
  taskId;
  node;
  report = null; // the last progress received
  problem = null; // the current problem, if the last query failed
  #updatedAt = null; // time of the last event, in seconds
  #parts = {};
  #plot;

  constructor(taskId, { onRemove }) {
    this.taskId = taskId;
    this.node = template.content.firstElementChild.cloneNode(true);
    for (const part of this.node.querySelectorAll("[data-part]")) this.#parts[part.dataset.part] = part;
    const { id, bar, remove, plot, span } = this.#parts;
    setText(id, taskId);
    bar.setAttribute("aria-label", `Progress of ${taskId}`);
    remove.setAttribute("aria-label", `Stop watching ${taskId}`);
    remove.title = "Stop watching";
    remove.addEventListener("click", () => onRemove(taskId));
    this.#plot = new Plot(plot, span);
    this.#render(seconds());
  }

  get look() {
    return this.problem ? "problem" : this.report?.status ?? "loading";
  }

  get ended() {
    return this.report?.terminal ?? false;
  }

  get etaSeconds() {
    if (this.problem || this.ended || this.report?.etaSeconds == null) return null;
    return Math.max(this.report.etaSeconds - (seconds() - this.#updatedAt), 0);
  }

  onProgress(report) {
    this.report = report;
    this.problem = null;
    this.#updatedAt = seconds();
    this.#plot.add(this.#updatedAt, Math.min(Math.max(report.progress, 0), 1), report.terminal);
    this.#render(this.#updatedAt);
  }

  onProblem(problem) {
    this.problem = problem;
    this.#updatedAt = seconds();
    this.#render(this.#updatedAt);
  }

  focusRemove() {
    this.#parts.remove.focus();
  }

  /** Update the parts that change with time. */
  tick(now = seconds()) {
    setText(this.#parts.updated, this.#updatedAt === null ? "" : ago(now - this.#updatedAt));
    setText(this.#parts.outlook, this.#outlook());
    this.#plot.draw(now);
  }

  #render(now) {
    const { status, percent: number, bar, problem, details } = this.#parts;
    const whole = this.report ? percent(this.report.progress) : null;
    this.node.dataset.look = this.look;
    this.node.querySelector(".status use").setAttribute("href", `#icon-${this.look}`);
    setText(status, STATUS[this.look] ?? STATUS.unknown);
    setText(number, whole === null ? "–" : `${whole} %`);
    setBar(bar, whole, `${whole === null ? "unknown" : `${whole} %`}, ${STATUS[this.look]}`);
    details.replaceChildren(...this.#details());
    problem.hidden = !this.problem;
    problem.replaceChildren(...(this.problem ? describeProblem(this.problem) : []));
    this.tick(now);
  }

  #outlook() {
    if (!this.report) return this.problem ? "No data for this task" : "Waiting for the first response";
    const { status, queueRemaining, progress } = this.report;
    if (this.problem) return `Last known: ${STATUS[status].toLowerCase()} at ${percent(progress)} %`;
    if (status === "succeeded") return "Finished";
    if (this.ended) return `${STATUS[status]} at ${percent(progress)} %`;
    const eta = this.etaSeconds;
    const place = queueRemaining === null ? "" : queueRemaining === 0 ? "next in the queue" : `${queueRemaining} ahead in the queue`;
    const text = [place, eta === null ? "" : timeLeft(eta)].filter(Boolean).join(", ") || TIME_LEFT_UNKNOWN;
    return text.charAt(0).toUpperCase() + text.slice(1);
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
      // The vendor's message often repeats its state.
      .filter(([, value], index, all) => all.findIndex(([, other]) => other === value) === index)
      .map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  }
}

function seconds() {
  return Date.now() / 1000;
}
