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
    "preference data",
    "name the reply that is wanted: columns: {chosen: completion}, or messages where it is a list",
)
_ARGUMENTS = Refusal("a template's arguments cannot differ from row to row", "remove the key, or these rows")
_SPANS = Refusal("what it makes of the loss is another trainer's way", "give each reply a weight, from 0 to 1")
_MASK = Refusal(
    "it may mean taught as well as not taught", 'remove it, and give messages that are not taught "weight": 0'
)

CONVERSATIONS = ("messages", "conversations", "conversation")
SYSTEM = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
IDS = "input_ids"
MASKS = ("mask", "loss_mask", "completion_mask", "assistant_masks")
"""beside IDS: 1 or true where a token is taught"""
TOKEN_WEIGHTS = ("weights", "loss_weights", "loss_mask")
"""beside IDS: how much each token's loss counts, 0 to 1"""
TOKEN_KEYS = ("labels", *MASKS, "weights", "loss_weights", "attention_mask", "position_ids")
"""read beside IDS, one value for each of them"""
LENGTHS = "seq_lengths"
"""beside IDS: the length of each conversation that was packed into the row"""
PREFERRED = ("label", "kto_tag", "desirable")
NOT_TAUGHT = ("masked", "ignore")
"""1 or true: the message is not taught"""
_FLAGS = ("weight", "loss", "train", "training", "trainable", "learn", *NOT_TAUGHT)
FLAGS = (*_FLAGS, "loss_weight")
"""1 or true: the message is taught, but for NOT_TAUGHT. 0 or false: the contrary."""
WEIGHTS = ("weight", "loss_weight", "sample_weight", "weights", "loss_weights")
"""also a number between: how much the loss of the message, or of the row, counts"""
ROW_FLAGS = (*_FLAGS, *WEIGHTS[1:])
"""the same of each message of a row"""
ASKS = ("prompt", "instruction", "query", "question", "problem", "instructions")
REPLIES = ("completion", "output", "response", "answer", "solution")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
REJECTED = ("response", "messages", "output", "completion", "answer")
PREFERENCE = {
    *("chosen", "rejected", "preferred_output", "non_preferred_output"),
    *(name for of in REJECTED for name in (f"rejected_{of}", f"{of}_rejected")),
}
PATHS = ("image_path", "image_url", "image_file", "image_paths", "image_urls", "image_files")
PICTURES = ("images", "image", "videos", "video", "audios", "audio", *PATHS, "video_path", "audio_path", "media")
NOT_TEXTS = {
    *(*CONVERSATIONS, *TOOLS, "history", "answers", *ROW_FLAGS, *PREFERRED),
    *(IDS, *TOKEN_KEYS, LENGTHS),
}
"""keys whose values are lists, numbers or true and false: as texts, they hold these as JSON"""

READ = {
    **dict.fromkeys(CONVERSATIONS, "the conversation: a list of messages, or JSON text of one"),
    "prompt": "what `completion` answers: a text, or messages, none of which is taught",
    "completion": "the reply that is taught: a text, or messages",
    "instruction": "what is asked: of Alpaca with `output`, of others with `response`",
    "input": "what `instruction` is about, below it; alone with `output`, what is asked",
    "context": "as `input`, below `instruction`",
    "output": "the reply to `instruction`, or to `input` alone",
    **dict.fromkeys(("query", "question", "problem", "inputs", "user"), "what is asked"),
    "response": "the reply to `instruction`, `prompt`, `query` or `question`",
    **{"answer": "the reply to `question`", "solution": "the reply to `problem`"},
    **{"targets": "the reply to `inputs`", "assistant": "the reply to `user`"},
    "answers": "beside `query` and `tools`: the calls that are the reply",
    "history": "of what is asked in a text: [asked, replied] pairs in front; their replies are taught",
    "text": "alone: Alpaca's ready text, or Guanaco's; else plain text, all of which is taught",
    "ends": "beside plain text: false where the document goes on elsewhere",
    **dict.fromkeys(THOUGHTS, "the reasoning in front of a reply that is a text"),
    **dict.fromkeys(SYSTEM, "the system message, unless the conversation begins with the same one"),
    "tools": "tools in the OpenAI shape, or without its envelope; or JSON text of them",
    "functions": "as `tools`",
    **dict.fromkeys(ROW_FLAGS, "as of a message: whether anything of the row is taught"),
    **dict.fromkeys(PREFERRED, "true: the reply is wanted"),
    IDS: "the row's tokens; what is taught of them say `mask` or `labels`",
    "labels": f"beside {IDS}: the ids that are taught, -100 for the others",
    **dict.fromkeys(MASKS, f"beside {IDS}: 1 where a token is taught"),
    **dict.fromkeys(("weights", "loss_weights"), f"a row's weight; beside {IDS} one for each of them"),
    "attention_mask": f"beside {IDS}: all 1",
    LENGTHS: f"beside {IDS}: a single one",
    "position_ids": f"beside {IDS}: 0, 1, 2 ...",
}
REFUSED = {
    **dict.fromkeys((*PICTURES, "objects"), _PICTURES),
    **dict.fromkeys(sorted(PREFERENCE), _PREFERENCE),
    **dict.fromkeys(("chat_template_kwargs", "chat_template"), _ARGUMENTS),
    "documents": Refusal("a template's documents are not taught", "put them into a message"),
    **dict.fromkeys(("mask", "loss_mask"), _MASK),
    "loss_scale": _SPANS,
}

CHOICES = (
    *("choices", "options", "endings", "distractors", "answerKey", "answer_index", "answer_idx"),
    *(f"{of}{n}" for of in ("choice", "option", "ending", "distractor", "sol") for n in "0123"),
    *("option_a", "opa", "A", "B"),
)
"""beside what is asked: a question of several choices"""
BELOW = ("input", "context", "contexts", "passage", "passages", "article")
"""belongs to what is asked, and where it goes is said for `instruction` and `query` only"""

# ---- of a message

MESSAGE_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "weight"}
SAME_AS = {"from": "role", "value": "content", "thinking": "reasoning_content", "reasoning": "reasoning_content"}
MESSAGE_READ = {*MESSAGE_KEYS, *SAME_AS, *FLAGS, "label", "function_call"}
MESSAGE_IGNORED = {
    *("id", "index", "model", "metadata", "timestamp", "created", "created_at", "language", "country", "annotations"),
    *("toxic", "redacted", "hashed_ip", "header", "state", "openai_id", "turn_identifier", "system_fingerprint"),
    *("temperature", "top_p", "token_counter", "usage"),
}
"""what is noted about a message, and says nothing of what is taught"""
TEXTS = {"role", "name", "tool_call_id", "reasoning_content", *SAME_AS}
"""texts of a message, which may be empty"""
MESSAGE_REFUSED = {
    **{key: REFUSED[key] for key in (*PICTURES, "mask", "loss_mask")},
    **dict.fromkeys(("train_detail", "training_detail", "loss_scale"), _SPANS),
    "refusal": Refusal("a refusal beside the content is not read", "make it the content"),
}
TURN_NAMES = {  # in any case, under `from` or `role`
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bot", "chatbot", "ai"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response"), "tool"),
}
SPEAKERS = {  # of a turn that is {"user": ..., "assistant": ...}
    "system": "system",
    **dict.fromkeys(("human", "user", "input", "prompt", "question", "query"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "output", "response", "answer"), "assistant"),
}
PARTS = {"input_text": "text", "output_text": "text", "thinking": "reasoning"}
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
