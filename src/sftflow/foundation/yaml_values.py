"""YAML as recipes are written in it: a key is text, and stands once in its mapping."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError

from sftflow.foundation.errors import RecipeError, first_line


def parse_yaml(text: str, place: str) -> Any:
    """What a recipe's file, or the value of a `--set`, holds.

    Raises RecipeError, which names the file's line, also for a key that comes twice, of which YAML's own reader takes
    the last.

    >>> parse_yaml("on: {5: yes}", "recipe.yaml")
    {'on': {'5': True}}
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:  # a date of no calendar
        problem = getattr(error, "problem", None) or first_line(error)
        if place.startswith("--set "):
            fact, remedy = f"the value is not YAML ({problem})", "mend it, or put it in quotes"
            raise RecipeError(place, fact, remedy) from None
        if isinstance(error, yaml.YAMLError):
            mark = getattr(error, "problem_mark", None)
            place += f":{mark.line + 1 if mark else text[: getattr(error, 'position', 0)].count(chr(10)) + 1}"
        of_data = re.search(r"\.(jsonl|ndjson|parquet|csv|arrow)(\.gz)?(:\d+)?$", place)
        remedy = "give a recipe, which names data files under mixture:" if of_data else "fix the line"
        raise RecipeError(place, f"not YAML ({problem})", remedy) from None


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> Any:
        node, lines = super().compose_mapping_node(anchor), dict[str, int]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":  # <<
                text, line = key.value, key.start_mark.line + 1
                if text in lines:
                    fact = f"the key {text} twice, first in line {lines[text]}"
                    raise ComposerError(None, None, fact, key.start_mark)
                key.tag, lines[text] = "tag:yaml.org,2002:str", line
        return node
