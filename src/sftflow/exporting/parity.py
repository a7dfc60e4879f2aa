"""The parity certificate: that a GGUF file says in llama.cpp what its checkpoint says here and in transformers.

The same prompts go through our renderer and engine, through transformers (template, tokenizer, the model's own forward
pass) and through llama.cpp (its Jinja engine on the stored template, its tokenizer, its own arithmetic). Text and ids
must be equal whatever the type; log-probabilities and greedy tokens within the type's BOUNDS. Replies end where
llama.cpp ends them: at all the checkpoint's ends, and at others that it knows by name, which the certificate lists.

llama.cpp shows log-probabilities, not logits: they are compared over the likeliest tokens of every generated place
where it tells them. What could not be compared is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from sftflow.chat.token_rows import token_bytes
from sftflow.checkpoint import Assistant
from sftflow.exporting.bounds import BOUNDS, TOKENS, difference_of, likeliest_of, parting_of
from sftflow.exporting.llamacpp import LlamaCpp
from sftflow.exporting.parity_prompts import Case
from sftflow.foundation.atomic_io import sha256_file
from sftflow.foundation.sequences import common_prefix
from sftflow.gguf.reader import read_ends
from sftflow.gguf.writer import exported_template

PROMPTS = 50
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""whatever the checkpoint asks for"""

Row = dict[str, Any]


