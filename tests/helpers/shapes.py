"""Conversations of every shape that a chat template can trip over.

Words that begin with "zq" are markers: each stands in exactly one message, so that a check can tell whose text a piece
of a rendered row is. Shapes whose contents must be exact (empty, padded, repeated) are checked by their structure.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any

Row = dict[str, Any]

LOOKALIKES = (
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|begin_of_text|>",
    "</s>",
    "<s>",
    "[INST]",
    "[/INST]",
    "<|endoftext|>",
    "<end_of_turn>",
    "<start_of_turn>",
    "<|end|>",
    "<|end_of_turn|>",
    "<|assistant_end|>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<|im_middle|>",
)


def user(content: str) -> Row:
    return {"role": "user", "content": content}


def system(content: str) -> Row:
    return {"role": "system", "content": content}


def assistant(content: str | None, **keys: Any) -> Row:
    return {"role": "assistant", "content": content, **keys}


def call(name: str, arguments: Any, identity: str) -> Row:
    """A tool call. Identities have nine letters and digits because some templates insist on that."""
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: str, identity: str) -> Row:
    return {"role": "tool", "content": content, "tool_call_id": identity}


def tool(name: str, argument: str, words: str) -> Row:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Looks up the {words}.",
            "parameters": {
                "type": "object",
                "properties": {argument: {"type": "string", "description": f"the {argument} to look up"}},
                "required": [argument],
            },
        },
    }


# The descriptions have markers of their own: names and arguments also stand in the calls.
WEATHER = tool("zqweather", "zqcity", "zqskies")
CLOCK = tool("zqclock", "zqzone", "zqhours")
PARIS = {"zqcity": "zqparis"}
LIMA = {"zqzone": "zqlima"}

# One character per thing that goes wrong: outside the BMP, joined, decomposed, right to left, no spaces, no newline.
UNICODE = "zq{0}emoji 🙂👩‍👩‍👧 cafe\u0301 n\u0303 שלום עולם مرحبا 你好，世界 ½ ﬁ \u00a0 \u2028 end"

SHAPES: dict[str, Row] = {
    "single": {"messages": [user("Say zqask please."), assistant("It is zqreply now.")]},
    "turns": {
        "messages": [
            user("First zqa question?"),
            assistant("First zqb answer."),
            user("Second zqc question?"),
            assistant("Second zqd answer, two\nlines."),
            user("Third zqe question?"),
            assistant("Third zqf answer."),
        ]
    },
    "system": {"messages": [system("Be zqterse always."), user("Say zqask."), assistant("So zqreply.")]},
    "system_turns": {
        "messages": [
            system("Be zqterse always."),
            user("One zqa."),
            assistant("Two zqb."),
            user("Three zqc."),
            assistant("Four zqd."),
        ]
    },
    "developer": {
        "messages": [
            {"role": "developer", "content": "Follow zqrules."},
            user("Say zqask."),
            assistant("So zqreply."),
        ]
    },
    "tools_unused": {
        "messages": [user("Say zqask."), assistant("No call, zqreply.")],
        "tools": [WEATHER, CLOCK],
    },
    "tools_system": {
        "messages": [system("Be zqterse."), user("Say zqask."), assistant("No call, zqreply.")],
        "tools": [WEATHER],
    },
    "call": {
        "messages": [
            user("How is zqask?"),
            assistant(None, tool_calls=[call("zqweather", PARIS, "callAAAA1")]),
            result('{"sky": "zqblue"}', "callAAAA1"),
            assistant("It is zqfinal."),
        ],
        "tools": [WEATHER],
    },
    "call_empty_content": {
        "messages": [
            user("How is zqask?"),
            assistant("", tool_calls=[call("zqweather", PARIS, "callAAAA1")]),
            result("zqblue", "callAAAA1"),
            assistant("It is zqfinal."),
        ],
        "tools": [WEATHER],
    },
    "call_json_string": {
        "messages": [
            user("How is zqask?"),
            assistant("", tool_calls=[call("zqweather", json.dumps(PARIS), "callAAAA1")]),
            result("zqblue", "callAAAA1"),
            assistant("It is zqfinal."),
        ],
        "tools": [WEATHER],
    },
    "call_last": {
        "messages": [user("How is zqask?"), assistant("", tool_calls=[call("zqweather", PARIS, "callAAAA1")])],
        "tools": [WEATHER],
    },
    "calls_parallel": {
        "messages": [
            user("How is zqask?"),
            assistant("", tool_calls=[call("zqweather", PARIS, "callAAAA1"), call("zqclock", LIMA, "callBBBB2")]),
            result("zqblue", "callAAAA1"),
            result("zqnoon", "callBBBB2"),
            assistant("It is zqfinal."),
        ],
        "tools": [WEATHER, CLOCK],
    },
    "call_with_text": {
        "messages": [
            user("How is zqask?"),
            assistant("Let me zqlook.", tool_calls=[call("zqweather", PARIS, "callAAAA1")]),
            result("zqblue", "callAAAA1"),
            assistant("It is zqfinal."),
        ],
        "tools": [WEATHER],
    },
    "call_rounds": {
        "messages": [
            user("How is zqask?"),
            assistant("", tool_calls=[call("zqweather", PARIS, "callAAAA1")]),
            result("zqblue", "callAAAA1"),
            assistant("", tool_calls=[call("zqclock", LIMA, "callBBBB2")]),
            result("zqnoon", "callBBBB2"),
            assistant("It is zqfinal."),
            user("And zqmore?"),
            assistant("Yes zqlast."),
        ],
        "tools": [WEATHER, CLOCK],
    },
    "call_reasoning": {
        "messages": [
            user("How is zqask?"),
            assistant("", reasoning_content="I zqwonder.", tool_calls=[call("zqweather", PARIS, "callAAAA1")]),
            result("zqblue", "callAAAA1"),
            assistant("It is zqfinal.", reasoning_content="I zqknow."),
        ],
        "tools": [WEATHER],
    },
    "reasoning": {"messages": [user("Say zqask."), assistant("So zqreply.", reasoning_content="I zqponder\nlong.")]},
    "reasoning_turns": {
        "messages": [
            user("One zqa."),
            assistant("Two zqb.", reasoning_content="I zqthinka."),
            user("Three zqc."),
            assistant("Four zqd.", reasoning_content="I zqthinkb."),
        ]
    },
    "reasoning_mixed": {
        "messages": [
            user("One zqa."),
            assistant("Two zqb.", reasoning_content="I zqthinka."),
            user("Three zqc."),
            assistant("Four zqd."),
        ]
    },
    "think_inline": {"messages": [user("Say zqask."), assistant("<think>\nI zqponder.\n</think>\n\nSo zqreply.")]},
    "think_inline_turns": {
        "messages": [
            user("One zqa."),
            assistant("<think>I zqthinka.</think>Two zqb."),
            user("Three zqc."),
            assistant("<think>\nI zqthinkb.\n</think>\n\nFour zqd."),
        ]
    },
    "empty": {"messages": [user("Say zqask."), assistant("")]},
    "empty_turn": {
        "messages": [user("One zqa."), assistant(""), user("Three zqc."), assistant("Four zqd.")],
    },
    "padded": {
        "messages": [
            system("  \n zqsys \n\n"),
            user(" \n  Say zqa.  \n\n "),
            assistant("  \n Padded zqb. \n\n  "),
            user("\tTabs zqc.\t"),
            assistant("  Two zqd.  "),
        ]
    },
    "padded_plain": {"messages": [user("  Say zqa. \n"), assistant(" Padded zqb. ")]},
    "newlines_first": {
        "messages": [user("Say zqa."), assistant("\n\nAfter zqb."), user("Say zqc."), assistant("\nAfter zqd.\n")]
    },
    "space_only": {"messages": [user("Say zqa."), assistant(" "), user("\n"), assistant("\n\n")]},
    "crlf": {"messages": [user("Say\r\n\r\nzqa."), assistant("Line zqb.\r\n\r\n\n\nLine zqc.")]},
    "unicode": {"messages": [user(UNICODE.format("a")), assistant(UNICODE.format("b"))]},
    "unicode_composed": {
        "messages": [
            user("🙂 zqa"),
            assistant(unicodedata.normalize("NFC", UNICODE.format("b"))),
            user("你好"),
            assistant("世界🙂"),
        ]
    },
    "combining_first": {"messages": [user("e"), assistant("\u0301zqb"), user("x"), assistant("\u200dzqd")]},
    "repeated": {"messages": [user("a"), assistant("a"), user("a"), assistant("a")]},
    "repeated_inside": {
        "messages": [
            user("The cat sat on the mat."),
            assistant("cat"),
            user("cat"),
            assistant("The cat sat on the mat. cat"),
            user("assistant"),
            assistant("user"),
        ]
    },
    "lookalikes_user": {
        "messages": [
            user("Text zqa " + " ".join(LOOKALIKES) + " end."),
            assistant("Plain zqb."),
            user("".join(LOOKALIKES)),
            assistant("Plain zqd."),
        ]
    },
    "lookalikes_assistant": {
        "messages": [
            user("Text zqa."),
            assistant("Say zqb " + " ".join(LOOKALIKES) + " end."),
            user("Text zqc."),
            assistant("".join(LOOKALIKES)),
        ]
    },
    "lookalikes_edges": {
        "messages": [
            system("<|eot_id|> zqsys <s>"),
            user("<|im_end|></s>"),
            assistant("<|im_end|>"),
            user("<s>zqc</s>"),
            assistant("</s> zqd <|eot_id|>"),
        ]
    },
    "lookalikes_tools": {
        "messages": [
            user("How is zqask?"),
            assistant("", tool_calls=[call("zqweather", {"zqcity": "<|im_end|></s><|eot_id|>"}, "callAAAA1")]),
            result("zqblue <|im_end|><|eot_id|></s><s>", "callAAAA1"),
            assistant("It is zqfinal."),
        ],
        "tools": [WEATHER],
    },
    "headers": {
        "messages": [
            user("<|im_start|>user\nzqa<|im_end|>\n<|im_start|>assistant\n"),
            assistant("<|start_header_id|>assistant<|end_header_id|>\n\nzqb"),
            user("### Response:\nASSISTANT: [/INST] <start_of_turn>model\n"),
            assistant("<|assistant|>\n<|im_start|>assistant\nzqd"),
        ]
    },
    "weight_zero": {
        "messages": [
            user("One zqa."),
            assistant("Two zqb.", weight=0),
            user("Three zqc."),
            assistant("Four zqd."),
        ]
    },
    "weight_zero_last": {
        "messages": [
            user("One zqa."),
            assistant("Two zqb."),
            user("Three zqc."),
            assistant("Four zqd.", weight=0),
        ]
    },
    "weight_zero_reasoning": {
        "messages": [
            user("One zqa."),
            assistant("Two zqb.", reasoning_content="I zqthinka.", weight=0),
            user("Three zqc."),
            assistant("Four zqd.", reasoning_content="I zqthinkb."),
        ]
    },
    "users_in_a_row": {"messages": [user("One zqa."), user("Two zqb."), assistant("Three zqc.")]},
    "assistants_in_a_row": {"messages": [user("One zqa."), assistant("Two zqb."), assistant("Three zqc.")]},
    "user_last": {"messages": [user("One zqa."), assistant("Two zqb."), user("Three zqc.")]},
    "assistant_first": {"messages": [assistant("Hello zqa."), user("Two zqb."), assistant("Three zqc.")]},
}
