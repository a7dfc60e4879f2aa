// The chat page: a plain client of /v1/models, /v1/chat/completions and /v1/render.
//
//   conversation.js  what was said, as a tree    store.js  kept in this browser    server.js, models.js  over HTTP
//   turn.js, reply.js, sidebar.js, settings.js   what is shown        markdown.js, inline.js  Markdown as DOM nodes
import { addTurn, asMarkdown, asRow, messagesFor, mixed, newConversation, parentOf, path, title } from "./conversation.js";
import { $, announce, confirmed, download, make, notice } from "./dom.js";
import { announceReply } from "./reply.js";
import { anyModel, askKey, chosen, keepModels, loadModels, lost } from "./models.js";
import { apiKey, chunks, ServerError, Unreachable } from "./server.js";
import { loadSettings, sampling, showSettings } from "./settings.js";
import { drawSidebar, showSidebar } from "./sidebar.js";
import * as store from "./store.js";
import { grow, turnView } from "./turn.js";

const KEEP_EVERY_MS = 1000; // while a reply is being written
const IDEAS = ["Who are you?", "Spell the word lantern.", "What is fine-tuning?", "What is 12 * 7?"];

let chats = store.conversations();
let chat = chats.find((kept) => kept.id === location.hash.slice(1)) ?? newConversation(store.setting("system") ?? "");
let running = null; // {controller, turn, open: Set of the replies being written}
let views = new Map(); // reply -> its view

// ---- what is shown

const main = document.querySelector("main");
const atBottom = () => main.scrollHeight - main.scrollTop - main.clientHeight < 80;
const toBottom = () => { main.scrollTop = main.scrollHeight; };

function draw() {
  const turns = path(chat);
  views = new Map();
  const sections = turns.map((turn) => {
    const { node, views: own } = turnView(chat, turn, { again, edit, show }, (reply) => Boolean(running?.open.has(reply)));
    for (const [reply, view] of own) views.set(reply, view);
    return node;
  });
  $("log").replaceChildren(...sections);
  $("empty").hidden = turns.length > 0;
  $("system-note").hidden = !chat.system;
  $("system-note").textContent = `System prompt: ${chat.system}`;
  $("export").hidden = !turns.length;
  history.replaceState(null, "", turns.length ? `#${chat.id}` : location.pathname); // a reload shows it again
  document.title = turns.length ? `${title(chat)} · sftflow` : "sftflow chat";
  busy();
  drawSidebar(chats, chat, { open, rename, remove });
}

function busy() {
  const on = Boolean(running);
  document.body.classList.toggle("busy", on);
  $("send").setAttribute("aria-label", on ? "Stop" : "Send");
  $("log").setAttribute("aria-busy", String(on));
  for (const part of ["edit", "again", "older", "newer"]) {
    for (const button of $("log").querySelectorAll(`[data-part="${part}"]`)) if (on) button.disabled = true;
  }
}

function keep(conversation = chat) {
  if (!chats.includes(conversation)) return; // nothing was said in it yet, or it was deleted meanwhile
  const problem = store.keep(conversation);
  if (problem) notice(problem);
}

// ---- asking

async function write(reply, body, controller) {
  const began = performance.now();
  const since = () => (performance.now() - began) / 1000;
  let drawing = false;
  try {
    for await (const chunk of chunks(body, controller.signal)) {
      const choice = chunk.choices?.[0];
      const { content, reasoning_content: thoughts } = choice?.delta ?? {};
      if (content || thoughts) {
        reply.first ??= since();
        reply.text += content ?? "";
        if (thoughts) reply.thoughts = (reply.thoughts ?? "") + thoughts;
        if (!drawing) {
          drawing = true;
          requestAnimationFrame(() => {
            drawing = false;
            const follow = atBottom();
            views.get(reply)?.update();
            if (follow) toBottom();
          });
        }
      }
      if (choice?.finish_reason) reply.reason = choice.finish_reason;
      if (chunk.usage) reply.tokens = chunk.usage.completion_tokens;
    }
  } catch (error) {
    if (error.name === "AbortError") reply.stopped = true;
    else reply.error = error.message;
    if (error instanceof Unreachable) lost();
    else if (error instanceof ServerError && error.status === 401) askKey();
  }
  reply.seconds = since();
}

async function run(turn) {
  const own = sampling();
  if (!own || running) return;
  const names = chosen();
  const version = parentOf(chat, turn).next.indexOf(turn);
  // The same for every model beside it. A seed that is set still gives each version another one.
  const seed = own.seed === undefined ? Math.floor(Math.random() * 2 ** 31) : own.seed + version;
  turn.system = chat.system;
  turn.replies = names.map((model) => ({ model, text: "", seed }));
  const controller = new AbortController();
  const mine = running = { controller, turn, open: new Set(turn.replies) };
  chat.updated = Date.now();
  if (!chats.includes(chat)) chats.unshift(chat);
  const asked = chat;
  keep();
  draw();
  toBottom();
  announce(`${names.join(" and ")} ${names.length > 1 ? "are" : "is"} writing`);
  const timer = setInterval(() => keep(asked), KEEP_EVERY_MS);
  const body = { messages: messagesFor(asked, turn), stream: true, stream_options: { include_usage: true }, ...own, seed };
  await Promise.all(turn.replies.map(async (reply) => {
    await write(reply, { model: reply.model, ...body }, controller);
    mine.open.delete(reply);
    const follow = atBottom();
    views.get(reply)?.update();
    if (follow) toBottom();
    announceReply(reply);
  }));
  clearInterval(timer);
  running = null;
  keep(asked);
  const follow = atBottom();
  draw();
  if (follow) toBottom();
}

