"""Small chat templates of our own that several modules use, and renderers of them."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from sftflow.chat.format import choose_format
from sftflow.chat.render import Renderer
from sftflow.chat.schema import Conversation, parse_row

# Templates written for these tests, in the ways that well-known ones write calls.
FRONT = """{%- for t in tools or [] %}{{ '<|im_start|>tools\n' + (t | tojson) + '<|im_end|>\n' }}{% endfor -%}
{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') -}}"""


BACK = (
    """{{- '<|im_end|>\n' -}}{%- endfor -%}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"""
)


CHATML = (
    FRONT
    + """{%- for c in m.tool_calls or [] -%}
{{- '\n<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson)
    + '}\n</tool_call>' -}}{%- endfor -%}"""
    + BACK
)


DROPS = FRONT + BACK


HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"


TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"


STRIPS = (
    HEAD
    + "{% set c = m.content %}{% if m.role == 'assistant' and not loop.last and not keep_thoughts %}"
    + "{% set c = c.split('</think>')[-1] %}{% endif %}{{ c }}"
    + TAIL
    + "{% endif %}"
)


def open_with(directory: Path, template: str) -> Renderer:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|eos|>"})
    tokenizer.chat_template = template
    return Renderer(tokenizer, choose_format("auto", tokenizer))


def chat(*texts: str) -> Conversation:
    return parse_row([{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)], "t:1")


THOUGHTS = chat("a", "<think>hm</think>b", "c", "<think>so</think>d")
