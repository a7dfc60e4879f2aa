"""Every id that a checkpoint names as an end stops a reply, wherever replies are made, and is kept on saving."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.bigrams import bigrams, write_checkpoint
from helpers.tokenizers import byte_level
from sftflow import checkpoint
from sftflow.chat.render import Renderer
from sftflow.chat.schema import parse_row
from sftflow.checkpoint.generation import read_ends
from sftflow.evaluation.evaluate import provenance_of
from sftflow.evaluation.grading import Asking, ask_all
from sftflow.evaluation.options import open_tasks
from sftflow.foundation.errors import CheckpointError, MaskError

ENDS = ("<|halt|>", "<|over|>", "<|pause|>")
TEMPLATE = (
    "{% for m in messages %}<|head|>{{ m.role }}: {{ m.content }}<|halt|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant:{% endif %}"
)
ASK = parse_row({"messages": [{"role": "user", "content": "?"}]}, "test")


def a_base(directory: Path, generation: Any = None, end: str = "<|over|>", **config: Any) -> Path:
    """A model that says "yes", then `end`, then "no" on and on. The template writes <|halt|>, the tokenizer's own end
    of text is <|eot|>.   generation: generation_config.json, None for no such file.   config: more of config.json."""
    tokenizer = byte_level(bos="<|bos|>", eos="<|eot|>", special=("<|head|>", *ENDS))
    tokenizer.chat_template = TEMPLATE
    first, yes, no = (tokenizer(word, add_special_tokens=False).input_ids for word in (":", "yes", "no"))
    chain = [*first, *yes, tokenizer.convert_tokens_to_ids(end), *no]
    write_checkpoint(directory, bigrams(len(tokenizer), chain), tokenizer)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    if config:
        known = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**known, **config}))
    return directory


def ids_of(*tokens: str) -> list[int]:
    """The base's own ids of some of its control tokens."""
    return [byte_level("<|bos|>", "<|eot|>", ("<|head|>", *ENDS)).convert_tokens_to_ids(t) for t in tokens]


def reply_of(assistant: checkpoint.Assistant, **options: Any) -> tuple[str, str]:
    (reply,) = assistant.engine.generate([assistant.request(ASK, max_tokens=12, **options)])
    return reply.text, reply.finish_reason


OVER = ids_of("<|over|>")[0]


@pytest.mark.parametrize(
    ("generation", "config"),
    [
        ({"eos_token_id": OVER}, {}),
        ({"eos_token_id": [0, OVER]}, {}),
        ({"eos_token_id": [OVER, OVER]}, {}),
        ({"eos_token_id": [OVER, -1, 99999]}, {}),  # ids that no token has end nothing
        (None, {"eos_token_id": OVER}),
        (None, {"eos_token_id": [0, OVER]}),
    ],
)
def test_each_end_stops_a_reply_as_in_transformers(tmp_path: Path, generation: Any, config: Any) -> None:
    from transformers import AutoModelForCausalLM

    base = a_base(tmp_path / "base", generation, **config)
    assistant = checkpoint.load_assistant(str(base))
    assert reply_of(assistant) == ("yes", "stop")
    prompt = torch.tensor([assistant.request(ASK).prompt_ids])
    theirs = AutoModelForCausalLM.from_pretrained(base).generate(prompt, max_new_tokens=12, do_sample=False)[0]
    assert theirs[prompt.shape[1] :].tolist()[-1] == OVER
    plain = checkpoint.open_renderer(checkpoint.resolve(str(base)), "auto")
    assert plain.stop_ids() == assistant.renderer.stop_ids()
    spec = pickle.loads(pickle.dumps(plain.spec))  # as a process that renders gets it
    assert Renderer(None, spec.format, spec=spec).stop_ids() == plain.stop_ids()


def test_without_such_an_end_the_reply_goes_on(tmp_path: Path) -> None:
    """generation_config.json counts where there is one: config.json is not asked."""
    base = a_base(tmp_path / "base", {"eos_token_id": ids_of("<|pause|>")[0]}, eos_token_id=OVER)
    text, finish = reply_of(checkpoint.load_assistant(str(base)))
    assert finish == "length" and text.startswith("yesno")


def test_an_end_need_not_be_a_control_token(tmp_path: Path) -> None:
    no = byte_level("<|bos|>", "<|eot|>", ("<|head|>", *ENDS))("no", add_special_tokens=False).input_ids[0]
    base = a_base(tmp_path / "base", {"eos_token_id": [no]})
    assert reply_of(checkpoint.load_assistant(str(base))) == ("yes", "stop")


def test_the_default_of_a_config_class_is_no_word_of_the_checkpoint(tmp_path: Path) -> None:
    """Llama's is 2, and transformers writes it into the files of any model whose maker said nothing."""
    base = a_base(tmp_path / "base", {"eos_token_id": 2}, model_type="llama")
    assert 2 not in checkpoint.open_renderer(checkpoint.resolve(str(base)), "auto").stop_ids()
    (base / "generation_config.json").write_text('{"eos_token_id": [2]}')
    assert 2 in checkpoint.open_renderer(checkpoint.resolve(str(base)), "auto").stop_ids()


def test_without_the_file_config_json_is_read_as_transformers_does(tmp_path: Path) -> None:
    """A multimodal checkpoint's text model has its own part of it."""
    from transformers import GenerationConfig

    tokenizer = byte_level()
    parts: list[dict[str, Any]] = [{"eos_token_id": 3}, {"eos_token_id": [4, 5]}, {"eos_token_id": None}, {}]
    for outer in parts:
        for name in ("text_config", "decoder", "vision_config"):
            for inner in parts:
                config = {"model_type": "one", **outer, name: inner}
                (tmp_path / "config.json").write_text(json.dumps(config))
                theirs = GenerationConfig.from_model_config(config).eos_token_id
                expected = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
                assert read_ends(tmp_path, tokenizer) == tuple(expected), config


