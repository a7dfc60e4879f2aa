// Small things that every part of the page needs. Text enters the page as text nodes only.

export const $ = (id) => document.getElementById(id);

export function make(tag, className, words) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (words !== undefined) node.textContent = words;
  return node;
}

// A copy of a <template> of index.html; part(name) is its element with data-part="name".
export function fromTemplate(id) {
  const node = $(id).content.firstElementChild.cloneNode(true);
  const part = (name) => (node.dataset.part === name ? node : node.querySelector(`[data-part="${name}"]`));
  return { node, part };
}

// For those who listen: read out when the reader has finished what it says. The same words twice are said twice.
export function announce(words) {
  $("status").replaceChildren(make("p", "", words));
}

export function notice(words, calm = false) {
  $("notice").textContent = words;
  $("notice").classList.toggle("calm", calm);
  $("notice").hidden = !words;
}

export async function copy(words, button) {
  try {
    await navigator.clipboard.writeText(words);
  } catch {
    // Over plain http from another machine a browser gives no clipboard; the old way needs a selection.
    const area = make("textarea", "hidden-text");
    area.value = words;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const before = button.dataset.label ?? button.textContent;
  button.dataset.label = before;
  button.textContent = "Copied";
  announce("Copied");
  setTimeout(() => { button.textContent = before; }, 1500);
}

// On a narrow screen a panel covers the rest, which then takes no keys either.
export function cover(on) {
  $("stage").inert = on && matchMedia("(max-width: 820px)").matches;
}

export function codeBlock(code, language) {
  const box = make("div", "code");
  const head = make("div", "code-head");
  const button = make("button", "quiet", "Copy");
  button.type = "button";
  button.setAttribute("aria-label", "Copy this code");
  button.addEventListener("click", () => copy(code, button));
  head.append(make("span", "", language), button);
  const pre = make("pre");
  pre.tabIndex = 0; // it scrolls by itself where a line is long
  pre.append(make("code", "", code));
  box.append(head, pre);
  return box;
}

// Asks in a dialog of the page. -> whether the answer was yes
export function confirmed(question, yes) {
  const dialog = $("confirm");
  $("confirm-question").textContent = question;
  $("confirm-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((done) => {
    // The event comes later than the closing: by then the next question may stand there.
    dialog.onclose = () => { if (!dialog.open) done(dialog.returnValue === "yes"); };
  });
}

export function download(name, kind, words) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([words], { type: kind }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
