"use strict";
// Filters the fixed prompts. The page is whole without it: the filter bar is hidden until this runs.
(() => {
  const bar = document.getElementById("filter");
  if (!bar) return;
  const cards = [...document.querySelectorAll("#cards > .card")];
  const texts = cards.map((card) => card.textContent.toLowerCase());
  const search = bar.querySelector("input");
  const kinds = [...bar.querySelectorAll("button[data-kind]")];
  const unstopped = bar.querySelector("button[data-unstopped]");
  const count = bar.querySelector("output");
  let kind = "";

  const apply = () => {
    const wanted = search.value.trim().toLowerCase();
    const only = unstopped.getAttribute("aria-pressed") === "true";
    let shown = 0;
    cards.forEach((card, i) => {
      const keep = (!kind || card.dataset.kind === kind) && (!only || "unstopped" in card.dataset) &&
        texts[i].includes(wanted);
      card.hidden = !keep;
      shown += keep;
    });
    kinds.forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.kind === kind)));
    count.textContent = shown + " of " + cards.length + " prompts";
  };

  const showAll = () => {
    kind = search.value = "";
    unstopped.setAttribute("aria-pressed", "false");
    apply();
  };

  search.addEventListener("input", apply);
  kinds.forEach((b) => b.addEventListener("click", () => { kind = b.dataset.kind; apply(); }));
  unstopped.addEventListener("click", () => {
    unstopped.setAttribute("aria-pressed", String(unstopped.getAttribute("aria-pressed") !== "true"));
    apply();
  });
  // A link to a prompt that the filter hides would go nowhere.
  addEventListener("hashchange", () => {
    const target = document.getElementById(location.hash.slice(1));
    if (target && target.hidden) { showAll(); target.scrollIntoView(); }
  });
  bar.hidden = false;
  apply();
})();
