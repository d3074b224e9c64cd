// The little that is needed to build elements. Text is always set as text: what an upstream
// says can never become markup.

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

export function svg(tag, attributes = {}) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** Set text only where it differs: an untouched node costs neither layout nor a screen reader's breath. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Fill a progress bar; null: not known. The style is set by script, which the policy allows. */
export function fill(bar, percent, words) {
  const known = percent !== null;
  // A little further than it is wide when empty, or its edge would shimmer through.
  bar.firstElementChild.style.transform = `translateX(${percent ? percent - 100 : -101}%)`;
  if (known) bar.setAttribute("aria-valuenow", percent);
  else bar.removeAttribute("aria-valuenow");
  bar.setAttribute("aria-valuetext", words);
}

/** The words of a problem document: its title, its detail, and what the upstream said. */
export function problemWords(problem) {
  const upstream = problem.upstream ?? {};
  const said = [
    [upstream.errMessage, upstream.errCode],
    [upstream.subErrMessage, upstream.subErrCode],
  ].filter(([message, code]) => message || code);
  return [
    element("strong", {}, problem.title ?? "Something went wrong"),
    // A detail that says the title once more says nothing.
    same(problem.detail, problem.title) ? null : element("p", {}, sentence(problem.detail)),
    ...said.map(([message, code]) =>
      element("p", { class: "said" }, "Upstream said: ", element("q", {}, message || code),
        message && code ? element("code", {}, code) : null)),
  ].filter(Boolean);
}

function same(one, other) {
  return !one || one.toLowerCase() === (other ?? "").toLowerCase();
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}
