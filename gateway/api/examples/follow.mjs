/** The request failed, and a retry would fail in the same way. */
export class Refused extends Error {}

/**
 * Yield { event, data } for each "progress" and "problem", until all tasks have ended.
 *
 * `seconds` bounds the whole wait. A connection without data for `silence` seconds counts as lost.
 */
export async function* follow(gateway, taskIds, { seconds, silence = 45 }) {
  const url = new URL("v1/events", gateway);
  for (const taskId of taskIds) url.searchParams.append("taskId", taskId);
  const deadline = Date.now() + seconds * 1000;
  let lastId = "";
  let retry = 2000;
  let failures = 0;
  while (Date.now() < deadline) {
    let retryAfter = 0;
    const connection = new AbortController();
    let timer;
    const received = () => {
      clearTimeout(timer);
      timer = setTimeout(() => connection.abort(), Math.min(silence * 1000, deadline - Date.now()));
    };
    received();
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
    const pause = Math.max(Math.min(retry * 2 ** failures, 30000) * (0.5 + Math.random() / 2), retryAfter);
    failures += 1;
    await new Promise((resolve) => setTimeout(resolve, Math.min(pause, deadline - Date.now() + 1)));
  }
  throw new Error(`${taskIds.join(", ")}: did not end within ${seconds} s`);
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
