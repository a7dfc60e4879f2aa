"""Two models tensor by tensor: the same shapes, and how far each kind of weights has moved."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Moved:
    """How far one kind of weights has moved, such as the query projections of all layers.

    shape: of one such tensor.   n: so many of them.   share: length of the difference over that of the weights before.
    """

    name: str
    shape: tuple[int, ...]
    n: int
    share: float


@dataclass(frozen=True, kw_only=True)
class WeightChange:
    """classes: of the model before and after.   added, removed: names of tensors that only one of them has.
    reshaped: those whose shape differs.   moved: of all others, by kind."""

    classes: tuple[str, str]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    reshaped: tuple[str, ...]
    moved: tuple[Moved, ...]

    @property
    def same_shapes(self) -> bool:
        """Whether both have the same tensors, of the same shapes."""
        return not (self.added or self.removed or self.reshaped)


def weight_change(before: Any, after: Any) -> WeightChange:
    """before, after: models of transformers. A kind is a tensor's name without the number of its layer."""
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    kinds: dict[str, list[str]] = {}
    for name in new:
        if name in old and old[name].shape == new[name].shape:
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    moved = []
    for kind, names in kinds.items():
        pairs = [(old[name].detach().cpu().double(), new[name].detach().cpu().double()) for name in names]
        was = sum(float(a.square().sum()) for a, _ in pairs)
        by = sum(float((b - a).square().sum()) for a, b in pairs)
        share = (by / was) ** 0.5 if was else float(by > 0)
        moved.append(Moved(name=kind, shape=tuple(pairs[0][1].shape), n=len(names), share=share))
    return WeightChange(
        classes=(type(before).__name__, type(after).__name__),
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
        reshaped=tuple(name for name in new if name in old and old[name].shape != new[name].shape),
        moved=tuple(moved),
    )
