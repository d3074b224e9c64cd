// A small line chart of progress over time, from the first event of the task until now.

import { setText, svg } from "./dom.js";
import { duration, percent } from "./words.js";

const MOST_POINTS = 240;
const HEIGHT = 40; // in units of the view box; the style sheet keeps strokes from scaling

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
    // When the list is full, every second point is dropped; the shape of the line stays.
    if (this.#points.length > MOST_POINTS) {
      const last = this.#points.length - 1;
      this.#points = this.#points.filter((_, index) => index % 2 === 0 || index === last);
    }
  }

  draw(now) {
    const points = this.#points;
    // A task that had ended before its first event has a single point: there is no line to draw.
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
    const path = points.map(({ at, progress }) => `${x(at)} ${y(progress)}`).join("L");
    const line = `M${path}H${x(until)}`; // the last value is valid until now
    this.#line.setAttribute("d", line);
    this.#area.setAttribute("d", `${line}V${HEIGHT}H0Z`);
    this.#dot.setAttribute("d", `M${x(until)} ${y(last.progress)}h0`); // a round cap makes the dot
    setText(this.#caption, this.#ended ? `within ${duration(span)}` : `last ${duration(span)}`);
    this.#svg.setAttribute("aria-label",
      `Progress over ${duration(span)}: from ${percent(first.progress)} % to ${percent(last.progress)} %`);
  }
}
