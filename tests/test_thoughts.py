"""What stands around a reply's thoughts, learnt from templates, and how a reply is taken apart by it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.outside import each, outside_files
from helpers.thoughts import BRACKETS, CALLING, CHANNELS, CLOSED, SPECIAL
from helpers.tokenizers import byte_level
from sftflow.chat.format import ChatFormat
from sftflow.chat.render import Renderer
from sftflow.chat.streaming import outputs
from sftflow.chat.thoughts import ThoughtMarks, ThoughtReader, learn_thoughts, split_thoughts

TEMPLATES = Path(__file__).parent / "templates"
TAGS = ThoughtMarks("<think>", "</think>")
A, B, C, D = "\ufdd0\ufdd1\ufdd2\ufdd3"
CODES = (("<|channel|>", A), ("<|message|>", B), ("<|end|>", C), ("<|start|>", D))
CHANNEL = ThoughtMarks(f"{A}analysis{B}", f"{C}{D}assistant", f"{A}final{B}", codes=CODES)


def learnt(template: str) -> ThoughtMarks | None:
    tokenizer = byte_level(special=SPECIAL)
    return learn_thoughts(Renderer(tokenizer, ChatFormat(name="own", template=template)))


def test_channels_are_learnt() -> None:
    assert learnt(CHANNELS) == CHANNEL
    assert learnt(BRACKETS) == ThoughtMarks(f"{A}thought", B, codes=(("<|channel>", A), ("<channel|>", B)))
    quiet = learnt("{% set quiet = true %}" + BRACKETS)
    assert quiet and (quiet.opening, quiet.closing, quiet.always) == (f"{A}thought", B, False)


@pytest.mark.parametrize(
    ("name", "always"),
    [
        ("reasoning_kept", False),
        ("strips_unless_asked", False),
        ("empty_thoughts_last", False),
        ("prefills_think", True),
        ("plain", None),
        ("alternation", None),
        ("tool_calls_tags", None),
    ],
)
def test_tags_are_learnt(name: str, always: bool | None) -> None:
    found = learnt((TEMPLATES / f"{name}.jinja").read_text())
    assert found == (None if always is None else ThoughtMarks("<think>", "</think>", always=always))


NAMED = (  # by their names: every reply has the block, and the prompt opens it
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{% if m.role == 'assistant' %}<|open|>think<|sep|>"
    "{{ m.reasoning_content or '' }}<|close|>think<|sep|><|open|>said<|sep|>{% endif %}{{ m.content }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|message|><|open|>think<|sep|>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "opening", "closing", "plain", "always"),
    [
        (CLOSED, "<|channel>thought", "<channel|>", "", False),
        (CALLING, "<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", False),
        (NAMED, "<|open|>think<|sep|>", "<|close|>think<|sep|>", "<|open|>said<|sep|>", True),
        ((TEMPLATES / "prefills_closed.jinja").read_text(), "<|open|>thought", "<|close|>", "", False),
    ],
)
def test_other_ways_to_tell(template: str, opening: str, closing: str, plain: str, always: bool) -> None:
    found = learnt(template)
    assert found and found.always == always
    assert [found.coded(mark) for mark in (opening, closing, plain)] == [found.opening, found.closing, found.plain]


THINKING = ("GLM", "SmolLM3", "LFM2.5", "QwQ", "Qwen3", "deepseek", "granite-3.3")


@pytest.mark.parametrize("path", each(outside_files("fixtures/chat_templates", "*/*.jinja")))
def test_well_known_templates(path: Path) -> None:
    found = learnt(path.read_text())
    thinks = any(name in path.stem for name in THINKING)
    assert found == (ThoughtMarks("<think>", "</think>", always="R1-Distill" in path.stem) if thinks else None)


@pytest.mark.parametrize(
    ("marks", "begun", "text", "thought", "said"),
    [
        (TAGS, "", "<think>\nhm\n</think>\n\nYes.", "hm", "Yes."),
        (TAGS, "", "\n<think>\nhm\n\nso\n</think>\n\n\n    code", "hm\n\nso", "    code"),
        (TAGS, "", "<think>\n\n</think>\n\nYes.", "", "Yes."),
        (TAGS, "", "<think>hm", "hm", ""),
        (TAGS, "", "<think>hm\n</thi", "hm\n</thi", ""),
        (TAGS, "", "<thi", "", "<thi"),
        (TAGS, "", " Yes: <think> is a tag.", "", " Yes: <think> is a tag."),
        (TAGS, "", "Yes.</think>", "", "Yes.</think>"),
        (TAGS, "", "<think>a</think><think>b</think>c", "a\n\nb", "c"),
        (TAGS, "<think>", "\nhm\n</think>\n\nYes.", "hm", "Yes."),
        (TAGS, "<think>", "hm", "hm", ""),
        (TAGS, "<think>\nWell", ", hm</think>Yes.", ", hm", "Yes."),
        (TAGS, "It is", " <think>", "", " <think>"),
        (CHANNEL, "", f"{A}analysis{B}hm{C}{D}assistant{A}final{B}Yes.", "hm", "Yes."),
        (CHANNEL, "", f"{A}final{B}Yes.", "", "Yes."),
        (CHANNEL, "", f"{A}analysis{B}hm{C}{D}assistant to=f{A}commentary{B}{{}}", "hm", " to=fcommentary{}"),
        (CHANNEL, "", f"Yes{A}analysis{B}hm{C}{D}assistant{A}final{B}No", "hm", "YesNo"),
    ],
)
def test_a_reply_is_taken_apart(marks: ThoughtMarks, begun: str, text: str, thought: str, said: str) -> None:
    assert split_thoughts(marks, text, begun) == (thought, said)


WORDS = [
    "<think>",
    "</think>",
    "<th",
    "ink>",
    "</",
    "\n",
    "\n\n",
    " ",
    "hm",
    "a",
    A,
    B,
    C,
    D,
    "analysis",
    "final",
    "assistant",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=12), st.sampled_from([TAGS, CHANNEL]), st.booleans())
def test_pieces_do_not_depend_on_how_the_text_is_cut(words: list[str], marks: ThoughtMarks, opened: bool) -> None:
    text, begun = "".join(words), marks.opening if opened else ""
    whole = split_thoughts(marks, text, begun)
    for pieces in (words, list(text)):
        found = [p for out in outputs(ThoughtReader(marks, begun), pieces) for p in out]
        assert tuple("".join(p.text for p in found if p.kind == kind) for kind in ("thought", "said")) == whole
        assert all(
            text[p.at : p.at + len(p.text)] == p.text for p in found if p.at >= 0
        )  # where they say that they are
        assert [p.at for p in found if p.at >= 0] == sorted(p.at for p in found if p.at >= 0)
