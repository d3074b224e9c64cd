// The words about all tasks: the line above the cards, and the title of the tab.

import { percent, shortTimeLeft, timeLeft } from "./words.js";

const TITLE = "Task progress";

/** Return the numbers of some tasks: {all, done, failed, canceled, missing, errors, overdue, mean, eta}. */
export function count(tasks, now) {
  const many = (test) => tasks.filter(test).length;
  const known = tasks.filter((task) => task.report);
  const eta = Math.max(...tasks.map((task) => task.etaSeconds(now) ?? -1));
  return {
    all: tasks.length,
    done: many((task) => task.look === "succeeded"),
    failed: many((task) => task.look === "failed"),
    canceled: many((task) => task.look === "canceled"),
    missing: many((task) => task.look === "missing"),
    errors: many((task) => task.look === "problem"),
    overdue: many((task) => task.stale),
    mean: known.length ? percent(known.reduce((sum, task) => sum + task.progress, 0) / known.length) : null,
    eta: eta < 0 ? null : eta,
  };
}

export function describe({ all, done, failed, canceled, missing, errors, overdue, mean, eta }) {
  return [
    `${done} of ${all} done`,
    failed && `${failed} failed`,
    canceled && `${canceled} canceled`,
    missing && `${missing} not found`,
    errors && `${errors} with errors`,
    overdue && `${overdue} not updated`,
    mean !== null && `${mean}\u00a0% on average`,
    eta !== null && timeLeft(eta),
  ].filter(Boolean).join(" · ");
}

/** Return {title, icon} for the tab. `ended`: all tasks have ended; `failing`: updates do not arrive. */
export function describeForTab({ all, done, failed, canceled, missing, errors, mean, eta }, { ended, failing }) {
  if (all === 0) return { title: TITLE, icon: "idle" };
  const of = (many, word) => (all === 1 ? word.charAt(0).toUpperCase() + word.slice(1) : `${many} of ${all} ${word}`);
  const ending = done + failed + canceled + missing === all;
  if (failed && (ended || ending)) return { title: `✕ ${of(failed, "failed")}`, icon: "failed" };
  if (missing && ending) return { title: `? ${of(missing, "not found")}`, icon: "trouble" };
  if (canceled && (ended || ending)) return { title: `✕ ${of(canceled, "canceled")}`, icon: "failed" };
  if (done === all) return { title: "✓ Done", icon: "done" };
  if (mean === null) return { title: errors ? `! ${of(errors, "with errors")}` : TITLE, icon: errors ? "trouble" : "idle" };
  const left = failing ? "not updated" : eta === null ? "" : shortTimeLeft(eta);
  const title = [`${mean} %`, left, failed ? `✕ ${failed} failed` : ""].filter(Boolean).join(" · ");
  return { title, icon: failing || failed ? "trouble" : "running" };
}
