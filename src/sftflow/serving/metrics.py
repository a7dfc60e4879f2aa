"""`/metrics`: what Prometheus reads, in its text format (version 0.0.4).

Labels are route patterns, status codes and served models: never a path or a text that a client chose.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sftflow.serving.engine_thread import EngineThread

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

Labels = Mapping[str, object]


def _labels(labels: Labels) -> str:
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

    def lines(self, name: str, labels: Labels) -> list[str]:
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

    def text(self, threads: Mapping[str, EngineThread]) -> str:
        """The whole answer. threads: by the names of their models."""
        out: list[str] = []

        def family(name: str, kind: str, about: str, values: Iterable[tuple[Labels, int | Histogram]]) -> None:
            out.extend([f"# HELP {name} {about}", f"# TYPE {name} {kind}"])
            for labels, value in values:
                if isinstance(value, Histogram):
                    out.extend(value.lines(name, labels))
                else:
                    out.append(f"{name}{_labels(labels)} {value}")

        def each(count: Callable[[EngineThread], int]) -> list[tuple[Labels, int]]:
            return [({"model": name}, count(thread)) for name, thread in threads.items()]

        requests = [({"route": r, "status": s}, n) for (r, s), n in sorted(self.requests.items())]
        family("sftflow_requests_total", "counter", "HTTP requests answered, by route and status.", requests)
        family("sftflow_prompt_tokens_total", "counter", "Prompt tokens read.", each(lambda t: t.prompt_tokens))
        family("sftflow_generated_tokens_total", "counter", "Tokens generated.", each(lambda t: t.generated_tokens))
        family("sftflow_replies_running", "gauge", "Replies being generated.", each(lambda t: t.running))
        family("sftflow_replies_waiting", "gauge", "Replies waiting for a slot.", each(lambda t: t.waiting))
        ended = [({"model": m, "ended": how}, n) for m, t in threads.items() for how, n in sorted(t.finished.items())]
        family("sftflow_replies_total", "counter", "Replies ended, by how.", ended)
        about = "From a streamed request's arrival to its first text."
        first_tokens = [({"model": name}, found) for name, found in self.first_tokens.items()]
        family("sftflow_time_to_first_token_seconds", "histogram", about, first_tokens)
        about = "From the request's arrival to the end of its answer."
        durations = [({"route": route}, found) for route, found in sorted(self.durations.items())]
        family("sftflow_request_duration_seconds", "histogram", about, durations)
        return "\n".join(out) + "\n"
