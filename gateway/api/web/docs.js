// Renders openapi.json: operations by tag, then problem codes, then schemas.

import { element, describeProblem } from "./dom.js";
import { fold, followScrolling, search, showTarget } from "./navigation.js";
import { requestElements } from "./request_form.js";
import { recallQuery } from "./storage.js";

const METHODS = ["get", "post", "put", "patch", "delete"];
const at = (id) => document.getElementById(id);
let openapi = {};

/** Resolve local references such as "#/components/schemas/Progress". */
function resolve(node) {
  let found = node;
  for (let hops = 0; found?.$ref && hops < 10; hops += 1) {
    const names = found.$ref.replace(/^#\//, "").split("/");
    found = names.reduce((inside, name) => inside?.[name.replaceAll("~1", "/").replaceAll("~0", "~")], openapi);
  }
  return found ?? {};
}

/** Turn `code` in backticks into code elements. */
function prose(text = "") {
  return text.split("`").map((part, index) => (index % 2 ? element("code", {}, part) : part));
}

function slug(text) {
  return text.replace(/[^A-Za-z0-9]+/g, "-").replace(/^-|-$/g, "");
}

// --- schemas -------------------------------------------------------------------------------------

/** Return a short description of a schema; a named schema becomes a link. */
function describeType(schema = {}) {
  const name = schema.$ref?.match(/^#\/components\/schemas\/(.+)$/)?.[1];
  if (name) return [element("a", { href: `#schema-${slug(name)}` }, name)];
  const resolved = resolve(schema);
  const choices = resolved.anyOf ?? resolved.oneOf;
  if (choices) return choices.flatMap((choice, index) => [index ? " or " : "", ...describeType(choice)]);
  if (resolved.const !== undefined) return [element("code", {}, JSON.stringify(resolved.const))];
  if (resolved.enum) return resolved.enum.flatMap((value, index) => [index ? ", " : "", element("code", {}, String(value))]);
  if (resolved.items) return ["list of ", ...describeType(resolved.items)];
  return [[resolved.type ?? "anything"].flat().join(" or ")];
}

const LIMITS = [
  ["minimum", "at least"], ["maximum", "at most"], ["minItems", "at least"], ["maxItems", "at most"],
  ["pattern", "matches"], ["default", "default"], ["example", "for example"],
];

function limits(...sources) {
  const schema = Object.assign({}, ...sources);
  if (schema.examples?.length) schema.example ??= schema.examples[0];
  return LIMITS.filter(([key]) => schema[key] !== undefined)
    .flatMap(([key, label]) => [`; ${label} `, element("code", {}, asText(schema[key]))]);
}

function member(name, schema, { description, needed, where, example } = {}) {
  const resolved = resolve(schema);
  const text = description ?? resolved.description;
  return element("div", {},
    element("dt", {}, element("code", {}, name), needed ? element("span", { class: "needed" }, "required") : ""),
    element("dd", {},
      element("p", { class: "type" }, where ? `${where}: ` : "", ...describeType(schema),
        ...limits(schema.$ref ? {} : resolved, example === undefined ? {} : { example })),
      text ? element("p", {}, ...prose(text)) : "",
      schema.$ref ? "" : nested(resolved)));
}

/** Return the members of all nested objects of a schema; named schemas are links instead. */
function nested(schema) {
  if (schema.properties) return members(schema);
  const inner = [schema.items, ...(schema.anyOf ?? schema.oneOf ?? [])].filter((one) => one && !one.$ref);
  const lists = inner.map(nested).filter(Boolean);
  return lists.length ? element("div", {}, ...lists) : "";
}

function members(schema) {
  const needed = new Set(schema.required);
  return element("dl", { class: "members" },
    ...Object.entries(schema.properties).map(([name, one]) => member(name, one, { needed: needed.has(name) })));
}

// --- operations ----------------------------------------------------------------------------------

function asText(value, indent) {
  return typeof value === "string" ? value : JSON.stringify(value, null, indent);
}

function example(value) {
  const text = asText(value, 2);
  return element("pre", { tabindex: "0", role: "group", "aria-label": "Example" }, element("code", {}, text));
}

function content(bodies = {}) {
  return Object.entries(bodies).flatMap(([type, { schema = {}, example: one, examples }]) => {
    const { example: general, examples: [first] = [] } = resolve(schema);
    const shown = one ?? Object.values(examples ?? {})[0]?.value ?? general ?? first;
    return [
      element("p", {}, element("code", {}, type), ": ", ...describeType(schema)),
      schema.$ref ? "" : nested(schema),
      shown === undefined ? "" : example(shown),
    ];
  });
}

function response(status, given) {
  const { description, headers, content: bodies } = resolve(given);
  const names = Object.entries(headers ?? {});
  return element("details", { class: "response", ...(status.startsWith("2") && bodies ? { open: "" } : {}) },
    element("summary", {}, element("span", { class: `code code-${status[0]}` }, status),
      element("span", {}, ...prose(description))),
    element("div", {}, ...content(bodies),
      names.length ? element("h4", {}, "Headers") : "",
      names.length ? element("dl", { class: "members" }, ...names.map(([name, header]) =>
        member(name, resolve(header).schema ?? {}, { description: resolve(header).description }))) : ""));
}

function operation({ path, method, head, details }) {
  const parameters = (details.parameters ?? []).map(resolve);
  const body = details.requestBody && resolve(details.requestBody);
  const stream = Object.values(details.responses ?? {}).some((one) => resolve(one).content?.["text/event-stream"]);
  return folding("article", { class: "operation", id: `operation-${slug(`${method} ${path}`)}` },
    element("h3", {}, element("span", { class: `method method-${method}` }, method.toUpperCase()),
      head ? element("span", { class: "method" }, "HEAD") : "", path),
    element("p", { class: "what" }, details.summary ?? ""),
    details.description ? element("p", {}, ...prose(details.description)) : "",
    ...requestElements({
      path, method, stream, body: Object.values(body?.content ?? {})[0]?.example,
      parameters: parameters.map((one) => ({ ...one, schema: resolve(one.schema ?? {}) })),
    }),
    parameters.length ? element("h4", {}, "Parameters") : "",
    parameters.length ? element("dl", { class: "members" }, ...parameters.map((one) =>
      member(one.name, one.schema ?? {}, { ...one, needed: one.required, where: one.in }))) : "",
    body ? element("h4", {}, "Body") : "",
    ...(body ? content(body.content) : []),
    element("h4", {}, "Responses"),
    ...Object.entries(details.responses ?? {}).map(([status, given]) => response(status, given)));
}

/** Return an element whose content after the heading can be folded. */
function folding(tag, attributes, heading, ...content) {
  return element(tag, attributes, element("details", { open: "" }, element("summary", {}, heading), ...content));
}

function operations() {
  return Object.entries(openapi.paths).flatMap(([path, item]) =>
    METHODS.filter((method) => item[method]).map((method) => ({
      path, method, details: item[method],
      head: method === "get" && Boolean(item.head), // HEAD is the same without a body and has no entry of its own
    })));
}

/** List the problem codes with their HTTP statuses, from the extension `x-problem-codes`. */
function problemCodes() {
  const { "x-problem-codes": codes = {} } = resolve({ $ref: "#/components/schemas/Problem/properties/code" });
  return element("dl", { class: "members" }, ...Object.entries(codes).map(([code, status]) =>
    element("div", {}, element("dt", {}, element("code", {}, code)), element("dd", {}, `HTTP ${status}`))));
}

// --- the page ------------------------------------------------------------------------------------

function section(title, text, ...children) {
  const id = slug(title);
  return element("section", { id, "aria-labelledby": `${id}-heading` },
    element("h2", { id: `${id}-heading` }, title), text ? element("p", {}, ...prose(text)) : "", ...children);
}

function link(target, ...children) {
  return element("li", {}, element("a", { href: `#${target}` }, ...children));
}

function render() {
  const all = operations();
  const named = (openapi.tags ?? []).map(({ name }) => name);
  const tagOf = ({ details }) => details.tags?.[0] ?? "Other";
  const tags = [...new Set([...named, ...all.map(tagOf)])].filter((tag) => all.some((one) => tagOf(one) === tag));
  const schemas = Object.entries(openapi.components?.schemas ?? {});
  const contents = element("ul");
  for (const tag of tags) {
    const mine = all.filter((one) => tagOf(one) === tag);
    const text = openapi.tags?.find(({ name }) => name === tag)?.description;
    at("operations").append(section(tag, text, ...mine.map(operation)));
    const group = link(slug(tag), tag);
    group.append(element("ul", {}, ...mine.map(({ path, method }) => link(`operation-${slug(`${method} ${path}`)}`, path))));
    contents.append(group);
  }
  const codes = problemCodes();
  if (codes.childElementCount) {
    at("operations").append(section("Problem codes", "Values of `code` in a problem, with the HTTP status.",
      element("article", { class: "schema" }, codes)));
    contents.append(link("Problem-codes", "Problem codes"));
  }
  if (schemas.length) {
    at("operations").append(section("Schemas", "", ...schemas.map(([name, schema]) =>
      folding("article", { class: "schema", id: `schema-${slug(name)}` }, element("h3", {}, name),
        schema.description ? element("p", {}, ...prose(schema.description)) : "",
        schema.properties ? members(schema) : element("p", {}, ...describeType(schema), ...limits(schema))))));
    contents.append(link("Schemas", "Schemas"));
  }
  at("contents").replaceChildren(contents);
  at("title").textContent = `${openapi.info?.title ?? "API"} ${openapi.info?.version ?? ""}`;
  at("lead").replaceChildren(...prose(openapi.info?.description ?? ""));
}

async function load() {
  try {
    const response = await fetch("openapi.json");
    if (!response.ok) throw new Error(`The gateway responded with HTTP ${response.status}.`);
    openapi = await response.json();
    if (!openapi.paths) throw new Error("The document is empty.");
    render();
    at("docs").hidden = false;
    at("status").textContent = "";
    // The browser looked up the fragment of the address before the content existed.
    showTarget();
    followScrolling();
    at("search").addEventListener("input", search);
    at("fold").addEventListener("click", fold);
    addEventListener("hashchange", showTarget);
  } catch (error) {
    at("status").className = "problem";
    at("status").replaceChildren(...describeProblem({ title: "The API description cannot be shown", detail: error.message }));
  }
}

// The links back lead to the tasks that this tab watches. They may have changed when a cached page is restored.
const links = document.querySelectorAll('.masthead a[href="./"]');
const linkBack = () => links.forEach((link) => link.setAttribute("href", `./${recallQuery()}`));
addEventListener("pageshow", linkBack);
linkBack();
load();