function send(text) {
  const words = text.trim();
  if (!words || running || !sampling()) return false;
  if (!anyModel()) {
    loadModels();
    return false;
  }
  const turns = path(chat);
  run(addTurn(turns.at(-1) ?? chat, words));
  return true;
}

function again(turn) {
  if (!running && sampling()) run(addTurn(parentOf(chat, turn), turn.user));
}

function edit(turn, text) {
  if (running || !sampling()) return;
  run(addTurn(parentOf(chat, turn), text));
  $("prompt").focus();
}

function show(parent, number) {
  parent.at = number;
  keep();
  draw();
}

const stop = () => running?.controller.abort();

// ---- conversations

function open(conversation) {
  if (conversation !== chat) stop();
  chat = conversation;
  $("system").value = chat.system;
  draw();
  toBottom();
  showSidebar(false);
  $("prompt").focus();
}

function rename(conversation, name) {
  if (name) {
    conversation.title = name;
    keep(conversation);
  }
  draw();
}

function remove(conversation) {
  if (conversation === chat) stop();
  store.forget(conversation.id);
  chats = chats.filter((other) => other !== conversation);
  if (conversation === chat) open(newConversation(chat.system));
  else draw();
  announce("Deleted");
}

// ---- the page comes alive

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) stop();
  else sendPrompt();
});

function sendPrompt() {
  if (!send($("prompt").value)) return;
  $("prompt").value = "";
  grow($("prompt"));
}

$("prompt").addEventListener("input", () => grow($("prompt")));
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  sendPrompt();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("confirm").open) return;
  if (running) stop();
  else if ($("export").open) closeExport();
  else if ($("sidebar").classList.contains("open")) showSidebar(false);
  else if (!$("settings").hidden) showSettings(false);
});

for (const idea of IDEAS) {
  const button = make("button", "", idea);
  button.type = "button";
  button.addEventListener("click", () => {
    send(idea);
    $("prompt").focus();
  });
  $("ideas").append(button);
}

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address names the conversation
  $("prompt").focus();
});
for (const id of ["model", "other", "both"]) $(id).addEventListener("change", keepModels);
$("new").addEventListener("click", () => open(newConversation(chat.system)));
$("clear").addEventListener("click", async () => {
  if (!(await confirmed("Delete all conversations? They are kept nowhere else.", "Delete all"))) return;
  stop();
  chats = [];
  store.forgetAll();
  open(newConversation(chat.system));
  announce("All conversations are deleted");
});
$("open-sidebar").addEventListener("click", () => showSidebar(true));
$("close-sidebar").addEventListener("click", () => showSidebar(false));
$("shade").addEventListener("click", () => showSidebar(false));
$("open-settings").addEventListener("click", () => showSettings($("settings").hidden));
$("close-settings").addEventListener("click", () => showSettings(false));
$("system-note").addEventListener("click", () => showSettings(true));
$("fields").addEventListener("submit", (event) => event.preventDefault());
$("system").addEventListener("input", () => {
  chat.system = $("system").value.trim();
  store.keepSetting("system", chat.system);
  $("system-note").hidden = !chat.system;
  $("system-note").textContent = `System prompt: ${chat.system}`;
  keep();
});
$("key").addEventListener("change", () => {
  apiKey.set($("key").value);
  loadModels();
});

function closeExport() {
  $("export").open = false;
  $("export").querySelector("summary").focus();
}

const fileName = () => title(chat).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 40) || "conversation";
$("export-json").addEventListener("click", () => {
  const row = asRow(chat);
  if (row) download(`${fileName()}.jsonl`, "application/jsonl", row);
  else notice("There is no reply to export yet.");
  if (mixed(chat)) notice("Replies made under another system prompt than the last one’s have weight 0 in the row.", true);
  closeExport();
});
$("export-markdown").addEventListener("click", () => {
  download(`${fileName()}.md`, "text/markdown", asMarkdown(chat));
  closeExport();
});
document.addEventListener("click", (event) => {
  if (!$("export").contains(event.target)) $("export").open = false;
});

const THEMES = { "": "as the system", light: "light", dark: "dark" };
function showTheme() {
  $("theme").setAttribute("aria-label", `Colours: ${THEMES[store.theme.get()] ?? THEMES[""]}`);
  $("theme").title = $("theme").getAttribute("aria-label");
}
$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  store.theme.set(names[(names.indexOf(store.theme.get()) + 1) % names.length]);
  showTheme();
  announce($("theme").title);
});

window.addEventListener("pagehide", () => keep());
window.addEventListener("online", loadModels);
window.addEventListener("storage", (event) => {
  // Another tab wrote. What is being written here stays ours.
  if (!store.isConversation(event.key) || running) return;
  const kept = store.conversations();
  chats = kept;
  chat = kept.find((other) => other.id === chat.id) ?? chat;
  draw();
});

loadSettings();
$("system").value = chat.system;
showTheme();
draw();
toBottom();
loadModels();
