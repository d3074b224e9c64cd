// The page: reads task IDs from its address and shows a card for each task, fed by one stream.
//
//   form or link -> address -> show() -> cards + Stream -> cards, summary, title, announcements

import { Announcer } from "./announce.js";
import { TaskCard } from "./card.js";
import { describeProblem, element, setBar, setText } from "./dom.js";
import { TaskForm } from "./form.js";
import { Health } from "./health.js";
import { MAX_TASKS, readIds } from "./ids.js";
import { TaskList } from "./list.js";
import { notifyEnd, offerNotification } from "./notify.js";
import { Slot } from "./stream_slots.js";
import { addRecent, recallTasks, rememberQuery, rememberTasks } from "./storage.js";
import { Stream } from "./stream.js";
import { count, describe, describeForTab } from "./summary.js";
import { Task } from "./task.js";
import { showInTab } from "./title.js";
import { API, STATUS } from "./words.js";

const TICK_MS = 1000;
const SUMMARY_MS = 50; // the events of many tasks arrive together
const OFFLINE_SECONDS = 3; // a shorter interruption is not worth a word

const CONNECTION = {
  idle: "Not watching",
  connecting: "Connecting",
  live: "Live",
  failing: "Connected, upstream failing",
  polling: "Live by long polls: a proxy buffers the event stream",
  checking: "Updated every 5 s: other tabs are live",
  reconnecting: "Connection lost, reconnecting",
  retrying: "Connection lost, retrying",
  ended: "All tasks ended",
  refused: "Request rejected",
};
const CONNECTED = new Set(["live", "polling", "checking"]);
const INTERRUPTED = new Set(["connecting", "reconnecting", "retrying"]);

const at = (id) => document.getElementById(id);
const cards = new Map(); // by task ID, in the order of the address
let memory = recallTasks();
let stream = null;
let query = ""; // query of the open stream
let shownApi = ""; // API of the cards
let limit = MAX_TASKS;
let rejected = []; // entered, but no task IDs
let note = ""; // about the tasks that were just added
let connected = { name: "idle", problem: null, since: 0 };
let gatewayTroubles = []; // from /readyz
let sawRunning = false;
let summarizing = 0; // timer

const announcer = new Announcer(at("announcements"), () => at("summary").textContent);
const list = new TaskList({ list: at("cards"), filters: at("filters"), changed: () => arrange() });
const form = new TaskForm({ onAdd: add, onDismiss: dismiss });
const health = new Health((found) => {
  gatewayTroubles = found;
  showTroubles();
});
const slot = new Slot(() => stream && (stream.slow = !slot.held));

function seconds() {
  return Date.now() / 1000;
}

function allTasks() {
  return [...cards.values()].map((card) => card.task);
}

// --- the address ---------------------------------------------------------------------------------

function fromAddress() {
  const given = new URLSearchParams(location.search);
  // Without this script, the form sends all that was entered in one parameter.
  const found = readIds(given.getAll("taskId").join("\n"));
  return { ...found, api: given.get("api") || found.api || "sd" };
}

function toQuery({ taskIds, api }) {
  return new URLSearchParams([...taskIds.map((id) => ["taskId", id]), ["api", api]]).toString();
}

function go(wanted) {
  const address = wanted.taskIds.length ? `?${toQuery(wanted)}` : "./";
  if (new URL(address, location.href).href !== location.href) history.pushState(null, "", address);
  show();
}

function add({ taskIds, api, rejected: entered }) {
  const before = fromAddress();
  // The tasks of one page belong to one API.
  const replaces = taskIds.length > 0 && before.api !== api && before.taskIds.length > 0;
  rejected = entered;
  note = replaces ? `These are ${API[api]} tasks. The browser's Back button returns to the ${API[before.api] ?? "other"} tasks.` : "";
  query = ""; // a submit queries again, even for the same tasks
  go({ taskIds: [...new Set([...(replaces ? [] : before.taskIds), ...taskIds])], api: taskIds.length ? api : before.api });
  note = "";
}

function dismiss(text) {
  rejected = rejected.filter((one) => one.text !== text);
  const wanted = fromAddress();
  // The corrected address has no bad entries: those that remain are kept here.
  const known = new Set([text, ...rejected.map((one) => one.text)]);
  rejected.push(...wanted.rejected.filter((one) => !known.has(one.text)));
  go(wanted);
  form.focus();
}

// --- cards ---------------------------------------------------------------------------------------

/** Show the tasks of the address. `again` opens a new stream even if the tasks are the same. */
function show({ again = false } = {}) {
  const wanted = fromAddress();
  const watched = { taskIds: wanted.taskIds.slice(0, limit), api: wanted.api };
  showRequestError(null);
  matchCards(watched);
  form.show(watched);
  const known = new Set(rejected.map(({ text }) => text));
  form.showRejected([...rejected, ...wanted.rejected.filter(({ text }) => !known.has(text))],
    { beyond: wanted.taskIds.length - watched.taskIds.length, limit, note });
  at("empty").hidden = cards.size > 0;
  document.body.classList.toggle("watching", cards.size > 0);
  rememberQuery(cards.size ? location.search : "");
  for (const link of document.querySelectorAll('.masthead a[href^="./"]')) link.setAttribute("href", `./${cards.size ? location.search : ""}`);
  if (cards.size) addRecent(watched.taskIds, watched.api);

  const wantedQuery = cards.size ? toQuery(watched) : "";
  const allEnded = cards.size > 0 && allTasks().every((task) => task.ended);
  if (allEnded && !again) {
    // All remaining tasks have ended: no stream is needed.
    closeStream();
    connection("ended");
  } else if (wantedQuery !== query || again) {
    closeStream();
    if (wantedQuery) openStream(wantedQuery);
    else connection("idle");
  }
  renderAll();
}

