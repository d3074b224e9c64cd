/** The request failed, and a retry would fail in the same way. */
export class Refused extends Error {}

/**
 * Yield { event, data } for each "progress" and "problem", until all tasks have ended.
 *
 * `seconds` bounds the whole wait. A connection without data for `silence` seconds counts as lost. A stream begins at
 * once. If it does not begin within `opening` seconds, but the gateway responds, long polls replace it.
 */
export async function* follow(gateway, taskIds, { seconds, silence = 45, opening = 5 }) {
  const url = new URL("v1/events", gateway);
  for (const taskId of taskIds) url.searchParams.append("taskId", taskId);
  const deadline = Date.now() + seconds * 1000;
  let lastId = "";
  let retry = 2000;
  let failures = 0;
  while (Date.now() < deadline) {
    let retryAfter = 0;
    let began = false;
    let late = false;
    const connection = new AbortController();
    let timer;
    const within = (limit) => {
      clearTimeout(timer);
      const expire = () => {
        late = !began;
        connection.abort();
      };
      timer = setTimeout(expire, Math.min(limit * 1000, deadline - Date.now()));
    };
    const received = () => {
      began = true;
      within(silence);
    };
    within(Math.min(opening, silence));
    try {
      const response = await fetch(url, {
        headers: { Accept: "text/event-stream", ...(lastId && { "Last-Event-ID": lastId }) },
        signal: connection.signal,
      });
      if (response.status === 200) {
        for await (const message of messages(response.body, received)) {
          failures = 0;
          lastId = message.id ?? lastId;
          retry = Number(message.retry ?? retry);
          if (message.event === "end") return;
          if (message.event) yield { event: message.event, data: JSON.parse(message.data) };
        }
      } else if (response.status < 500 && response.status !== 429) {
        throw new Refused(await response.text());
      } else {
        retryAfter = 1000 * (Number(response.headers.get("retry-after")) || 0);
      }
    } catch (error) {
      if (error instanceof Refused) throw error; // otherwise the gateway restarted, or the network failed
    } finally {
      clearTimeout(timer);
      connection.abort(); // also when the caller stops iterating
    }
    if (late && (await responds(gateway, taskIds))) {
      console.warn("the event stream did not begin: a proxy buffers it; using long polls instead");
      yield* poll(gateway, taskIds, { deadline });
      return;
    }
    const pause = Math.max(Math.min(retry * 2 ** failures, 30000) * (0.5 + Math.random() / 2), retryAfter);
    failures += 1;
    await new Promise((resolve) => setTimeout(resolve, Math.min(pause, deadline - Date.now() + 1)));
  }
  throw new Error(`${taskIds.join(", ")}: did not end within ${seconds} s`);
}

/** Resolve to whether the gateway responds to a request. */
async function responds(gateway, taskIds) {
  try {
    return (await request(gateway, taskIds, {})).ok;
  } catch {
    return false;
  }
}

function request(gateway, taskIds, { etag = "", wait = 0 }) {
  const url = new URL("v1/progress", gateway);
  for (const taskId of taskIds) url.searchParams.append("taskId", taskId);
  if (etag) url.searchParams.set("wait", Math.floor(wait));
  return fetch(url, {
    cache: "no-store",
    headers: etag ? { "If-None-Match": etag } : {},
    signal: AbortSignal.timeout((wait + 15) * 1000),
  });
}

/** Yield the same as `follow`, by long polls. A task that is rejected for `unknown` seconds has ended. */
export async function* poll(gateway, taskIds, { deadline, unknown = 30 }) {
  let etag = "";
  let failures = 0;
  const shown = new Map();
  const rejected = new Map();
  for (let left; (left = deadline - Date.now()) > 0; ) {
    const rests = [...rejected.values()].map((since) => unknown - (Date.now() - since) / 1000);
    const wait = Math.min(25, left / 1000, ...rests.filter((rest) => rest > 0));
    let response;
    try {
      response = await request(gateway, taskIds, { etag, wait });
      if (response.status === 200) {
        const { items } = await response.json();
        etag = response.headers.get("etag");
        // As in the events of a stream, without the two fields about the age.
        for (const { error, ageSeconds, stale, ...item } of items) {
          // The IDs in a problem differ from request to request.
          const text = error ? `${error.code}: ${error.detail}` : JSON.stringify(item);
          if (shown.get(item.taskId)?.text !== text) {
            if (error) yield { event: "problem", data: { ...item, ...error } };
            else yield { event: "progress", data: item };
          }
          if (error?.code !== "upstream-rejected") rejected.delete(item.taskId);
          else if (!rejected.has(item.taskId)) rejected.set(item.taskId, Date.now());
          shown.set(item.taskId, { text, terminal: item.terminal });
        }
      }
    } catch (error) {
      response = undefined; // the gateway restarted, or the network failed
    }
    const ok = response?.status === 200 || response?.status === 304;
    if (response && !ok && response.status < 500 && response.status !== 429) throw new Refused(await response.text());
    const ended = (taskId) => shown.get(taskId)?.terminal || Date.now() - rejected.get(taskId) >= unknown * 1000;
    if (taskIds.every(ended)) return;
    failures = ok ? 0 : failures + 1;
    let pause = failures ? Math.min(2 ** failures, 30) * 1000 * (0.5 + Math.random() / 2) : 500;
    if (failures) pause = Math.max(pause, 1000 * (Number(response?.headers.get("retry-after")) || 0));
    await new Promise((resolve) => setTimeout(resolve, Math.min(pause, deadline - Date.now() + 1)));
  }
  throw new Error(`${taskIds.join(", ")}: did not end in time`);
}

/** Yield the fields of each message. A heartbeat comment gives a field with an empty name. */
async function* messages(body, received) {
  let rest = "";
  let fields = {};
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part; !(part = await reader.read()).done; ) {
    received();
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const colon = line.indexOf(": ");
      if (line) fields[line.slice(0, Math.max(colon, 0))] = line.slice(colon + 2);
      else {
        yield fields;
        fields = {};
      }
    }
  }
}