def certificate(
    path: Path,
    kind: str,
    assistant: Assistant,
    prompts: list[Case],
    *,
    notes: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The certificate of a GGUF file as JSON; "passed" says whether it holds."""
    import transformers
    import xllamacpp

    context = max(len(c.rendered.ids) for c in prompts) + TOKENS + 8
    rows: list[Row] = []
    failures: list[dict[str, str]] = []  # what must not be, in the order it was found
    with LlamaCpp(path, context=context) as engine:
        own = assistant.renderer.stop_ids()
        stops = [i for i in dict.fromkeys([*own, *read_ends(path)]) if _ends_at(engine, i)]
        lacking = [i for i in own if i not in stops]
        if lacking:
            failures.append(_failure("stop ids", "stop", f"llama.cpp does not stop at {lacking}"))
        for n, (case, ours) in enumerate(zip(prompts, _ours(assistant, prompts, stops), strict=True), 1):
            rows.append(_compare(case, kind, ours, assistant, engine, stops, failures))
            if n % 10 == 0:
                say(f"parity: {n} of {len(prompts)} prompts")

    def total(key: str) -> int:
        return sum(int(row[key]) for row in rows)

    return {
        "passed": not failures,
        "file": path.name,
        "sha256": sha256_file(path),
        "type": kind,
        "model": assistant.name,
        "llama_cpp": f"xllamacpp {xllamacpp.__version__}",
        "transformers": transformers.__version__,
        "prompts": len(rows),
        "tokens_each": TOKENS,
        "rendered_equal": total("rendered_equal"),
        "ids_equal": total("ids_equal"),
        "look_alikes": total("look_alike"),
        "boundary_splits": total("boundary_splits"),
        "greedy_equal": total("greedy_equal"),
        "near_ties": total("near_ties"),
        "greedy_uncompared": total("greedy_uncompared"),
        "stop_ids": own,
        "llama_cpp_stop_ids": stops,
        "largest_logit_difference": max(r["logit_difference"] for r in rows),
        "largest_likely_difference": max(r["likely_difference"] for r in rows),
        "logit_places": total("logit_places"),
        "generated": sum(len(r["tokens"]) for r in rows),
        "bounds": asdict(BOUNDS[kind]),
        "notes": [*notes, *_more_ends(assistant, [i for i in stops if i not in own])],
        "failures": failures,
        "rows": rows,
    }


def not_checked(path: Path, kind: str, name: str, why: str) -> dict[str, Any]:
    """The certificate where llama.cpp is not there to be asked."""
    return {
        "passed": None,
        "file": path.name,
        "sha256": sha256_file(path),
        "type": kind,
        "model": name,
        "llama_cpp": f"not checked: {why}",
    }


def _failure(prompt: str, check: str, detail: str) -> dict[str, str]:
    return {"prompt": prompt, "check": check, "detail": detail}


def _more_ends(assistant: Assistant, ids: list[int]) -> list[str]:
    """The note on ends that the checkpoint does not have."""
    names = ", ".join(assistant.renderer.decode([i]) for i in ids)
    return [f"llama.cpp ends replies at {names}, too, which it knows by name; so does sftflow with this file"] * bool(
        ids
    )


def _ours(assistant: Assistant, prompts: list[Case], ends: Collection[int]) -> list[tuple[list[int], bool]]:
    """(generated ids without the end, whether it ended by itself) of our engine.   ends: the ids that end a reply."""
    stops = frozenset(ends)
    options = {"use_python": False, "stop_ids": stops, **GREEDY}
    requests = [assistant.request(c.rendered.ids.tolist(), max_tokens=TOKENS, **options) for c in prompts]
    out = []
    for reply in assistant.engine.generate(requests):
        ids = list(reply.ids)
        ended = bool(ids) and ids[-1] in stops
        out.append((ids[:-1] if ended else ids, ended))
    return out


def _ends_at(engine: LlamaCpp, token: int) -> bool:
    """Whether llama.cpp takes this token for the end of a reply, asked by making it the likeliest."""
    body = {"prompt": [token], "n_predict": 1, "temperature": 0.0, "logit_bias": [[token, 1e4]]}
    return engine.post("/completion", body).get("stop_type") == "eos"


def _compare(
    case: Case,
    kind: str,
    ours: tuple[list[int], bool],
    assistant: Assistant,
    engine: LlamaCpp,
    stops: list[int],
    failures: list[dict[str, str]],
) -> Row:
    """A prompt's row of the certificate; what must not be goes into `failures`.   stops: where llama.cpp stops."""
    bounds = BOUNDS[kind]
    renderer, rendered = assistant.renderer, case.rendered
    theirs = engine.prompt(case.messages)
    in_transformers = assistant.tokenizer.apply_chat_template(
        renderer.as_given(case.messages),
        chat_template=exported_template(renderer),
        tokenize=False,
        add_generation_prompt=True,
    )
    rendered_equal = rendered.text == theirs == in_transformers
    if not rendered_equal:
        who, other = ("llama.cpp", theirs) if theirs != rendered.text else ("transformers", in_transformers)
        failures.append(_failure(case.id, "rendered", f"{who} renders {_apart(rendered.text, other)}"))
    problem = _ids_problem(case, assistant, engine)
    if problem:
        failures.append(_failure(case.id, "ids", problem))
    ids = rendered.ids.tolist()
    reply = engine.greedy(ids, TOKENS, lambda tokens: _spelled(assistant, tokens))
    likeliest = likeliest_of(assistant.model, ids, reply)
    difference, places = difference_of(likeliest, reply)
    likely, _ = difference_of(likeliest, reply, bounds.likely)
    parted, near_ties, uncompared = parting_of(reply, likeliest, ours, stops, bounds.near)
    if parted:
        failures.append(_failure(case.id, "greedy", parted))
    if reply.tokens and not places:
        failures.append(_failure(case.id, "logits", "llama.cpp told no log-probabilities, so none are compared"))
    if not likely <= bounds.difference:
        of = f" for {kind}, of tokens with a probability of {bounds.likely} and more" if bounds.likely else ""
        failures.append(
            _failure(case.id, "logits", f"they differ by {likely:.2g}, allowed are {bounds.difference}{of}")
        )
    return {
        "id": case.id,
        "n_prompt": len(ids),
        "rendered_equal": rendered_equal,
        "ids_equal": not problem,
        "look_alike": case.look_alike,
        "boundary_splits": rendered.boundary_splits,
        "greedy_equal": not parted,
        "near_ties": near_ties,
        "greedy_uncompared": uncompared,
        "tokens": reply.tokens,
        "logit_difference": difference,
        "likely_difference": likely,
        "logit_places": places,
    }


def _spelled(assistant: Assistant, ids: list[int]) -> list[bytes]:
    """The bytes that llama.cpp writes for each id: none for a control token."""
    control = set(assistant.renderer.special.values())
    spelled = token_bytes(assistant.tokenizer, ids)
    return [b"" if i in control else b for i, b in zip(ids, spelled, strict=True)]


def _ids_problem(case: Case, assistant: Assistant, engine: LlamaCpp) -> str:
    """How llama.cpp's ids differ from ours; "" where they do not.

    llama.cpp's server takes control strings in content for control tokens, which ours keeps as text: there the text
    between the control tokens is compared. Where ours encodes two sides of a boundary apart, llama.cpp is compared
    with transformers, which does not.
    """
    rendered, tokenizer = case.rendered, assistant.tokenizer
    ids = rendered.ids.tolist()
    if case.look_alike:
        control = set(assistant.renderer.special.values())
        for part in (list(run) for special, run in groupby(ids, control.__contains__) if not special):
            text = assistant.renderer.decode(part)
            if (got := engine.ids(text, special=False)) != part:
                return f"{text!r} is {got} in llama.cpp, {part} here"
        return ""
    got = engine.ids(rendered.text)
    plain = tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    if plain != ids and not rendered.boundary_splits:
        return f"transformers: {_apart(ids, plain)}"
    return "" if got == plain else f"llama.cpp: {_apart(plain, got)}"


def _apart(ours: Any, theirs: Any) -> str:
    """Where two sequences part, in words."""
    at = common_prefix(ours, theirs)
    return f"{theirs[at : at + 8]!r} where {ours[at : at + 8]!r} is right (at {at})"
