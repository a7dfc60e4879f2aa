"""Real chat templates x tokenizers x shapes of conversation: every row that is made must be right.

`python -m pytest tests/test_templates.py -s -q` prints the table; `-m slow` runs the whole product.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.oracle import Reference, accepts, check_rows, why_not
from helpers.outside import NOT_SET, each, outside, outside_files
from helpers.shapes import SHAPES, WEATHER, Row
from sftflow.chat.format import TEMPLATE_NOW, choose_format
from sftflow.chat.render import Renderer
from sftflow.chat.schema import parse_row
from sftflow.chat.template_options import settle
from sftflow.errors import FormatError, MaskError, SchemaError

PATHS = outside_files("fixtures/chat_templates", "*/*.jinja")

# What each template closes an assistant's turn with, read from its source by hand: None where it writes nothing there.
EOS = "eos_token"
ENDS: dict[str, str | None] = {
    "alpaca": EOS,
    "amberchat": None,
    "chatml": "<|im_end|>",
    "chatqa": None,
    "falcon-instruct": None,
    "gemma-it": "<end_of_turn>",
    "granite-3.0-instruct": "<|end_of_text|>",
    "llama-2-chat": EOS,
    "llama-3-instruct": "<|eot_id|>",
    "mistral-instruct": EOS,
    "openchat-3.5": "<|end_of_turn|>",
    "phi-3": "<|end|>",
    "phi-3-small": "<|end|>",
    "qwen2.5-instruct": "<|im_end|>",
    "saiga": EOS,
    "solar-instruct": None,
    "vicuna": EOS,
    "zephyr": EOS,
    "GLM-4.6": None,
    "HuggingFaceTB-SmolLM3-3B": "<|im_end|>",
    "Kimi-K2-Instruct": "<|im_end|>",
    "LFM2.5-Instruct": "<|im_end|>",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "<|im_end|>",
    "Qwen-QwQ-32B": "<|im_end|>",
    "Qwen-Qwen2.5-7B-Instruct": "<|im_end|>",
    "Qwen-Qwen3-0.6B": "<|im_end|>",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "<｜end▁of▁sentence｜>",
    "deepseek-ai-DeepSeek-V3.1": "<｜end▁of▁sentence｜>",
    "google-gemma-2-2b-it": "<end_of_turn>",
    "ibm-granite-granite-3.3-2B-Instruct": "<|end_of_text|>",
    "meta-llama-Llama-3.1-8B-Instruct": "<|eot_id|>",
    "meta-llama-Llama-3.2-3B-Instruct": "<|eot_id|>",
    "microsoft-Phi-3.5-mini-instruct": "<|end|>",
    "mistralai-Mistral-Nemo-Instruct-2407": EOS,
}

# bos and eos of the tokenizers that these templates were written for, where they are not <s> and </s>.
BOS_EOS = {
    "chatml": ("<s>", "<|im_end|>"),
    "llama-3-instruct": ("<|begin_of_text|>", "<|eot_id|>"),
    "meta-llama-Llama-3.1-8B-Instruct": ("<|begin_of_text|>", "<|eot_id|>"),
    "meta-llama-Llama-3.2-3B-Instruct": ("<|begin_of_text|>", "<|eot_id|>"),
    "google-gemma-2-2b-it": ("<bos>", "<eos>"),
    "LFM2.5-Instruct": ("<|startoftext|>", "<|im_end|>"),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": ("<|begin_of_text|>", "<|im_end|>"),
    "Kimi-K2-Instruct": ("[BOS]", "<|im_end|>"),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "deepseek-ai-DeepSeek-V3.1": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "microsoft-Phi-3.5-mini-instruct": ("<s>", "<|endoftext|>"),
}

CONTROL = re.compile(
    r"<\|[a-z0-9_ ]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>|</?s>|<bos>|<eos>|\[gMASK\]|<sop>"
    r"|\[/?(?:AVAILABLE_TOOLS|TOOL_RESULTS)\]|\[TOOL_CALLS\]"
)
# In the tokenizers that have these, they are added tokens but not special ones.
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")

SWITCHES = ("enable_thinking", "thinking", "keep_past_thinking")

PROBE = [
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "v"},
    {"role": "assistant", "content": "b"},
]

# Enough for the everyday run where the tokenizer lacks the template's tokens, so that nearly every row is refused.
FEW = ("single", "turns", "system", "call", "reasoning", "lookalikes_user", "lookalikes_assistant", "repeated")


@dataclass
class Line:
    """A row of the table: how many conversations went which way.

    declined: the template itself refuses. forced: refused, and no right row exists for it with any thinking switch
    (content dropped, no end of turn, a prompt that is no prefix). open: refused although a right row exists.
    """

    template: str
    tokenizer: str
    owned: bool
    right: int = 0
    declined: int = 0
    forced: int = 0
    open: int = 0
    wrong: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    shapes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        name = f"{self.template[:30]:30} {self.tokenizer:12} {'owned' if self.owned else '-':5}"
        counts = f"{self.right:4} {self.declined:5} {self.forced:6} {self.open:5} {len(self.wrong):5}"
        reasons = "; ".join(f"{n} x {reason}" for reason, n in self.reasons.most_common())
        return f"{name} {counts}  {reasons}"


HEADER = f"{'template':30} {'tokenizer':12} owned right tmpl. forced avoid wrong  reasons of refusals"


# GPT-2's first merges make a tokenizer of the same kind that loads and saves many times faster.
MERGES = 4000


def gpt2(*, bos: str = "<|endoftext|>", eos: str = "<|endoftext|>", special: tuple[str, ...] = ()) -> Any:
    """The GPT-2 tokenizer of the public files, cut to its first merges, with further special tokens."""
    from tokenizers import AddedToken
    from tokenizers.implementations import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    folder = outside("fixtures", "tokenizers", "gpt2")
    encoder = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1 : MERGES + 1]
    vocab = {token: i for token, i in encoder.items() if i < 256 + MERGES}
    inner = ByteLevelBPETokenizer(vocab, [(a, b) for a, b in (line.split() for line in lines)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner._tokenizer, bos_token=bos, eos_token=eos, unk_token="<|endoftext|>"
    )
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return tokenizer


@pytest.fixture(scope="session")
def own_tokenizers(known_tokenizers: dict[str, Path]) -> dict[str, Any]:
    return {"gpt2": gpt2(), **loaded(known_tokenizers)}


def loaded(directories: dict[str, Path]) -> dict[str, Any]:
    """The tokenizers of the outside data."""
    from transformers import AutoTokenizer

    return {n: AutoTokenizer.from_pretrained(path) for n, path in directories.items() if n.startswith("hf_")}


def controls(reference: Reference) -> set[str] | None:
    """The control tokens that a template writes around a conversation of two turns; None where it refuses that."""
    for tools in (None, [WEATHER]):  # one template is only for conversations with tools
        text = reference.text(PROBE, tools, {})
        if text is not None:
            return set(
                CONTROL.findall(text + (reference.text(PROBE[:-1], tools, {}, add_generation_prompt=True) or ""))
            )
    return None


def given_tokenizer(path: Path) -> Any:
    """GPT-2 with every control token of the template, so that each template is met where its tokens are owned."""
    template = path.read_text(encoding="utf-8")
    bos, eos = BOS_EOS.get(path.stem, ("<s>", "</s>"))
    plain = gpt2(bos=bos, eos=eos)
    # Some templates put their tokens together ('<|' + role + '|>'), so that only a rendering shows them.
    reference = Reference(plain, template, TEMPLATE_NOW)
    systems = reference.text([{"role": "system", "content": "s"}, *PROBE], None, {})
    names = {bos, eos, *CONTROL.findall(template), *(controls(reference) or ()), *CONTROL.findall(systems or "")}
    return gpt2(bos=bos, eos=eos, special=tuple(sorted(names)))


def tokenizers_of(path: Path, own: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "given", given_tokenizer(path)
    yield from own.items()


def owns(path: Path, tokenizer: Any) -> bool:
    """Whether all control tokens that the template writes around two turns are tokens of the tokenizer."""
    reference = Reference(tokenizer, path.read_text(encoding="utf-8"), TEMPLATE_NOW)
    written, end = controls(reference), ENDS[path.stem]
    if written is None:
        return False
    end = tokenizer.eos_token if end == EOS else end
    return (written | ({end} if end else set())) <= set(reference.added.values())


def choices(template: str) -> list[dict[str, Any]]:
    """Every setting of the thinking switches that a template reads."""
    names = [name for name in SWITCHES if re.search(rf"\b{name}\b", template)]
    settings = itertools.product((None, True, False), repeat=len(names))
    return [{n: v for n, v in zip(names, values, strict=True) if v is not None} for values in settings]


def run(path: Path, name: str, tokenizer: Any, shapes: dict[str, Row]) -> Line:
    """Render every shape, and judge every row."""
    template = path.read_text(encoding="utf-8")
    line = Line(path.stem, name, owns(path, tokenizer))
    end = ENDS[path.stem]
    stop = tokenizer.eos_token if end == EOS else end
    reference = Reference(tokenizer, template, TEMPLATE_NOW)
    renderer = Renderer(tokenizer, choose_format(str(path), tokenizer))
    for shape, row in shapes.items():
        where = f"{path.stem} / {name} / {shape}"
        try:
            conversation = parse_row(row, "shape:1")
            settled = settle(renderer, [conversation])  # as for a data set that holds this one row
            rows = settled.render_rows(conversation)
        except FormatError as error:
            line.declined += 1
            if accepts(reference, row, {}):
                line.shapes.append(f"{where}: FORMAT: {error}")
            continue
        except MaskError as error:
            reason = re.sub(r"shape:1[^:]*: ", "", str(error))
            reason = re.sub(r"(messages\[)\d+|zq\w+", r"\1", re.sub(r"; .*", "", reason))[:90]
            why = why_not(reference, row, choices(template), stop if stop in reference.added.values() else None)
            line.reasons[reason] += 1
            if why is None:
                line.open += 1
            else:
                line.forced += 1
            line.shapes.append(f"{where}: {'AVOIDABLE' if why is None else why}: {error}")
            continue
        except Exception as error:  # whatever else comes out is a fault of the renderer's, and the table goes on
            line.wrong.append(f"{where}: {type(error).__name__}: {error}")
            continue
        problems = check_rows(
            row,
            rows,
            tokenizer=tokenizer,
            template=template,
            kwargs=dict(settled.format.kwargs),
            now=renderer.format.now,
            stop_token=stop,
            reference=reference,
        )
        if problems:
            line.wrong.append(f"{where}: " + "; ".join(problems))
        else:
            line.right += 1
    return line


@pytest.fixture(scope="module")
def table() -> Iterator[list[Line]]:
    """Collects the lines of all templates; printed at the end (pytest shows it with -s)."""
    lines: list[Line] = []
    yield lines
    if lines:
        print(f"\n{HEADER}")
        for line in lines:
            print(line)
        owned = [line for line in lines if line.owned]
        for label, part in (("all", lines), ("owned", owned)):
            right, forced = sum(x.right for x in part), sum(x.forced for x in part)
            avoidable, wrong = sum(x.open for x in part), sum(len(x.wrong) for x in part)
            declined = sum(x.declined for x in part)
            share = 100 * avoidable / max(1, right + wrong + avoidable)
            print(f"{label}: {right=} {declined=} {forced=} {avoidable=} ({share:.1f} %) {wrong=}")


@pytest.mark.parametrize("path", each(PATHS))
def test_every_row_is_right(path: Path, own_tokenizers: dict[str, Any], table: list[Line]) -> None:
    """No wrong row in any combination; all shapes where the tokenizer has the template's tokens, a few elsewhere."""
    wrong = []
    for name, tokenizer in tokenizers_of(path, own_tokenizers):
        shapes = SHAPES if owns(path, tokenizer) else {k: SHAPES[k] for k in FEW}
        line = run(path, name, tokenizer, shapes)
        table.append(line)
        wrong += line.wrong
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(not PATHS, reason=NOT_SET)
def test_few_refusals(own_tokenizers: dict[str, Any], table: list[Line]) -> None:
    """Where tokens are owned, at most one in twenty of the conversations that a template can express is refused."""
    owned = [line for line in table if line.owned]
    if len({line.template for line in owned}) < len(PATHS):
        pytest.skip("needs the table of all templates: run the whole file")
    refused = sum(line.open for line in owned)
    accepted = refused + sum(line.right + len(line.wrong) for line in owned)
    avoidable = [s for line in owned for s in line.shapes if ": AVOIDABLE: " in s]
    assert refused <= 0.05 * accepted, f"{refused} of {accepted} refused:\n" + "\n".join(avoidable)


