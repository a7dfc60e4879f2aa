"""Checks of the form of replies, without a judge: do they end, do they stay in their role, do they repeat themselves.

    checks = check_replies(assistant.engine.generate(requests), assistant.renderer)
    checks.rate("looping"), checks.replies["looping"]  ->  0.02, (17,)

Each rule is stated where it is applied. They must raise no false alarm on a clean reply, whatever it is about: what
stands in Markdown code is shown, not done, and a dialogue that the reply announces is content.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sftflow.chat.render import Renderer
from sftflow.chat.schema import Conversation, text_message
from sftflow.chat.token_rows import token_bytes
from sftflow.evaluation.journal import EvalRow
from sftflow.foundation.errors import SftflowError
from sftflow.generation.request import Reply
from sftflow.generation.sequence import ReplyDecoder

LOOP_TIMES, LOOP_TOKENS, LOOP_END = 3, 24, 2
FAULTS = {
    "limit": "did not stop",
    "empty": "empty",
    "looping": "looping",
    "role_leak": "leaked a control token",
    "self_turn": "went on as the user",
    "invalid_utf8": "not valid UTF-8",
    "tool_calls": "broken tool call",
}
"""what can be wrong with a reply, in words"""

# Markers of chat formats, spelled out. "### Response" without its colon is a heading that a clean reply may have.
MARKERS = re.compile(
    r"<\|/?(?:user|assistant|system|developer|tool|im_start|im_end|im_sep|start_header_id|end_header_id|eot_id|eom_id|"
    r"endoftext|begin_of_text|end_of_text|python_tag|bos|eos|end\|)|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|"
    r"^### (?:Instruction:?|Response:|Human:|Assistant:)[ \t]*$",
    re.MULTILINE,
)
USER_LINE = re.compile(r"^(?:User|USER|Human|HUMAN|Question):", re.MULTILINE)
SPEAKER_LINE = re.compile(
    r"\W*(?!(?:Assistant|ASSISTANT|AI|Bot|Model|Answer|Response)\b)[A-Z][\w'-]*(?: [A-Z][\w'-]*)?:\W*\s\S"
)
CODE = re.compile(r"^ {0,3}(```+|~~~+).*?(?:^ {0,3}\1|\Z)|(`+)[^`\n]+\2", re.MULTILINE | re.DOTALL)
HTML_LIKE = re.compile(r"</?[A-Za-z]+>")
# Chinese and Japanese write no spaces: there a character counts as a word.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|(?:(?![\u3040-\u30ff\u3400-\u9fff])\w)+(?:['\u2019]\w+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyChecks:
    """What was found over n replies.

    replies: for each of FAULTS the numbers of the replies that have it, and under "stop" of those that ended by
    themselves. distinct: 1 to 3 words, None where no reply has so many. tool_calls: None in formats without them.
    """

    n: int
    replies: Mapping[str, tuple[int, ...]]
    distinct: tuple[float | None, float | None, float | None]
    tool_calls: Mapping[str, int] | None
    length: Mapping[str, Any]

    def rate(self, name: str) -> float | None:
        """The share of the replies; None where there are none."""
        return len(self.replies[name]) / self.n if self.n else None

    def faults_of(self, number: int) -> list[str]:
        """What is wrong with one reply, in words."""
        return [words for name, words in FAULTS.items() if number in self.replies[name]]

    def to_json(self) -> dict[str, Any]:
        """`replies` lists, for each rate, the numbers of the replies at fault; for stop_rate those that went on."""
        names = [name for name in self.replies if name != "tool_calls"]
        at_fault = {f"{name}_rate": list(self.replies[name]) for name in names}
        at_fault["stop_rate"] = sorted(set(range(self.n)) - set(self.replies["stop"]))
        return {
            "n": self.n,
            **{f"{name}_rate": self.rate(name) for name in names},
            **{f"distinct_{i}": share for i, share in enumerate(self.distinct, 1)},
            "tool_calls": None if self.tool_calls is None else dict(self.tool_calls),
            "length": dict(self.length),
            "replies": {**at_fault, "tool_calls": list(self.replies["tool_calls"])},
        }


def check_replies(replies: Sequence[Reply | EvalRow], renderer: Renderer) -> ReplyChecks:
    """Check replies that were generated in the renderer's format."""
    decoder = ReplyDecoder(renderer)
    control = frozenset(renderer.special.values()) - _in_ends(renderer) - frozenset(decoder.python or ())
    header = user_header(renderer)
    # <s> is also struck-out text in HTML
    spelled = [t for t in renderer.special if len(t) > 2 and not HTML_LIKE.fullmatch(t)]
    known = sorted({i for r in replies for i in r.ids})
    raw = dict(zip(known, token_bytes(renderer.tokenizer, known), strict=True))
    found: dict[str, list[int]] = {name: [] for name in ("stop", *FAULTS)}
    calls = {"calls": 0, "well_formed": 0, "answered": 0}
    for number, reply in enumerate(replies):
        text, ids = reply.text, reply.ids
        prose = CODE.sub("", text)
        made, well_formed, answered, stray = tool_calls(ids, decoder)
        for key, count in zip(calls, (made, well_formed, answered), strict=True):
            calls[key] += count
        leak = any(i in control for i in ids) or any(t in prose for t in spelled) or bool(MARKERS.search(prose))
        cut = reply.finish_reason != "stop"
        checks = {
            "stop": reply.finish_reason == "stop",
            "limit": reply.finish_reason == "length",
            "empty": not text.strip(),
            "looping": loops([i for i in ids if i not in decoder.stop]),
            "role_leak": leak,
            "self_turn": _opens_user_turn(header, ids, prose, control, renderer) or answers_itself(prose),
            "invalid_utf8": not _decodes(b"".join(raw[i] for i in ids), cut=cut),
            "tool_calls": stray or made > answered,
        }
        for name, is_so in checks.items():
            if is_so:
                found[name].append(number)
    words = [WORD.findall(r.text.lower()) for r in replies]
    return ReplyChecks(
        n=len(replies),
        replies={name: tuple(numbers) for name, numbers in found.items()},
        distinct=(distinct(words, 1), distinct(words, 2), distinct(words, 3)),
        tool_calls=None if decoder.python is None else calls,
        length=lengths([r.n_generated for r in replies]),
    )


