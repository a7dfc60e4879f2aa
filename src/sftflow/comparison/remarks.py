"""What a reader of the score table must know beside it, in lines for a terminal."""

from __future__ import annotations

from sftflow.comparison.results import Comparison
from sftflow.evaluation.contamination import Overlap

SMALL_MODEL = 50_000_000


def remarks(comparison: Comparison) -> list[str]:
    """Continued SFT, forgetting, tasks that overlap with the training rows, a model too small to know much."""
    out = []
    if comparison.continued:
        out.append("the starting checkpoint was already instruction-tuned: this is continued SFT, not base versus SFT")
    plain = comparison.forgetting
    if plain.change is not None:
        text = f"plain text: {plain.base:.3f} -> {plain.sft:.3f} bits per byte ({plain.change:+.1%}"
        out.append(text + (", it forgot some of its reading)" if plain.forgot else ")"))
    for name, task in comparison.tasks.items():
        overlap = task.contamination
        if isinstance(overlap, Overlap) and overlap.contaminated:
            out.append(f"{name}: {overlap.contaminated} of {overlap.items} items share words with training rows")
    if comparison.n_parameters < SMALL_MODEL:
        out.append(
            f"a {comparison.n_parameters / 1e6:.1f}M-parameter model knows what it was taught; other questions get weak"
            " answers (the report shows some)"
        )
    return out
