"""The answer in a reply, as every grader reads it: reasoning set aside first, one writing for what is written in many
ways, numbers compared as numbers.

    answer_of("<think>20?</think>It is 18.")          "It is 18."
    same_text("It’s", "it's")                         True
    final_number("So \\\\boxed{9{,}500} from 2 markets")   Decimal("9500")

Gradings that others define (lm-evaluation-harness, IFEval) do not come through here.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

_REASONING = r"(?:\w+:)?(?:think|thinking|thought|thoughts|reasoning)"
_BLOCK = re.compile(rf"<({_REASONING})>.*?</\1>|\[THINK\].*?\[/THINK\]|◁think▷.*?◁/think▷", re.S)
_OPEN = re.compile(rf"<{_REASONING}>|\[THINK\]|◁think▷")
_CLOSE = re.compile(rf"</{_REASONING}>|\[/THINK\]|◁/think▷")

# What is written in several ways -> the way it is compared in.
_DASHES, _SINGLE, _DOUBLE = "‐‑‒–—―−﹘﹣", "‘’‚‛‹›´ʼ", "“”„‟«»"
_INVISIBLE = [0x00AD, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, *range(0x2066, 0x206A), 0xFEFF]
_ONE_WRITING = {
    **dict.fromkeys(map(ord, _DASHES), "-"),
    **dict.fromkeys(map(ord, _SINGLE), "'"),
    **dict.fromkeys(map(ord, _DOUBLE), '"'),
    **dict.fromkeys(_INVISIBLE),
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # of full width: １２，５００
    ord("。"): ".",
}
_THIN = "\u00a0\u2006\u2007\u2009\u200a\u202f"  # blanks that stand inside a number, between its thousands
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_POWER = r"10\s*(?:(?:\^|\*\*)\s*\{?\s*([-+]?\d{1,4})(?!\d)\}?|([⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,4}))"
_TIMES_POWER = re.compile(rf"(?<=\d)\s*(?:×|\\times|\\cdot|·|\*|x)\s*{_POWER}")
_ALONE = re.compile(rf"(?<![\w.]){_POWER}")
_OF_A_UNIT = re.compile(r"(?<=[^\W\d_])\^\{?[-+]?\d+\}?")  # 50 m^2

_MONEY = "$€£¥₹"
_GROUPED = rf"\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d{{1,2}}(?:,\d{{2}})+,\d{{3}}(?!\d)|\d{{1,3}}(?:[{_THIN}']\d{{3}})+(?!\d)"
_NUMBER = re.compile(
    rf"((?<![\w.)\]}}%])-[{_MONEY}]?|(?<!\w)[{_MONEY}]-)?"
    rf"((?:{_GROUPED}|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE]([-+]?\d{{1,4}})(?!\w))?"
)
_MARK = re.compile(rf"####\s*(?i:(?:final )?answer(?: is)?:?\s*)?(?:\*\*|\\boxed\{{|\\\(|[{_MONEY}](?!-))*")
_HEADING = re.compile(r"####\s*\d+\s*[.):]\s*[^\W\d]")
_BOXED = re.compile(r"\\f?boxed\s*\{")

# Scripts without blanks between words, by what Unicode names their letters; and Hangul, whose particles join the word.
_NO_BLANKS = (
    *("CJK ", "HIRAGANA", "KATAKANA", "BOPOMOFO", "HANGUL", "YI ", "THAI", "LAO ", "KHMER", "MYANMAR", "TIBETAN"),
    *("JAVANESE", "BALINESE", "TAI ", "NEW TAI", "IDEOGRAPHIC"),
)


# ---- reasoning


def answer_of(reply: str) -> str:
    r"""The reply without its reasoning: what a person is told. "" where the reasoning did not come to its end.

    Where the prompt opened the block, the reply has its end only; all in front of that is reasoning.

    >>> [answer_of(r) for r in ("<think>20?</think>\n\n18", "20?</think>18", "<think>20?", "18")]
    ['18', '18', '', '18']
    """
    answer = _BLOCK.sub("", reply)
    answer = answer[max((m.end() for m in _CLOSE.finditer(answer)), default=0) :]
    opened = _OPEN.search(answer)
    answer = answer[: opened.start()] if opened else answer
    # White space in front belongs to the block that is gone; indentation, as code may have it, does not.
    return answer if answer == reply else re.sub(r"\A(?:[^\S\n]*\n)+", "", answer)


# ---- texts


def one_writing(text: str) -> str:
    """Composed characters (NFC), plain dashes, quotes and full stops, half width; nothing that cannot be seen."""
    return unicodedata.normalize("NFC", text).translate(_ONE_WRITING)


def folded(text: str) -> str:
    """In one writing, without letter case and extra space."""
    caseless = unicodedata.normalize("NFD", one_writing(text)).casefold()
    return " ".join(unicodedata.normalize("NFC", caseless).split())


def bare(text: str) -> str:
    """Folded, without quotes, asterisks or backticks around, and without a final . or !

    >>> bare(' "A  Wren." ')
    'a wren'
    """
    plain = folded(text)
    return plain.strip("\"'*`").rstrip(".!").strip("\"'*` ") or plain


def same_text(reply: str, answer: str) -> bool:
    """ "A wren." is "a wren"; "It is a wren" is not."""
    return bare(answer_of(reply)) == bare(answer)


def holds_text(reply: str, answer: str) -> bool:
    """The answer stands in the reply as whole words: "no" is in "No, 3." but not in "I know". Where a script puts no
    blanks between words, any place is one: 猫 is in それは猫です."""
    text, wanted = bare(answer_of(reply)), bare(answer)
    at = text.find(wanted)
    while at >= 0:
        end = at + len(wanted)
        if not (_joined(text[at - 1 : at], wanted[:1]) or _joined(wanted[-1:], text[end : end + 1])):
            return True
        at = text.find(wanted, at + 1)
    return False


def _joined(left: str, right: str) -> bool:
    """Whether two characters side by side are inside one word. "": the text's beginning or end."""
    if not left or not right:
        return False
    if unicodedata.category(right).startswith("M"):  # a vowel sign or an accent, of the letter in front
        return True
    return all(c == "_" or unicodedata.category(c)[0] in "LNM" for c in (left, right)) and not any(
        unicodedata.name(c, "").startswith(_NO_BLANKS) for c in (left, right)
    )


