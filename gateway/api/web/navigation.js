// Finding one's way on the API page: search, the current section, and folding.

const at = (id) => document.getElementById(id);

/** Filter the articles by the words of the search field; entries of the contents follow. */
export function search() {
  const field = at("search");
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  let found = 0;
  for (const article of document.querySelectorAll("#operations article")) {
    const text = article.textContent.toLowerCase();
    article.hidden = !words.every((word) => text.includes(word));
    found += article.hidden ? 0 : 1;
  }
  for (const section of document.querySelectorAll("#operations > section")) {
    section.hidden = words.length > 0 && !section.querySelector("article:not([hidden])");
  }
  for (const link of document.querySelectorAll("#contents a")) {
    link.parentElement.hidden = Boolean(at(link.hash.slice(1))?.hidden);
  }
  at("found").textContent = words.length ? `${found} found` : "";
}

/** Mark the entry of the contents whose section is at the top of the window. */
export function followScrolling() {
  const links = new Map([...document.querySelectorAll("#contents a")].map((link) => [link.hash.slice(1), link]));
  const targets = [...links.keys()].map(at).filter(Boolean);
  let current = null;
  function mark() {
    const top = targets.filter((target) => !target.hidden && target.getClientRects().length && target.getBoundingClientRect().top < 120).pop();
    const link = links.get((top ?? targets[0])?.id);
    if (link === current) return;
    current?.removeAttribute("aria-current");
    link?.setAttribute("aria-current", "true");
    current = link;
    // Only the contents scroll, not the page.
    if (link) at("contents").scrollTop += link.getBoundingClientRect().top - at("contents").getBoundingClientRect().top - 120;
  }
  let due = 0;
  addEventListener("scroll", () => (due ||= requestAnimationFrame(() => {
    due = 0;
    mark();
  })), { passive: true });
  mark();
}

/** Fold or unfold all operations. */
export function fold() {
  const all = [...document.querySelectorAll("#operations article > details")];
  const open = !all.some((one) => one.open);
  for (const one of all) one.open = open;
  at("fold").textContent = open ? "Fold all" : "Unfold all";
}

/** Unfold and show the target of the address. */
export function showTarget() {
  const target = at(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (const details of target.querySelectorAll(":scope > details")) details.open = true;
  target.scrollIntoView();
}
