"""The built-in chat formats: written alike by this package, by transformers and by llama.cpp, and as published."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.outside import each, outside
from helpers.tiny import make_renderer
from sftflow.chat.format import BUILTIN, builtin_format
from sftflow.chat.render import Renderer
from sftflow.chat.schema import Conversation, parse_row
from sftflow.foundation.errors import FormatError

NAMES = sorted(BUILTIN)
STRICT = ("alpaca", "llama2", "sftflow")  # user and assistant must alternate
BLANKS = " \t\n\r"

Messages = list[dict[str, Any]]


def chat(*contents: str, system: str | None = None) -> Messages:
    """Alternating user and assistant turns, after a system message where there is one."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


CHATS: dict[str, Messages] = {
    "one": chat("hi", "yo"),
    "two": chat("What is it?", "It is 42.", "and 48/2?", "24"),
    "system": chat("hi", "yo", "Bye", "See you", system="Be kind.\nBe brief."),
    "unicode": chat("é 😀 שלום 東京", "naïve ☕ क्षि", "ok?", "да", system="\u4f60\u597d"),
    "blanks": chat("  hi\n\n", "\tyo \n", "\n\nBye ", " x\r\n"),
    "blank system": chat("\n hi ", " yo", system="\n be kind \n"),
    "wide blanks": chat("\u3000hi\u00a0", "\u2003yo\u3000", "\u00a0", "x\u2028"),
    "empty": chat("", "", "x", "y"),
    "empty system": chat("hi", "yo", system=""),
    "markup": chat("{{ x }} {% y %} 'q' \"d\" \\n <b>", "[INST] ### Response: <<SYS>>", "&lt;", "#} a"),
}


