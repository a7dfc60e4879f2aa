// The chat page: a plain client of /v1/models, /v1/chat/completions and /v1/render.
// Everything a model or a person wrote enters the page through textContent only.
"use strict";

const $ = (id) => document.getElementById(id);
const turns = []; // {user, system, replies: Map(model -> {text, done})}; what each model is shown is made from these
let models = [];
let running = null; // the AbortController of the replies being written

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

async function api(path, body, signal) {
  const headers = {};
  const key = $("key").value || sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body),
  });
  if (response.ok) return response;
  if (response.status === 401) {
    $("key-box").hidden = false;
    $("settings").open = true;
    throw new Error("This server asks for its API key: enter it under Settings.");
  }
  const error = await response.json().catch(() => ({}));
  throw new Error(error.error?.message || `the server answered ${response.status}`);
}

async function loadModels() {
  try {
    models = (await (await api("/v1/models")).json()).data.map((m) => m.id);
  } catch (error) {
    notice(error.message);
    return;
  }
  notice("");
  $("model").replaceChildren(...models.map((id) => Object.assign(make("option", "", id), { value: id })));
  $("both-box").hidden = models.length < 2;
}

function chosen() {
  const first = $("model").value;
  if (!$("both").checked || models.length < 2) return [first];
  return [first, models.find((id) => id !== first)];
}

// The conversation as one model sees it before turn number `end`'s reply: its own replies where it gave one, else
// the other model's; a turn nobody answered is left out, so that user and assistant keep taking turns.
function historyFor(model, end) {
  const messages = [];
  if (turns[end].system) messages.push({ role: "system", content: turns[end].system });
  for (const turn of turns.slice(0, end)) {
    const answered = [...turn.replies].filter(([, r]) => r.text);
    const reply = turn.replies.get(model)?.text || answered[0]?.[1].text;
    if (reply) messages.push({ role: "user", content: turn.user }, { role: "assistant", content: reply });
  }
  messages.push({ role: "user", content: turns[end].user });
  return messages;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const pieces = (rest + value).split("\n\n");
    rest = pieces.pop();
    for (const piece of pieces) {
      const data = piece.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function atBottom() {
  const main = document.querySelector("main");
  return main.scrollHeight - main.scrollTop - main.clientHeight < 60;
}

function toBottom() {
  const main = document.querySelector("main");
  main.scrollTop = main.scrollHeight;
}

function addSeen(reply, model, messages) {
  const seen = make("details", "seen");
  const tokens = make("div", "tokens");
  tokens.tabIndex = 0;
  tokens.setAttribute("aria-label", `Prompt tokens given to ${model}`);
  seen.append(make("summary", "", "What the model sees"), tokens);
  seen.addEventListener("toggle", async () => {
    if (!seen.open || tokens.childNodes.length) return;
    tokens.textContent = "…";
    try {
      const list = (await (await api("/v1/render", { model, messages })).json()).tokens;
      tokens.replaceChildren(...list.map((t) => {
        const span = make("span", t.special ? "special" : "", t.text.replace(/\n/g, "↵\n") || "·");
        span.title = t.text ? `id ${t.id}` : `id ${t.id}: the first bytes of the next character`;
        return span;
      }));
      seen.firstChild.textContent = `What the model sees (${list.length} tokens)`;
    } catch (error) {
      tokens.textContent = error.message;
    }
  });
  reply.append(seen);
}

async function answer(number, model, box, signal) {
  const messages = historyFor(model, number);
  const record = { text: "" };
  turns[number].replies.set(model, record);
  const reply = make("article", "reply");
  reply.setAttribute("aria-label", `Reply of ${model}`);
  const text = make("div", "text waiting");
  const meta = make("p", "meta");
  reply.append(make("p", "name", model), text, meta);
  const atEnd = atBottom();
  box.append(reply);
  addSeen(reply, model, messages);
  if (atEnd) toBottom();
  const body = {
    model, messages, stream: true, stream_options: { include_usage: true },
    temperature: Number($("temperature").value) || 0,
  };
  if ($("max-tokens").value) body.max_tokens = Number($("max-tokens").value);
  const say = (words, bad) => meta.append(make("span", bad ? "bad" : "", words));
  const started = performance.now();
  let reason = null;
  let usage = null;
  try {
    for await (const event of events(await api("/v1/chat/completions", body, signal))) {
      const choice = event.choices[0];
      if (choice?.delta?.content) {
        if (!record.text) text.classList.remove("waiting");
        const follow = atBottom();
        record.text += choice.delta.content;
        text.textContent = record.text;
        if (follow) toBottom();
      }
      reason = choice?.finish_reason || reason;
      usage = event.usage || usage;
    }
    const seconds = (performance.now() - started) / 1000;
    if (usage) {
      say(`${usage.completion_tokens} tokens`);
      say(`${(usage.completion_tokens / seconds).toFixed(1)} tokens/s`);
    }
    if (reason === "stop") say("finished: stop");
    else if (reason === "length") say("cut: length (max tokens or context)");
    else say("the connection ended early", true);
  } catch (error) {
    if (error.name === "AbortError") say("stopped by you");
    else say(error.message, true);
  }
  text.classList.remove("waiting");
  if (!record.text) text.append(make("small", "", "(no text)"));
}

async function run(number) {
  const turn = turns[number];
  const names = chosen();
  running = new AbortController();
  turn.replies.clear();
  turn.system = $("system").value.trim();
  turn.box.replaceChildren();
  turn.box.className = names.length > 1 ? "replies two" : "replies";
  document.querySelectorAll(".again").forEach((b) => b.remove());
  $("send").textContent = "Stop";
  $("send").classList.add("stop");
  $("log").setAttribute("aria-busy", "true");
  toBottom();
  await Promise.all(names.map((name) => answer(number, name, turn.box, running.signal)));
  running = null;
  $("send").textContent = "Send";
  $("send").classList.remove("stop");
  $("log").setAttribute("aria-busy", "false");
  const again = make("button", "again", "Regenerate");
  again.type = "button";
  again.title = Number($("temperature").value) ? "" : "At temperature 0 the reply stays the same";
  again.addEventListener("click", () => { if (!running) run(number); });
  const follow = atBottom();
  turn.node.append(again);
  if (follow) toBottom();
}

function send() {
  const text = $("prompt").value.trim();
  if (!text || running) return;
  if (!models.length) {
    loadModels();
    return;
  }
  notice("");
  $("empty").hidden = true;
  $("prompt").value = "";
  grow();
  const node = make("section", "turn");
  const box = make("div", "replies");
  const user = make("div", "user", text);
  user.setAttribute("aria-label", "You");
  node.append(user, box);
  $("log").append(node);
  turns.push({ user: text, system: "", replies: new Map(), box, node });
  run(turns.length - 1);
}

function grow() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`; // its border; page.css sets the upper limit
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else send();
});
$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
$("new").addEventListener("click", () => {
  if (running) running.abort();
  turns.length = 0;
  $("log").replaceChildren();
  $("empty").hidden = false;
  $("prompt").focus();
});
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  loadModels();
});
loadModels();
