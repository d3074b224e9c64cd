// The list of cards: its order, its filters, and rows instead of cards when there are many.

import { element, setText } from "./dom.js";

const MOST_CARDS = 12; // more tasks are shown as rows
const STILL_MS = 2000; // cards do not move while the pointer moves over them
const GROUPS = [
  ["problems", "Problems"],
  ["running", "Running"],
  ["waiting", "Waiting"],
  ["done", "Done"],
  ["canceled", "Canceled"],
];

export class TaskList {
  #list;
  #filters;
  #filter = "all";
  #chips = new Map(); // by group
  #pointerAt = -Infinity;
  #changed;

  sorted = true; // by group, otherwise as in the address

  /** `changed` is called when the user has chosen another filter. */
  constructor({ list, filters, changed }) {
    this.#list = list;
    this.#filters = filters;
    this.#changed = changed;
    for (const [group, name] of [["all", "All"], ...GROUPS]) {
      const count = element("span", { class: "count" });
      const chip = element("button", { type: "button", class: `chip chip-${group}` }, `${name} `, count);
      chip.addEventListener("click", () => {
        this.#filter = group;
        this.#changed();
      });
      this.#chips.set(group, { chip, count });
      filters.append(chip);
    }
    list.addEventListener("pointermove", () => (this.#pointerAt = Date.now()));
  }

  /** Show these cards, given in the order of the address. `settled`: their order may change. */
  show(cards, { settled = true } = {}) {
    const counts = this.#countGroups(cards);
    if (this.#filter !== "all" && !counts.get(this.#filter)) this.#filter = "all";
    this.#filters.hidden = cards.length < 2;
    for (const [group, { chip, count }] of this.#chips) {
      const many = group === "all" ? cards.length : counts.get(group) ?? 0;
      chip.hidden = many === 0;
      setText(count, String(many));
      chip.setAttribute("aria-pressed", this.#filter === group);
    }
    this.#list.classList.toggle("rows", cards.length > MOST_CARDS);
    for (const card of cards) card.node.hidden = this.#filter !== "all" && card.task.group !== this.#filter;
    if (!settled || Date.now() - this.#pointerAt > STILL_MS) this.#arrange(this.#ordered(cards));
  }

  #countGroups(cards) {
    const counts = new Map();
    for (const { task } of cards) counts.set(task.group, (counts.get(task.group) ?? 0) + 1);
    return counts;
  }

  #ordered(cards) {
    if (!this.sorted) return cards;
    const rank = ({ task }) => GROUPS.findIndex(([group]) => group === task.group);
    return [...cards].sort((one, other) => rank(one) - rank(other)); // stable
  }

  #arrange(cards) {
    cards.forEach(({ node }, index) => {
      const place = this.#list.children[index] ?? null;
      if (place === node) return;
      // A node that is inserted again loses the focus and its scroll positions; moveBefore keeps them.
      if (node.parentNode === this.#list && this.#list.moveBefore) this.#list.moveBefore(node, place);
      else insert(this.#list, node, place);
    });
  }
}

function insert(list, node, place) {
  const focused = node.contains(document.activeElement) ? document.activeElement : null;
  list.insertBefore(node, place);
  focused?.focus({ preventScroll: true });
}