@pytest.fixture(scope="session")
def tokenizers(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny tokenizer with one token for beginning and end, with one for each, without a bos, without an eos."""
    from transformers import AutoTokenizer

    out = {"one": tokenizer_dir}
    for name, bos, eos in [
        ("two", "<s>", "</s>"),
        ("llama3", "<|begin_of_text|>", "<|end_of_text|>"),
        ("no bos", None, "</s>"),
        ("no eos", "<s>", None),
    ]:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        tokenizer.add_special_tokens({"additional_special_tokens": [t for t in (bos, eos) if t]})
        tokenizer.bos_token, tokenizer.eos_token = bos, eos
        out[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
        tokenizer.save_pretrained(out[name])
    return out


_renderers: dict[tuple[Path, str], Renderer] = {}


def cached(directory: Path, name: str) -> Renderer:
    key = (directory, name)
    if key not in _renderers:
        _renderers[key] = make_renderer(directory, name)
    return _renderers[key]


def row(messages: Messages) -> Conversation:
    return parse_row({"messages": messages}, "t:1")


def prompt_text(renderer: Renderer, messages: Messages) -> str:
    return renderer.render(row(messages), add_generation_prompt=True).text


def by_transformers(renderer: Renderer, messages: Messages, template: str | None = None, **options: Any) -> Any:
    return renderer.tokenizer.apply_chat_template(
        messages, chat_template=template or renderer.format.template, return_dict=False, **options
    )


def shown(renderer: Renderer, messages: Messages) -> list[tuple[str, int]]:
    rendered = renderer.render(row(messages))
    names = renderer.tokenizer.convert_ids_to_tokens(rendered.ids.tolist())
    return list(zip(names, rendered.mask.tolist(), strict=True))


def reply_text(name: str, answer: str, end: str) -> str:
    """What the model must write for `answer`."""
    if name == "llama2":
        return f" {answer.strip(BLANKS)} {end}"
    return (answer.strip(BLANKS) if name in ("alpaca", "llama3") else answer) + end


def test_every_format_has_its_file() -> None:
    from sftflow.chat import format as module

    assert sorted(p.stem for p in (Path(module.__file__).parent / "formats").glob("*.jinja")) == NAMES


# ---- transformers


@pytest.mark.parametrize("which", ["one", "two", "no bos"])
@pytest.mark.parametrize("name", NAMES)
def test_text_and_ids_are_transformers(tokenizers: dict[str, Path], name: str, which: str) -> None:
    renderer = cached(tokenizers[which], name)
    for label, messages in CHATS.items():
        rendered = renderer.render(row(messages))
        assert rendered.text == by_transformers(renderer, messages, tokenize=False), label
        assert "None" not in rendered.text
        if rendered.boundary_splits == 0:
            assert rendered.ids.tolist() == by_transformers(renderer, messages), label
        prompt = renderer.render(row(messages[:-1]), add_generation_prompt=True)
        assert prompt.text == by_transformers(renderer, messages[:-1], tokenize=False, add_generation_prompt=True)
        assert rendered.text.startswith(prompt.text), label
        assert rendered.ids[: len(prompt.ids)].tolist() == prompt.ids.tolist(), label


FAMILIES = (("llama2", "llama2"), ("alpaca", "llama2"), ("llama3", "llama3_1"))


@pytest.mark.parametrize(
    ("name", "which"),
    [*((name, f"own_{kind}") for name, kind in FAMILIES), *each([(name, f"hf_{kind}") for name, kind in FAMILIES])],
)
def test_on_the_familys_own_tokenizer(known_tokenizers: dict[str, Path], name: str, which: str) -> None:
    renderer = make_renderer(known_tokenizers[which], name)
    bare = make_renderer(known_tokenizers[which], "alpaca").tokenizer  # a format without tokens of its own
    assert len(renderer.tokenizer) == len(bare)
    for label, messages in CHATS.items():
        rendered = renderer.render(row(messages))
        assert rendered.boundary_splits == 0
        assert rendered.text == by_transformers(renderer, messages, tokenize=False), label
        assert rendered.ids.tolist() == by_transformers(renderer, messages), label
        supervised = renderer.tokenizer.decode(rendered.ids[rendered.mask == 1])
        last = reply_text(name, messages[-1]["content"], str(renderer.end_token))
        assert supervised.endswith(last.lstrip(" ")), label  # this decoder drops a leading space


CONTENT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(list(" \n\t\r<|>[]#/")))).filter(
    lambda t: not any("\uf8f0" <= c <= "\uf8f1" for c in t)  # the renderer's own marks
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3), system=st.one_of(st.none(), CONTENT))
@pytest.mark.parametrize("name", ["alpaca", "llama2", "llama3", "phi3"])
def test_any_content(tokenizers: dict[str, Path], name: str, pairs: list[tuple[str, str]], system: str | None) -> None:
    """The supervised text is the replies as the format writes them, each behind the prompt that serving sends."""
    renderer = cached(tokenizers["two"], name)
    messages = chat(*(t for pair in pairs for t in pair), system=system)
    rendered = renderer.render(row(messages))
    assert rendered.text == by_transformers(renderer, messages, tokenize=False)
    supervised = renderer.tokenizer.decode(rendered.ids[rendered.mask == 1])
    assert supervised == "".join(reply_text(name, a, str(renderer.end_token)) for _, a in pairs)
    prompt = renderer.render(row(messages[:-1]), add_generation_prompt=True).ids.tolist()
    assert rendered.ids[: len(prompt)].tolist() == prompt
    assert rendered.mask[len(prompt)] == 1
    end = renderer.special[str(renderer.end_token)]
    assert int((rendered.ids[rendered.mask == 1] == end).sum()) == len(pairs)


@pytest.mark.parametrize("name", NAMES)
def test_the_end_of_turn_stops_a_reply(tokenizers: dict[str, Path], name: str) -> None:
    renderer = cached(tokenizers["two"], name)
    end = {
        "alpaca": "</s>",
        "chatml": "<|im_end|>",
        "llama2": "</s>",
        "llama3": "<|eot_id|>",
        "phi3": "<|end|>",
        "sftflow": "<|assistant_end|>",
    }[name]
    assert renderer.end_token == end
    assert renderer.tokenizer.convert_ids_to_tokens(renderer.stop_ids()) == list(dict.fromkeys([end, "</s>"]))


# ---- worked examples: user x, assistant y, user a, assistant b; the tiny tokenizer's bos and eos are both <|bos|>

# (Ġ is a space, Ċ a line end); a star stands before each supervised token

INSTRUCTION, RESPONSE = "# # # ĠI ns t r u c t i on : Ċ", "# # # Ġ R e s pon se : Ċ"
ASSISTANT = "as s i s t an t"
HEADER = "<|start_header_id|> {} <|end_header_id|> Ċ Ċ"
HEADERS = HEADER.format("u s er"), HEADER.format(ASSISTANT)
EXAMPLES = {
    "sftflow": "<|bos|> <|user_start|> x <|user_end|> <|assistant_start|> *y *<|assistant_end|>"
    " <|user_start|> a <|user_end|> <|assistant_start|> *b *<|assistant_end|>",
    "chatml": f"<|im_start|> u s er Ċ x <|im_end|> Ċ <|im_start|> {ASSISTANT} Ċ *y *<|im_end|> Ċ"
    f" <|im_start|> u s er Ċ a <|im_end|> Ċ <|im_start|> {ASSISTANT} Ċ *b *<|im_end|> Ċ",
    "llama2": "<|bos|> [ I N S T ] Ġ x Ġ [ / I N S T ] *Ġ *y *Ġ *<|bos|>"
    " <|bos|> [ I N S T ] Ġa Ġ [ / I N S T ] *Ġ *b *Ġ *<|bos|>",
    "llama3": f"<|begin_of_text|> {HEADERS[0]} x <|eot_id|> {HEADERS[1]} *y *<|eot_id|>"
    f" {HEADERS[0]} a <|eot_id|> {HEADERS[1]} *b *<|eot_id|>",
    "alpaca": f"<|bos|> {INSTRUCTION} x Ċ Ċ {RESPONSE} *y *<|bos|> Ċ Ċ {INSTRUCTION} a Ċ Ċ {RESPONSE} *b *<|bos|> Ċ Ċ",
    "phi3": "<|user|> Ċ x <|end|> Ċ <|assistant|> Ċ *y *<|end|> Ċ <|user|> Ċ a <|end|> Ċ <|assistant|> Ċ *b *<|end|> Ċ",
}


@pytest.mark.parametrize("name", NAMES)
def test_worked_example(tokenizer_dir: Path, name: str) -> None:
    expected = [(t.removeprefix("*"), int(t.startswith("*"))) for t in EXAMPLES[name].split()]
    assert shown(cached(tokenizer_dir, name), chat("x", "y", "a", "b")) == expected


def test_a_prompt_of_each_family(tokenizers: dict[str, Path]) -> None:
    messages = chat("x", "y", "a", system="s")
    prompts = {
        "alpaca": "<s>s\n\n### Instruction:\nx\n\n### Response:\ny</s>\n\n### Instruction:\na\n\n### Response:\n",
        "chatml": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\ny<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        "llama2": "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nx [/INST] y </s><s>[INST] a [/INST]",
        "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nx<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\ny<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "phi3": "<|system|>\ns<|end|>\n<|user|>\nx<|end|>\n<|assistant|>\ny<|end|>\n"
        "<|user|>\na<|end|>\n<|assistant|>\n",
        "sftflow": "<|bos|><|user_start|>s\n\nx<|user_end|><|assistant_start|>y<|assistant_end|>"
        "<|user_start|>a<|user_end|><|assistant_start|>",
    }
    for name, expected in prompts.items():
        assert prompt_text(cached(tokenizers["two"], name), messages) == expected


# ---- as published: every conversation of CHATS reads as in the published template, or the difference is one of these

STRIPPED = {"blanks", "blank system", "wide blanks"}
DIFFERENT = {
    # Meta's code does not strip the system text, this template does; in Python `trim` takes wide blanks, ours does not
    "llama-2-chat": {"blank system", "wide blanks"},
    "llama-3-instruct": {"wide blanks"},
    "alpaca": {"wide blanks"},
    # a third party's: Microsoft's own strips nothing
    "phi-3": STRIPPED,
    # likewise
    "chatml": STRIPPED,
}


@pytest.mark.parametrize(
    ("published", "name", "which"),
    each(
        [
            ("llama-2-chat", "llama2", "two"),
            ("llama-3-instruct", "llama3", "llama3"),
            ("alpaca", "alpaca", "two"),
            ("phi-3", "phi3", "two"),
            ("chatml", "chatml", "no bos"),  # this one writes a bos token where there is one; OpenAI's ChatML has none
        ]
    ),
)
def test_text_is_the_published_templates(tokenizers: dict[str, Path], published: str, name: str, which: str) -> None:
    path = outside("fixtures", "chat_templates", "chujiezheng", f"{published}.jinja")
    template = path.read_text(encoding="utf-8")
    if which == "no bos":
        template = template.replace("{{ bos_token }}", "")
    renderer = cached(tokenizers[which], name)
    different = set()
    for label, messages in CHATS.items():
        whole = by_transformers(renderer, messages, template, tokenize=False)
        prompt = by_transformers(renderer, messages[:-1], template, tokenize=False, add_generation_prompt=True)
        ours = renderer.render(row(messages)).text, prompt_text(renderer, messages[:-1])
        if ours != (whole, prompt):
            different.add(label)
    assert different == DIFFERENT[published]


def test_phi3_is_microsofts_but_for_its_trailing_eos(tokenizers: dict[str, Path]) -> None:
    """Microsoft's template puts the eos token behind a text without a generation prompt, where a further turn would
    stand, and leaves out an empty system message."""
    path = outside("fixtures", "chat_templates", "llamacpp", "microsoft-Phi-3.5-mini-instruct.jinja")
    template = path.read_text(encoding="utf-8")
    renderer = cached(tokenizers["two"], "phi3")
    for label, messages in CHATS.items():
        if label == "empty system":
            continue
        prompt = by_transformers(renderer, messages[:-1], template, tokenize=False, add_generation_prompt=True)
        assert prompt_text(renderer, messages[:-1]) == prompt
        whole = by_transformers(renderer, messages, template, tokenize=False)
        assert renderer.render(row(messages)).text + "</s>" == whole


def test_llama2_is_metas_reference(tokenizers: dict[str, Path]) -> None:
    """The text of Meta's `chat_completion` (llama/generation.py): each exchange between bos and eos."""

    def reference(messages: Messages) -> str:
        if messages[0]["role"] == "system":
            text = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n{messages[1]['content']}"
            messages = [{"role": "user", "content": text}, *messages[2:]]
        out = ""
        for prompt, answer in zip(messages[::2], messages[1::2], strict=False):
            out += f"<s>[INST] {prompt['content'].strip()} [/INST] {answer['content'].strip()} </s>"
        if len(messages) % 2:
            out += f"<s>[INST] {messages[-1]['content'].strip()} [/INST]"
        return out

    renderer = cached(tokenizers["two"], "llama2")
    for label, messages in CHATS.items():
        if label == "wide blanks":
            continue
        assert renderer.render(row(messages)).text == reference(messages), label
        assert prompt_text(renderer, messages[:-1]) == reference(messages[:-1]), label


# ---- refusals

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize("name", NAMES)
def test_what_no_built_in_format_has_is_refused_by_name(tokenizer_dir: Path, name: str) -> None:
    renderer = cached(tokenizer_dir, name)
    ask, reply = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    for messages, tools, fact in [
        ([ask, reply], [TOOL], "no tool definitions"),
        ([ask, {"role": "assistant", "content": None, "tool_calls": [CALL]}], [], "no tool calls"),
        ([ask, {**reply, "tool_calls": [CALL]}], [], "no tool calls"),
        ([ask, {**reply, "reasoning_content": "hm"}], [], "no reasoning"),
        ([ask, {"role": "tool", "content": "sun"}, reply], [], "no tool messages"),
    ]:
        with pytest.raises(FormatError, match=f"the {name} format has {fact}"):
            renderer.render(parse_row({"messages": messages, "tools": tools}, "t:1"))


@pytest.mark.parametrize("name", NAMES)
def test_order_of_roles(tokenizer_dir: Path, name: str) -> None:
    renderer = cached(tokenizer_dir, name)
    x, y = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    system = {"role": "system", "content": "s"}
    twice = row([x, x, y])
    if name in STRICT:
        with pytest.raises(FormatError, match="two user turns in a row; merge them or put an assistant turn between"):
            renderer.render(twice)
        with pytest.raises(FormatError, match="an assistant turn that does not follow a user turn"):
            renderer.render(row([x, y, y]))
        with pytest.raises(FormatError, match="an assistant turn that does not follow a user turn"):
            renderer.render(row([y, x, y]))
        for messages in ([x, y], [system]):
            with pytest.raises(FormatError, match=r"a reply needs a user turn before it|begins with a user turn"):
                renderer.render(row(messages), add_generation_prompt=True)
    else:
        assert renderer.render(twice).n_supervised == 2
        assert renderer.render(row([x, y, y])).n_supervised == 4
    late = row([x, y, system, x, y])
    if name == "chatml":
        assert renderer.render(late).n_supervised == 4
    else:
        with pytest.raises(FormatError, match="a system message after the first message"):
            renderer.render(late)


@pytest.mark.parametrize("name", NAMES)
def test_developer_is_system(tokenizer_dir: Path, name: str) -> None:
    renderer = cached(tokenizer_dir, name)
    developer = [{"role": "developer", "content": "s"}, *chat("x", "y")]
    assert renderer.render(row(developer)).text == renderer.render(row(chat("x", "y", system="s"))).text


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"sftflow"}))
def test_content_that_is_not_text_is_refused(tokenizer_dir: Path, name: str) -> None:
    """Through transformers, which would write a list as Python does. (The schema lets none come this far.)"""
    from jinja2 import TemplateError

    renderer = cached(tokenizer_dir, name)
    for content in (None, [{"type": "text", "text": "x"}]):
        with pytest.raises(TemplateError, match=f"the {name} format takes only text as content"):
            by_transformers(renderer, [{"role": "user", "content": content}])


