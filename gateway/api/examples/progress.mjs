/** The request failed, and a retry would fail in the same way. */
export class Refused extends Error {}

/**
 * Resolve to the final progress of a task; reject with Refused, or with an Error on timeout.
 *
 * `seconds` bounds the whole wait. `wait` is the length of a long poll in seconds; 0 polls instead. A new task is
 * unknown to the vendor for a moment: it may be rejected for `unknown` seconds.
 */
export async function finished(gateway, taskId, { seconds, wait = 30, unknown = 30 }) {
  const deadline = Date.now() + seconds * 1000;
  let knownBy = Date.now() + unknown * 1000;
  let etag = "";
  let failures = 0;
  let lastError = "still running";
  for (let left; (left = deadline - Date.now()) > 0; ) {
    let pause;
    let response;
    try {
      const url = new URL(`v1/progress/${encodeURIComponent(taskId)}`, gateway);
      if (etag) url.searchParams.set("wait", Math.floor(Math.min(wait, left / 1000)));
      response = await fetch(url, {
        cache: "no-store", // otherwise the browser's cache turns a 304 of the gateway into a 200
        headers: etag ? { "If-None-Match": etag } : {},
        signal: AbortSignal.timeout((wait + 15) * 1000),
      });
      if (response.status === 200) {
        const progress = await response.json();
        if (progress.terminal) return progress;
        etag = response.headers.get("etag");
      }
    } catch (error) {
      response = undefined; // no response, or an incomplete one
      lastError = String(error);
    }
    if (response?.status === 200 || response?.status === 304) {
      failures = 0;
      lastError = "still running";
      knownBy = Date.now() + unknown * 1000;
      pause = wait ? 0.5 : lifetime(response);
    } else {
      failures += 1;
      pause = Math.min(2 ** failures, 30) * (0.5 + Math.random() / 2);
      const rest = (knownBy - Date.now()) / 1000; // afterwards a rejection is final
      if (rest > 0) pause = Math.min(pause, rest);
      if (response) {
        lastError = await problem(response, Date.now() < knownBy);
        pause = Math.max(pause, Number(response.headers.get("retry-after")) || 0);
      }
    }
    await new Promise((resolve) => setTimeout(resolve, Math.min(pause * 1000, deadline - Date.now() + 1)));
  }
  throw new Error(`${taskId} did not end within ${seconds} s: ${lastError}`);
}

/** Resolve to the URLs of the images of a task that has succeeded. They expire: download the images soon. */
export async function imageUrls(gateway, taskId) {
  const url = new URL(`v1/results/${encodeURIComponent(taskId)}`, gateway);
  const response = await fetch(url, { signal: AbortSignal.timeout(30_000) });
  if (!response.ok) throw new Error(`HTTP status ${response.status}`);
  return (await response.json()).images.map((image) => image.url);
}

/** Return the lifetime of a response in seconds, at least 1. */
function lifetime(response) {
  const maxAge = /max-age=(\d+)/.exec(response.headers.get("cache-control"));
  return Math.max(1, maxAge ? Number(maxAge[1]) : 0);
}

/** Resolve to the error message; reject with Refused if a retry would not help. */
async function problem(response, mayBeNew) {
  const body = await response.json().catch(() => null); // null: the response is from a proxy
  const reason = body?.upstream?.errMessage; // the vendor's, if there is one
  const message = body?.code
    ? `${body.code}: ${body.detail}${reason ? `: ${reason}` : ""} (${body.requestId})`
    : `HTTP status ${response.status}`;
  const permanent =
    body?.code === "upstream-rejected" ? !mayBeNew : response.status < 500 && response.status !== 429;
  if (permanent) throw new Refused(message);
  return message;
}
