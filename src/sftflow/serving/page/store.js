// What the browser keeps, and nobody else: conversations and settings in localStorage, one key a conversation.

const PREFIX = "sftflow.chat.";

function storage() {
  try {
    return window.localStorage;
  } catch {
    return null; // blocked by the browser's settings: everything then lasts as long as the page
  }
}

// Whether a stored value has the shape that the page writes; others may have written there, too.
function isTurn(turn) {
  const isReply = (r) => r && typeof r.model === "string" && typeof r.text === "string";
  return turn && typeof turn.user === "string" && Array.isArray(turn.replies) && turn.replies.every(isReply)
    && isNode(turn);
}

function isNode(node) {
  const { next, at } = node;
  return Array.isArray(next) && next.every(isTurn) && Number.isInteger(at) && (next.length ? at in next : at === 0);
}

function read(key) {
  try {
    const value = JSON.parse(storage()?.getItem(key) ?? "null");
    const good = value && typeof value.id === "string" && key === PREFIX + value.id && isNode(value);
    return good ? { title: "", system: "", created: 0, updated: 0, ...value } : null;
  } catch {
    return null;
  }
}

// All conversations, the newest first.
export function conversations() {
  const keys = Object.keys(storage() ?? {}).filter((key) => key.startsWith(PREFIX));
  return keys.map(read).filter(Boolean).sort((a, b) => b.updated - a.updated);
}

// -> "" or what went wrong, in words for the reader.
function write(key, value) {
  try {
    if (!storage()) return "This browser keeps nothing for this page: the conversation lasts until you close it.";
    storage().setItem(key, JSON.stringify(value));
    return "";
  } catch {
    return "The browser's storage is full: this conversation is not kept. Export it, or delete old ones.";
  }
}

export const keep = (conversation) => write(PREFIX + conversation.id, conversation);
export const isConversation = (key) => key === null || key.startsWith(PREFIX); // null: all was cleared
export const forget = (id) => storage()?.removeItem(PREFIX + id);

export function forgetAll() {
  for (const key of Object.keys(storage() ?? {})) if (key.startsWith(PREFIX)) storage().removeItem(key);
}

export function setting(name) {
  try {
    return JSON.parse(storage()?.getItem(`sftflow.${name}`) ?? "null");
  } catch {
    return null;
  }
}

export const keepSetting = (name, value) => write(`sftflow.${name}`, value);

export const theme = {
  get: () => storage()?.getItem("sftflow.theme") ?? "",
  set(name) {
    if (name) document.documentElement.dataset.theme = name;
    else delete document.documentElement.dataset.theme;
    try {
      if (name) storage()?.setItem("sftflow.theme", name);
      else storage()?.removeItem("sftflow.theme");
    } catch {
      // The choice then lasts as long as the page.
    }
  },
};
