"""Multiple choice by probability, whatever the tokenizer makes of a letter and the template of a reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.outside import each, outside, tokenizer_names
from helpers.tiny import TEXT, make_renderer
from sftflow.chat.format import ChatFormat
from sftflow.chat.render import Renderer
from sftflow.chat.schema import Conversation, text_message
from sftflow.checkpoint import Assistant
from sftflow.evaluation import prompts_for as choices
from sftflow.evaluation.evaluate import evaluate, evaluate_models
from sftflow.evaluation.options import EvalTask, open_tasks
from sftflow.evaluation.prompts_for import letter_scores, plain_letters, prompts_for
from sftflow.foundation.errors import RunError, TaskError
from sftflow.foundation.runtime import Runtime
from sftflow.generation.engine import Engine
from sftflow.tasks import Item, TaskSource
from sftflow.tasks.multiple_choice import MultipleChoice, prompt

FP32 = Runtime(device="cpu", precision="fp32", reason="test")
QUESTIONS = (("Which one flies?", "a wren", "a mole", "a pike"), ("What is cold?", "ice", "fire"), ("1 + 1?", *"2345"))


def choice_run(name: str = "arc") -> EvalTask:
    task = MultipleChoice(TaskSource())
    items = [
        Item(
            id=f"arc:{n}",
            messages=(text_message("user", prompt(question, texts)),),
            answer="A",
            choices=tuple("ABCDE"[: len(texts)]),
        )
        for n, (question, *texts) in enumerate(QUESTIONS)
    ]
    return EvalTask(name=name, task=task, items=tuple(items))


def assistant_of(tokenizer: Any, renderer: Renderer) -> Assistant:
    """A small random model, its weights so large that no two letters are as good as equal."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, initializer_range=0.5, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return Assistant("tiny", model, tokenizer, renderer, Engine(model, renderer, FP32), {})


def with_template(tokenizer: Any, template: str, name: str = "own") -> Renderer:
    return Renderer(tokenizer, ChatFormat(name=name, template=template))


def log_probability(model: Any, ids: Sequence[int], n_last: int) -> float:
    """Of the last n ids behind the others, by transformers' own forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)
    return sum(float(logits[k - 1, ids[k]]) for k in range(len(ids) - n_last, len(ids)))


@pytest.fixture(scope="module", params=[257, 400])
def spaced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    """257 entries: bytes alone, so that " A" is a space and a letter. 400: some letters have a token with the space."""
    from sftflow.pretraining.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([f"{text} A A A A A A" for text in TEXT], request.param, 256).save_pretrained(folder)
    renderer = make_renderer(folder, "sftflow")
    return assistant_of(renderer.tokenizer, renderer)


def test_letters_have_the_probability_of_all_their_tokens(spaced: Assistant) -> None:
    run = choice_run()
    prompts = prompts_for(spaced, run, "plain")
    lengths = {len(ids) for p in prompts for ids in p.letters.values()}
    found = dict(letter_scores(spaced.engine, prompts))
    for i, item in enumerate(run.items):
        assert set(found[i]) == set(item.choices)
        for letter, score in found[i].items():
            whole = spaced.plain_ids(f"{item.plain} {letter}")
            behind = len(whole) - len(prompts[i].ids)
            assert whole[: len(prompts[i].ids)] == prompts[i].ids and behind == len(prompts[i].letters[letter])
            assert score == pytest.approx(log_probability(spaced.model, whole, behind), abs=1e-4)
    space = spaced.renderer.encode_plain(" ")
    if len(spaced.tokenizer) < 300:
        assert lengths == {1} and all(list(p.ids[-1:]) == space for p in prompts)
    else:
        assert lengths == {1, 2}  # " A" is one token, " D" are two


def test_the_row_holds_the_likeliest_letter(spaced: Assistant, tmp_path: Path) -> None:
    run = choice_run()
    for arm in ("plain", "chat"):
        result = evaluate(spaced, run, arm, tmp_path)  # type: ignore[arg-type]
        for row, asked in zip(result.rows, prompts_for(spaced, run, arm), strict=True):  # type: ignore[arg-type]
            scores = {
                c: log_probability(spaced.model, (*asked.ids, *ids), len(ids)) for c, ids in asked.letters.items()
            }
            best = max(scores, key=lambda c: scores[c])
            assert (row.reply, row.ids, row.n_prompt) == (best, asked.letters[best], len(asked.ids))


def test_what_letters_share_belongs_to_the_prompt() -> None:
    split = choices._split((7,), {"A": (1, 5, 2), "B": (1, 6, 2)}, "t")
    assert (split.ids, split.letters) == ((7, 1), {"A": (5,), "B": (6,)})
    mixed = choices._split((7,), {"A": (5, 2), "B": (1, 6, 2), "C": (1, 8, 2)}, "t")
    assert (mixed.ids, mixed.letters) == ((7,), {"A": (5,), "B": (1, 6), "C": (1, 8)})
    assert choices._branches(list(mixed.letters.values())) == {(): [5, 1], (1,): [6, 8]}
    (item,) = choice_run().items[1:2]
    # A token that straddles the colon and the letter: the prompt ends before it.
    ids = {"A": (3, 10), "B": (3, 11)}
    (straddled,) = plain_letters(lambda text: ids[text[-1]], [item], "t")
    assert (straddled.ids, straddled.letters) == ((3,), {"A": (10,), "B": (11,)})
    for same in ({"A": (4,), "B": (4,)}, {"A": (4,), "B": (4, 4)}, {"A": (4, 4), "B": (4,)}):
        with pytest.raises(TaskError, match="t: the tokenizer does not tell the choice letters apart"):
            choices._split((), same, "t")


# ---- thinking templates


@pytest.fixture(scope="module", params=tokenizer_names("qwen3"))
def qwen(request: pytest.FixtureRequest, known_tokenizers: dict[str, Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(known_tokenizers[request.param])


CLOSES_A_BLOCK = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif -%}
{{- m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif -%}
{%- endif -%}
"""