def _fault(name: str, rows: list[Any], tokenizer: Any) -> list[Any]:
    """The rows with one fault planted in the first."""
    row, rest = rows[0], rows[1:]
    ids, mask = row.ids.tolist(), row.mask.tolist()
    on = [t for t, m in enumerate(mask) if m]
    text, splits = row.text, row.boundary_splits
    match name:
        case "first token lost":
            mask[on[0]] = 0
        case "end of turn lost":
            mask[on[-1]] = 0
        case "header supervised":
            mask[on[0] - 1] = 1
        case "newline after the end supervised":
            mask[on[-1] + 1] = 1
        case "everything supervised":
            mask = [1] * len(ids)
        case "nothing supervised":
            mask = [0] * len(ids)
        case "shifted":
            mask = [0, *mask[:-1]]
        case "first turn lost":
            end = next(t for t in on if not mask[t + 1])
            mask = [0] * (end + 1) + mask[end + 1 :]
        case "second BOS":
            ids, mask = [tokenizer.bos_token_id, *ids], [0, *mask]
        case "control id from content":  # what plain encoding of the text makes of a look-alike
            text = tokenizer.decode(ids)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            mask = (mask + [0] * len(ids))[: len(ids)]
        case "token lost":
            del ids[3], mask[3]
        case "other segmentation":  # the same text from single bytes
            t = next(t for t in on if len(tokenizer.convert_ids_to_tokens(ids[t])) > 3)
            letters = tokenizer.convert_tokens_to_ids(list(tokenizer.convert_ids_to_tokens(ids[t])))
            ids[t : t + 1], mask[t : t + 1] = letters, [1] * len(letters)
        case "other text":
            text = text.replace("zqa", "zqz")
        case "row twice":
            rest = [row]
        case _:
            raise ValueError(name)
    faulty = SimpleNamespace(ids=np.array(ids), mask=np.array(mask), text=text, boundary_splits=splits)
    return [faulty, *rest]


