// The images of a finished task: small views that open the image, links to download it, and the renewal of links that
// have expired.
//
// The images come from the vendor's storage, not from the gateway. They are requested without a referrer, because the
// page's address contains task IDs. If the gateway does not offer results, nothing is shown.
//
// A browser saves an image of another origin only if a script may read it, which the storage has to allow (CORS). If it
// does not, the image is opened, and a note tells how to save it.

import { element, setText } from "./dom.js";
import { clock } from "./words.js";

const AT_ONCE = 2; // requests for results
const MOST_TRIES = 5; // while a result is not finished although the task is
const RENEW_PAUSE_SECONDS = 15; // between two renewals that a broken image causes
const off = new Set(); // APIs without results
const unreadable = new Set(); // origins whose images a script may not read

let running = 0;
const waiting = [];
const galleries = new WeakMap(); // by node
// Only the results of cards on the screen, or near it, are requested.
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) if (isIntersecting) galleries.get(target).onVisible();
}, { rootMargin: "300px" });

export class Gallery {
  #node;
  #id;
  #api;
  #images = []; // [{url}]
  #expiresAt = null; // seconds
  #askedAt = 0;
  #tries = 0;
  #asking = false;
  #wanted = false;
  #note = null;

  constructor(node, id, api) {
    this.#node = node;
    this.#id = id;
    this.#api = api;
    galleries.set(node, this);
  }