@pytest.mark.parametrize("wrong", ["2", 1.0, True, [1, "2"], [[1]], {"id": 1}])
def test_what_are_no_ids_is_refused(tmp_path: Path, wrong: Any) -> None:
    base = a_base(tmp_path / "base", {"eos_token_id": wrong})
    with pytest.raises(
        CheckpointError, match=r"generation_config.json: eos_token_id is .*not a token id; write a whole number"
    ):
        checkpoint.open_renderer(checkpoint.resolve(str(base)), "auto")


@pytest.mark.parametrize("damaged", ["{", "[1]", "\x00"])
def test_a_damaged_file_is_refused(tmp_path: Path, damaged: str) -> None:
    base = a_base(tmp_path / "base")
    (base / "generation_config.json").write_text(damaged)
    with pytest.raises(CheckpointError, match=r"generation_config.json: not (a )?JSON"):
        checkpoint.open_renderer(checkpoint.resolve(str(base)), "auto")


def test_both_arms_of_an_evaluation_stop_there(tmp_path: Path) -> None:
    base = a_base(tmp_path / "base", {"eos_token_id": [0, OVER]})
    (tmp_path / "q.jsonl").write_text('{"question": "Well:", "answer": "yes"}\n')
    assistant = checkpoint.load_assistant(str(base))
    (task,) = open_tasks([f"jsonl={tmp_path / 'q.jsonl'}"], None)
    for arm in ("chat", "plain"):
        ((row,),) = ask_all([Asking(assistant, task, arm, None)])  # type: ignore[arg-type]
        assert (row.score, row.finish_reason) == (1.0, "stop"), arm
    assert provenance_of(assistant, task, "chat")["stop_ids"] == sorted(assistant.renderer.stop_ids())


def test_a_base_without_a_template_keeps_its_old_ends(tmp_path: Path) -> None:
    base = a_base(tmp_path / "base", {"eos_token_id": ids_of("<|pause|>", "<|over|>")})
    (base / "chat_template.jinja").unlink()
    renderer = checkpoint.load_assistant(str(base)).renderer
    assert renderer.format.name == "sftflow"
    own = [renderer.special[t] for t in ("<|assistant_end|>", "<|eot|>", "<|pause|>", "<|over|>")]
    assert renderer.stop_ids() == own


def test_an_end_that_the_template_writes_inside_replies_is_refused(tmp_path: Path) -> None:
    """transformers would stop there: the rest of the reply could be learnt and never said."""
    base = a_base(tmp_path / "base", {"eos_token_id": ids_of("<|halt|>", "<|pause|>")})
    text = TEMPLATE.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<|pause|>{% endif %}{{ m.content }}")
    (base / "chat_template.jinja").write_text(text)
    row = parse_row({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "row:1")
    with pytest.raises(MaskError, match=r"writes <\|pause\|> inside the reply.*take it out of eos_token_id"):
        checkpoint.open_renderer(checkpoint.resolve(str(base)), "auto").render(row)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": ids_of("<|halt|>")}))
    assert checkpoint.open_renderer(checkpoint.resolve(str(base)), "auto").render(row).n_supervised == 4


def test_all_is_kept_on_saving(tmp_path: Path) -> None:
    """The ends, and values for sampling though do_sample is not set: vLLM obeys those."""
    asked = {"eos_token_id": ids_of("<|pause|>", "<|over|>"), "pad_token_id": 0, "temperature": 0.6, "top_k": 7}
    base = checkpoint.load_assistant(str(a_base(tmp_path / "base", asked)))
    checkpoint.save(tmp_path / "sft", base.model, base.tokenizer, base.renderer, dtype=torch.float32, meta={})
    kept = json.loads((tmp_path / "sft" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == ids_of("<|halt|>", "<|eot|>", "<|pause|>", "<|over|>")
    assert {**asked, "eos_token_id": 0}.items() <= {**kept, "eos_token_id": 0}.items() and "do_sample" not in kept
    again = checkpoint.load_assistant(str(tmp_path / "sft"))
    assert again.renderer.stop_ids() == base.renderer.stop_ids() and again.sampling == base.sampling
    assert base.model.generation_config.temperature == 0.6  # the model in memory is as it was


@pytest.mark.parametrize(
    "asked",
    [
        {}, {"do_sample": False, "temperature": 0.6, "top_k": 7}, {"temperature": 0.6},
        {"do_sample": True}, {"do_sample": True, "top_k": None}, {"do_sample": True, "top_k": 0},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "min_p": 0.1, "top_k": 3},
        {"repetition_penalty": 1.3}, {"do_sample": True, "repetition_penalty": 1.3},
    ],
)  # fmt: skip
def test_sampling_is_what_transformers_would_use(tmp_path: Path, asked: dict[str, Any]) -> None:
    assistant = checkpoint.load_assistant(str(a_base(tmp_path / "base", asked)))
    checkpoint.save(
        tmp_path / "sft", assistant.model, assistant.tokenizer, assistant.renderer, dtype=torch.float32, meta={}
    )
    for one in (assistant, checkpoint.load_assistant(str(tmp_path / "sft"))):
        theirs, _ = one.model._prepare_generation_config(None)
        keys = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        expected = {key: getattr(theirs, key) or 0 for key in keys}
        if not theirs.do_sample:
            expected |= {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        assert one.sampling == expected
