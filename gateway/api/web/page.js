// The page: which tasks its address names, a card for each, one stream for all.
//
//   form or link -> address -> show() -> cards + Stream -> cards, summary, announcements

import { fill, problemWords, say } from "./dom.js";
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
  reconnecting: "Connection lost, reconnecting",
  retrying: "Connection lost, trying again",
  ended: "Ended: nothing more will come",
  refused: "Not accepted",
};

const at = (id) => document.getElementById(id);
const form = at("form");
const cards = new Map(); // by task ID, in the address's order
let stream = null;
let query = ""; // what the stream was opened with
let shownApi = ""; // what the cards belong to

// --- the address ---------------------------------------------------------------------------------

function parseIds(text) {
  return [...new Set(text.split(/[\s,;]+/).filter(Boolean))];
}

function fromAddress() {
  const given = new URLSearchParams(location.search);
  // A form sent without this script puts all IDs into one parameter.
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

// --- what is shown -------------------------------------------------------------------------------

/** Make the page show what its address names. `again`: ask once more, though it is the same. */
function show({ again = false } = {}) {
  const wanted = fromAddress();
  form.elements.taskId.value = wanted.taskIds.join(" ");
  if (wanted.api === "sd" || wanted.api === "comfy") form.elements.api.value = wanted.api;
  refuse(null);
  matchCards(wanted);
  at("empty").hidden = cards.size > 0;

  const wantedQuery = cards.size ? toQuery(wanted) : "";
  const settled = cards.size > 0 && [...cards.values()].every((card) => card.ended);
  if (settled && !again) {
    // What is left after a removal has ended: there is nothing to ask.
    leave();
    connection("ended");
  } else if (wantedQuery !== query || again) {
    leave();
    if (wantedQuery) listen(wantedQuery);
    else connection("idle");
  }
  summarize();
}

function matchCards({ taskIds, api }) {
  if (api !== shownApi) removeCards([...cards.keys()]); // the same ID on another API is another task
  shownApi = api;
  removeCards([...cards.keys()].filter((id) => !taskIds.includes(id)));
  const made = taskIds.map((id) => [id, cards.get(id) ?? new TaskCard(id, { onRemove: remove })]);
  cards.clear();
  for (const [id, card] of made) {
    cards.set(id, card);
    // Only what is not in its place is moved: moving a node takes its focus away.
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

function leave() {
  stream?.close();
  stream = null;
  query = "";
}

function listen(wantedQuery) {
  query = wantedQuery;
  stream = new Stream(wantedQuery, {
    state: (name, problem) => (name === "refused" ? refuse(problem) : connection(name, problem)),
    progress: (report) => hear(report.taskId, (card) => card.hearProgress(report)),
    problem: (problem) => hear(problem.taskId, (card) => card.hearProblem(problem)),
  });
}

function hear(taskId, tell) {
  const card = cards.get(taskId);
  if (!card) return;
  const before = card.look;
  tell(card);
  if (card.look !== before && before !== "asking") {
    announce(`${taskId}: ${card.problem ? card.problem.title : STATUS[card.look]}`);
  }
  summarize();
}

function connection(name, problem) {
  const shown = at("connection");
  shown.dataset.state = name;
  say(at("connection-words"), problem?.title ? `${CONNECTION[name]}: ${problem.title}` : CONNECTION[name]);
}

/** Show why the request itself was refused; null: it was not. */
function refuse(problem) {
  const shown = at("refusal");
  shown.hidden = !problem;
  shown.replaceChildren(...(problem ? problemWords(problem) : []));
  if (!problem) return;
  // The gateway judges; the page helps to find the culprit in a long list.
  const odd = [...cards.keys()].filter((id) => !/^[A-Za-z0-9_-]{1,64}$/.test(id));
  if (problem.code === "invalid-task-id" && odd.length) {
    const paragraph = document.createElement("p");
    paragraph.textContent = `Look at: ${odd.join(", ")}`;
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
    say(at("summary"), "");
    document.title = TITLE;
    return;
  }
  const known = all.filter((card) => card.report);
  const mean = known.length
    ? percent(known.reduce((sum, card) => sum + Math.min(Math.max(card.report.progress, 0), 1), 0) / known.length)
    : null;
  const done = all.filter((card) => card.ended).length;
  const failed = all.filter((card) => card.look === "failed").length;
  const troubled = all.filter((card) => card.problem).length;
  const eta = Math.max(...all.map((card) => card.etaSeconds ?? -1));
  const words = [
    `${done} of ${all.length} done`,
    failed ? `${failed} failed` : "",
    troubled ? `${troubled} without an answer` : "",
    mean === null ? "" : `${mean}\u00a0% on average`,
    eta >= 0 ? timeLeft(eta) : "",
  ];
  say(at("summary"), words.filter(Boolean).join(" · "));
  fill(bar, mean, at("summary").textContent);
  document.title = `${done} of ${all.length} done · ${TITLE}`;
}

// --- announcements, for those who listen ---------------------------------------------------------

let pending = [];
let announcing = 0;

function announce(text) {
  pending.push(text);
  announcing ||= setTimeout(flush, TICK_MS);
}

function flush() {
  const log = at("announcements");
  // A crowd of changes is told as what it comes to.
  const text = pending.length > 3 ? `${pending.length} changes. ${at("summary").textContent}` : pending.join(". ");
  if (text) {
    const line = document.createElement("span");
    line.textContent = `${text}. `;
    log.replaceChildren(line);
  }
  announcing = text ? setTimeout(flush, ANNOUNCE_MS) : 0;
  pending = [];
}

// --- beginning -----------------------------------------------------------------------------------

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const wanted = { taskIds: parseIds(form.elements.taskId.value), api: form.elements.api.value };
  if (wanted.taskIds.length === 0) form.elements.taskId.focus();
  query = ""; // whoever asks again wants a new answer, of the same tasks too
  go(wanted);
});

form.elements.taskId.addEventListener("keydown", (event) => {
  // While a character is being composed, Enter belongs to the input method.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});

at("example").addEventListener("click", (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return; // wanted elsewhere
  event.preventDefault();
  history.pushState(null, "", event.currentTarget.href);
  show();
  at("tasks").focus();
});

addEventListener("popstate", () => show());
// A page that comes back out of the browser's memory has lost its connection.
addEventListener("pageshow", (event) => event.persisted && show({ again: true }));

setInterval(() => {
  for (const card of cards.values()) card.tick();
  if (cards.size) summarize();
}, TICK_MS);

show();
