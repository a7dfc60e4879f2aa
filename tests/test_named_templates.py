"""A checkpoint with several chat templates: chosen row by row as transformers chooses, all kept, wherever they lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.bigrams import bigrams, write_checkpoint
from helpers.serving import local
from helpers.tokenizers import byte_level
from sftflow import checkpoint
from sftflow.chat.schema import parse_row
from sftflow.chat.template_options import append_eos, with_arguments
from sftflow.chat.verify import verify
from sftflow.exporting import llamacpp
from sftflow.exporting.to_gguf import export_gguf
from sftflow.foundation.errors import CheckpointError, FormatError

SPECIAL = ("<|head|>", "<|halt|>", "<|called|>")
PLAIN = (
    "{% for m in messages %}<|head|>{{ m.role }}: {{ m.content }}<|halt|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant:{% if brief %} briefly{% endif %}{% endif %}"
)
TOOLS = (  # its calls end with a token of their own
    "{% for t in tools %}<|head|>tool: {{ t | tojson }}<|halt|>{% endfor %}"
    "{% for m in messages %}<|head|>{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
    "{% if m.tool_calls %}<|called|>{% else %}<|halt|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant:{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "tells the time",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
USER, REPLY = {"role": "user", "content": "when?"}, {"role": "assistant", "content": "at noon"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
ROWS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [USER, REPLY, USER, REPLY]},
    "tools, unused": {"messages": [USER, REPLY], "tools": [TOOL]},
    "tools, called": {"messages": [USER, CALLED, {"role": "tool", "content": "12"}, REPLY], "tools": [TOOL]},
}
NAMED = {"default": PLAIN, "tool_use": TOOLS, "rag": "{{ 'documents' }}" + PLAIN}


def base(directory: Path, templates: dict[str, str] | None, layout: str = "files") -> Path:
    """layout: `files`, as transformers 5 saves them, `list` in tokenizer_config.json, or no template at all."""
    tokenizer = byte_level(bos="<|bos|>", eos="<|eot|>", special=SPECIAL)
    tokenizer.chat_template = templates if layout == "files" else None
    write_checkpoint(directory, bigrams(len(tokenizer)), tokenizer)
    if layout == "list" and templates:
        file = directory / "tokenizer_config.json"
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": listed}))
    return directory


def opened(directory: Path | str, format_name: str = "auto") -> Any:
    return checkpoint.open_renderer(checkpoint.resolve(str(directory)), format_name)


@pytest.mark.parametrize("layout", ["files", "list"])
@pytest.mark.parametrize("row", ROWS)
def test_ids_are_those_of_transformers(tmp_path: Path, layout: str, row: str) -> None:
    from transformers import PreTrainedTokenizerFast

    directory = base(tmp_path / "base", NAMED, layout)
    renderer, theirs = opened(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    conversation = parse_row(ROWS[row], "row:1")
    rendered = renderer.render(conversation)
    messages, tools = ROWS[row]["messages"], ROWS[row].get("tools")
    expected = theirs.apply_chat_template(messages, tools=tools, return_dict=False)
    assert rendered.ids.tolist() == expected and not verify(renderer, conversation, rendered)
    asked = renderer.render(conversation, add_generation_prompt=True)
    expected = theirs.apply_chat_template(messages, tools=tools, return_dict=False, add_generation_prompt=True)
    assert asked.ids.tolist() == expected
    taught = renderer.decode(rendered.ids[rendered.mask == 1].tolist())
    assert (
        taught
        == {
            "plain": " at noon<|halt|> at noon<|halt|>",
            "tools, unused": " at noon<|halt|>",
            "tools, called": ' {"name": "clock", "arguments": {"zone": "UTC"}}<|called|> at noon<|halt|>',
        }[row]
    )


def test_either_template_s_ends_stop_all_replies(tmp_path: Path) -> None:
    renderer = opened(base(tmp_path / "base", NAMED))
    assert [renderer.decode([i]) for i in renderer.stop_ids()] == ["<|halt|>", "<|called|>", "<|eot|>"]
    assert renderer.end_token == "<|halt|>"


@pytest.mark.parametrize("layout", ["files", "list"])
def test_all_are_kept_on_saving(tmp_path: Path, layout: str) -> None:
    from transformers import AutoTokenizer

    one = checkpoint.load_assistant(str(base(tmp_path / "base", NAMED, layout)))
    checkpoint.save(tmp_path / "sft", one.model, one.tokenizer, one.renderer, dtype=torch.float32, meta={})
    assert AutoTokenizer.from_pretrained(tmp_path / "sft").chat_template == NAMED
    again = checkpoint.load_assistant(str(tmp_path / "sft"))  # raises where the fingerprint differs
    assert again.renderer.format == one.renderer.format
    other = tmp_path / "sft" / "additional_chat_templates" / "tool_use.jinja"
    other.write_text(TOOLS.replace("tool: ", "function: "))
    with pytest.raises(CheckpointError, match="chat format changed since training"):
        checkpoint.load_assistant(str(tmp_path / "sft"))


def test_arguments_and_ends_are_built_into_all(tmp_path: Path) -> None:
    renderer = opened(base(tmp_path / "base", NAMED))
    assert renderer.arguments() == ["brief"]
    found = with_arguments(renderer.format, {"brief": True})
    default = "{%- set brief = brief if brief is defined else true -%}"
    assert all(t.startswith(default) for t in (found.template, *found.named.values()))
    endless = {"default": PLAIN.replace("<|halt|>", "\n"), "tool_use": TOOLS}
    appended = append_eos(opened(base(tmp_path / "endless", endless)))
    for row in ("plain", "tools, called"):
        conversation = parse_row(ROWS[row], "row:1")
        assert not verify(appended, conversation, appended.render(conversation)), row


@pytest.mark.parametrize("layout", ["files", "list"])
def test_none_called_default_is_refused(tmp_path: Path, layout: str) -> None:
    others = {name: text for name, text in NAMED.items() if name != "default"}
    directory = base(tmp_path / "base", others, layout)
    with pytest.raises(
        FormatError, match=r"called 'rag', 'tool_use', and none called 'default'; rename one of them to"
    ):
        opened(directory)
    assert opened(directory, "chatml").format.named == {}  # another format replaces them all


def test_the_server_takes_the_template_of_tools(tmp_path: Path) -> None:
    assistant = checkpoint.load_assistant(str(base(tmp_path / "base", NAMED)))
    with local(assistant) as http:
        for row in (ROWS["plain"], ROWS["tools, unused"]):
            asked = {"messages": row["messages"][:-1], **({"tools": row["tools"]} if "tools" in row else {})}
            answer = http.post("/v1/chat/completions", json={"model": "tiny", "max_tokens": 1, **asked})
            assert answer.status_code == 200, answer.text
            prompt = assistant.renderer.render(parse_row(asked, "asked"), add_generation_prompt=True)
            assert answer.json()["usage"]["prompt_tokens"] == len(prompt.ids)


@pytest.mark.skipif(not llamacpp.available(), reason="llama.cpp: pip install xllamacpp")
def test_a_gguf_file_has_them_all(tmp_path: Path) -> None:
    directory = base(tmp_path / "base", NAMED)
    found = export_gguf(str(directory), tmp_path / "m.gguf", "f32", prompts=2, say=lambda _: None)
    assert found["passed"], found["failures"]
    ours, theirs = opened(directory), opened(tmp_path / "m.gguf")
    assert theirs.format.named == ours.format.named
    for row in ROWS.values():
        conversation = parse_row(row, "row:1")
        assert theirs.render(conversation).ids.tolist() == ours.render(conversation).ids.tolist()
    with llamacpp.LlamaCpp(tmp_path / "m.gguf", context=64) as engine:
        answer = engine.post("/apply-template", {"messages": [USER], "tools": [TOOL]})
    assert "<|head|>tool: " in answer["prompt"]


# ---- the processor's


PROCESSOR = {
    "chat_template.json": json.dumps({"chat_template": PLAIN}),
    "processor_config.json": json.dumps({"processor_class": "AProcessor", "chat_template": PLAIN}),
}


@pytest.mark.parametrize("name", PROCESSOR)
def test_the_processor_s_template_is_read(tmp_path: Path, name: str) -> None:
    directory = base(tmp_path / "base", None)
    (directory / name).write_text(PROCESSOR[name])
    renderer = opened(directory)
    assert (renderer.format.name, renderer.format.template) == ("own", PLAIN)
    one = checkpoint.load_assistant(str(directory))
    checkpoint.save(tmp_path / "sft", one.model, one.tokenizer, one.renderer, dtype=torch.float32, meta={})
    assert (tmp_path / "sft" / "chat_template.jinja").read_text() == PLAIN


def test_chat_template_json_goes_before_the_processor_s_configuration(tmp_path: Path) -> None:
    directory = base(tmp_path / "base", None)
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
    (directory / "processor_config.json").write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    assert opened(directory).format.template == PLAIN
    (directory / "chat_template.jinja").write_text(PLAIN + "\n\n ")  # the tokenizer's own
    assert opened(directory).format.template == PLAIN + "\n\n "


@pytest.mark.parametrize("damaged", ["{", "[]", '{"chat_template": 3}', '{"chat_template": [{"name": "default"}]}'])
def test_a_damaged_one_is_refused(tmp_path: Path, damaged: str) -> None:
    directory = base(tmp_path / "base", None)
    (directory / "chat_template.json").write_text(damaged)
    with pytest.raises(CheckpointError, match=r"chat_template.json: it has no chat_template that is a text"):
        opened(directory)


def test_a_processor_s_configuration_without_one_means_no_template(tmp_path: Path) -> None:
    directory = base(tmp_path / "base", None)
    (directory / "processor_config.json").write_text('{"image_size": 4}')
    assert opened(directory).format.name == "sftflow"
