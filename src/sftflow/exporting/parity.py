"""The parity certificate: that a GGUF file says in llama.cpp what its checkpoint says here and in transformers.

The same prompts go through our renderer and engine, through transformers (template, tokenizer, the model's own forward
pass) and through llama.cpp (its Jinja engine on the stored template, its tokenizer, its own arithmetic). Text and ids
must be equal whatever the type; in f32 the greedy tokens, too, and logits to TOLERANCE.

llama.cpp shows log-probabilities, not logits: they are compared over the likeliest tokens of every generated place
where it tells them. What could not be compared is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from sftflow.chat.token_rows import token_bytes
from sftflow.checkpoint import Assistant
from sftflow.exporting.llamacpp import Continuation, LlamaCpp
from sftflow.exporting.parity_prompts import Case
from sftflow.foundation.atomic_io import sha256_file
from sftflow.foundation.sequences import common_prefix
from sftflow.gguf.writer import exported_template

PROMPTS, TOKENS = 50, 24
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""whatever the checkpoint asks for"""
TOLERANCE = 1e-3
"""of a log-probability in f32: two orders above what single precision loses in 30 layers"""
NEAR = 1e-4
"""two tokens this close in log-probability: rounding chose between them"""

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
        ends = [i for i in assistant.renderer.stop_ids() if not _ends_at(engine, i)]
        if ends:
            failures.append(_failure("stop ids", "stop", f"llama.cpp does not stop at {ends}"))
        for n, (case, ours) in enumerate(zip(prompts, _ours(assistant, prompts), strict=True), 1):
            rows.append(_compare(case, kind, ours, assistant, engine, failures))
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
        "stop_ids": assistant.renderer.stop_ids(),
        "largest_logit_difference": max(r["logit_difference"] for r in rows),
        "logit_places": total("logit_places"),
        "generated": sum(len(r["tokens"]) for r in rows),
        "tolerance": TOLERANCE if kind == "f32" else None,
        "notes": list(notes),
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


def _ours(assistant: Assistant, prompts: list[Case]) -> list[tuple[list[int], bool]]:
    """(generated ids without the end, whether it ended by itself) of our engine."""
    stops = frozenset(assistant.renderer.stop_ids())
    requests = [
        assistant.request(c.rendered.ids.tolist(), max_tokens=TOKENS, use_python=False, **GREEDY) for c in prompts
    ]
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
    failures: list[dict[str, str]],
) -> Row:
    """A prompt's row of the certificate; what must not be goes into `failures`."""
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
    likeliest = _likeliest(assistant.model, ids, reply)
    difference, places = _difference(likeliest, reply)
    parted, near_ties, uncompared = _greedy(reply, likeliest, ours, renderer.stop_ids())
    if kind == "f32" and parted:
        failures.append(_failure(case.id, "greedy", parted))
    if kind == "f32" and reply.tokens and not places:
        failures.append(_failure(case.id, "logits", "llama.cpp told no log-probabilities, so none are compared"))
    if kind == "f32" and not difference <= TOLERANCE:
        failures.append(_failure(case.id, "logits", f"they differ by {difference:.2g}, allowed are {TOLERANCE}"))
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


def _likeliest(model: Any, ids: list[int], reply: Continuation) -> Any:
    """(n + 1, vocabulary) log-probabilities of transformers' own forward pass over what llama.cpp wrote."""
    import torch

    with torch.inference_mode():
        row = torch.tensor([[*ids, *reply.tokens]], device=model.device)
        logits = model(input_ids=row, use_cache=False, logits_to_keep=len(reply.tokens) + 1).logits[0]
    return logits.float().log_softmax(-1).cpu()


def _difference(likeliest: Any, reply: Continuation) -> tuple[float, int]:
    """(the largest difference of a log-probability, infinite where one is no number; the places compared)."""
    import torch

    gap, places = 0.0, 0
    for place, told in enumerate(reply.logprobs):
        if not told:
            continue
        places += 1
        here = float((likeliest[place, list(told)] - torch.tensor(list(told.values()))).abs().max())
        gap = max(gap, here if math.isfinite(here) else math.inf)  # max(0.0, nan) would be 0.0
    return gap, places


def _greedy(
    reply: Continuation, likeliest: Any, ours: tuple[list[int], bool], stops: list[int]
) -> tuple[str, int, int]:
    """Greedy tokens side by side: (where they differ by more than a near tie, "" where they do not; the number of
    places where rounding chose; that of the places behind one that parted llama.cpp and us: from there on they answer
    different texts)."""
    tokens, ended = reply.tokens, reply.stopped
    if tokens and tokens[-1] in stops:
        tokens, ended = tokens[:-1], True
    mine, mine_ended = ours
    near_ties = 0
    for place in range(min(TOKENS, max(len(tokens), len(mine)) + 1)):
        a = tokens[place] if place < len(tokens) else "end" if ended else None
        b = mine[place] if place < len(mine) else "end" if mine_ended else None
        row = likeliest[place]
        best = int(row.argmax())
        c = "end" if best in stops else best
        if not a == b == c:
            if not (_near_best(a, row, stops) and _near_best(b, row, stops)):
                detail = f"token {place}: llama.cpp {a}, sftflow {b}, transformers {c}"
                return detail, near_ties, 0
            near_ties += 1
            if a != b:
                return "", near_ties, max(len(tokens), len(mine)) - place - 1
        if a == "end":
            break
    return "", near_ties, 0


def _near_best(choice: int | str | None, row: Any, stops: list[int]) -> bool:
    """Whether a token, or one of those that end a reply, is as good as the likeliest of (vocabulary,)."""
    ids = stops if choice == "end" else [choice] if isinstance(choice, int) else []
    return any(float(row.max() - row[i]) < NEAR for i in ids)
