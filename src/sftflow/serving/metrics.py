"""`/metrics`: what Prometheus reads, in its text format (version 0.0.4).

Labels are route patterns, status codes and served models: never a path or a text that a client chose.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sftflow.serving.engine_thread import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


def _labels(labels: Mapping[str, object]) -> str:
    """
    >>> _labels({"route": "/health", "status": 200})
    '{route="/health",status="200"}'
    """
    escape = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    inside = ",".join(f'{name}="{str(value).translate(escape)}"' for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""


class Histogram:
    """Counts of observations below bounds, in seconds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(SECONDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str, labels: Mapping[str, object]) -> list[str]:
        out, below = [], 0
        for bound, count in zip((*SECONDS, "+Inf"), self.counts, strict=True):
            below += count
            out.append(f"{name}_bucket{_labels({**labels, 'le': bound})} {below}")
        return [*out, f"{name}_sum{_labels(labels)} {self.total:.6f}", f"{name}_count{_labels(labels)} {below}"]


class Metrics:
    """What has been answered since the server began. Used on the event loop only."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.durations: dict[str, Histogram] = {}
        self.first_tokens: dict[str, Histogram] = {}

    def answered(self, route: str, status: int, seconds: float) -> None:
        self.requests[route, status] += 1
        self.durations.setdefault(route, Histogram()).observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        self.first_tokens.setdefault(model, Histogram()).observe(seconds)

    def text(self, stats: Mapping[str, Stats]) -> str:
        """The whole answer. stats: by model."""
        out: list[str] = []

        def family(name: str, kind: str, help_text: str, lines: list[str]) -> None:
            out.extend([f"# HELP {name} {help_text}", f"# TYPE {name} {kind}", *lines])

        def per_model(name: str, field: str) -> list[str]:
            return [f"{name}{_labels({'model': m})} {getattr(s, field)}" for m, s in stats.items()]

        name = "sftflow_requests_total"
        lines = [f"{name}{_labels({'route': r, 'status': s})} {n}" for (r, s), n in sorted(self.requests.items())]
        family(name, "counter", "HTTP requests answered, by route and status.", lines)
        for name, kind, field, help_text in (
            ("sftflow_prompt_tokens_total", "counter", "prompt_tokens", "Prompt tokens read."),
            ("sftflow_generated_tokens_total", "counter", "generated_tokens", "Tokens generated."),
            ("sftflow_replies_running", "gauge", "running", "Replies being generated."),
            ("sftflow_replies_waiting", "gauge", "waiting", "Replies waiting for a slot."),
        ):
            family(name, kind, help_text, per_model(name, field))
        name = "sftflow_replies_total"
        lines = [
            f"{name}{_labels({'model': m, 'ended': ended})} {n}"
            for m, s in stats.items()
            for ended, n in sorted(s.finished.items())
        ]
        family(name, "counter", "Replies ended, by how.", lines)
        name = "sftflow_time_to_first_token_seconds"
        lines = [x for model, h in self.first_tokens.items() for x in h.lines(name, {"model": model})]
        family(name, "histogram", "From a streamed request's arrival to its first text.", lines)
        name = "sftflow_request_duration_seconds"
        lines = [x for route, h in sorted(self.durations.items()) for x in h.lines(name, {"route": route})]
        family(name, "histogram", "From the request's arrival to the end of its answer.", lines)
        return "\n".join(out) + "\n"
