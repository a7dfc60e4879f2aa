"""Chat templates that keep thoughts between control tokens, in the ways that well-known ones do."""

# Channels between control tokens, in two ways that well-known models have; written for these tests.
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}{% if loop.last and m.thinking %}"
    "<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}<|channel|>final{% endif %}"
    "<|message|>{{ m.content }}{{ '<|return|>' if m.role == 'assistant' and loop.last else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
BRACKETS = (
    "{% for m in messages %}<|turn>{{ m.role }}\n"
    "{% if m.reasoning_content %}<|channel>thought\n{{ m.reasoning_content }}\n<channel|>{% endif %}"
    "{{ m.content }}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>assistant\n"
    "{% if quiet %}<|channel>thought\n<channel|>{% endif %}{% endif %}"
)
SPECIAL = (
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|return|>",
    "<|turn>",
    "<turn|>",
    "<|channel>",
    "<channel|>",
    *(f"<|{side}_{name}|>" for name in ("THINKING", "ACTION", "RESPONSE") for side in ("START", "END")),
    "<|open|>",
    "<|close|>",
    "<|sep|>",
)

# Ways of which the marks are told otherwise than by a reply with thoughts and words; written for these tests.
CLOSED = (  # by the block of a prompt that asks for no thoughts; those in a content are cut out
    "{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content.split('<channel|>')[-1] }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>assistant\n{% if not enable_thinking | default(false) %}"
    "<|channel>thought\n<channel|>{% endif %}{% endif %}"
)
CALLING = (  # by those in front of a call
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.tool_calls %}<|START_THINKING|>{{ m.reasoning_content }}"
    "<|END_THINKING|><|START_ACTION|>{{ m.tool_calls | tojson }}<|END_ACTION|>{% else %}<|START_RESPONSE|>"
    "{{ m.content }}<|END_RESPONSE|>{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