# ---- numbers


def numbers_in(text: str) -> list[Decimal]:
    r"""Every number, whatever its thousands are parted by, without units.

    A minus is a sign where it does not follow a word, a number or a closing bracket: 7-8 are 7 and 8.

    >>> [str(n) for n in numbers_in(r"-$1,080.50, 7-8, .5, 20%, x=−3, 9{,}500, 1.2e-3 and 3 \times 10^8")]
    ['-1080.50', '7', '8', '0.5', '20', '-3', '9500', '0.0012', '3E+8']
    """
    return [_value(found) for found in _NUMBER.finditer(_plain_numbers(text))]


def _plain_numbers(text: str) -> str:
    """Thousands and dollars as LaTeX writes them, and powers of ten, in the writing of _NUMBER."""
    text = one_writing(text).replace("{,}", ",").replace(r"\$", "$").replace(r"\!", "")
    text = re.sub(r"(?<=\d)(?:\\[,;: ]|~)(?=\d{3})", "\u2009", text)
    text = _ALONE.sub(lambda m: "1" + _exponent(m), _TIMES_POWER.sub(_exponent, text))
    return _OF_A_UNIT.sub("", text)


def _exponent(power: re.Match[str]) -> str:
    return "e" + (power[1] or power[2]).translate(_SUPERSCRIPT)


def _value(found: re.Match[str]) -> Decimal:
    sign, digits, exponent = found.groups()
    plain = re.sub(rf"[,'{_THIN}]", "", digits)
    return Decimal(f"{'-' if sign else ''}{plain}e{exponent or 0}")


def is_number(text: str) -> bool:
    """Whether a text is a number and nothing else, a percent sign aside."""
    return _NUMBER.fullmatch(_plain_numbers(text).strip().rstrip("% ").lstrip(_MONEY + "+")) is not None


def marked_text(reply: str) -> str | None:
    r"""What stands in the reply's last \boxed{...}, None where there is none.

    >>> marked_text(r"so \boxed{9{,}500} from 2 markets")
    '9{,}500'
    """
    boxes = list(_BOXED.finditer(reply))
    if not boxes:
        return None
    start = at = boxes[-1].end()
    depth = 1
    while at < len(reply) and depth:
        depth += {"{": 1, "}": -1}.get(reply[at], 0)
        at += 1
    return reply[start : at - 1 if not depth else at]


def final_number(reply: str) -> Decimal | None:
    r"""The number that the reply gives as its answer: behind the last `####`, else in the last \boxed{...}, else the
    last of all. A heading ("#### 2. Money", with numbers below it) is no such mark.

    >>> [str(final_number(r)) for r in ("#### 72 of 80", r"\boxed{18} from 2", "#### 1. Eggs\n9*2 = 18", "no")]
    ['72', '18', '18', 'None']
    """
    answer = answer_of(reply)
    text = _plain_numbers(answer)
    for mark in reversed(list(_MARK.finditer(text))):
        found = _NUMBER.match(text, mark.end())
        below = text[mark.end() :].partition("\n")[2]
        if found and not (_HEADING.match(text, mark.start()) and _NUMBER.search(below)):
            return _value(found)
    boxed = marked_text(answer)
    numbers = (numbers_in(boxed) if boxed else []) or numbers_in(text)
    return numbers[-1] if numbers else None


def same_number(reply: str, answer: str) -> bool:
    """The reply's answer has the value of the answer's last number: "so 72.00%" is 72."""
    return final_number(reply) in numbers_in(answer)[-1:]
