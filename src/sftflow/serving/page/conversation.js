// A conversation as a tree of turns. Regenerating or editing a turn adds a sibling, so nothing that was said is lost;
// what is shown is one path through the tree.
//
//   {id, title, created, updated, system, next: [turn, ...], at}
//   turn:  {user, system, replies: [reply, ...], next: [turn, ...], at}       next[at] is the turn that is shown
//   reply: {model, text, thoughts, seed, reason | stopped | error, tokens, first, seconds}    seconds since it was asked for

export function newConversation(system = "") {
  const now = Date.now();
  const id = `${now.toString(36)}${Math.floor(Math.random() * 2 ** 30).toString(36)}`;
  return { id, title: "", created: now, updated: now, system, next: [], at: 0 };
}

export function path(conversation) {
  const turns = [];
  for (let node = conversation; node.next.length; ) {
    node = node.next[node.at];
    turns.push(node);
  }
  return turns;
}

// What a turn hangs on: the turn in front of it, or the conversation.
export function parentOf(conversation, turn) {
  const turns = path(conversation);
  const number = turns.indexOf(turn);
  return number > 0 ? turns[number - 1] : conversation;
}

export function addTurn(parent, user) {
  const turn = { user, system: "", replies: [], next: [], at: 0 };
  parent.next.push(turn);
  parent.at = parent.next.length - 1;
  return turn;
}

export const title = (conversation) => {
  const words = conversation.title || conversation.next[0]?.user.trim().replace(/\s+/g, " ") || "New conversation";
  return words.length > 60 ? `${words.slice(0, 59)}…` : words;
};

// Whether the reply ended by itself: then it is whole, and fit to be learned from.
export const whole = (reply) => reply.reason === "stop" || reply.reason === "tool_calls";

// The reply that the conversation goes on from: the first model's, else another's; none where nobody said anything.
const heard = (turn) => turn.replies.find((reply) => reply.text);

// As a message. Its thoughts go along: the chat template says whether the model reads them again.
const said = ({ text, thoughts }) => ({
  role: "assistant", content: text, ...(thoughts ? { reasoning_content: thoughts } : {}),
});

// What is sent for a reply to this turn: the same to every model, so that what they say can be compared. Turns that
// nobody answered are left out, so that user and assistant keep taking turns.
export function messagesFor(conversation, turn) {
  const messages = turn.system ? [{ role: "system", content: turn.system }] : [];
  for (const earlier of path(conversation)) {
    if (earlier === turn) break;
    const reply = heard(earlier);
    if (reply) messages.push({ role: "user", content: earlier.user }, said(reply));
  }
  messages.push({ role: "user", content: turn.user });
  return messages;
}

// One line of JSON in the OpenAI shape, as `sftflow train` reads it, with the system prompt of its last reply. A reply
// that was cut, or made under another one, gets weight 0: it is history, not something to learn. null where there is no
// reply yet.
export function asRow(conversation) {
  const turns = path(conversation).filter(heard);
  if (!turns.length) return null;
  const { system } = turns.at(-1);
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    const reply = heard(turn);
    const learned = whole(reply) && turn.system === system;
    messages.push({ role: "user", content: turn.user });
    messages.push({ ...said(reply), ...(learned ? {} : { weight: 0 }) });
  }
  return `${JSON.stringify({ messages })}\n`;
}

// Whether its replies were made under different system prompts.
export const mixed = (conversation) => new Set(path(conversation).filter(heard).map((turn) => turn.system)).size > 1;

// To be read by people: every model's reply, under the system prompt that it was made under.
export function asMarkdown(conversation) {
  const parts = [`# ${title(conversation)}`];
  let system = "";
  for (const turn of path(conversation)) {
    if (turn.replies.length && turn.system !== system) parts.push("## System", turn.system || "(none)");
    if (turn.replies.length) system = turn.system;
    parts.push("## You", turn.user);
    for (const reply of turn.replies) parts.push(`## ${reply.model}`, reply.text || `(${reply.error || "no text"})`);
  }
  return `${parts.join("\n\n")}\n`;
}
