"""The audit of a mixture as one page: what is trained on, how long it is, what repeats, what overlaps a test."""

from __future__ import annotations

from collections.abc import Sequence

from sftflow.data.audit.charts import lengths_section
from sftflow.data.audit.markup import Data, count, fold, percent, section, table
from sftflow.report.token_page import PAGE_CSS, esc, legend, page, token_boxes

_CSS = """
body > section { margin-top: 2.25rem; padding-top: 1.1rem; border-top: 1px solid var(--line); }
section > h2 + p { margin-top: .25rem; } .note { color: var(--soft); max-width: 46rem; }
.lead { font-size: 1.0625rem; max-width: 50rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: .75rem; margin: 1.1rem 0; }
.fact { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .65rem .9rem; }
.fact b { display: block; font-size: 1.45rem; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.3; }
.fact span { display: block; color: var(--soft); font-size: .8125rem; line-height: 1.4; }
.warning { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .5rem .75rem; margin: .6rem 0; }
.good { color: var(--good); } .bad { color: var(--bad); }
table { width: 100%; border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums;
  margin: .75rem 0; }
th, td { text-align: right; vertical-align: top; padding: .4rem .5rem; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; }
thead th { color: var(--soft); font-size: .8125rem; vertical-align: bottom; font-weight: 600; }
th:first-child, .left { text-align: left; } th[scope="row"] { font-weight: 600; min-width: 6rem;
  overflow-wrap: anywhere; } td.left { overflow-wrap: anywhere; }
tfoot th, tfoot td { border-bottom: 0; font-weight: 600; }
td small { display: block; color: var(--soft); font-size: .85em; } .zero { color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19.5rem), 1fr)); gap: .75rem;
  margin: .9rem 0; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .65rem .75rem; break-inside: avoid; }
figcaption b { display: block; } figcaption { font-size: .8125rem; color: var(--soft); }
figcaption b { color: var(--ink); font-size: .9375rem; }
.lost { color: var(--before); font-weight: 600; white-space: nowrap; }
svg { display: block; width: 100%; height: auto; overflow: visible; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
svg text { fill: var(--soft); font-family: inherit; font-size: 11px; }
.grid { stroke: var(--line); stroke-width: 1; } .bars { fill: var(--accent); }
.limit { stroke: var(--before); stroke-width: 1.5; stroke-dasharray: 4 3; } svg text.limit-name { fill: var(--before); }
details { border-bottom: 1px solid var(--line); padding: .5rem 0; } summary { cursor: pointer; font-weight: 600; }
summary .soft { font-weight: 400; } details ul { margin: .4rem 0; padding-left: 1.25rem; font-size: .875rem; }
q { quotes: "“" "”"; } code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.sample { margin-top: 1.1rem; } footer { margin-top: 2.25rem; color: var(--soft); font-size: .8125rem; }
/* On a phone each table row becomes a card, and each cell says its column. */
@media screen and (max-width: 46rem) {
  body { padding-top: .9rem; } body > section { margin-top: 1.75rem; }
  .facts { grid-template-columns: 1fr 1fr; gap: .4rem; } .fact { padding: .45rem .7rem; } .fact b { font-size: 1.2rem; }
  thead { display: none; } table, tbody, tfoot { display: block; }
  tr { display: grid; grid-template-columns: repeat(3, 1fr); gap: .35rem .75rem; padding: .7rem 0;
    border-bottom: 1px solid var(--line); }
  th, td { display: block; border: 0; padding: 0; text-align: left; min-width: 0; }
  th[scope="row"] { grid-column: 1 / -1; font-size: 1rem; } td.all { grid-column: 1 / -1; } td.none { display: none; }
  td[data-label]::before { content: attr(data-label); display: block; color: var(--soft); font-size: .75rem;
    font-weight: 400; }
}
@media print { .facts { grid-template-columns: repeat(4, 1fr); } .fact b { font-size: 13pt; }
  .plots { grid-template-columns: repeat(2, 1fr); } table { font-size: 8.5pt; } th, td { padding: .25rem .3rem; }
  tr, .fact { break-inside: avoid; } body > section { margin-top: 1.25rem; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""


def audit_page(ledger: Data, samples: Sequence[Data] | None = None) -> str:
    """One page of a ledger with the audit's keys; what the ledger has not is left out.

    samples: rows as `chat.inspect.token_rows` gives them, with the source's "name" where it is known
    (default: `ledger["samples"]`).
    """
    shown = ledger.get("samples") or [] if samples is None else samples
    body = [
        _head(ledger),
        _sources(ledger),
        lengths_section(ledger),
        _repeats(ledger),
        _overlap(ledger),
        _invariants(ledger),
        _bad_rows(ledger),
        _samples(shown),
    ]
    if ledger.get("data_sha256"):
        body.append(f"<footer>Ids and masks, in order: SHA-256 <code>{esc(ledger['data_sha256'])}</code></footer>")
    return page("Mixture audit", PAGE_CSS + _CSS, "\n".join(b for b in body if b))


def _head(ledger: Data) -> str:
    sources, tokens = ledger["sources"], ledger["tokens"]
    lead = (
        f"{count(ledger['rows'], 'training row')} from {count(len(sources), 'source')}, repeats included. The loss is "
        f"taken on {percent(ledger['supervised_tokens'], tokens)} of their {count(tokens, 'token')}."
    )
    facts = [(f"{tokens:,}", f"tokens, {ledger['supervised_tokens']:,} supervised")]
    if "packed_rows" in ledger:
        limit = f" of {ledger['max_length']:,}" if ledger.get("max_length") else ""
        facts.append((f"{ledger['packed_rows']:,}", f"packed rows{limit}, {ledger['padding_share']:.1%} padding"))
    cut, dropped = (sum(s.get(key, 0) for s in sources) for key in ("cut", "dropped"))
    facts.append((f"{cut:,} / {dropped:,}", "rows cut / dropped"))
    if "duplicates" in ledger:
        near = ledger["near_duplicates"]["rows"]
        facts.append(
            (f"{ledger['duplicates']['rows']:,} / {near:,}", "rows that repeat / nearly repeat an earlier one")
        )
    if ledger.get("overlap"):
        found = sum(t["contaminated"] for t in ledger["overlap"].values())
        items = sum(t["items"] for t in ledger["overlap"].values())
        facts.append((f"{found:,}", f"of {count(items, 'evaluation item')} found in training rows"))
    if ledger.get("invariants"):
        checked = sum(i["checked"] for i in ledger["invariants"].values())
        failed = sum(i["failed"] for i in ledger["invariants"].values())
        facts.append((f"{failed:,}", f"of {count(checked, 'check')} failed"))
    boxes = "".join(f'<div class="fact"><b>{value}</b><span>{esc(said)}</span></div>' for value, said in facts)
    return (
        f'<header><h1>Mixture audit</h1><p class="lead">{lead}</p><div class="facts">{boxes}</div></header>'
        + "".join(f'<p class="warning">{w}</p>' for w in _warnings(ledger))
    )


def _warnings(ledger: Data) -> list[str]:
    out = []
    for name, i in (ledger.get("invariants") or {}).items():
        if i["failed"]:
            out.append(f"<b>{esc(name)}</b> failed in {i['failed']:,} of {count(i['checked'], 'check')}.")
    found = [
        f"{t['contaminated']:,} of {count(t['items'], 'item')} of <b>{esc(name)}</b>"
        for name, t in (ledger.get("overlap") or {}).items()
        if t["contaminated"]
    ]
    if found:
        out.append(f"Evaluation items have their words in training rows: {', '.join(found)}.")
    return out


def _sources(ledger: Data) -> str:
    audited = "duplicates" in ledger
    columns = ["source", "rows", "repeat", "tokens", "supervised", "cut", "dropped", "expanded", "held out"]
    columns += ["duplicates", "near-dupl."] if audited else []

    def cells(s: Data, name: str, repeat: str, held: int, dropped: str) -> list[str]:
        out = [
            name,
            f"{s['rows']:,}",
            repeat,
            f"{s['tokens']:,}",
            percent(s["supervised_tokens"], s["tokens"]),
            f"{s.get('cut', 0):,}",
            dropped,
            f"{s.get('expanded', 0):,}",
            f"{held:,}",
        ]
        return out + ([f"{s['duplicates']['rows']:,}", f"{s['near_duplicates']['rows']:,}"] if audited else [])

    rows = []
    for s in ledger["sources"]:
        why = "".join(f"<small>{n:,} {esc(w)}</small>" for w, n in (s.get("dropped_why") or {}).items())
        dropped = f"{s.get('dropped', 0):,}{why}"
        rows.append(cells(s, esc(s["name"]), f"×{s.get('repeat', 1)}", s.get("validation_rows", 0), dropped))
    every = {key: sum(s.get(key, 0) for s in ledger["sources"]) for key in ("cut", "dropped", "expanded")}
    foot = cells({**ledger, **every}, "all", "", ledger.get("validation_rows", 0), f"{every['dropped']:,}")
    note = (
        "Tokens and supervised tokens count a row as often as it is repeated; every other column counts it once. In "
        "the last line, rows count repeats, too. Cut: earlier turns kept, the last ones left out to fit. Expanded: one "
        "conversation became several training rows."
    )
    return section("Sources", f'{table(columns, rows, foot)}<p class="note small">{note}</p>')


def _repeats(ledger: Data) -> str:
    details = []
    for s in ledger["sources"]:
        same, near = s.get("duplicates"), s.get("near_duplicates")
        if not same or not near or not (same["examples"] or near["examples"]):
            continue
        groups = "".join(
            f"<li>{count(g['rows'], 'equal row')}: {', '.join(f'<code>{esc(p)}</code>' for p in g['places'])}"
            f"{' …' if g['rows'] > len(g['places']) else ''}</li>"
            for g in same["examples"]
        )
        pairs = "".join(
            f"<li>{n['similarity']:.2f}: <code>{esc(n['place'])}</code> nearly repeats <code>{esc(n['of'])}</code></li>"
            for n in near["examples"]
        )
        said = f"{same['rows']:,} repeat, {near['rows']:,} nearly repeat"
        across = same["of_other_sources"] + near["of_other_sources"]
        said += f" an earlier row, {across:,} of them another source's" if across else " an earlier row"
        details.append(fold(s["name"], said, f"<ul>{groups}{pairs}</ul>"))
    if not details:
        return ""
    note = (
        "Repeating rows have the same ids. Nearly repeating rows share 80% or more of their runs of 5 words (Jaccard "
        "similarity); exact repeats are not counted again."
    )
    return section("Repeated rows", "".join(details), note)


def _overlap(ledger: Data) -> str:
    tasks: Data = ledger.get("overlap") or {}
    if not tasks:
        return ""
    rows, details = [], []
    for name, t in tasks.items():
        where = ", ".join(f"{esc(s['name'])} {s['items']:,}" for s in t["sources"] if s["items"])
        hit = f'<b class="bad">{t["contaminated"]:,}</b>' if t["contaminated"] else "0"
        share = percent(t["contaminated"], t["items"])
        unchecked, templates = f"{t['unchecked']:,}", f"{t['template_ngrams']:,}"
        rows.append([esc(name), f"{t['items']:,}", hit, share, unchecked, templates, where])
        if t["examples"]:
            found = "".join(
                f"<li>item {e['item']}, in {esc(e['source'])}, <code>{esc(e['place'])}</code>: "
                f"<q>{esc(e['words'])}</q></li>"
                for e in t["examples"]
            )
            more = f"the first {len(t['examples'])} found" if len(t["examples"]) < t["contaminated"] else "all found"
            details.append(fold(name, more, f"<ul>{found}</ul>"))
    ngram = next(iter(tasks.values()))["ngram"]
    note = (
        f"An evaluation item is found where a training row has {ngram} words in a row of its question or answer "
        "(lower case, no punctuation), or, where it is shorter, the whole of it. Not checked: items of fewer than 4 "
        "words, or with wording only that more than 10 items of the task (or half of a small one) have in common; such "
        "runs of words are counted as template."
    )
    columns = ("task", "items", "found", "share", "not checked", "template", "found in")
    return section("Overlap with evaluation sets", table(columns, rows, left=6) + "".join(details), note)


def _invariants(ledger: Data) -> str:
    found: Data = ledger.get("invariants") or {}
    if not found:
        return ""
    rows = []
    for name, i in found.items():
        state = '<b class="bad">✗ failed</b>' if i["failed"] else '<b class="good">✓ holds</b>'
        if not i["checked"]:
            state = '<span class="soft">not checked</span>'
        rows.append([esc(name), state, f"{i['checked']:,}", f"{i['failed']:,}", esc(i.get("first"))])
    columns = ("what must hold", "", "checked", "failed", "first failure")
    return section("Invariants", table(columns, rows, left=4))


def _bad_rows(ledger: Data) -> str:
    bad = ledger.get("bad_rows") or []
    if not bad:
        return ""
    rows = "".join(f"<li>{esc(b)}</li>" for b in bad)
    said = f"{len(bad):,}{' or more' if len(bad) >= 100 else ''}"
    return section("Bad rows", fold("AuditRows left out", said, f"<ul>{rows}</ul>"))


def _samples(samples: Sequence[Data]) -> str:
    if not samples:
        return ""
    parts = []
    for number, sample in enumerate(samples, 1):
        name = f"{esc(sample['name'])} " if sample.get("name") else ""
        place = f'<span class="soft small">{esc(sample.get("source"))}</span>'
        boxes = token_boxes(sample["tokens"], sample.get("turns") or (), f"s{number}")
        parts.append(f'<div class="sample"><h3>{name}{place}</h3>{boxes}</div>')
    return section("One row of each source", legend() + "".join(parts))
