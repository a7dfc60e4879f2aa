// The list of kept conversations: open, rename, delete, delete all.
import { $, confirmed, cover, fromTemplate, make } from "./dom.js";
import { title } from "./conversation.js";

// Opens and closes the list where it is a drawer; on a wide screen it always stands there.
export function showSidebar(open) {
  const was = $("sidebar").classList.contains("open");
  $("sidebar").classList.toggle("open", open);
  $("shade").hidden = !open;
  $("open-sidebar").setAttribute("aria-expanded", String(open));
  cover(open);
  if (open) $("new").focus();
  else if (was) $("open-sidebar").focus();
}

function renaming(item, conversation, done) {
  const field = make("input");
  field.value = title(conversation);
  field.setAttribute("aria-label", "New name");
  let over = false;
  const end = (keep) => {
    if (over) return; // taking the field away makes it lose the focus once more
    over = true;
    done(keep ? field.value.trim() : null);
  };
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault();
    event.stopPropagation();
    end(event.key === "Enter");
  });
  field.addEventListener("blur", () => end(true));
  item.replaceChildren(field);
  field.select();
}

// actions: {open(conversation), rename(conversation, title), remove(conversation)}
export function drawSidebar(conversations, current, actions) {
  const items = conversations.map((conversation) => {
    const { node, part } = fromTemplate("chat-item");
    const name = title(conversation);
    part("open").textContent = name;
    part("open").title = name;
    if (conversation.id === current.id) part("open").setAttribute("aria-current", "true");
    part("open").addEventListener("click", () => actions.open(conversation));
    part("rename").setAttribute("aria-label", `Rename “${name}”`);
    part("rename").addEventListener("click", () => renaming(node, conversation, (given) => {
      actions.rename(conversation, given);
    }));
    part("delete").setAttribute("aria-label", `Delete “${name}”`);
    part("delete").addEventListener("click", async () => {
      if (await confirmed(`Delete “${name}”? It is kept nowhere else.`, "Delete")) actions.remove(conversation);
    });
    return node;
  });
  $("chats").replaceChildren(...items);
  $("clear").hidden = !items.length;
}
