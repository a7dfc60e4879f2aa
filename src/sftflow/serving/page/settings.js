// The panel of settings: the system prompt, the sampling fields, the API key.
import { $, cover } from "./dom.js";
import { apiKey } from "./server.js";
import { keepSetting, setting } from "./store.js";

const fields = () => [...$("fields").elements].filter((field) => field.name);

export function loadSettings() {
  const kept = setting("sampling") ?? {};
  for (const field of fields()) field.value = kept[field.name] ?? "";
  $("key").value = apiKey.get();
  for (const field of fields()) {
    field.addEventListener("input", () => {
      keepSetting("sampling", Object.fromEntries(fields().map((f) => [f.name, f.value])));
    });
  }
  $("reset").addEventListener("click", () => {
    for (const field of fields()) field.value = "";
    keepSetting("sampling", {});
    fields()[0].focus();
  });
}

// The request's sampling fields: those that are set, and no others. null where one is wrong; the reader is shown which.
export function sampling() {
  for (const field of fields()) {
    if (field.checkValidity()) continue;
    showSettings(true);
    field.focus();
    field.reportValidity();
    return null;
  }
  return Object.fromEntries(fields().filter((f) => f.value !== "").map((f) => [f.name, Number(f.value)]));
}

export function showSettings(open, focus) {
  $("settings").hidden = !open;
  cover(open);
  $("open-settings").setAttribute("aria-expanded", String(open));
  if (open) (focus ?? $("system")).focus();
  else $("open-settings").focus();
}
