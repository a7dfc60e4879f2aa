// Which models answer, and whether the server is there at all.
import { $, announce, make, notice } from "./dom.js";
import { models, Unreachable } from "./server.js";
import { showSettings } from "./settings.js";
import { keepSetting, setting } from "./store.js";

const WAIT_MS = [500, 1000, 2000, 4000]; // between two looks whether the server is back

let known = []; // the served models' ids
let reconnecting = false;

export const anyModel = () => known.length > 0;

function fill(select, ids, chosen) {
  select.replaceChildren(...ids.map((id) => Object.assign(make("option", "", id), { value: id })));
  if (ids.includes(chosen)) select.value = chosen;
  select.title = select.value;
}

function showModels() {
  const kept = setting("models") ?? {};
  fill($("model"), known, kept.model);
  const others = known.filter((id) => id !== $("model").value);
  fill($("other"), others, kept.other);
  $("compare").hidden = !others.length;
  $("both").checked = kept.both ?? true;
  $("other").disabled = !$("both").checked;
  $("who").textContent = chosen().length > 1
    ? `${chosen()[0]} and ${chosen()[1]} answer side by side, with the same seed.`
    : `You talk with ${$("model").value || "…"}, on this server.`;
}

export function keepModels() {
  keepSetting("models", { model: $("model").value, other: $("other").value, both: $("both").checked });
  showModels();
}

// The models that answer: one, or two side by side.
export function chosen() {
  const first = $("model").value;
  return !$("compare").hidden && $("both").checked ? [first, $("other").value] : [first];
}

// Asks for the models. -> "here"; "gone" where nobody answers; "refused", which the reader is told.
async function look() {
  try {
    known = await models();
  } catch (error) {
    if (error instanceof Unreachable) return "gone";
    if (error.status === 401) askKey();
    else notice(error.message);
    return "refused";
  }
  notice("");
  showModels();
  return "here";
}

export async function loadModels() {
  if (await look() === "gone") lost();
}

export function askKey() {
  notice("This server asks for its API key; enter it in the settings.");
  showSettings(true, $("key"));
}

// Look for the server until it answers.
export async function lost() {
  if (reconnecting) return;
  reconnecting = true;
  notice("The server does not answer. Looking for it again…", true);
  let found = "gone";
  for (let n = 0; found === "gone"; n++) {
    await new Promise((done) => setTimeout(done, WAIT_MS[Math.min(n, WAIT_MS.length - 1)]));
    found = await look();
  }
  reconnecting = false;
  if (found === "here") announce("The server is back.");
}
