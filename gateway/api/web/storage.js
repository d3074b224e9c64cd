// What the page keeps in this browser. Nothing is sent anywhere.
//
// For the tab: what is known of each task, so that clocks and plots survive a reload, and the address of the tasks.
// For all tabs: the IDs that were watched recently.

const TASKS = "sd-gateway:tasks"; // the session's
const QUERY = "sd-gateway:query"; // the session's
const RECENT = "sd-gateway:recent";
const MOST_RECENT = 20;
const NOTIFY = "sd-gateway:notify";

function read(storage, key, otherwise) {
  try {
    return JSON.parse(storage().getItem(key)) ?? otherwise;
  } catch {
    return otherwise; // blocked, or written by something else
  }
}

function write(storage, key, value) {
  try {
    if (value === null) storage().removeItem(key);
    else storage().setItem(key, JSON.stringify(value));
  } catch {
    // Blocked or full: the page works without it.
  }
}

// Even the access to the property throws if storage is blocked.
const session = () => sessionStorage;
const local = () => localStorage;

export function recallTasks() {
  return read(session, TASKS, {});
}

export function rememberTasks(tasks) {
  write(session, TASKS, Object.fromEntries(tasks.map((task) => [`${task.api}:${task.id}`, task.remember()])));
}

export function rememberQuery(query) {
  write(session, QUERY, query);
}

/** Return the query of the tasks that this tab watches, with its question mark, or "". */
export function recallQuery() {
  const query = read(session, QUERY, "");
  return typeof query === "string" ? query : "";
}

/** Return [{id, api}], the latest first. */
export function recentTasks() {
  const known = read(local, RECENT, []);
  return Array.isArray(known) ? known.filter((one) => typeof one?.id === "string") : [];
}

export function addRecent(taskIds, api) {
  const others = recentTasks().filter((one) => one.api !== api || !taskIds.includes(one.id));
  write(local, RECENT, [...taskIds.map((id) => ({ id, api })), ...others].slice(0, MOST_RECENT));
}

export function clearRecent() {
  write(local, RECENT, null);
}

export function wantsNotification() {
  return read(local, NOTIFY, false) === true;
}

export function setNotification(wanted) {
  write(local, NOTIFY, wanted ? true : null);
}
