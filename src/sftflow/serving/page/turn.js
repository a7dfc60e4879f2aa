// One turn on the page: what the reader said, the replies to it side by side, and its other versions.
import { copy, fromTemplate } from "./dom.js";
import { messagesFor, parentOf } from "./conversation.js";
import { replyView } from "./reply.js";

// A field grows with its text; page.css sets the upper limit.
export function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`; // its border
}

function startEditing(bubble, tools, turn, send) {
  const { node, part } = fromTemplate("editor");
  const field = part("text");
  field.value = turn.user;
  const stop = () => {
    node.replaceWith(bubble);
    tools.hidden = false;
    tools.querySelector('[data-part="edit"]').focus();
  };
  const go = () => { if (field.value.trim()) send(field.value.trim()); };
  field.addEventListener("input", () => grow(field));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      stop();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      go();
    }
  });
  part("cancel").addEventListener("click", stop);
  node.addEventListener("submit", (event) => {
    event.preventDefault();
    go();
  });
  bubble.replaceWith(node);
  tools.hidden = true;
  grow(field);
  field.focus();
}

// Greedy decoding says the same again; a reader who pressed Regenerate should know why.
function sameAgain(parent, turn) {
  const earlier = parent.next[parent.next.indexOf(turn) - 1];
  const texts = (t) => t.replies.map((reply) => reply.model + reply.text).join("\0");
  return Boolean(earlier) && earlier.user === turn.user && turn.replies.some((r) => r.text) && texts(earlier) === texts(turn);
}

// actions: {again(turn), edit(turn, text), show(parent, number)}; live(reply): whether it is being written.
// -> {node, views: Map(reply -> its view)}
export function turnView(conversation, turn, actions, live) {
  const { node, part } = fromTemplate("turn");
  const parent = parentOf(conversation, turn);
  part("user").textContent = turn.user;
  const [userTools] = node.querySelectorAll(".you .tools");
  part("copy").addEventListener("click", () => copy(turn.user, part("copy")));
  part("edit").addEventListener("click", () => {
    startEditing(part("user"), userTools, turn, (text) => actions.edit(turn, text));
  });
  const views = new Map();
  for (const reply of turn.replies) {
    const view = replyView(reply, () => messagesFor(conversation, turn), () => live(reply));
    views.set(reply, view);
    part("replies").append(view.node);
  }
  part("replies").classList.toggle("two", turn.replies.length > 1);
  const writing = turn.replies.some(live);
  const tools = node.querySelector(":scope > .tools");
  tools.hidden = writing;
  const again = tools.querySelector('[data-part="again"]');
  again.textContent = turn.replies.some((reply) => reply.error) ? "Try again" : "Regenerate";
  again.addEventListener("click", () => actions.again(turn));
  const number = parent.next.indexOf(turn);
  part("versions").hidden = parent.next.length < 2;
  part("version").textContent = `${number + 1} of ${parent.next.length}`;
  part("older").disabled = number === 0;
  part("newer").disabled = number === parent.next.length - 1;
  part("older").addEventListener("click", () => actions.show(parent, number - 1));
  part("newer").addEventListener("click", () => actions.show(parent, number + 1));
  part("hint").textContent = !writing && sameAgain(parent, turn)
    ? "The same once more: without a temperature above 0 the likeliest tokens are always chosen." : "";
  return { node, views };
}