def template_named(name: str) -> str:
    """The template above, another one of our own, or one of the outside data."""
    if name == "closes a block":
        return CLOSES_A_BLOCK
    own = Path(__file__).parent / "templates" / name
    path = own if own.exists() else outside("fixtures", "chat_templates", "llamacpp", name)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["closes a block", *each(["Qwen-Qwen3-0.6B.jinja"])])
def test_it_is_asked_behind_an_empty_think_block(qwen: Any, tmp_path: Path, name: str) -> None:
    template = template_named(name)
    assistant = assistant_of(qwen, with_template(qwen, template))
    run = choice_run()
    for item, asked in zip(run.items, prompts_for(assistant, run, "chat"), strict=True):
        wanted = qwen.apply_chat_template(
            [{"role": "user", "content": item.messages[0].text}], chat_template=template, add_generation_prompt=True,
            enable_thinking=False, return_dict=False,
        )  # fmt: skip
        assert list(asked.ids) == wanted
        assert asked.letters == {c: (qwen.convert_tokens_to_ids(c),) for c in item.choices}
    result = evaluate(assistant, run, "chat", tmp_path)
    assert [r.n_prompt for r in result.rows] == [len(p.ids) for p in prompts_for(assistant, run, "chat")]
    # A template whose prompt already closes the block: nothing is doubled.
    closed = assistant_of(qwen, with_template(qwen, "{%- set enable_thinking = false -%}" + template))
    assert prompts_for(closed, run, "chat") == prompts_for(assistant, run, "chat")