  /** Show the images, once the card is on the screen. */
  want() {
    if (this.#wanted || off.has(this.#api)) return;
    this.#wanted = true;
    this.#node.hidden = false; // an element that is not displayed is never visible to the observer
    observer.observe(this.#node);
  }

  onVisible() {
    observer.unobserve(this.#node);
    this.#ask();
  }

  /** Renew the links when they have expired and the page is looked at. */
  tick(now) {
    if (this.#expiresAt !== null && now > this.#expiresAt && !document.hidden) this.#renew(now);
  }

  close() {
    observer.unobserve(this.#node);
  }

  #renew(now) {
    if (now - this.#askedAt >= RENEW_PAUSE_SECONDS) this.#ask();
  }

  #ask() {
    if (this.#asking) return;
    this.#asking = true;
    waiting.push(() => this.#query());
    next();
  }

  async #query() {
    this.#askedAt = Date.now() / 1000;
    const { result, problem, status, retryAfter } = await getResult(this.#id, this.#api);
    this.#asking = false;
    this.#tries += 1;
    if (result) {
      this.#tries = 0;
      this.#show(result.images ?? []);
    } else if (status === 409 && this.#tries < MOST_TRIES) {
      setTimeout(() => this.#ask(), retryAfter * 1000);
    } else if (status >= 400 && status < 500 && status !== 409 && status !== 429) {
      off.add(this.#api);
      this.#node.hidden = true;
    } else if (!this.#images.length) {
      const again = element("button", { type: "button", class: "quiet" }, "Try again");
      again.addEventListener("click", () => this.#ask());
      const why = problem?.title ?? "no response from the gateway";
      this.#node.replaceChildren(element("p", { class: "images-note" }, `The images are not available: ${why}. `, again));
    }
  }

  #show(images) {
    this.#images = images.filter((image) => isWebAddress(image?.url));
    this.#expiresAt = earliest(this.#images.map(({ url }) => expiry(url)));
    this.#node.hidden = this.#images.length === 0;
    const figures = this.#images.map(({ url }, index) => this.#figure(url, index));
    const renew = element("button", { type: "button", class: "quiet" }, "Renew links");
    renew.addEventListener("click", () => this.#ask());
    this.#note = element("span");
    this.#node.replaceChildren(element("ul", { class: "gallery" }, ...figures), element("p", { class: "images-note" }, this.#note, " ", renew));
    this.#showNote();
  }

  #showNote() {
    const expire = this.#expiresAt === null ? "The links expire." : `The links expire at ${clock(this.#expiresAt)}.`;
    const manual = this.#images.some(({ url }) => unreadable.has(new URL(url).origin));
    setText(this.#note, manual ? `Save an image in the tab that it opens in, with Ctrl+S or a long press. ${expire}` : expire);
  }

  /** Save an image as a file. If a script may not read it, open it. */
  async #save(link, url) {
    link.setAttribute("aria-busy", "true");
    setText(link, "Downloading…");
    let words = "Download";
    try {
      // A cached response to the image element may lack the headers that allow a script to read it.
      const response = await fetch(url, { cache: "no-store", credentials: "omit", referrerPolicy: "no-referrer" });
      if (response.ok) {
        const blob = await response.blob();
        words = "Downloaded";
        saveAs(blob, link.download);
      } else {
        words = "Expired: try again";
        this.#ask();
      }
    } catch {
      unreadable.add(new URL(url).origin);
      this.#showNote();
      open(url, "_blank", "noopener,noreferrer");
    }
    link.removeAttribute("aria-busy");
    setText(link, words);
  }

  #figure(url, index) {
    const many = this.#images.length;
    const name = many === 1 ? `Image of ${this.#id}` : `Image ${index + 1} of ${many} of ${this.#id}`;
    const privately = { rel: "noopener noreferrer", referrerpolicy: "no-referrer", target: "_blank" };
    const image = element("img", { alt: name, loading: "lazy", decoding: "async", referrerpolicy: "no-referrer", src: url });
    const open = element("a", { class: "thumbnail", href: url, title: "Open the image", ...privately }, image);
    const extension = /\.(png|jpe?g|webp|gif|avif)$/i.exec(new URL(url).pathname)?.[0] ?? "";
    const download = element("a", {
      class: "download", href: url, download: `${this.#id}${many > 1 ? `-${index + 1}` : ""}${extension}`,
      "aria-label": `Download ${name.charAt(0).toLowerCase()}${name.slice(1)}`, ...privately,
    }, "Download");
    download.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey || unreadable.has(new URL(url).origin)) return; // the link opens it
      event.preventDefault();
      if (!download.ariaBusy) this.#save(download, url);
    });
    image.addEventListener("error", () => {
      // A second failure after a renewal has another cause.
      if (Date.now() / 1000 - this.#askedAt >= RENEW_PAUSE_SECONDS) return this.#ask();
      open.replaceChildren(element("span", { class: "broken" }, "The image cannot be shown here. Open it"));
    });
    return element("li", {}, open, download);
  }
}

function saveAs(blob, name) {
  // Without an extension in its address, the image gets that of its type.
  const extension = /\.\w+$/.test(name) ? "" : `.${{ "image/jpeg": "jpg" }[blob.type] ?? (/^image\/(\w+)/.exec(blob.type)?.[1] || "png")}`;
  const href = URL.createObjectURL(blob);
  element("a", { href, download: `${name}${extension}` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}

function next() {
  if (running >= AT_ONCE || waiting.length === 0) return;
  running += 1;
  waiting.shift()().finally(() => {
    running -= 1;
    next();
  });
}

/** Return {result}, or {problem, status, retryAfter}; status 0 means that there is no response. */
async function getResult(id, api) {
  try {
    const response = await fetch(`v1/results/${encodeURIComponent(id)}?api=${api}`, { cache: "no-store" });
    if (response.ok) return { result: await response.json() };
    const problem = await response.json().catch(() => null);
    return { problem, status: response.status, retryAfter: Number(response.headers.get("Retry-After")) || 2 };
  } catch {
    return { status: 0 };
  }
}

/** An address of another kind, such as javascript:, or with a password, is not made a link. */
function isWebAddress(text) {
  try {
    const { protocol, username, password } = new URL(text);
    return ["https:", "http:"].includes(protocol) && !username && !password;
  } catch {
    return false;
  }
}

const LONGEST_LINK_SECONDS = 366 * 24 * 3600; // a later end is a mark for "never", such as 9223372036854775807

/** Return when a signed link expires, in seconds, or null if it does not say so. */
export function expiry(url) {
  const time = signedExpiry(url);
  return time > 0 && time < Date.now() / 1000 + LONGEST_LINK_SECONDS ? time : null;
}

function signedExpiry(url) {
  const given = new Map([...new URL(url).searchParams].map(([name, value]) => [name.toLowerCase(), value]));
  if (given.has("expires")) return Number(given.get("expires"));
  for (const vendor of ["x-amz", "x-oss", "x-goog"]) {
    const date = /^(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z$/.exec(given.get(`${vendor}-date`));
    const seconds = Number(given.get(`${vendor}-expires`));
    if (date && seconds) {
      const [, year, month, day, hour, minute, second] = date.map(Number);
      return Date.UTC(year, month - 1, day, hour, minute, second) / 1000 + seconds;
    }
  }
  return NaN;
}

function earliest(times) {
  const known = times.filter((time) => time !== null);
  return known.length ? Math.min(...known) : null;
}
