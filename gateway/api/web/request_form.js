// A request of the API page: its inputs, the samples in three languages, and sending it.

import { copyButton } from "./copy.js";
import { element, setText } from "./dom.js";

const LANGUAGES = { curl, Python: python, JavaScript: javascript };
const MOST_CHARS = 200_000; // of a shown body
const chosen = { language: "curl", views: new Set() }; // the same in all operations

/** Return the elements that show and send requests of an operation. `parameters` and `body` are resolved. */
export function requestElements({ path, method, parameters, body, stream }) {
  const inputs = parameters.map((parameter) => ({ parameter, input: inputFor(parameter, path) }));
  const text = body && element("textarea", { rows: "3", spellcheck: "false", "aria-label": `Body of ${path}` }, JSON.stringify(body, null, 2));
  const read = () => build({ path, method, stream, values: inputs.map(({ parameter, input }) => [parameter, input.value.trim()]), body: text?.value });
  const form = element("form", { class: "request-inputs" },
    ...inputs.map(({ parameter, input }) => element("label", {}, element("code", {}, parameter.name), input)), text ?? "",
    element("div", { class: "request-buttons" }, element("button", { class: "primary small" }, "Send")));
  const answer = element("div", { class: "answer", role: "region", "aria-label": `Response of ${path}`, tabindex: "0", hidden: "" });
  const code = samples(read, path);
  form.addEventListener("input", code.update);
  let sending = null;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    sending?.abort();
    sending = new AbortController();
    answer.hidden = false;
    await send(read(), answer, sending);
  });
  return [code.node, element("details", { class: "try" }, element("summary", {}, "Try it"), form, answer)];
}

function inputFor({ name, schema, required, example }, path) {
  const label = { "aria-label": `${name} of ${path}`, autocomplete: "off", spellcheck: "false" };
  if (schema?.enum) return element("select", label, ...["", ...schema.enum].map((value) => element("option", { value }, value || "–")));
  const input = element("input", { ...label, ...(required ? { required: "" } : {}), placeholder: example ?? "" });
  if (name === "taskId") input.value = "demo-1";
  return input;
}

function build({ path, method, stream, values, body }) {
  const url = new URL(path.slice(1).replace(/\{(\w+)\}/g, (_, name) =>
    encodeURIComponent(values.find(([one]) => one.in === "path" && one.name === name)?.[1] || name)), document.baseURI);
  const headers = body ? { "Content-Type": "application/json" } : {};
  for (const [{ name, in: where, schema }, value] of values) {
    if (!value) continue;
    if (where === "header") headers[name] = value;
    const each = schema?.type === "array" ? value.split(/[\s,]+/).filter(Boolean) : [value];
    if (where === "query") for (const one of each) url.searchParams.append(name, one);
  }
  return { url: url.href, method: method.toUpperCase(), headers, body, stream };
}

// --- samples -------------------------------------------------------------------------------------

function samples(read, path) {
  const code = element("code");
  const buttons = Object.keys(LANGUAGES).map((language) => {
    const button = element("button", { type: "button", class: "chip" }, language);
    button.addEventListener("click", () => {
      chosen.language = language;
      for (const view of chosen.views) view();
    });
    return button;
  });
  function update() {
    setText(code, LANGUAGES[chosen.language](read()));
    for (const button of buttons) button.setAttribute("aria-pressed", button.textContent === chosen.language);
  }
  chosen.views.add(update);
  update();
  const node = element("div", { class: "samples" },
    element("div", { class: "chips", role: "group", "aria-label": `Language of the sample of ${path}` }, ...buttons, copyButton(`the sample of ${path}`, () => code.textContent)),
    element("pre", { tabindex: "0", role: "group", "aria-label": `Sample of ${path}` }, code));
  return { node, update };
}

function shell(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function curl({ url, headers, body, stream }) {
  const parts = [stream ? "curl --no-buffer" : "curl", shell(url), ...Object.entries(headers).map(([name, value]) => `--header ${shell(`${name}: ${value}`)}`)];
  if (body) parts.push(`--data ${shell(body)}`);
  return parts.join(parts.length > 2 ? " \\\n  " : " ");
}

function python({ url, method, headers, body, stream }) {
  const given = [JSON.stringify(url), Object.keys(headers).length ? `headers=${JSON.stringify(headers)}` : "", body ? `content=${JSON.stringify(body)}` : ""];
  const call = given.filter(Boolean).join(", ");
  if (!stream) return `import httpx\n\nresponse = httpx.${method.toLowerCase()}(${call})\nprint(response.status_code, response.text)`;
  return `import httpx\n\nwith httpx.stream("GET", ${call}, timeout=60) as response:\n    for line in response.iter_lines():\n        print(line)`;
}

function javascript({ url, method, headers, body, stream }) {
  if (stream) {
    return `const source = new EventSource(${JSON.stringify(url)});\nfor (const kind of ["progress", "stale", "problem"]) {\n  source.addEventListener(kind, (event) => console.log(kind, JSON.parse(event.data)));\n}\nsource.addEventListener("end", () => source.close());`;
  }
  const options = { ...(method === "GET" ? {} : { method }), ...(Object.keys(headers).length ? { headers } : {}), ...(body ? { body } : {}) };
  const second = Object.keys(options).length ? `, ${JSON.stringify(options, null, 2)}` : "";
  return `const response = await fetch(${JSON.stringify(url)}${second});\nconsole.log(response.status, await response.text());`;
}

// --- sending -------------------------------------------------------------------------------------

async function send({ url, method, headers, body }, answer, sending) {
  const stop = element("button", { type: "button", class: "quiet" }, "Stop");
  stop.addEventListener("click", () => sending.abort());
  const status = element("p", { role: "status" }, "Waiting for the response ");
  const text = element("code");
  answer.replaceChildren(element("div", { class: "answer-head" }, status, stop), element("pre", {}, text));
  const began = performance.now();
  try {
    const response = await fetch(url, { method, headers, body: body || undefined, cache: "no-store", signal: sending.signal });
    status.replaceChildren(element("strong", { class: `code code-${String(response.status)[0]}` }, String(response.status)),
      ` ${response.statusText} after ${Math.round(performance.now() - began)} ms`);
    const received = [...response.headers].map(([name, value]) => `${name}: ${value}`).join("\n");
    answer.insertBefore(element("details", {}, element("summary", {}, "Headers"), element("pre", {}, element("code", {}, received))), answer.lastChild);
    await show(response, text);
  } catch (error) {
    if (error.name !== "AbortError") status.textContent = `No response: ${error.message}`;
  }
  stop.remove();
}

/** Show a body as it arrives; JSON is indented at its end. */
async function show(response, text) {
  let all = "";
  const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
  for (let part = await reader?.read(); part && !part.done; part = await reader.read()) {
    all = (all + part.value).slice(-MOST_CHARS);
    text.textContent = all;
  }
  if (/json/.test(response.headers.get("Content-Type") ?? "") && all) text.textContent = JSON.stringify(JSON.parse(all), null, 2);
}
