"""The answer in a reply, as every grader reads it: reasoning set aside first, one writing for what is written in many
ways, numbers compared as numbers.

    answer_of("<think>20?</think>It is 18.")          "It is 18."
    same_text("It’s", "it's")                         True
    final_number("So \\boxed{9{,}500} from 2 markets")   Decimal("9500")

Gradings that others define (lm-evaluation-harness, IFEval) do not come through here.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

from sftflow.chat.thoughts import CLOSES, OPENS

_BARE = r"(?<![\"'`])(?:{})(?![\"'`])"  # a tag between quotes or backticks is spoken of
_OPEN = re.compile(_BARE.format(OPENS), re.I)
_CLOSE = re.compile(_BARE.format(CLOSES), re.I)

# What is written in several ways -> the way it is compared in.
_DASHES, _SINGLE, _DOUBLE = "‐‑‒–—―−﹘﹣", "‘’‚‛‹›´ʼ", "“”„‟«»「」『』《》〈〉"
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
# A character of a word, but for scripts without blanks between words; and Hangul, whose particles join the word.
WORD = (
    r"[^\W\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
    r"\U00020000-\U0003ffff]"
)
_GROUPED = rf"\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d{{1,2}}(?:,\d{{2}})+,\d{{3}}(?!\d)|\d{{1,3}}(?:[{_THIN}']\d{{3}})+(?!\d)"
_NUMBER = re.compile(
    rf"((?<!{WORD})(?<![.)\]}}%])-[{_MONEY}]?|(?<!{WORD})[{_MONEY}]-)?"
    rf"((?:{_GROUPED}|\d+)(?:\.\d+)?|(?<!{WORD})(?<!\.)\.\d+)(?:[eE]([-+]?\d{{1,4}})(?!\w))?"
)
_SIGN = re.compile(  # with a blank behind it: a hyphen after = or ( and the like, a minus or dash also after a word
    rf"(?:([=:(\[{{$≈~<>,;]\s?)-|(^|[^\W\d_]\s)[\u2212\u2013])(?:\s|\\[,;: ]){{0,3}}(?=[{_MONEY}]?\s?\.?\d)", re.M
)
_FRACTION = re.compile(
    r"(?:(?<!\d)(\d{1,9}))?\s?(?:\\[dt]?frac\s?\{(\d{1,9})\}\s?\{(\d{1,9})\}|([¼½¾⅐-⅞]))"
    r"|(?<![\w./,])(?:(\d{1,9}) )?(\d{1,9}) ?/ ?(\d{1,9})(?![\d/]|\.\d)"
)
_DOTTED = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{3}){2,}(?!\.?\d)")
_MARK = re.compile(rf"####\s*(?i:(?:final )?answer(?: is)?:?\s*)?(?:\*\*|\\boxed\{{|\\\(|[{_MONEY}](?!-))*")
_HEADING = re.compile(r"####\s*\d+\s*[.):]\s*[^\W\d]")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{|<answer>", re.I)


# ---- reasoning


def answer_of(reply: str) -> str:
    r"""The reply without its reasoning: what a person is told. "" where the reasoning did not come to its end.

    Where the prompt opened the block, the reply has its end only; all in front of that is reasoning.

    >>> [answer_of(r) for r in ("<think>20?</think>\n\n18", "20?</think>18", "<think>20?", "18")]
    ['18', '18', '', '18']
    """
    answer = reply
    while (opened := _OPEN.search(answer)) and (closed := _CLOSE.search(answer, opened.end())):
        answer = answer[: opened.start()] + answer[closed.end() :]
    answer = answer[max((m.end() for m in _CLOSE.finditer(answer)), default=0) :]
    answer = "" if _OPEN.match(answer.lstrip()) else answer
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
    """Folded, without quotes, asterisks, underscores or backticks around, and without a final . or !

    >>> bare(' "A  Wren." ')
    'a wren'
    """
    plain = folded(text)
    return plain.strip("\"'*_`").rstrip(".!").strip("\"'*_` ") or plain


def same_text(reply: str, answer: str) -> bool:
    r""" "A wren." is "a wren", and so is what ends on \boxed{a wren}; "It is a wren" is not."""
    said = answer_of(reply)
    return bare(answer) in (bare(said), bare(marked_text(said) or said))


def holds_text(reply: str, answer: str) -> bool:
    """The answer stands in the reply as whole words: "no" is in "No, 3." but not in "I know". Where a script puts no
    blanks between words, any place is one: 猫 is in それは猫です. A number is one of the reply's numbers."""
    if is_number(answer):
        return numbers_in(answer)[-1] in numbers_in(answer_of(reply))
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
    inner = unicodedata.category(left).startswith("M") or re.match(WORD, left)
    return bool(inner and re.match(f"{WORD}|[+#]", right))  # C is not in C++


# ---- numbers


def numbers_in(text: str) -> list[Decimal]:
    r"""Every number, whatever its thousands are parted by, without units.

    A minus is a sign where it does not follow a word, a number or a closing bracket: 7-8 are 7 and 8.

    >>> [str(n) for n in numbers_in(r"-$1,080.50, 7-8, .5, 20%, x=−3, 9{,}500, 1.2e-3 and 3 \times 10^8")]
    ['-1080.50', '7', '8', '0.5', '20', '-3', '9500', '0.0012', '3E+8']
    """
    return [_value(found) for found in _NUMBER.finditer(_plain_numbers(text))]


def _plain_numbers(text: str) -> str:
    """What LaTeX and prose write in ways of their own, as _NUMBER reads it: thousands, dollars, signs with a blank
    behind them, fractions, powers of ten."""
    text = re.sub(r"(?<=[-\u2212])\\[,;:!]", "", text.replace("{-}", "-"))
    text = _SIGN.sub(lambda m: (m[1] or m[2] or "") + "-", text)
    text = one_writing(text).replace("{,}", ",").replace(r"\$", "$").replace(r"\!", "")
    text = re.sub(r"(?<=\d)(?:\\[,;: ]|~)(?=\d{3})", "\u2009", text)
    text = _DOTTED.sub(lambda m: m[0].replace(".", ""), text)
    text = _ALONE.sub(lambda m: "1" + _exponent(m), _TIMES_POWER.sub(_exponent, text))
    return _FRACTION.sub(_quotient, _OF_A_UNIT.sub("", text))


def _quotient(found: re.Match[str]) -> str:
    """A fraction, and the whole number in front of it, as a decimal."""
    whole, above, below, sign = found[1] or found[5] or "0", found[2] or found[6], found[3] or found[7], found[4]
    if below is not None and not int(below):
        return found[0]
    part = Decimal(above) / Decimal(below) if below else Decimal(str(unicodedata.numeric(sign)))
    return f"{Decimal(whole) + part:f}"


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
    r"""What stands in the reply's last \boxed{...} or <answer>...</answer>, None where there is none.

    >>> marked_text(r"so \boxed{9{,}500} from 2 markets")
    '9{,}500'
    """
    boxes = list(_BOXED.finditer(reply))
    if not boxes:
        return None
    start = at = boxes[-1].end()
    if boxes[-1][0].startswith("<"):
        return re.split("</answer>", reply[start:], maxsplit=1, flags=re.I)[0]
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
    numbers = (numbers_in(f"={boxed}") if boxed else []) or numbers_in(answer)
    return numbers[-1] if numbers else None


def same_number(reply: str, answer: str) -> bool:
    """The reply's answer has the value of the answer's last number: "so 72.00%" is 72."""
    return final_number(reply) in numbers_in(answer)[-1:]
