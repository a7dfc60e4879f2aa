"""What the scores can be trusted for: a judge's verdicts with its biases, and items that training may have seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sftflow.report.page.parts import cells, duo, fact, fold, note, plural
from sftflow.report.pages import esc
from sftflow.report.wording import Data, number, percent, share

FAIR = 0.1  # a judge's share this far from a half is worth a word


def judge(data: Data, say: dict[str, str]) -> str:
    j: Data = data.get("judge") or {}
    if not j:
        return ""
    if j.get("not_judged"):
        return note(f"Not judged: {esc(j['not_judged'])}.")
    ci, said = j.get("ci95"), "cannot tell which the judge prefers"
    if ci and ci[0] > 0.5:
        said = f"the judge prefers the {say['after']} replies"
    elif ci and ci[1] < 0.5:
        said = f"the judge prefers the {say['before']} replies"
    interval = f", 95% interval {percent(ci[0])} to {percent(ci[1])}" if ci else ""
    facts = [
        fact(share(j.get("win_rate")), f"of pairs won by {say['after']}{interval}: {said}"),
        fact(
            f"{number(j.get('wins'))} · {number(j.get('losses'))} · {number(j.get('ties'))}",
            f"won, lost, tied by {say['after']}, of {number(j.get('n'))}",
        ),
    ]
    rows = [
        ("verdict changed when the order was swapped", number(j.get("disagreements"))),
        ("answer could not be read", number(j.get("parse_failures"))),
        ("preferred the reply shown first", _leaning(j.get("first_share"))),
        ("preferred the longer reply", _leaning(j.get("length_effect"))),
    ]
    where = f" at {esc(j['url'])}" if j.get("url") else ""
    about = (
        f"{esc(j.get('model'))}{where} read each pair twice, in both orders; only a verdict that holds in both counts. "
        "A judge is a model with tastes of its own, so what it leans to stands here too."
    )
    verdicts: Sequence[Data] = j.get("rows") or []
    folded = fold("Every verdict", _verdicts(verdicts, say), plural(len(verdicts), "pair")) if verdicts else ""
    return note(about) + f'<div class="facts">{"".join(facts)}</div>' + duo(["how it judges", ""], rows) + folded


def _verdicts(rows: Sequence[Data], say: dict[str, str]) -> str:
    names = {"a": say["after"], "b": say["before"], "tie": "neither"}
    columns = [("better", "verdict"), (f"{say['after']} shown first", "first_order")]
    columns.append((f"{say['before']} shown first", "second_order"))
    body = []
    for r in rows:
        told = cells((title, names.get(str(r.get(key)), "no verdict")) for title, key in columns)
        why = f'<td class="left why">{esc(r["failure"])}</td>' if r.get("failure") else ""
        body.append(f'<tr><th scope="row" class="left">{esc(r.get("id"))}</th>{told}{why}</tr>')
    head = "".join(f"<th>{title}</th>" for title, _ in columns)
    head = f'<thead><tr><th class="left">prompt</th>{head}</tr></thead>'
    return f'<table class="cards">{head}<tbody>{"".join(body)}</tbody></table>'


def _leaning(x: object) -> str:
    """0.7 -> '70.0% (leans)', 0.52 -> '52.0%'; a half is no leaning."""
    return share(x) + (" (leans)" if isinstance(x, int | float) and abs(x - 0.5) > FAIR else "")


def contamination(data: Data) -> str:
    """Per task, how many of its items stand in what was trained on."""
    tasks: Mapping[str, Data] = data.get("tasks") or {}
    found = {name: t["contamination"] for name, t in tasks.items() if t.get("contamination")}
    if not found:
        return ""
    reasons = {c.get("not_checked") for c in found.values()}
    if len(reasons) == 1 and None not in reasons:
        return note(f"Not checked for any task: {esc(reasons.pop())}.")
    rows, folds = [], []
    ngrams = sorted({c["ngram"] for c in found.values() if c.get("ngram")})
    for name, c in found.items():
        if c.get("not_checked"):
            rows.append(
                f'<tr><th scope="row" class="left">{esc(name)}</th>'
                f'<td class="left why" colspan="4">not checked: {esc(c["not_checked"])}</td></tr>'
            )
            continue
        n = c.get("contaminated") or 0
        kind = ' class="worse"' if n else ""
        columns = [
            ("items", number(c.get("items"))),
            ("found in training", f"<b{kind}>{number(n)}</b>"),
            ("share", share(c.get("share"))),
            ("too short to check", number(c.get("unchecked"))),
        ]
        rows.append(f'<tr><th scope="row" class="left">{esc(name)}</th>{cells(columns)}</tr>')
        examples = [
            f"<dt>{' · '.join(esc(e[k]) for k in ('item', 'source', 'place') if e.get(k) is not None)}</dt>"
            f"<dd>{esc(e.get('words'))}</dd>"
            for e in c.get("examples") or []
        ]
        if examples:
            folds.append(
                fold(
                    f"What was found of {name}",
                    f'<dl class="pairs">{"".join(examples)}</dl>',
                    plural(len(examples), "example"),
                )
            )
    words = f"{' or '.join(map(str, ngrams))} words in a row" if ngrams else "a run of words"
    said = f"Items of which {words} stand in the training data. A score on such items may be memory, not skill."
    head = "".join(f"<th>{h}</th>" for h in ("items", "found in training", "share", "too short to check"))
    head = f'<thead><tr><th class="left">task</th>{head}</tr></thead>'
    table = f'<table class="cards">{head}<tbody>{"".join(rows)}</tbody></table>'
    return note(said) + table + "".join(folds)