# ---- the rules


def loops(ids: Sequence[int]) -> bool:
    """A looping tail: 24 tokens or more that are one stretch said 3 times or more (its last round may be cut), with at
    most 2 other tokens behind them.

    >>> loops([9, 8, *[1, 2, 3] * 8, 7]), loops([1, 2, 3] * 7), loops(range(100))
    (True, False, False)
    """
    for n in range(len(ids), max(LOOP_TOKENS, len(ids) - LOOP_END) - 1, -1):
        for period in range(1, n // LOOP_TIMES + 1):
            long = max(LOOP_TIMES * period, LOOP_TOKENS)
            if long <= n and all(ids[i] == ids[i - period] for i in range(n - 1, n - 1 - (long - period), -1)):
                return True
    return False


def distinct(words: Sequence[Sequence[str]], n: int) -> float | None:
    """distinct-n (Li et al. 2016): different word n-grams / n-grams, the mean over the replies that have any.

    A reply at a time, because over all replies pooled it falls with the amount of text: the more talkative model of two
    would look the more repetitive one.

    >>> distinct([["a", "b", "a", "b"], ["c"]], 2)  # ab ba ab
    0.6666666666666666
    """
    shares = []
    for said in words:
        grams = list(zip(*(said[i:] for i in range(n)), strict=False))
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else None


def answers_itself(text: str) -> bool:
    """After some text, a line begins with "User:", "Human:" or "Question:", and no dialogue was under way or announced:
    the line of text before it neither ends in a colon nor is another speaker's. The first such line decides.

    >>> answers_itself("It is 4.\\nUser: And 3+3?"), answers_itself("A play:\\n\\nHuman: Hello!\\nRobot: Beep.")
    (True, False)
    """
    for line in USER_LINE.finditer(text):
        said = text[: line.start()].rstrip()
        if said:
            before = said.rsplit("\n", 1)[-1]
            return not (before.rstrip("*_ ").endswith(":") or SPEAKER_LINE.match(before))
    return False


def _in_ends(renderer: Renderer) -> frozenset[int]:
    """Ids of the tokens that turns end with."""
    return frozenset(i for end in renderer.ends() for i in end)


def user_header(renderer: Renderer) -> str:
    """What the template writes between a reply's end and the next user text, without white space and without the
    stop and BOS tokens: "<|im_start|>user", "[INST]"; "" where the format has no second user turn."""
    texts = ("firstquestion", "firstanswer", "secondquestion", "secondanswer")
    roles = ("user", "assistant") * 2
    try:
        text = renderer.text(Conversation(tuple(map(text_message, roles, texts)), source="probe"))
    except SftflowError:
        return ""
    between = text.partition(texts[1])[2].partition(texts[2])[0]
    ends = [t for t, i in renderer.special.items() if i in _in_ends(renderer)]
    for token in (*ends, renderer.spec.names.get("bos_token")):
        between = between.replace(token, "") if token else between
    return "".join(between.split())


def _opens_user_turn(header: str, ids: Sequence[int], prose: str, control: frozenset[int], renderer: Renderer) -> bool:
    """The format's own user header, spelled out or among the ids. Plain words ("USER:") would stand in many a text and
    are left to `answers_itself`."""
    if not header or re.fullmatch(r"\w+:?", header):
        return False
    if header in "".join(prose.split()):
        return True
    return any(i in control for i in ids) and header in "".join(renderer.decode(ids).split())


def tool_calls(ids: Sequence[int], decoder: ReplyDecoder) -> tuple[int, int, int, bool]:
    """Calculator calls: (opened; closed before another tool token; answered: followed by their right result between the
    output tokens), and whether a tool token stands where none belongs."""
    if decoder.python is None:
        return 0, 0, 0, False
    start, end = decoder.python[:2]
    made = well_formed = answered = at = 0
    stray = False
    while at < len(ids):
        token, at = ids[at], at + 1
        if token != start:
            stray |= token in decoder.python
            continue
        made += 1
        close = next((i for i in range(at, len(ids)) if ids[i] in decoder.python or ids[i] in decoder.stop), len(ids))
        if close == len(ids) or ids[close] != end:
            at = close
            continue
        well_formed += 1
        result, at = decoder.result(ids[at:close]), close + 1
        if result and list(ids[at : at + len(result)]) == result:
            answered += 1
            at += len(result)
    return made, well_formed, answered, stray


def _decodes(raw: bytes, *, cut: bool) -> bool:
    """Whether bytes are UTF-8. cut: they may end within a character, since the limit came there and not the model."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(raw, final=not cut)
    except UnicodeDecodeError:
        return False
    return True


def lengths(generated: Sequence[int]) -> dict[str, Any]:
    """Generated tokens; bins double: edges 0, 1, 2, 4, ..., the last above the longest, counts of edge <= n < next.

    >>> [lengths([0, 3, 5])[k] for k in ("median", "edges", "counts")]
    [3.0, [0, 1, 2, 4, 8], [1, 0, 1, 1]]
    """
    edges = [0, 1]
    while edges[-1] <= max(generated, default=0):
        edges.append(2 * edges[-1])
    counts = np.histogram(generated, edges)[0].tolist()
    some = list(generated) or [0]
    return {
        "mean": float(np.mean(some)),
        "median": float(np.median(some)),
        "p90": float(np.percentile(some, 90)),
        "max": max(some),
        "edges": edges,
        "counts": counts,
    }
