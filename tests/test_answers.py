"""What graders read in a reply: reasoning set aside, one writing of texts, numbers by their value."""

from __future__ import annotations

import json
import unicodedata
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sftflow.tasks import GENERATED, Item, Task, TaskSource, make_task
from sftflow.tasks.answers import answer_of, final_number, numbers_in, same_number

NUMBERS = {
    # signs
    "It fell to \u221212.": "-12",
    "It fell to \u201312 degrees": "-12",
    "\ufe6312": "-12",
    "\uff0d\uff11\uff12": "-12",
    "\u2212$12.50": "-12.50",
    "$\u221212.50": "-12.50",
    "y=-12": "-12",
    "y-12": "12",
    "(4)-12": "12",
    "4%-12": "12",
    "5\u20136 days": "6",
    "from 5-6": "6",
    "20-8=12": "12",
    "- 12 pens": "12",
    "the answer\u201412": "12",
    "-0": "0",
    "x = - 12": "-12",
    "It is \u2212 12.": "-12",
    "10 - 12": "12",
    "10 \u2212 12": "12",
    r"\boxed{- 12}": "-12",
    r"-\,12": "-12",
    "{-}12": "-12",
    "\u7b54\u6848\u662f-12": "-12",
    "\u6e29\u5ea6\u306f\u221212\u5ea6": "-12",
    # thousands
    "4.250.600": "4250600",
    "1.2.3": "3",
    "4{,}250": "4250",
    r"$4\,250$": "4250",
    r"4,\!250": "4250",
    r"4\ 250": "4250",
    "4~250": "4250",
    "4\u00a0250 m": "4250",
    "4\u2009250\u2009600": "4250600",
    "4\u202f250,": "4250",
    "4'250": "4250",
    "4\u2019250.5": "4250.5",
    "4,250,600.75": "4250600.75",
    "3,45,600": "345600",
    "42,50": "50",
    "4,2506": "2506",
    "4 250": "250",
    "4\u00a025": "25",
    # other writings of a value
    "012": "12",
    ".25": "0.25",
    "-.25": "-0.25",
    "12.": "12",
    "12.00%": "12",
    "\u0661\u0662": "12",
    "\uff11\uff12\uff0e\uff15": "12.5",
    "6e3 J": "6000",
    "6E+3": "6000",
    "2.5e-4": "0.00025",
    "6each": "6",
    r"6 \times 10^{3}": "6000",
    "6×10³ J": "6000",
    "6·10⁻³": "0.006",
    "2.5*10^-4": "0.00025",
    "6 x 10^3": "6000",
    "10^6": "1000000",
    "an area of 12 m²": "12",
    "12 cm^3": "12",
    "6e99999": "99999",
    "3/4": "0.75",
    "1 1/2 cups": "1.5",
    "2\u00bd cups": "2.5",
    r"\boxed{\frac{1}{4}}": "0.25",
    r"2\dfrac{1}{2}": "2.5",
    "3/0": "0",
    "on 2/3/2024": "2024",
    # what is marked as the answer
    r"\fbox{12} from 3": "12",
    "<answer>12</answer> of 3": "12",
    r"It is $\boxed{12}$, of 3 boxes": "12",
    r"\boxed{\$12} and 3": "12",
    r"\boxed{\text{12 pens}} for 3": "12",
    r"\boxed{4{,}250}": "4250",
    r"\boxed{3}, no: \boxed{12} of 40": "12",
    r"\boxed{x} is 12": "12",
    r"\boxed{12": "12",
    "#### 12 of 40": "12",
    "#### $12": "12",
    "#### -$12": "-12",
    "#### **12** of 40": "12",
    r"#### \boxed{12} of 40": "12",
    "####\n12": "12",
    "#### .5 of 40": "0.5",
    "#### Answer: 12\n(of 40)": "12",
    "#### Final answer: **12** of 40": "12",
    "#### 12. That is 3 boxes.": "12",
    "#### 1. Boxes\n40\n#### 2) Pens\n3*4 = 12\nIt is 12.": "12",
    "#### 1: Boxes\n3*4\n#### 12\n": "12",
    "#### Step 2\n12": "12",
    # reasoning
    "<think>40?\n#### 40</think>\nIt is 12.": "12",
    "#### 40</think>12": "12",
    "<thinking>3</thinking> 12": "12",
    "<seed:think>3</seed:think>12": "12",
    "[THINK]3[/THINK]12": "12",
    "12 <think>or 3?</think>": "12",
    "<think>It is 12": "None",
    "<THINK>3</THINK>12": "12",
    "<|think|>3<|/think|>12": "12",
    "<analysis>3</analysis>12": "12",
    "I write <think> first: 12": "12",
    "It ends with `</think>`, so 12": "12",
    "none": "None",
    "": "None",
}


@pytest.mark.parametrize(("reply", "number"), NUMBERS.items())
def test_the_number_a_reply_gives(reply: str, number: str) -> None:
    assert final_number(reply) == (None if number == "None" else Decimal(number))


