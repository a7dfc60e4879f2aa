"""YAML as recipes are written in it: a key is text, and stands once in its mapping."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.composer import ComposerError


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises YAMLError, also for a key that comes twice, of which YAML's own reader takes the
    last; and like that one ValueError and others for a date of no calendar.

    >>> parse_yaml("on: {5: yes}")
    {'on': {'5': True}}
    """
    return yaml.load(text, Loader=_Loader)


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
