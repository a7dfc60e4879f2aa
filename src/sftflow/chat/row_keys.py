"""What each key of a row means: the tables that rows are read by (docs/rows.md says the same in words).

read       with the meaning that it has for the programs that write it
refused    it changes what would be taught, and that cannot be done here: named, with a remedy
ignored    every other key: counted, and listed by `mix` and `train`

A key whose value is null or empty, or holds nothing but nulls, is not there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sftflow.foundation.errors import SchemaError
from sftflow.foundation.json_values import MOST_NESTED


class Refusal(NamedTuple):
    fact: str
    remedy: str


_PICTURES = Refusal("only text is taught, not pictures or sound", "remove the row, or this key where it is not needed")
_PREFERENCE = Refusal(
    "preference data", "give the reply that is wanted as `completion` or `messages`, without this key"
)
_ARGUMENTS = Refusal("a template's arguments cannot differ from row to row", "remove the key, or these rows")
_SPANS = Refusal("a reply is taught as a whole or not at all", "use weight 0 or 1")
_MASK = Refusal(
    "it may mean taught as well as not taught", 'remove it, and give messages that are not taught "weight": 0'
)

CONVERSATIONS = ("messages", "conversations", "conversation")
SYSTEM = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
IDS = "input_ids"
MASKS = ("mask", "loss_mask", "completion_mask", "assistant_masks")
"""beside IDS: 1 or true where a token is taught"""
TOKEN_KEYS = ("labels", *MASKS, "attention_mask", "position_ids")
"""read beside IDS, one value for each of them"""
LENGTHS = "seq_lengths"
"""beside IDS: the length of each conversation that was packed into the row"""
PREFERRED = ("label", "kto_tag", "desirable")
NOT_TAUGHT = ("masked", "ignore")
"""1 or true: the message is not taught"""
ROW_FLAGS = ("weight", "loss", "train", "training", "trainable", "learn", *NOT_TAUGHT)
FLAGS = (*ROW_FLAGS, "loss_weight")
"""1 or true: the message, or each of the row, is taught, but for NOT_TAUGHT. 0 or false: the contrary."""
REJECTED = ("response", "messages", "output", "completion", "answer")
PATHS = ("image_path", "image_url", "image_file", "image_paths", "image_urls", "image_files")
PICTURES = ("images", "image", "videos", "video", "audios", "audio", *PATHS, "video_path", "audio_path", "media")

READ = {
    **dict.fromkeys(CONVERSATIONS, "the conversation: a list of messages, or JSON text of one"),
    "prompt": "what `completion` answers: a text, or messages, none of which is taught",
    "completion": "the reply that is taught: a text, or messages",
    "instruction": "Alpaca: what is asked",
    "input": "Alpaca: what `instruction` is about, below it",
    "output": "Alpaca: the reply",
    "query": "as `instruction`",
    "response": "as `output`",
    "history": "of Alpaca and `query`: [asked, replied] pairs in front; their replies are taught",
    **dict.fromkeys(SYSTEM, "the system message, unless the conversation begins with the same one"),
    "tools": "tools in the OpenAI shape, or without its envelope; or JSON text of them",
    "functions": "as `tools`",
    **dict.fromkeys(ROW_FLAGS, "as of a message: whether anything of the row is taught"),
    **dict.fromkeys(PREFERRED, "true: the reply is wanted"),
    IDS: "the row's tokens; what is taught of them say `mask` or `labels`",
    "labels": f"beside {IDS}: the ids that are taught, -100 for the others",
    **dict.fromkeys(MASKS, f"beside {IDS}: 1 where a token is taught"),
    "attention_mask": f"beside {IDS}: all 1",
    LENGTHS: f"beside {IDS}: a single one",
    "position_ids": f"beside {IDS}: 0, 1, 2 ...",
}
REFUSED = {
    **dict.fromkeys((*PICTURES, "objects"), _PICTURES),
    **dict.fromkeys(("chosen", "rejected", *(f"rejected_{of}" for of in REJECTED)), _PREFERENCE),
    **dict.fromkeys((f"{of}_rejected" for of in REJECTED), _PREFERENCE),
    **dict.fromkeys(("preferred_output", "non_preferred_output"), _PREFERENCE),
    **dict.fromkeys(("chat_template_kwargs", "chat_template"), _ARGUMENTS),
    "documents": Refusal("a template's documents are not taught", "put them into a message"),
    **dict.fromkeys(("mask", "loss_mask"), _MASK),
    **dict.fromkeys(("loss_weight", "loss_scale", "sample_weight", "weights", "loss_weights"), _SPANS),
}

# ---- of a message

MESSAGE_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "weight"}
SAME_AS = {"from": "role", "value": "content", "thinking": "reasoning_content", "reasoning": "reasoning_content"}
MESSAGE_READ = {*MESSAGE_KEYS, *SAME_AS, *FLAGS, "label", "function_call"}
TEXTS = {"role", "name", "tool_call_id", "reasoning_content", *SAME_AS}
"""texts of a message, which may be empty"""
MESSAGE_REFUSED = {
    **{key: REFUSED[key] for key in (*PICTURES, "mask", "loss_mask")},
    **dict.fromkeys(("train_detail", "training_detail", "loss_scale"), _SPANS),
    "refusal": Refusal("a refusal beside the content is not read", "make it the content"),
}
TURN_NAMES = {  # under `from`
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bot"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
}
ROLES = {"function": "tool", "tool_response": "tool"}  # under `role`, beside OpenAI's own of today
CALL_ROLES = ("function_call", "tool_call")
"""an assistant's turn whose content is a call, or a list of calls, as JSON"""


def absent(value: Any, nested: int = MOST_NESTED) -> bool:
    """Whether a row's value stands for a key that is not there: an object of nothing but such values does, too, and a
    list of nothing but nulls and such objects.   nested: how deep it is looked into.

    >>> [absent(value) for value in (None, "", [], {"a": {}, "b": None}, [None, {"a": None}], 0, [""])]
    [True, True, True, True, True, False, False]
    """
    if isinstance(value, dict):
        return nested > 0 and all(absent(inner, nested - 1) for inner in value.values())
    if isinstance(value, list):
        return nested > 0 and all(not isinstance(inner, str) and absent(inner, nested - 1) for inner in value)
    return value is None or (isinstance(value, str) and not value)


def refuse(found: dict[str, Any], refused: dict[str, Refusal], place: str) -> None:
    """Raises SchemaError at the first key that changes what would be taught. A weight of 1 changes nothing."""
    for key in found:
        if key in refused and not absent(found[key]) and not (refused[key] is _SPANS and found[key] == 1):
            raise SchemaError(f"{place}.{key}", *refused[key])
