"use strict";
// Filters the page's lists and lets a keyboard walk through them. The page is whole without it: the bars are hidden
// until this runs. It reads the page and writes no text of the data back.
(() => {
  const summary = (entry) => entry.querySelector("summary");

  const setUp = (browse) => {
    const bar = browse.querySelector(".bar");
    const entries = [...browse.querySelectorAll(":scope > .entry")];
    const search = bar.querySelector("input");
    const select = bar.querySelector("select");
    const buttons = [...bar.querySelectorAll("button[data-is]")];
    const foldAll = bar.querySelector(".fold-all");
    let texts = null; // read when first searched: a task may have hundreds of long items
    let mark = "";

    const apply = () => {
      const wanted = search.value.trim().toLowerCase();
      if (wanted && !texts) texts = entries.map((e) => e.textContent.toLowerCase());
      let shown = 0;
      entries.forEach((e, i) => {
        const keep = (!mark || e.dataset.is.split(" ").includes(mark)) &&
          (!select || !select.value || e.dataset.kind === select.value) && (!wanted || texts[i].includes(wanted));
        e.hidden = !keep;
        shown += keep;
      });
      buttons.forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.is === mark)));
      bar.querySelector("output").textContent = shown + " of " + entries.length + " " + browse.dataset.noun;
    };

    browse.showAll = () => {
      mark = search.value = "";
      if (select) select.value = "";
      apply();
    };
    search.addEventListener("input", apply);
    if (select) select.addEventListener("change", apply);
    buttons.forEach((b) => b.addEventListener("click", () => { mark = b.dataset.is; apply(); }));
    foldAll.addEventListener("click", () => {
      const open = foldAll.getAttribute("aria-pressed") !== "true";
      foldAll.setAttribute("aria-pressed", String(open));
      foldAll.textContent = open ? "close all" : "open all";
      entries.forEach((e) => { e.open = open && !e.hidden; });
    });
    bar.hidden = false;
    browse.showAll();
  };

  document.querySelectorAll(".browse").forEach(setUp);

  // A link to an entry that a filter hides would go nowhere.
  const follow = () => {
    const target = document.getElementById(location.hash.slice(1));
    const entry = target?.closest(".entry");
    if (!entry) return;
    if (entry.hidden) entry.closest(".browse").showAll();
    entry.open = true;
    entry.scrollIntoView();
    summary(entry).focus({ preventScroll: true });
  };
  addEventListener("hashchange", follow);
  follow();

  // The list's own neighbour; with nothing in focus, the first entry that is on the screen.
  const neighbour = (at, step) => {
    const from = at?.closest(".entry");
    const browse = at?.closest(".browse");
    const row = [...document.querySelectorAll(".browse > .entry")].filter((e) =>
      !e.hidden && e.getClientRects().length > 0 && (!browse || e.parentElement === browse));
    if (from) return row[row.indexOf(from) + step];
    return browse ? row[0] : row.find((e) => e.getBoundingClientRect().bottom > 0);
  };

  addEventListener("keydown", (event) => {
    const at = document.activeElement;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = at.matches("input, select, textarea");
    const search = at.closest(".browse")?.querySelector("input");
    if (typing && event.key === "Escape" && at === search) { search.value = ""; search.dispatchEvent(new Event("input")); }
    const down = { j: 1, k: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
    const arrow = event.key.startsWith("Arrow");
    const onEntry = at.matches(".entry > summary");
    // Letters are text while typing; arrows scroll, unless the focus is in a list. From the search, down enters it.
    if (typing ? !(at === search && event.key === "ArrowDown") : arrow && !onEntry) return;
    if (event.key === "/" && search) { event.preventDefault(); search.focus(); return; }
    if (!down) return;
    const next = neighbour(at === document.body ? null : at, down);
    if (!next) return;
    event.preventDefault();
    // Reading goes on: where an entry was open, the next one opens in its place.
    const from = at.closest(".entry");
    if (from && from.open) { from.open = false; next.open = true; }
    summary(next).focus({ preventScroll: true });
    next.scrollIntoView({ block: "nearest" });
  });
})();
