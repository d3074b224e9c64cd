// Helpers that build DOM elements. Text is always set as text, so upstream messages cannot become markup.

import { absolute, isTime } from "./words.js";

export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

export function svg(tag, attributes = {}) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

/** Set the text of a node if it differs. An unchanged node causes no layout and no announcement. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Return a function that shows a text about a time in `parent`, with the date and time on hover; null hides it. */
export function timeElement(parent) {
  const time = element("time");
  let shownAt = null;
  parent.replaceChildren(time);
  return (at, text) => {
    const known = at !== null && isTime(at);
    parent.hidden = !known;
    setText(time, known ? text : "");
    if (!known) return;
    if (Math.round(at) === shownAt) return;
    shownAt = Math.round(at);
    time.dateTime = new Date(shownAt * 1000).toISOString();
    time.title = absolute(shownAt);
  };
}

/** Set a progress bar; null means unknown. Setting a style from a script is allowed by the content policy. */
export function setBar(bar, percent, label) {
  const known = percent !== null;
  // An empty bar is moved by 101 %, because at 100 % its edge stays visible.
  bar.firstElementChild.style.transform = `translateX(${percent ? percent - 100 : -101}%)`;
  if (known) bar.setAttribute("aria-valuenow", percent);
  else bar.removeAttribute("aria-valuenow");
  bar.setAttribute("aria-valuetext", label);
}

/** Return elements for a problem document: title, detail and the errors of the upstream. */
export function describeProblem(problem) {
  const upstream = problem.upstream ?? {};
  const errors = [
    [upstream.errMessage, upstream.errCode],
    [upstream.subErrMessage, upstream.subErrCode],
  ].filter(([message, code]) => message || code);
  return [
    element("strong", {}, problem.title ?? "Something went wrong"),
    // A detail equal to the title is not repeated.
    same(problem.detail, problem.title) ? null : element("p", { dir: "auto" }, sentence(problem.detail)),
    ...errors.map(([message, code]) =>
      element("p", { class: "upstream-error" }, "Upstream error: ", element("q", { dir: "auto" }, message || code),
        message && code ? element("code", {}, code) : null)),
  ].filter(Boolean);
}

function same(one, other) {
  return !one || one.toLowerCase() === (other ?? "").toLowerCase();
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}
