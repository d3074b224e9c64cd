// Shows openapi.json to people: operations by tag, then the problem codes, then the schemas.

import { element, problemWords } from "./dom.js";

const METHODS = ["get", "post", "put", "patch", "delete"];
const at = (id) => document.getElementById(id);
let openapi = {};

/** Follow local references: "#/components/schemas/Progress" to what stands there. */
function resolve(node) {
  let found = node;
  for (let hops = 0; found?.$ref && hops < 10; hops += 1) {
    const names = found.$ref.replace(/^#\//, "").split("/");
    found = names.reduce((inside, name) => inside?.[name.replaceAll("~1", "/").replaceAll("~0", "~")], openapi);
  }
  return found ?? {};
}

/** Text with `code` in backticks, as the document writes it. */
function prose(text = "") {
  return text.split("`").map((part, index) => (index % 2 ? element("code", {}, part) : part));
}

function slug(text) {
  return text.replace(/[^A-Za-z0-9]+/g, "-").replace(/^-|-$/g, "");
}

// --- schemas -------------------------------------------------------------------------------------

/** A schema in a few words; a named one is a link to where it is shown whole. */
function typeWords(schema = {}) {
  const name = schema.$ref?.match(/^#\/components\/schemas\/(.+)$/)?.[1];
  if (name) return [element("a", { href: `#schema-${slug(name)}` }, name)];
  const resolved = resolve(schema);
  const choices = resolved.anyOf ?? resolved.oneOf;
  if (choices) return choices.flatMap((choice, index) => [index ? " or " : "", ...typeWords(choice)]);
  if (resolved.const !== undefined) return [element("code", {}, JSON.stringify(resolved.const))];
  if (resolved.enum) return resolved.enum.flatMap((value, index) => [index ? ", " : "", element("code", {}, String(value))]);
  if (resolved.items) return ["list of ", ...typeWords(resolved.items)];
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
    .flatMap(([key, words]) => [`; ${words} `, element("code", {}, asText(schema[key]))]);
}

function member(name, schema, { description, needed, where, example } = {}) {
  const resolved = resolve(schema);
  const text = description ?? resolved.description;
  return element("div", {},
    element("dt", {}, element("code", {}, name), needed ? element("span", { class: "needed" }, "required") : ""),
    element("dd", {},
      element("p", { class: "type" }, where ? `${where}: ` : "", ...typeWords(schema),
        ...limits(schema.$ref ? {} : resolved, example === undefined ? {} : { example })),
      text ? element("p", {}, ...prose(text)) : "",
      schema.$ref ? "" : nested(resolved)));
}

/** The members of the objects in a schema, however deep; named schemas are links instead. */
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
      element("p", {}, element("code", {}, type), ": ", ...typeWords(schema)),
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
  return element("article", { class: "operation", id: `operation-${slug(`${method} ${path}`)}` },
    element("h3", {}, element("span", { class: `method method-${method}` }, method.toUpperCase()),
      head ? element("span", { class: "method" }, "HEAD") : "", path),
    element("p", {}, details.summary ?? ""),
    details.description ? element("p", {}, ...prose(details.description)) : "",
    parameters.length ? element("h4", {}, "Parameters") : "",
    parameters.length ? element("dl", { class: "members" }, ...parameters.map((one) =>
      member(one.name, one.schema ?? {}, { ...one, needed: one.required, where: one.in }))) : "",
    body ? element("h4", {}, "Body") : "",
    ...(body ? content(body.content) : []),
    element("h4", {}, "Answers"),
    ...Object.entries(details.responses ?? {}).map(([status, given]) => response(status, given)));
}

function operations() {
  return Object.entries(openapi.paths).flatMap(([path, item]) =>
    METHODS.filter((method) => item[method]).map((method) => ({
      path, method, details: item[method],
      head: method === "get" && Boolean(item.head), // it is the same without a body: no entry of its own
    })));
}

/** Problem codes with the HTTP statuses whose descriptions name them. */
function problemCodes() {
  const statuses = new Map((resolve({ $ref: "#/components/schemas/Problem/properties/code" }).enum ?? [])
    .map((code) => [code, new Set()]));
  for (const { details } of operations()) {
    for (const [status, given] of Object.entries(details.responses ?? {})) {
      for (const [, code] of (resolve(given).description ?? "").matchAll(/`([a-z-]+)`/g)) statuses.get(code)?.add(status);
    }
  }
  return element("dl", { class: "members" }, ...[...statuses].map(([code, where]) =>
    element("div", {}, element("dt", {}, element("code", {}, code)),
      element("dd", {}, where.size ? `HTTP ${[...where].sort().join(", ")}` : "on any path"))));
}

// --- the page ------------------------------------------------------------------------------------

function section(title, words, ...children) {
  const id = slug(title);
  return element("section", { id, "aria-labelledby": `${id}-heading` },
    element("h2", { id: `${id}-heading` }, title), words ? element("p", {}, ...prose(words)) : "", ...children);
}

function link(target, ...words) {
  return element("li", {}, element("a", { href: `#${target}` }, ...words));
}

function render() {
  const all = operations();
  const named = (openapi.tags ?? []).map(({ name }) => name);
  const tagOf = ({ details }) => details.tags?.[0] ?? "Others";
  const tags = [...new Set([...named, ...all.map(tagOf)])].filter((tag) => all.some((one) => tagOf(one) === tag));
  const schemas = Object.entries(openapi.components?.schemas ?? {});
  const contents = element("ul");
  for (const tag of tags) {
    const mine = all.filter((one) => tagOf(one) === tag);
    const words = openapi.tags?.find(({ name }) => name === tag)?.description;
    at("operations").append(section(tag, words, ...mine.map(operation)));
    const group = link(slug(tag), tag);
    group.append(element("ul", {}, ...mine.map(({ path, method }) => link(`operation-${slug(`${method} ${path}`)}`, path))));
    contents.append(group);
  }
  const codes = problemCodes();
  if (codes.childElementCount) {
    at("operations").append(section("Problem codes", "The `code` of a problem, and where it occurs.",
      element("div", { class: "schema" }, codes)));
    contents.append(link("Problem-codes", "Problem codes"));
  }
  if (schemas.length) {
    at("operations").append(section("Schemas", "", ...schemas.map(([name, schema]) =>
      element("article", { class: "schema", id: `schema-${slug(name)}` }, element("h3", {}, name),
        schema.description ? element("p", {}, ...prose(schema.description)) : "",
        schema.properties ? members(schema) : element("p", {}, ...typeWords(schema), ...limits(schema))))));
    contents.append(link("Schemas", "Schemas"));
  }
  at("contents").replaceChildren(contents);
  at("title").textContent = `${openapi.info?.title ?? "API"} ${openapi.info?.version ?? ""}`;
  at("lead").replaceChildren(...prose(openapi.info?.description ?? ""));
}

async function load() {
  try {
    const answer = await fetch("openapi.json");
    if (!answer.ok) throw new Error(`The gateway answered with HTTP ${answer.status}.`);
    openapi = await answer.json();
    if (!openapi.paths) throw new Error("The document is empty.");
    render();
    at("docs").hidden = false;
    at("status").textContent = "";
    // The browser looked for the address's fragment before there was anything to find.
    if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
  } catch (error) {
    at("status").className = "problem";
    at("status").replaceChildren(...problemWords({ title: "The API's description cannot be shown", detail: error.message }));
  }
}

load();
