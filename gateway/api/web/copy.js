// Buttons that copy a text to the clipboard.

import { element } from "./dom.js";

const SHOWN_MS = 1500;

/** Return a button that copies the text of `read()`; `name` tells screen readers what it copies. */
export function copyButton(name, read) {
  const button = element("button", { type: "button", class: "copy", "aria-label": `Copy ${name}` }, "Copy");
  let timer = 0;
  button.addEventListener("click", async () => {
    button.textContent = (await copy(read())) ? "Copied" : "Press Ctrl+C";
    clearTimeout(timer);
    timer = setTimeout(() => (button.textContent = "Copy"), SHOWN_MS);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text); // exists in secure contexts only
    return true;
  } catch {
    const field = element("textarea", { readonly: "", class: "visually-hidden", "aria-hidden": "true" }, text);
    const focused = document.activeElement;
    document.body.append(field);
    field.select();
    const copied = document.execCommand("copy"); // deprecated, but the only way over plain HTTP
    field.remove();
    focused?.focus();
    return copied;
  }
}
