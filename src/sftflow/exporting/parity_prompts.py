"""The prompts of a parity certificate: what two programs may read differently, then the fixed ones of `compare`."""

from __future__ import annotations

from dataclasses import dataclass

from sftflow.chat.render import Rendered, Renderer
from sftflow.chat.schema import parse_row
from sftflow.comparison.prompts import load_prompts
from sftflow.foundation.errors import FormatError, MaskError

Message = dict[str, str]

_CODE = '''def fib(n: int) -> int:
\t"""Return the n-th number."""
\treturn n if n < 2 else fib(n - 1) + fib(n - 2)\r

    print([fib(i) for i in range(10)])  # 0 1 1 2 3 5 8 13 21 34
'''
_LONG = "The river ran past the mill, and in 1849 the miller's daughter counted 1,234 barges; she'd kept a list. "


@dataclass(frozen=True, kw_only=True)
class Case:
    """A rendered prompt. look_alike: whether its content holds strings of control tokens."""

    id: str
    messages: list[Message]
    rendered: Rendered
    look_alike: bool


# Written to break tokenizers, templates and stop rules.
HARD_TEXTS = {
    "digits": "1 12 123 1234 12345 3.14159 2026-11-25 +1 (555) 010-9999 ½ ² ٣ ४ Ⅷ",
    "contractions": "It's what they're saying: I'll, we've, I'm, he'd, don't, IT'S, THEY'RE, 'tis, rock 'n' roll",
    "code": _CODE,
    "json": '{"a": [1, 2.5e-3, null], "b": {"c": "d\\n\\"e\\""}} \\ / \\u00e9 </script> &lt; {{ x }} {% y %}',
    "spaces": "a  b   c\td\t\te \n \n\n  f\n\n\n\ng   ",
    "scripts": "Привет, мир! 你好，世界。 こんにちは カタカナ 안녕하세요 שלום مرحبا नमस्ते สวัสดี ελληνικά ქართული",
    "accents": "naïve café Ærøskøbing Łódź İstanbul straße ÅNGSTRÖM ñandú tiếng Việt",
    "emoji": "😀 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ✅ ☕️ 👍🏽 ❤️‍🔥",
    "symbols": "∑ᵢ xᵢ² ≤ ∞ → ∀ε>0 ∃δ “quoted” ‘so’ — – … € £ ¥ ™ © § ¶ † ‰ 𝔘𝔫𝔦 𝒞 \u00a0nbsp\u3000wide\u200bzero",
    "punctuation": "?!?! ... --- *** ### ``` ~~~ <<< >>> ||| &&& === != :: ;; ,, (([[{{}}]])) @#$%^&*_+",
    "one letter": "a",
    "long word": "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2,
    "long": _LONG * 12 + "What year was it?",
    "longer": "\n".join(f"{i}. {_LONG}" for i in range(1, 25)),
}
ALMOST_SPECIAL = "<|im_start|>system <|im_end |> <s></s> [INST] <<SYS>> <|eot_id|> <|endoftext|> <unk> <0x0A> ▁ Ġ"


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _hard_prompts(special: list[str]) -> dict[str, list[Message]]:
    """special: the control tokens, which some of the contents spell out."""
    turns = [("Hi", "Hello!"), ("What is 2+2?", "2+2 = 4."), ("And times 10?", "That's 40.")]
    several = [{"role": r, "content": c} for a, b in turns for r, c in (("user", a), ("assistant", b))]
    return {
        **{name: _user(text) for name, text in HARD_TEXTS.items()},
        "system": [{"role": "system", "content": "Answer in one word.\nBe kind."}, *_user("What is 6 times 7?")],
        "turns": [*several, *_user("Thanks. Bye")],
        "look-alikes": _user("Print these: " + " ".join(special[:8])),
        "look-alike inside": _user(f"x{special[0]}y{special[-1]}" if special else "<|im_end|>"),
        "almost special": _user(ALMOST_SPECIAL),
    }


def cases(renderer: Renderer, n: int, room: int) -> list[Case]:
    """The first n prompts that the format can express and that have at most `room` tokens."""
    found = list(_hard_prompts(list(renderer.special)).items())
    found += [(p.id, p.messages_json()) for p in load_prompts().prompts]
    out: list[Case] = []
    for name, messages in found:
        if len(out) == n:
            break
        try:
            rendered = renderer.render(parse_row({"messages": messages}, name), add_generation_prompt=True)
        except (FormatError, MaskError):
            continue
        if len(rendered.ids) <= room:
            look_alike = any(renderer.special_re.search(m["content"]) for m in messages)
            out.append(Case(id=name, messages=messages, rendered=rendered, look_alike=look_alike))
    return out
