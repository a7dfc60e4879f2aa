"""Whether a NaN or an infinity comes out of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sftflow.errors import RunError


@contextmanager
def finite_logits(model: Any, name: str) -> Iterator[None]:
    """Raises RunError when the model's logits hold a NaN or +inf: what it says then means nothing."""

    def look(module: Any, given: Any, out: Any) -> None:
        # The maximum is NaN where any of them is. -inf is allowed: some models rule ids out by it.
        if not bool(out.logits.amax().isfinite()):
            raise RunError(name, "the model's logits are not finite", "give another checkpoint")

    hook = model.register_forward_hook(look)
    try:
        yield
    finally:
        hook.remove()
