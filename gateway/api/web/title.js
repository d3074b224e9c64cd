// The state of all tasks, in the title and the icon of the tab.

const icon = document.querySelector('link[rel="icon"][type="image/svg+xml"]');
const folder = icon.href.slice(0, icon.href.lastIndexOf("/") + 1); // absolute: the address of the page changes
const ICONS = { idle: "icon.svg", running: "icon.svg", done: "icon-done.svg", failed: "icon-failed.svg", trouble: "icon-trouble.svg" };

/** Show a title, and the icon of `state`. */
export function showInTab(title, state) {
  if (document.title !== title) document.title = title;
  const href = folder + ICONS[state];
  if (icon.href !== href) icon.href = href;
}