@given(
    st.decimals(-(10**12), 10**12, places=3), st.sampled_from([",", "{,}", r"\,", "\u00a0", "\u202f", "\u2009", "'"])
)
@example(Decimal("-0.000"), ",")
@example(Decimal("1234567.100"), "'")
def test_a_value_in_any_writing_is_that_value(value: Decimal, between: str) -> None:
    sign, digits = ("-" if value < 0 else ""), f"{abs(value):,}"
    grouped = digits.replace(",", between)
    for text in (f"{sign}{grouped}", f"\u2212{grouped}" if sign else grouped, f"so {sign}${grouped}.", f"{value:e}"):
        assert numbers_in(text) == [value], text
        assert same_number(f"<think>0</think>{text}", str(value))
    assert not same_number(f"{sign}{grouped}", str(value + 1))


def one(folder: Path, row: Any) -> tuple[Task, Item]:
    (folder / "own.jsonl").write_text(json.dumps({"question": "Well?", **row}) + "\n", encoding="utf-8")
    task = make_task("jsonl", TaskSource(path=str(folder / "own.jsonl")))
    return task, task.items()[0]


NFD = unicodedata.normalize("NFD", "Zoë Résumé")
TEXTS: list[tuple[str, str, str, bool]] = [
    ("exact", "Zoë Résumé", NFD, True),
    ("exact", NFD, "ZOË RÉSUMÉ.", True),
    ("exact", "don't", "Don\u2019t", True),
    ("exact", 'so "called"', "\u201cso \u201ccalled\u201d\u201d", True),
    ("exact", "well-known", "well\u2011known", True),
    ("exact", "ABC 12", "\uff21\uff22\uff23\u3000\uff11\uff12\u3002", True),
    ("exact", "wren", "w\u00adren\u200b", True),
    ("exact", "wren", "<think>a mole?</think>\n\nWren.", True),
    ("exact", "wren", "<think>wren", False),
    ("exact", "x²", "x2", False),
    ("contains", "犬", "これは犬です", True),
    ("contains", "北京", "首都是北京。", True),
    ("contains", "แมว", "นี่คือแมวครับ", True),
    ("contains", "서울", "서울입니다", True),
    ("contains", "wren", "これはwrenです", True),
    ("contains", "5", "これは15です", False),
    ("contains", "5", "これは5です", True),
    ("contains", "owl", "owls", False),
    ("contains", "owl", "fowl", False),
    ("contains", "cafe", unicodedata.normalize("NFD", "café"), False),
    ("contains", "कम", "काम कमाल", False),
    ("contains", "don't", "No, I don\u2019t.", True),
    ("contains", "owl", "<think>an owl?</think>a wren", False),
    ("contains", "5", "-5", False),
    ("contains", "3", "3.14", False),
    ("contains", "1000", "It is 1,000.", True),
    ("contains", "C", "C++ and C#", False),
    ("contains", "C", "C, of course", True),
    ("contains", "\u092e", "\u0915\u093e\u092e", False),
    ("exact", "\u5df4\u9ece", "\u300c\u5df4\u9ece\u300d\u3002", True),
    ("exact", "wren", "_wren_", True),
    ("exact", "wren", r"It is \boxed{wren}", True),
    ("exact", "wren", "<think>owl</think><answer>wren</answer>", True),
    ("regex", "it's", "It is: it\u2019s", True),
    ("regex", "it\u2019s", "it\u2019s", True),
    ("regex", "é$", unicodedata.normalize("NFD", "café"), True),
    ("regex", "owl", "<think>an owl?</think>a wren", False),
]


@pytest.mark.parametrize(("grader", "answer", "reply", "same"), TEXTS)
def test_texts(tmp_path: Path, grader: str, answer: str, reply: str, same: bool) -> None:
    task, item = one(tmp_path, {"answer": answer, "grader": grader})
    assert task.grade(item, reply) == float(same)


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("<think>A or B? B.</think>\n\nC", "C"),
        ("A? B?</think>C", "C"),
        ("<think>C", None),
        (r"A is wrong, so \boxed{C}", "C"),
        (r"\boxed{\text{C}}", "C"),
        ("\uff23", "C"),
        ("A\u2019s wrong: C", "C"),
        ("\u7b54\u6848\u662fC\u3002", "C"),
        ("\ub2f5\uc740 C\uc785\ub2c8\ub2e4", "C"),
        ("<answer>C</answer>, not A", "C"),
    ],
)
def test_letters(tmp_path: Path, reply: str, letter: str | None) -> None:
    task, item = one(tmp_path, {"answer": "C", "choices": ["x", "y", "z"]})
    assert task.grade(item, reply) == float(letter == "C")


@pytest.mark.parametrize("name", GENERATED)
def test_every_task_sets_reasoning_aside(name: str) -> None:
    task = make_task(name, TaskSource(limit=40))
    replies = {c.messages[:-1]: c.messages[-1].text for c in task.conversations("train")}
    asked = [(item, replies.get(item.messages, item.answer)) for item in task.items("train")]
    right = [(item, reply) for item, reply in asked if isinstance(reply, str)]
    assert right
    for item, reply in right:
        assert task.grade(item, reply) == task.grade(item, f"<think>\nno\n</think>\n\n{reply}") == 1
        assert task.grade(item, f"<think>\n{reply}\n</think>\n\nNo idea") == 0


def test_white_space_stays_unless_reasoning_was_in_front() -> None:
    assert answer_of("\n    return x") == "\n    return x"
    assert answer_of("<think>a</think>\n \n    return x") == "    return x"