@pytest.mark.parametrize("name", ["alpaca", "llama2"])
def test_without_an_eos_token_a_reply_is_refused(tokenizers: dict[str, Path], name: str) -> None:
    renderer = cached(tokenizers["no eos"], name)
    with pytest.raises(FormatError, match=f"the {name} format ends a reply with the eos token, and the tokenizer has"):
        renderer.render(row(chat("x", "y")))
    assert prompt_text(renderer, chat("x"))  # a prompt needs none


# ---- llama.cpp


def write_gguf(tokenizer: Any, path: Path) -> None:
    """A one-layer model of zeros with this tokenizer and its chat template: all that rendering needs."""
    gguf = pytest.importorskip("gguf")
    n, width = len(tokenizer), 32
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(1024)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(n)
    writer.add_rope_dimension_count(width // 2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(list(range(n))))
    added = tokenizer.added_tokens_decoder
    writer.add_token_types([gguf.TokenType.CONTROL if i in added else gguf.TokenType.NORMAL for i in range(n)])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(m) for m in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)  # the template writes it; llama.cpp would take it off the text to add it itself
    writer.add_chat_template(tokenizer.chat_template)
    writer.add_tensor("token_embd.weight", np.zeros((n, width), np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.zeros(width, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((width, width), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """llama.cpp's own server in this process, asked how it renders."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.warmup, params.verbosity = 256, False, 0
        params.cpuparams.n_threads = 1
        self.server = xllamacpp.Server(params)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def prompt(self, messages: Messages, **options: Any) -> str:
        answer = self.post("/apply-template", {"messages": messages, **options})
        return answer["prompt"] if "prompt" in answer else answer["error"]["message"]

    def ids(self, text: str) -> list[int]:
        return self.post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]


@pytest.fixture(params=[(name, which) for name in NAMES for which in ("one", "two")], ids="-".join)
def llama_cpp(request: Any, tokenizers: dict[str, Path], tmp_path: Path) -> Iterator[tuple[str, Renderer, LlamaCpp]]:
    pytest.importorskip("xllamacpp", reason="llama.cpp's own template engine: pip install xllamacpp")
    name, which = request.param
    renderer = cached(tokenizers[which], name)
    write_gguf(renderer.tokenizer, tmp_path / "model.gguf")
    engine = LlamaCpp(tmp_path / "model.gguf")
    yield name, renderer, engine
    del engine.server


def test_llama_cpp_renders_the_same(llama_cpp: tuple[str, Renderer, LlamaCpp]) -> None:
    name, renderer, engine = llama_cpp
    developer = [{"role": "developer", "content": "s"}, *chat("x", "y")]
    for label, messages in {**CHATS, "developer": developer}.items():
        ends = [i for i, m in enumerate(messages) if m["role"] == "user"]
        for end in ends:
            rendered = renderer.render(row(messages[: end + 1]), add_generation_prompt=True)
            assert engine.prompt(messages[: end + 1]) == rendered.text, label
            if rendered.boundary_splits == 0:
                assert engine.ids(rendered.text) == rendered.ids.tolist(), label
    parts = [{"role": "user", "content": [{"type": "text", "text": "typed"}]}]
    assert engine.prompt(parts) == prompt_text(renderer, chat("typed"))
    assert f"the {name} format has no tool definitions" in engine.prompt(chat("x"), tools=[TOOL])
    late = [*chat("x", "y"), {"role": "tool", "content": "sun", "tool_call_id": "1"}]
    assert f"the {name} format has no tool messages" in engine.prompt(late)


def test_stored_template_is_the_file(tokenizer_dir: Path, tmp_path: Path) -> None:
    """What a checkpoint carries is what was rendered with."""
    from transformers import AutoTokenizer

    for name in NAMES:
        renderer = make_renderer(tokenizer_dir, name)
        renderer.tokenizer.save_pretrained(tmp_path / name)
        stored = (tmp_path / name / "chat_template.jinja").read_text(encoding="utf-8")
        assert stored.rstrip("\n") == builtin_format(name).template
        again = AutoTokenizer.from_pretrained(tmp_path / name)
        assert again.apply_chat_template(CHATS["system"], tokenize=False) == renderer.render(row(CHATS["system"])).text