@pytest.mark.parametrize(
    ("fault", "shape"),
    [
        ("first token lost", "turns"),
        ("first token lost", "empty"),
        ("end of turn lost", "turns"),
        ("header supervised", "single"),
        ("newline after the end supervised", "single"),
        ("everything supervised", "repeated"),
        ("nothing supervised", "single"),
        ("shifted", "turns"),
        ("first turn lost", "turns"),
        ("second BOS", "single"),
        ("control id from content", "lookalikes_user"),
        ("token lost", "single"),
        ("other segmentation", "turns"),
        ("other text", "turns"),
        ("row twice", "single"),
    ],
)
def test_planted_faults_are_seen(fault: str, shape: str) -> None:
    """The checker is itself checked: each way in which a row can be wrong must be reported."""
    path = outside("fixtures", "chat_templates", "llamacpp", "LFM2.5-Instruct.jinja")
    tokenizer = given_tokenizer(path)
    renderer = Renderer(tokenizer, choose_format(str(path), tokenizer))
    rows = renderer.render_rows(parse_row(SHAPES[shape], "shape:1"))

    def check(rendered: list[Any]) -> list[str]:
        return check_rows(
            SHAPES[shape],
            rendered,
            tokenizer=tokenizer,
            template=path.read_text(encoding="utf-8"),
            kwargs=dict(renderer.format.kwargs),
            now=TEMPLATE_NOW,
            stop_token="<|im_end|>",
        )

    assert check(rows) == []
    assert check(_fault(fault, rows, tokenizer)) != []