/** Run an action for one card. An error is reported to the console, and does not stop the other cards. */
function attempt(action) {
  try {
    action();
  } catch (error) {
    reportError(error);
  }
}

function matchCards({ taskIds, api }) {
  if (api !== shownApi) removeCards([...cards.keys()]); // the same ID on another API is another task
  shownApi = api;
  removeCards([...cards.keys()].filter((id) => !taskIds.includes(id)));
  const wantedCards = taskIds.map((id) => [id, cards.get(id) ?? newCard(id, api)]);
  cards.clear();
  for (const [id, card] of wantedCards) cards.set(id, card);
  list.show([...cards.values()], { settled: false });
}

function newCard(id, api) {
  return new TaskCard(new Task(id, api, memory[`${api}:${id}`]), { onRemove: remove, onTryOther: tryOther });
}

function removeCards(taskIds) {
  for (const id of taskIds) {
    cards.get(id).close();
    cards.delete(id);
  }
}

function remove(taskId) {
  const shown = [...at("cards").children].filter((node) => !node.hidden);
  const index = shown.indexOf(cards.get(taskId).node);
  const next = shown[index + 1] ?? shown[index - 1];
  drop([taskId]);
  announcer.say(`No longer watching ${taskId}`);
  const card = [...cards.values()].find(({ node }) => node === next);
  if (card) card.focusRemove();
  else form.focus();
}

function drop(taskIds) {
  const { taskIds: all, api } = fromAddress();
  go({ taskIds: all.filter((id) => !taskIds.includes(id)), api });
}

/** Watch a task that the vendor does not know under the other API, with all others that it does not know. */
function tryOther(taskId, api) {
  const missing = allTasks().filter((task) => task.look === "missing").map((task) => task.id);
  go({ taskIds: missing.length === cards.size ? missing : [taskId], api });
  at("tasks").focus();
}

// --- the stream ----------------------------------------------------------------------------------

function closeStream() {
  stream?.close();
  stream = null;
  query = "";
}

function openStream(wantedQuery) {
  query = wantedQuery;
  const handlers = {
    state: (name, problem) => (name === "refused" ? refuse(problem) : connection(name, problem)),
    progress: (report) => attempt(() => update(report.taskId, (task, now) => task.onProgress(report, now))),
    problem: (problem) => attempt(() => update(problem.taskId, (task) => task.onProblem(problem))),
    stale: ({ taskId, stale: code, ...more }) =>
      attempt(() => update(taskId, (task, now) => task.onStale({ code, ...more }, now))),
    unchanged: () => allTasks().forEach((task) => task.confirm(seconds())),
  };
  stream = new Stream(wantedQuery, handlers, { slow: !slot.held });
}

function update(taskId, apply) {
  const card = cards.get(taskId);
  if (!card) return;
  const { task } = card;
  const before = { look: task.look, stale: task.stale?.code };
  apply(task, seconds());
  if (task.look !== before.look && before.look !== "loading") {
    announcer.say(`${taskId}: ${task.problem ? task.problem.title : STATUS[task.look]}`);
  }
  if (task.stale?.code !== before.stale) {
    if (task.stale) announcer.say(`${taskId} is not updated: ${task.stale.title}`);
    showTroubles(); // with the card, not after the other events
  }
  sawRunning ||= task.report !== null && !task.ended;
  card.render(seconds(), view());
  summarizing ||= setTimeout(summarize, SUMMARY_MS);
}

function connection(name, problem = null) {
  const before = connected;
  connected = { name, problem, since: INTERRUPTED.has(name) && INTERRUPTED.has(before.name) ? before.since : seconds() };
  health.watch(cards.size > 0 && name !== "ended" && name !== "refused");
  showConnection();
  if (name !== "ended" || !sawRunning) return;
  sawRunning = false;
  renderAll();
  notifyEnd(describe(count(allTasks(), seconds())));
}

/** Return why updates fail, without repetitions. */
function failures() {
  const failing = ({ stale, problem }) => stale ?? (problem && /^upstream-(?!rejected)/.test(problem.code) ? problem : null);
  return [...new Set(allTasks().map(failing).filter(Boolean).map(({ title }) => title))];
}

function showConnection() {
  const failing = CONNECTED.has(connected.name) && failures().length > 0;
  const name = failing ? "failing" : connected.name;
  const shown = at("connection");
  shown.hidden = false;
  shown.dataset.state = name;
  const { problem } = connected;
  setText(at("connection-words"), problem?.title ? `${CONNECTION[name]}: ${problem.title}` : CONNECTION[name]);
  at("retry").hidden = !["failing", "reconnecting", "retrying"].includes(name);
}

