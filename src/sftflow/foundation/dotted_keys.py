"""Keys as one types them: `train.steps`, `mixture.0.limit`."""

from __future__ import annotations

import copy
import re
from typing import Any

from sftflow.foundation.errors import RecipeError


def set_key(data: Any, key: str, value: Any, place: str) -> None:
    """Set what stands at a dotted key of a mapping: names of keys, and of a list's entries their numbers from 0.

    Raises RecipeError, at `place`, where a list has no such entry, or there is neither a list nor a mapping on the way.

    >>> recipe = {"mixture": [{"source": "spelling"}]}
    >>> set_key(recipe, "mixture.0.limit", 5, "--set mixture.0.limit=5")
    >>> recipe
    {'mixture': [{'source': 'spelling', 'limit': 5}]}
    """
    if (dotted := re.sub(r"\.?\[(\d+)\]", r".\1", key)) != key:
        raise RecipeError(place, "an entry's number stands behind a dot", f"write {dotted}=...")
    steps = key.split(".")
    for number, step in enumerate(steps, 1):
        here = ".".join(steps[: number - 1])
        if isinstance(data, list):
            at: Any = int(step) if re.fullmatch("0|[1-9][0-9]{0,8}", step) else len(data)
            if at >= len(data):
                fact = f"{here} has {len(data)} entr{'y' if len(data) == 1 else 'ies'}, and {step} is none of them"
                more = f"another goes into the whole list, {here}=[...]"
                remedy = f"the first is {here}.0; {more}" if data else f"write the whole list: {here}=[...]"
                raise RecipeError(place, fact, remedy)
        elif isinstance(data, dict):
            at = step
        else:
            raise RecipeError(place, f"{here!r} holds no keys", "check the key")
        if number == len(steps):
            data[at] = value
        else:  # what is changed is a copy: an alias in the YAML, and the caller's own, stay as they are
            inner = data[at] if isinstance(data, list) else data.get(at)
            absent: Any = [] if re.fullmatch("-?[0-9]+", steps[number]) else {}
            data[at] = absent if inner is None else copy.copy(inner)
            data = data[at]