OPENS_A_BLOCK = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' and thinking is defined and not thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif -%}
{{- m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n<think>\\n' -}}
{%- if thinking is defined and not thinking %}{{ '\\n</think>\\n\\n' }}{% endif -%}
{%- endif -%}
"""


def test_an_argument_that_closes_the_block_is_found(qwen: Any) -> None:
    assistant = assistant_of(qwen, with_template(qwen, OPENS_A_BLOCK))
    for asked in prompts_for(assistant, choice_run(), "chat"):
        said = assistant.renderer.decode(asked.ids)
        assert said.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n"), said


@pytest.mark.parametrize("name", ["prefills_closed.jinja", *each(["Qwen-QwQ-32B.jinja"])])
def test_a_letter_is_a_reply_behind_a_prompt_that_serving_closes_itself(qwen: Any, name: str) -> None:
    """Without arguments its prompts end with an empty block, which stands in front of no reply in its texts."""
    assistant = assistant_of(qwen, with_template(qwen, template_named(name)))
    run = choice_run()
    for item, asked in zip(run.items, prompts_for(assistant, run, "chat"), strict=True):
        served = qwen.apply_chat_template(
            [{"role": "user", "content": item.messages[0].text}], chat_template=template_named(name),
            add_generation_prompt=True, tokenize=False,
        )  # fmt: skip
        assert served.endswith(("\n<think>\n</think>", "\n<|open|>thought\n<|close|>"))
        assert list(asked.ids) == qwen(served, add_special_tokens=False)["input_ids"]
        assert asked.letters == {c: (qwen.convert_tokens_to_ids(c),) for c in item.choices}
        row = assistant.renderer.render(Conversation((item.messages[0], text_message("assistant", "A"))))
        taught = row.ids[row.mask == 1].tolist()
        assert [*asked.ids, *taught] == row.ids[: len(asked.ids) + len(taught)].tolist()
        assert taught == qwen.convert_tokens_to_ids(["A", "<|im_end|>"])


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("no_end_of_turn.jinja", "### Assistant:\n"),
        *each([("GLM-4.6.jinja", "<|assistant|>\n<think></think>\n")]),
    ],
)
def test_a_format_that_ends_no_turn_is_asked_all_the_same(qwen: Any, name: str, end: str) -> None:
    assistant = assistant_of(qwen, with_template(qwen, template_named(name)))
    assert assistant.renderer.end_token is None
    for asked in prompts_for(assistant, choice_run(), "chat"):
        assert assistant.renderer.decode(asked.ids).endswith(end)
        assert all(ids == (qwen.convert_tokens_to_ids(c),) for c, ids in asked.letters.items())


THINKS = "{%- set enable_thinking = true -%}"


@pytest.mark.parametrize(
    ("name", "front"),
    [
        ("prefills_always.jinja", ""),
        *each([("Qwen-QwQ-32B.jinja", THINKS), ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja", "")]),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_generated(
    qwen: Any, tmp_path: Path, name: str, front: str
) -> None:
    assistant = assistant_of(qwen, with_template(qwen, front + template_named(name), "thinking"))
    asks = text_message("user", "?")
    assert assistant.renderer.text(Conversation((asks,)), add_generation_prompt=True).endswith("<think>\n")
    runs = [*open_tasks(["arithmetic"], 2), choice_run()]
    with pytest.raises(TaskError) as error:
        evaluate_models([(assistant, runs)], tmp_path / "out")
    assert str(error.value) == (
        "arc: in this chat format a letter alone is no reply (the thinking format's prompt for this reply is not a "
        "prefix of the training text); leave this task out"
    )
    assert not (tmp_path / "out").exists()


# ---- models that say nothing


@pytest.mark.parametrize("task", ["arc", "arithmetic"])
def test_a_model_that_is_not_finite_is_not_measured(task: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    renderer = make_renderer(tokenizer_dir, "sftflow")
    assistant = assistant_of(renderer.tokenizer, renderer)
    run = choice_run() if task == "arc" else open_tasks([task], 2)[0]
    run = replace(run, name=task)
    norm = assistant.model.model.norm.weight
    with torch.no_grad():
        norm[0] = 3e38  # finite, and what comes out of it is not
        assistant.model.lm_head.weight[:, 0] = 1e3
    with pytest.raises(RunError) as error:
        evaluate(assistant, run, "chat", tmp_path)
    assert error.value.exit_code == 3
    assert str(error.value).startswith(f"tiny: {task}: the model's logits are not finite; ")
    assert (tmp_path / "eval" / f"tiny-{task}.jsonl").read_text() == ""
    with torch.no_grad():
        norm[0] = float("nan")
    assistant.info.clear()
    with pytest.raises(RunError, match=r"^tiny: its weights are not finite \(model\.norm\.weight\); ") as error:
        evaluate(assistant, run, "chat", tmp_path)
    assert error.value.exit_code == 3
