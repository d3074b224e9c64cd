// The page: reads task IDs from its address and shows a card for each task, fed by one stream.
//
//   form or link -> address -> show() -> cards + Stream -> cards, summary, announcements

import { describeProblem, setBar, setText } from "./dom.js";
import { Stream } from "./stream.js";
import { TaskCard } from "./task.js";
import { STATUS, percent, timeLeft } from "./words.js";

const TICK_MS = 1000;
const ANNOUNCE_MS = 5000;
const TITLE = document.title;

const CONNECTION = {
  idle: "Not watching",
  connecting: "Connecting",
  live: "Live",
  polling: "Live by long polls: a proxy buffers the event stream",
  reconnecting: "Connection lost, reconnecting",
  retrying: "Connection lost, retrying",
  ended: "All tasks ended",
  refused: "Request rejected",
};

const at = (id) => document.getElementById(id);
const form = at("form");
const cards = new Map(); // by task ID, in the order of the address
let stream = null;
let query = ""; // query of the open stream
let shownApi = ""; // API of the cards

// --- the address ---------------------------------------------------------------------------------

function parseIds(text) {
  return [...new Set(text.split(/[\s,;]+/).filter(Boolean))];
}

function fromAddress() {
  const given = new URLSearchParams(location.search);
  // Without this script, the form sends all IDs in one parameter.
  return { taskIds: parseIds(given.getAll("taskId").join(" ")), api: given.get("api") || "sd" };
}

function toQuery({ taskIds, api }) {
  return new URLSearchParams([...taskIds.map((id) => ["taskId", id]), ["api", api]]).toString();
}

function go(wanted) {
  const address = wanted.taskIds.length ? `?${toQuery(wanted)}` : "./";
  if (new URL(address, location.href).href !== location.href) history.pushState(null, "", address);
  show();
}

// --- cards ---------------------------------------------------------------------------------------

/** Show the tasks of the address. `again` opens a new stream even if the tasks are the same. */
function show({ again = false } = {}) {
  const wanted = fromAddress();
  form.elements.taskId.value = wanted.taskIds.join(" ");
  if (wanted.api === "sd" || wanted.api === "comfy") form.elements.api.value = wanted.api;
  showRequestError(null);
  matchCards(wanted);
  at("empty").hidden = cards.size > 0;

  const wantedQuery = cards.size ? toQuery(wanted) : "";
  const allEnded = cards.size > 0 && [...cards.values()].every((card) => card.ended);
  if (allEnded && !again) {
    // All remaining tasks have ended: no stream is needed.
    closeStream();
    connection("ended");
  } else if (wantedQuery !== query || again) {
    closeStream();
    if (wantedQuery) openStream(wantedQuery);
    else connection("idle");
  }
  summarize();
}

function matchCards({ taskIds, api }) {
  if (api !== shownApi) removeCards([...cards.keys()]); // the same ID on another API is another task
  shownApi = api;
  removeCards([...cards.keys()].filter((id) => !taskIds.includes(id)));
  const wantedCards = taskIds.map((id) => [id, cards.get(id) ?? new TaskCard(id, { onRemove: remove })]);
  cards.clear();
  for (const [id, card] of wantedCards) {
    cards.set(id, card);
    // Only misplaced cards are moved, because a moved node loses the focus.
    const place = at("cards").children[cards.size - 1];
    if (place !== card.node) at("cards").insertBefore(card.node, place ?? null);
  }
}

function removeCards(taskIds) {
  for (const id of taskIds) {
    cards.get(id).node.remove();
    cards.delete(id);
  }
}

function remove(taskId) {
  const ids = [...cards.keys()];
  const index = ids.indexOf(taskId);
  const next = ids[index + 1] ?? ids[index - 1];
  go({ taskIds: ids.filter((id) => id !== taskId), api: shownApi });
  announce(`No longer watching ${taskId}`);
  if (next) cards.get(next).focusRemove();
  else form.elements.taskId.focus();
}

// --- the stream ----------------------------------------------------------------------------------

function closeStream() {
  stream?.close();
  stream = null;
  query = "";
}

function openStream(wantedQuery) {
  query = wantedQuery;
  stream = new Stream(wantedQuery, {
    state: (name, problem) => (name === "refused" ? showRequestError(problem) : connection(name, problem)),
    progress: (report) => update(report.taskId, (card) => card.onProgress(report)),
    problem: (problem) => update(problem.taskId, (card) => card.onProblem(problem)),
  });
}

