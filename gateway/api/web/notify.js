// A notification at the end of all tasks, if the user asked for it.

import { setNotification, wantsNotification } from "./storage.js";

const supported = "Notification" in window && isSecureContext;

/** Set up the button that turns notifications on and off. It stays hidden if the browser has none. */
export function offerNotification(button) {
  if (!supported) return;
  button.hidden = false;
  show(button);
  button.addEventListener("click", async () => {
    const wanted = !isOn();
    if (wanted && Notification.permission === "default") await Notification.requestPermission();
    setNotification(wanted && Notification.permission === "granted");
    show(button);
  });
}

export function notifyEnd(text) {
  if (!supported || !isOn()) return;
  try {
    const notification = new Notification("sd-progress-gateway", { body: text, tag: "sd-gateway-end", icon: "web/icon.svg" });
    notification.addEventListener("click", () => {
      window.focus();
      notification.close();
    });
  } catch {
    // Some browsers show notifications of service workers only.
  }
}

function isOn() {
  return wantsNotification() && Notification.permission === "granted";
}

function show(button) {
  const refused = Notification.permission === "denied";
  button.setAttribute("aria-pressed", isOn());
  button.disabled = refused;
  button.title = refused ? "Your browser blocks notifications of this page" : "Show a notification when all tasks have ended";
}
