// Progress over time, as a small line: from when the page first heard of the task until now.

import { say, svg } from "./dom.js";
import { duration, percent } from "./words.js";

const MOST_POINTS = 240;
const HEIGHT = 40; // in units of the view box; strokes do not scale, see the style sheet

export class Plot {
  #points = []; // {at: seconds, progress}
  #ended = false;
  #figure;
  #caption;
  #svg = svg("svg", { viewBox: `0 0 100 ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
  #area = svg("path", { class: "plot-area" });
  #line = svg("path", { class: "plot-line" });
  #dot = svg("path", { class: "plot-dot" });

  constructor(figure, caption) {
    this.#figure = figure;
    this.#caption = caption;
    const grid = svg("path", { class: "plot-grid", d: `M0 1H100M0 ${HEIGHT / 2}H100M0 ${HEIGHT - 1}H100` });
    this.#svg.append(grid, this.#area, this.#line, this.#dot);
    figure.prepend(this.#svg);
    this.draw(0);
  }

  add(at, progress, ended) {
    this.#points.push({ at, progress });
    this.#ended = ended;
    // Bounded: when full, every second point goes, and the shape stays.
    if (this.#points.length > MOST_POINTS) {
      const last = this.#points.length - 1;
      this.#points = this.#points.filter((_, index) => index % 2 === 0 || index === last);
    }
  }

  draw(now) {
    const points = this.#points;
    // One point of a task that was over when first heard of is no course.
    if (points.length === 0 || (this.#ended && points.length === 1)) {
      this.#figure.classList.add("plot-empty");
      return;
    }
    this.#figure.classList.remove("plot-empty");
    const first = points[0];
    const last = points[points.length - 1];
    const until = this.#ended ? last.at : Math.max(now, last.at);
    const span = Math.max(until - first.at, 1);
    const x = (at) => (((at - first.at) / span) * 100).toFixed(2);
    const y = (progress) => (HEIGHT - 1 - progress * (HEIGHT - 2)).toFixed(2);
    const course = points.map(({ at, progress }) => `${x(at)} ${y(progress)}`).join("L");
    const line = `M${course}H${x(until)}`; // nothing newer is known: it holds until now
    this.#line.setAttribute("d", line);
    this.#area.setAttribute("d", `${line}V${HEIGHT}H0Z`);
    this.#dot.setAttribute("d", `M${x(until)} ${y(last.progress)}h0`); // a round cap makes the dot
    say(this.#caption, this.#ended ? `within ${duration(span)}` : `last ${duration(span)}`);
    this.#svg.setAttribute("aria-label",
      `Progress over ${duration(span)}: from ${percent(first.progress)} % to ${percent(last.progress)} %`);
  }
}