function update(taskId, apply) {
  const card = cards.get(taskId);
  if (!card) return;
  const before = card.look;
  apply(card);
  if (card.look !== before && before !== "loading") {
    announce(`${taskId}: ${card.problem ? card.problem.title : STATUS[card.look]}`);
  }
  summarize();
}

function connection(name, problem) {
  const shown = at("connection");
  shown.dataset.state = name;
  setText(at("connection-words"), problem?.title ? `${CONNECTION[name]}: ${problem.title}` : CONNECTION[name]);
}

/** Show why the gateway rejected the request; null hides the error. */
function showRequestError(problem) {
  const shown = at("request-error");
  shown.hidden = !problem;
  shown.replaceChildren(...(problem ? describeProblem(problem) : []));
  if (!problem) return;
  // The gateway validates; the page points out the invalid IDs of a long list.
  const invalid = [...cards.keys()].filter((id) => !/^[A-Za-z0-9_-]{1,64}$/.test(id));
  if (problem.code === "invalid-task-id" && invalid.length) {
    const paragraph = document.createElement("p");
    paragraph.textContent = `Invalid: ${invalid.join(", ")}`;
    shown.append(paragraph);
  }
  removeCards([...cards.keys()]);
  query = "";
  connection("refused");
  summarize();
}

// --- the summary ---------------------------------------------------------------------------------

function summarize() {
  const all = [...cards.values()];
  const bar = at("summary-bar");
  bar.hidden = all.length === 0;
  if (all.length === 0) {
    setText(at("summary"), "");
    document.title = TITLE;
    return;
  }
  const known = all.filter((card) => card.report);
  const mean = known.length
    ? percent(known.reduce((sum, card) => sum + Math.min(Math.max(card.report.progress, 0), 1), 0) / known.length)
    : null;
  const done = all.filter((card) => card.ended).length;
  const failed = all.filter((card) => card.look === "failed").length;
  const withErrors = all.filter((card) => card.problem).length;
  const eta = Math.max(...all.map((card) => card.etaSeconds ?? -1));
  const parts = [
    `${done} of ${all.length} done`,
    failed ? `${failed} failed` : "",
    withErrors ? `${withErrors} with errors` : "",
    mean === null ? "" : `${mean}\u00a0% on average`,
    eta >= 0 ? timeLeft(eta) : "",
  ];
  setText(at("summary"), parts.filter(Boolean).join(" · "));
  setBar(bar, mean, at("summary").textContent);
  document.title = `${done} of ${all.length} done · ${TITLE}`;
}

// --- announcements for screen readers ------------------------------------------------------------

let pending = [];
let announcing = 0;

function announce(text) {
  pending.push(text);
  announcing ||= setTimeout(flush, TICK_MS);
}

function flush() {
  const log = at("announcements");
  // Many changes are summarized.
  const text = pending.length > 3 ? `${pending.length} changes. ${at("summary").textContent}` : pending.join(". ");
  if (text) {
    const line = document.createElement("span");
    line.textContent = `${text}. `;
    log.replaceChildren(line);
  }
  announcing = text ? setTimeout(flush, ANNOUNCE_MS) : 0;
  pending = [];
}

// --- start ---------------------------------------------------------------------------------------

// Behind an ingress the address may lack its final slash. Relative URLs would then leave the prefix.
const home = new URL("../", import.meta.url).pathname;
if (location.pathname !== home) history.replaceState(null, "", home + location.search + location.hash);

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const wanted = { taskIds: parseIds(form.elements.taskId.value), api: form.elements.api.value };
  if (wanted.taskIds.length === 0) form.elements.taskId.focus();
  query = ""; // a submit queries again, even for the same tasks
  go(wanted);
});

form.elements.taskId.addEventListener("keydown", (event) => {
  // While an input method composes a character, Enter belongs to it.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});

at("example").addEventListener("click", (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return; // the link opens in a new tab or window
  event.preventDefault();
  history.pushState(null, "", event.currentTarget.href);
  show();
  at("tasks").focus();
});

addEventListener("popstate", () => show());
// A page restored from the back-forward cache has lost its connection.
addEventListener("pageshow", (event) => event.persisted && show({ again: true }));

setInterval(() => {
  for (const card of cards.values()) card.tick();
  if (cards.size) summarize();
}, TICK_MS);

show();
