// A small line chart of a task over time: its progress, or before that its place in the queue. All charts of the page
// share one time axis.

import { setText, svg } from "./dom.js";
import { duration, percent } from "./words.js";

const HEIGHT = 40; // in units of the view box; the style sheet keeps strokes from scaling

export class Plot {
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
  }

  /** Draw `points` as task.js records them. `axis` has the times of the left and right edges. */
  draw(points, { from, until }, ended) {
    const queued = points.length > 0 && points[points.length - 1][2] === "queue";
    const shown = points.filter(([, , kind]) => Boolean(kind) === queued);
    // A task that had ended before its first event has no history: there is no line to draw.
    const empty = shown.length === 0 || (ended && shown[0][1] === shown[shown.length - 1][1]);
    this.#figure.classList.toggle("plot-empty", empty);
    if (empty) return;
    const first = shown[0];
    const last = shown[shown.length - 1];
    const end = ended ? last[0] : Math.max(until, last[0]);
    const span = Math.max(until - from, end - from, 1);
    const top = queued ? Math.max(...shown.map(([, ahead]) => ahead), 1) : 1;
    const x = (at) => (((at - from) / span) * 100).toFixed(2);
    const y = (value) => (HEIGHT - 1 - (value / top) * (HEIGHT - 2)).toFixed(2);
    // Progress is joined by lines. A place in the queue is valid until the next event.
    const path = shown.map(([at, value], index) =>
      (index ? (queued ? `H${x(at)}V${y(value)}` : `L${x(at)} ${y(value)}`) : `M${x(at)} ${y(value)}`)).join("");
    const line = `${path}H${x(end)}`; // the last value is valid until now
    this.#line.setAttribute("d", line);
    this.#area.setAttribute("d", `${line}V${HEIGHT}H${x(first[0])}Z`);
    this.#dot.setAttribute("d", `M${x(end)} ${y(last[1])}h0`); // a round cap makes the dot
    const time = duration(span);
    setText(this.#caption, queued ? `queue, last ${time}` : ended ? `within ${time}` : `last ${time}`);
    this.#svg.setAttribute("aria-label", queued
      ? `Queue over ${duration(end - first[0])}: from ${first[1]} to ${last[1]} ahead`
      : `Progress over ${duration(end - first[0])}: from ${percent(first[1])} % to ${percent(last[1])} %`);
  }
}
