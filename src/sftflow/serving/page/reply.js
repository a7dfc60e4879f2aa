// One reply on the page: its text as Markdown or as it is, what it cost, and the tokens its model was shown.
import { announce, copy, fromTemplate, make } from "./dom.js";
import { draw } from "./markdown.js";
import { promptTokens } from "./server.js";

const ENDS = {
  stop: "ended by itself (stop)",
  length: "cut at the limit (length)",
  tool_calls: "calls a tool (tool_calls)",
};

function facts(reply) {
  const told = [];
  if (reply.stopped) told.push("stopped by you");
  else if (reply.reason) told.push(ENDS[reply.reason] ?? reply.reason);
  if (reply.tokens !== undefined) told.push(`${reply.tokens} tokens`);
  // The first token has been waited for apart, unless all came at once.
  const apart = reply.seconds > reply.first;
  const [n, seconds] = apart ? [reply.tokens - 1, reply.seconds - reply.first] : [reply.tokens, reply.seconds];
  if (reply.tokens > 1 && seconds > 0) told.push(`${(n / seconds).toFixed(1)} tokens/s`);
  if (reply.first !== undefined) told.push(`first after ${(reply.first * 1000).toFixed(0)} ms`);
  if (reply.seed !== undefined) told.push(`seed ${reply.seed}`);
  return told;
}

async function showTokens(box, reply, messages) {
  box.replaceChildren(make("p", "hint", "Asking the server…"));
  try {
    const list = await promptTokens(reply.model, messages);
    const tokens = make("div", "tokens");
    tokens.tabIndex = 0;
    tokens.setAttribute("role", "group");
    tokens.setAttribute("aria-label", `The ${list.length} tokens that ${reply.model} was given`);
    for (const token of list) {
      const piece = make("span", token.special ? "special" : "", token.text.replaceAll("\n", "↵\n") || "·");
      piece.title = token.text ? `id ${token.id}` : `id ${token.id}: the first bytes of the next character`;
      tokens.append(piece);
    }
    const special = list.filter((token) => token.special).length;
    box.replaceChildren(make("p", "hint", `What the model saw: ${list.length} tokens, ${special} of them special.`), tokens);
  } catch (error) {
    box.replaceChildren(make("p", "error", error.message));
  }
}

// -> {node, update}; update() draws what has changed in the reply. messages() gives what its model was sent.
export function replyView(reply, messages, live) {
  const { node, part } = fromTemplate("reply");
  part("name").textContent = reply.model;
  node.setAttribute("aria-label", `Reply of ${reply.model}`);
  let source = false;
  part("source").addEventListener("click", () => {
    source = !source;
    part("source").setAttribute("aria-pressed", String(source));
    update();
  });
  part("copy").addEventListener("click", () => copy(reply.text, part("copy")));
  part("see").addEventListener("click", () => {
    const open = part("seen").hidden;
    part("seen").hidden = !open;
    part("see").setAttribute("aria-expanded", String(open));
    if (open) showTokens(part("seen"), reply, messages());
  });

  function update() {
    const writing = live();
    part("markdown").hidden = source;
    part("plain").hidden = !source;
    const text = part(source ? "plain" : "markdown");
    const follow = text.scrollHeight - text.scrollTop - text.clientHeight < 60; // side by side it scrolls by itself
    if (source) text.textContent = reply.text;
    else draw(text, reply.text);
    if (writing && follow) text.scrollTop = text.scrollHeight;
    node.classList.toggle("writing", writing);
    part("thoughts").hidden = !reply.thoughts;
    part("thinking").textContent = writing && !reply.text ? "Thinking…" : "Thoughts";
    part("thought").textContent = reply.thoughts ?? "";
    const broken = !writing && !reply.reason && !reply.stopped && !reply.error;
    const error = reply.error || (broken ? "The connection ended before the reply did." : "");
    part("error").textContent = error;
    part("error").hidden = !error;
    const silent = !writing && !reply.text && !error;
    part("meta").replaceChildren(...(writing ? [] : facts(reply)).map((words) => make("span", "", words)));
    if (silent) part("meta").prepend(make("span", "", "no text"));
    part("copy").disabled = !reply.text;
    part("tools").hidden = writing;
  }
  update();
  return { node, update };
}

export function announceReply(reply) {
  announce(reply.error ? `${reply.model}: ${reply.error}` : `${reply.model} wrote: ${reply.text.slice(0, 2000) || "nothing"}`);
}
