"""IFEval: prompts whose instructions code can verify (Zhou et al. 2023, arXiv 2311.07911). For evaluation only.

Four accuracies, as published: by prompt (every instruction followed) or by instruction (all rows' instructions in one
pool), strict (the reply as it is) or loose (any of eight variants of it: with and without its first line, its last
line, its asterisks). The score is the strict one by prompt.

An instruction we cannot check (its id is unknown, or it needs the package langdetect and that is absent) counts as not
followed, in all four: they are then lower bounds, and `unsupported` says how many instructions they lack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from sftflow.foundation.errors import SchemaError
from sftflow.tasks.ifeval_checks import CHECKS, is_supported, wrong_argument
from sftflow.tasks.ifeval_text import language_package
from sftflow.tasks.task import Item, Task, make_item, rows_of, sample, text_of

SHAPE = '{"prompt": ..., "instruction_id_list": ["punctuation:no_comma", ...], "kwargs": [{}, ...]}'


class IFEval(Task):
    """Rows `{"key", "prompt", "instruction_id_list", "kwargs"}` of the published file, or of a hub set like it."""

    name = "ifeval"
    max_new_tokens = 1280  # as published scores are made; one prompt asks for more, 1,200 words
    plain_paragraph = False  # replies of several paragraphs are asked for, and graded as published

    def items(self, split: str = "test") -> list[Item]:
        return sample(self, (self._item(row, place) for place, row in rows_of(self, split)))

    def grade(self, item: Item, reply: str) -> float:
        """1.0 where every instruction is followed by the reply as it is."""
        return float(all(follows(i["id"], i["kwargs"], [reply]) for i in item.answer))

    def details(self, item: Item, reply: str) -> dict[str, Any]:
        """Every instruction's verdicts, and both of the prompt's.

        {"prompt_strict": 0.0, "prompt_loose": 1.0, "unsupported": [],
         "instructions": [{"id": "startend:quotation", "strict": False, "loose": True}]}
        """
        variants = loose_variants(reply)
        found = []
        for wanted in item.answer:
            name, given = wanted["id"], wanted["kwargs"]
            strict = follows(name, given, [reply])
            found.append({"id": name, "strict": strict, "loose": strict or follows(name, given, variants)})
        return {
            "prompt_strict": float(all(i["strict"] for i in found)),
            "prompt_loose": float(all(i["loose"] for i in found)),
            "instructions": found,
            "unsupported": [i["id"] for i in found if not is_supported(i["id"])],
        }

    def provenance(self) -> dict[str, str]:
        return {"langdetect": version("langdetect") if language_package() else "absent"}

    def metrics(self, details: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
        """The four accuracies, and the number of instructions that could not be checked."""
        if not details:
            return {}
        n, pool = len(details), [i for row in details for i in row["instructions"]]
        return {
            "prompt_strict": sum(row["prompt_strict"] for row in details) / n,
            "prompt_loose": sum(row["prompt_loose"] for row in details) / n,
            "instruction_strict": sum(i["strict"] for i in pool) / len(pool),
            "instruction_loose": sum(i["loose"] for i in pool) / len(pool),
            "unsupported": sum(len(row["unsupported"]) for row in details),
        }

    def _item(self, row: Any, place: str) -> Item:
        prompt = text_of(row, "prompt", place, SHAPE)
        return make_item(self.id_of(place), prompt, instructions_of(row, place))


def instructions_of(row: Any, place: str) -> list[dict[str, Any]]:
    """The row's instructions with their arguments; null ones (hub sets write every key) are left out.

    ["punctuation:no_comma"], [{"num_words": null}]  ->  [{"id": "punctuation:no_comma", "kwargs": {}}]
    """
    names, given = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise SchemaError(place, "no list of texts under 'instruction_id_list'", f"write {SHAPE}")
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise SchemaError(place, "no list of objects under 'kwargs'", f"write {SHAPE}")
    if len(names) != len(given):
        fact = f"{len(names)} instructions but {len(given)} kwargs"
        raise SchemaError(place, fact, "give every instruction one object")
    out = []
    for name, one in zip(names, given, strict=True):
        kwargs = {k: v for k, v in one.items() if v is not None}
        wrong = wrong_argument(name, kwargs) if name in CHECKS else None
        if wrong:
            raise SchemaError(place, wrong, "correct its kwargs")
        out.append({"id": name, "kwargs": kwargs})
    return out


def follows(name: str, kwargs: Mapping[str, Any], replies: Sequence[str]) -> bool:
    """Whether one of the replies follows the instruction. A blank reply follows none."""
    return is_supported(name) and any(CHECKS[name](reply, **kwargs) for reply in replies if reply.strip())


def loose_variants(reply: str) -> list[str]:
    """The reply, and what is left of it without its first line, its last line, both; each also without asterisks.

    >>> loose_variants("Sure:\\n*Hi*\\nBye")
    ['Sure:\\n*Hi*\\nBye', '*Hi*\\nBye', 'Sure:\\n*Hi*', '*Hi*', 'Sure:\\nHi\\nBye', 'Hi\\nBye', 'Sure:\\nHi', 'Hi']
    """
    lines = reply.split("\n")
    cut = [reply, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(text.replace("*", "") for text in cut)]