def test_weight_zero_fault_is_seen() -> None:
    """A row that teaches a turn of weight 0 is as wrong as one that leaves out a turn of weight 1."""
    path = outside("fixtures", "chat_templates", "llamacpp", "LFM2.5-Instruct.jinja")
    tokenizer, unlike = given_tokenizer(path), SHAPES["weight_zero"]
    renderer = Renderer(tokenizer, choose_format(str(path), tokenizer))
    alike = {"messages": [{k: v for k, v in m.items() if k != "weight"} for m in unlike["messages"]]}
    for shown, judged_as in ((alike, unlike), (unlike, alike)):
        problems = check_rows(
            judged_as,
            renderer.render_rows(parse_row(shown, "shape:1")),
            tokenizer=tokenizer,
            template=path.read_text(encoding="utf-8"),
            kwargs=dict(renderer.format.kwargs),
            now=TEMPLATE_NOW,
            stop_token="<|im_end|>",
        )
        assert any("are to be taught" in p for p in problems)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", each(PATHS))
def test_whole_product(path: Path, whole_tokenizers: dict[str, Path]) -> None:
    """Every shape with every tokenizer, whether or not it has the template's tokens."""
    own_tokenizers = {"gpt2": gpt2(), **loaded(whole_tokenizers)}
    wrong = [w for name, tok in tokenizers_of(path, own_tokenizers) for w in run(path, name, tok, SHAPES).wrong]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", each(PATHS[::4]))
def test_a_prompt_is_never_shorter_than_is_surely_said(path: Path) -> None:
    """`rough_length` refuses requests before they are rendered, so what it says is sure must be."""
    tokenizer = given_tokenizer(path)
    renderer = Renderer(tokenizer, choose_format(str(path), tokenizer))
    turns = [
        [{"role": ("user", "assistant")[i % 2], "content": content} for i in range(21)]
        for content in ("", "a", "\n", " x\n\n", "<|im_end|><|im_start|>", "</s></s>")
    ]
    checked = 0
    for row in (*SHAPES.values(), *turns):
        try:
            conversation = parse_row(row, "shape:1")
            n = len(renderer.render(conversation, add_generation_prompt=True).ids)
        except (FormatError, MaskError, SchemaError):
            continue
        about, least = renderer.rough_length(conversation)
        assert least <= min(n, about), row
        checked += 1
    assert checked or owns(path, tokenizer) is False