/** Return whether the gateway has been unreachable for some time. */
function isOffline(now) {
  return INTERRUPTED.has(connected.name) && now - connected.since >= OFFLINE_SECONDS;
}

function refuse(problem) {
  const allowed = Number(/'taskId' must be given 1 to (\d+) times/.exec(problem.detail)?.[1]);
  if (allowed && allowed < limit) {
    limit = allowed; // an operator may allow fewer tasks
    closeStream();
    show();
    return;
  }
  showRequestError(problem);
  removeCards([...cards.keys()]);
  query = "";
  connection("refused");
  summarize();
}

/** Show why the gateway rejected the request; null hides the error. */
function showRequestError(problem) {
  const shown = at("request-error");
  shown.hidden = !problem;
  shown.replaceChildren(...(problem ? describeProblem(problem) : []));
}

/** Show why updates fail, and what else is wrong with the gateway. */
function showTroubles() {
  const own = failures();
  // The upstream's troubles matter only to tasks that wait for it. They end with the tasks' own: /readyz is read later.
  const waits = own.length > 0 || allTasks().some((task) => task.look === "loading");
  const others = gatewayTroubles.filter(({ upstream }) => waits || !upstream).map(({ text }) => text);
  const isRepeated = (title) => others.some((text) => text.startsWith(`${title}: `)); // /readyz adds a cause
  const troubles = [...new Set([...own.filter((title) => !isRepeated(title)), ...others])];
  const shown = at("troubles");
  shown.hidden = troubles.length === 0;
  const text = troubles.map((trouble) => `${trouble}.`).join(" ");
  if (shown.textContent !== text) {
    if (text) announcer.say(text);
    shown.replaceChildren(...troubles.map((trouble) => element("p", { dir: "auto" }, `${trouble}.`)));
  }
}

// --- what is shown -------------------------------------------------------------------------------

/** Return what all cards have in common: whether the gateway is unreachable, and the edges of the plots. */
function view() {
  const now = seconds();
  const tasks = allTasks();
  const times = tasks.flatMap(({ points }) => (points.length ? [points[0][0], points[points.length - 1][0]] : []));
  const running = tasks.some((task) => !task.ended);
  return {
    offline: isOffline(now),
    axis: { from: times.length ? Math.min(...times) : now, until: running || !times.length ? now : Math.max(...times) },
  };
}

function renderAll() {
  const now = seconds();
  const shared = view();
  for (const card of cards.values()) attempt(() => card.render(now, shared));
  summarize();
}

function tick() {
  const now = seconds();
  if (connected.name === "live" || connected.name === "polling") allTasks().forEach((task) => task.confirm(now));
  const shared = view();
  for (const card of cards.values()) attempt(() => card.tick(now, shared));
  if (cards.size) summarize();
}

function arrange() {
  list.show([...cards.values()]);
}

function summarize() {
  clearTimeout(summarizing);
  summarizing = 0;
  const now = seconds();
  const tasks = allTasks();
  const numbers = count(tasks, now);
  const text = tasks.length ? describe(numbers) : "";
  at("summary-bar").hidden = tasks.length < 2;
  at("toolbar").hidden = tasks.length === 0;
  at("order-field").hidden = tasks.length < 2;
  at("remove-finished").hidden = tasks.length < 2 || !tasks.some((task) => task.ended);
  setText(at("summary"), text);
  setBar(at("summary-bar"), numbers.mean, text);
  const failing = failures().length > 0 || isOffline(now);
  const { title, icon } = describeForTab(numbers, { ended: connected.name === "ended", failing });
  showInTab(title, icon);
  showConnection();
  showTroubles();
  arrange();
}

// --- start ---------------------------------------------------------------------------------------

// Behind an ingress the address may lack its final slash. Relative URLs would then leave the prefix.
const home = new URL("../", import.meta.url).pathname;
if (location.pathname !== home) history.replaceState(null, "", home + location.search + location.hash);

at("retry").addEventListener("click", () => {
  stream?.again();
  health.check();
});

at("order").addEventListener("change", (event) => {
  list.sorted = event.target.value === "status";
  arrange();
});

at("remove-finished").addEventListener("click", () => {
  drop(allTasks().filter((task) => task.ended).map((task) => task.id));
  at("tasks").focus();
});

at("example").addEventListener("click", (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return; // the link opens in a new tab or window
  event.preventDefault();
  history.pushState(null, "", event.currentTarget.href);
  show();
  at("tasks").focus();
});

addEventListener("popstate", () => {
  rejected = [];
  show();
});
// A page restored from the back-forward cache has lost its connection.
addEventListener("pageshow", (event) => event.persisted && show({ again: true }));
for (const leaving of ["pagehide", "visibilitychange"]) {
  addEventListener(leaving, () => cards.size && rememberTasks(allTasks()), { capture: true });
}

offerNotification(at("notify"));
setInterval(tick, TICK_MS);
show();
memory = {}; // for the tasks of the start only
