// Finds task IDs in what people paste: lists, JSON, log lines, curl commands and addresses of this gateway.
//
//   text -> { taskIds, rejected: [{ text, reason }], api }

export const MAX_TASKS = 100; // the default of limits.max_tasks_per_request
const VALID = /^[A-Za-z0-9_-]{1,64}$/;
const LIKE_VENDOR = /^[0-7][0-9a-hjkmnp-tv-z]{24,25}$/i; // see ulid.js
const INVISIBLE = /[\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]/g;
const KEY_AND_VALUE = /(["'])(?:task[_-]?)?ids?\1\s*:\s*(?:(["'])(.*?)\2|\[([^\]]*)\])/gi;
const ADDRESS = /(?:https?:\/\/|\.?\/|\?)[^\s"'<>`]+/gi;
const LABEL = /\btask[\s_-]*ids?\s*[:=]/gi;
// taskId: one, task_id=one, as in YAML, logs and JavaScript. "Task ID:" often precedes a list.
const ASSIGNED = /\btask[_-]?id["']?\s*[:=]\s*["']?([A-Za-z0-9_-]+)/gi;
const HEADING = /^task[_-]?ids?$/i; // of a table
const NOISE = /^(?:\p{L}+|[\d:.TZ+-]+)$/u; // a word or a time, in a line with an ID of the vendor
// Names of JSON members, the surest first: of the ID of a task; of something that may be one.
const TASK_ID = /^task[_-]?ids?$/i;
const MAYBE_ID = /^(?:tasks?|jobs?|prompts?|(?:(?:job|prompt)[_-]?)?ids?)$/i;
const BULLET = /^[ \t]*(?:\d{1,3}[.)]|[-+*]|\[[ x]?\])(?:[ \t]+|$)/gim;
// Everything that separates IDs, with the quotes and brackets around them.
const SEPARATORS = /[\s,;|"'`´<>()[\]{}‘’“”„«»‹›「」『』、。・•‣⁃◦▪▫●○■□→–—]+/;

/** Return the task IDs in a text without duplicates, the entries that are no IDs, and the API if an address names it. */
export function readIds(text) {
  // Quotes are escaped in JSON within JSON, as in logs.
  const clean = text.normalize("NFKC").replace(INVISIBLE, "").replace(/\\+(?=["'])/g, "");
  const found = { candidates: [], foreign: [], api: null, rest: idsInJson(clean) ?? clean };
  takeAddresses(found);
  takeMembers(found);
  // Beside addresses and JSON, words such as "curl" or "status" are no IDs, unless they look like the vendor's.
  const structured = found.candidates.length > 0;
  for (const line of found.rest.replace(LABEL, " ").replace(BULLET, " ").split("\n")) {
    const words = line.split(SEPARATORS)
      .map((word) => word.replace(/^[.:=]+|[.:=!?]+$/g, "")).filter((word) => /[\p{L}\p{N}]/u.test(word));
    const hasVendors = words.some((word) => LIKE_VENDOR.test(word));
    found.candidates.push(...words.filter((word) => (structured
      ? LIKE_VENDOR.test(word) : !HEADING.test(word) && !(hasVendors && NOISE.test(word)))));
  }
  const unique = [...new Set(found.candidates)];
  return {
    taskIds: unique.filter((one) => VALID.test(one)),
    rejected: [
      ...unique.filter((one) => !VALID.test(one)).map((one) => ({ text: one, reason: whyInvalid(one) })),
      ...found.foreign.map((one) => ({ text: one, reason: "an address without a task ID" })),
    ],
    api: found.api,
  };
}

/** Take the IDs of this gateway's addresses: ?taskId=…, /v1/progress/… and /v1/results/…. */
function takeAddresses(found) {
  found.rest = found.rest.replace(ADDRESS, (address) => {
    let url;
    try {
      url = new URL(address, location.href);
    } catch {
      return address;
    }
    const inPath = /\/v1\/(?:progress|results)\/([^/]+)/.exec(url.pathname)?.[1];
    const ids = [...url.searchParams.getAll("taskId").flatMap((value) => value.split(/[\s,;]+/)), inPath && decode(inPath)];
    found.candidates.push(...ids.filter(Boolean));
    found.api ??= { sd: "sd", comfy: "comfy" }[url.searchParams.get("api")] ?? null;
    if (ids.some(Boolean)) return " ";
    if (!/^https?:/i.test(address)) return address;
    found.foreign.push(address);
    return " ";
  });
}

/** Take the values of members named taskId, task_id, taskIds or id, in JSON and in texts that are nearly JSON. */
function takeMembers(found) {
  found.rest = found.rest.replace(KEY_AND_VALUE, (_, _quote, _inner, value, list) => {
    found.candidates.push(...(list ?? value).split(SEPARATORS).filter(Boolean));
    return " ";
  });
  found.rest = found.rest.replace(ASSIGNED, (_, id) => {
    found.candidates.push(id);
    return " ";
  });
}

/** Return the IDs in a JSON text, or JSON lines, one per line; null if it is no such text, or names none. */
function idsInJson(text) {
  let values;
  try {
    values = [JSON.parse(text)];
  } catch {
    try {
      values = text.split("\n").filter((line) => line.trim()).map((line) => JSON.parse(line));
    } catch {
      return null;
    }
  }
  const sure = [];
  const likely = []; // [depth, text]: the outer ones belong to tasks, the inner ones to a user, for example
  function visit(value, name, depth) {
    if (typeof value === "string") {
      if (TASK_ID.test(name)) sure.push(value);
      else if (MAYBE_ID.test(name)) likely.push([depth, value]);
    } else if (Array.isArray(value)) {
      for (const item of value) visit(item, name, depth);
    } else if (value) {
      for (const [key, item] of Object.entries(value)) visit(item, key, depth + 1);
    }
  }
  for (const value of values) if (typeof value === "object") visit(value, "", 0);
  const least = Math.min(...likely.map(([depth]) => depth));
  const ids = sure.length ? sure : likely.filter(([depth]) => depth === least).map(([, id]) => id);
  return ids.length ? ids.join("\n") : null;
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function whyInvalid(text) {
  const wrong = [...text].find((one) => !/[A-Za-z0-9_-]/.test(one));
  if (wrong) return `“${wrong}” is not allowed in an ID`;
  return `${text.length} characters; an ID has at most 64`;
}
