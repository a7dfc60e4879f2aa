"""All that one model is asked, of several tasks, arms and prompt sets, in one run of its engine.

    askers -> whole batches, each of one model -> shared out over the ranks -> replies, side by side -> askers

A task alone ends in a tail: the few replies that run to the limit are generated side by side with nothing. Here
whatever is still to be asked of the same weights takes the free places.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from sftflow.checkpoint import Assistant
from sftflow.foundation.errors import RunError
from sftflow.generation.engine import Engine
from sftflow.generation.request import GenerationRequest, Reply

ROUNDS = 12
"""a batch has so many times the replies that run at once: the more, the smaller the share of its tail; the fewer, the
more ranks can take one"""
SMALL, MORE = 16 << 10, 4
"""bytes of keys and values a token (fp32, heads not shared) up to which so many times the usual replies run side by
side: there a step costs little more for many than for one"""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be asked.   replies: how many.   read: tokens of their prompts.   most: tokens they may have."""

    replies: int = 0
    read: int = 0
    most: int = 0

    @classmethod
    def of(cls, requests: Iterable[GenerationRequest]) -> Work:
        each = [(len(r.prompt_ids), r.max_new_tokens) for r in requests]
        return cls(replies=len(each), read=sum(n for n, _ in each), most=sum(n for _, n in each))

    def __add__(self, other: Work) -> Work:
        return Work(replies=self.replies + other.replies, read=self.read + other.read, most=self.most + other.most)


class Asker(Protocol):
    """Whoever wants replies of a model. name: in errors.   requests: all of them by its own numbers, also those whose
    replies are `known`: batches must not hang on these."""

    @property
    def assistant(self) -> Assistant: ...

    @property
    def name(self) -> str: ...

    @property
    def requests(self) -> Mapping[int, GenerationRequest]: ...

    @property
    def known(self) -> Collection[int]: ...

    def taking(self) -> AbstractContextManager[Callable[[int, Reply], None]]:
        """Gives what takes a reply by its number. All are taken in when the context is left."""
        ...

    def drain(self) -> list[Any]:
        """What came of the replies since it was last asked; travels to the other ranks."""
        ...

    def left(self) -> Work:
        """What is not known yet."""
        ...

    def take_in(self, drained: Any) -> None:
        """What some rank, this one or another, has drained."""
        ...


Batch = list[tuple[int, int]]
"""(number of an asker, number of its request), the dearest first"""


def batches_of(askers: Sequence[Asker]) -> list[Batch]:
    """The unknown requests in even batches that stay whole, whoever computes them.

    What runs side by side decides a reply's last bits, and at a near-tie the reply. So the batches hang on the requests
    alone, and neither on the number of processes nor on what is known already. Every batch has long and short ones.
    """
    wanted: dict[tuple[int, bool], Batch] = {}
    for number, asker in enumerate(askers):
        engine = asker.assistant.engine
        for i, request in asker.requests.items():
            # Beyond the model's limit rows are computed one by one: that is kept for those that need it.
            short = len(request.prompt_ids) + request.max_new_tokens <= engine.length_limit
            wanted.setdefault((id(engine), short), []).append((number, i))
    out: list[Batch] = []
    for all_ in wanted.values():
        order = sorted(all_, key=lambda key: _dearest_first(askers[key[0]].requests[key[1]]))
        n = -(-len(order) // (ROUNDS * running(askers[all_[0][0]].assistant.engine)))
        out += [order[k::n] for k in range(n)]
    asked = ([(number, i) for number, i in batch if i not in askers[number].known] for batch in out)
    return [batch for batch in asked if batch]


def running(engine: Engine) -> int:
    """Replies side by side. They hang on the model and not on the machine, as the batches do."""
    config = engine.model.config.get_text_config()
    per_token = 8 * getattr(config, "hidden_size", SMALL) * getattr(config, "num_hidden_layers", 1)
    return engine.max_running * (MORE if per_token <= SMALL else 1)


def _dearest_first(request: GenerationRequest) -> tuple[int, int]:
    return -request.max_new_tokens, -len(request.prompt_ids)


def cost_of(batch: Batch, askers: Sequence[Asker]) -> float:
    """Tokens at most."""
    work = Work.of(askers[number].requests[i] for number, i in batch)
    return float(work.read + work.most)


def generate(batch: Batch, askers: Sequence[Asker]) -> None:
    """Ask a batch, all of one model. Raises RunError where the model's logits are not finite."""
    requests = [askers[number].requests[i] for number, i in batch]
    who = list(dict.fromkeys(number for number, _ in batch))
    assistant = askers[who[0]].assistant
    with ExitStack() as stack:
        take = {number: stack.enter_context(askers[number].taking()) for number in who}
        # Found out before logits are looked at: it may try ways that give none.
        assistant.engine.decode_mode(max(len(r.prompt_ids) + r.max_new_tokens for r in requests))
        names = ", ".join(dict.fromkeys(askers[number].name for number in who))
        stack.enter_context(finite_logits(assistant.model, f"{assistant.name}: {names}"))
        assistant.engine.generate(
            requests, lambda k, reply: take[batch[k][0]](batch[k][1], reply), running=running(assistant.engine)
        )


@contextmanager
def finite_logits(model: Any, name: str) -> Iterator[None]:
    """Raises RunError when the model's logits hold a NaN or +inf: its replies mean nothing then."""

    def look(module: Any, given: Any, out: Any) -> None:
        # The maximum is NaN where any of them is. -inf is allowed: some models rule ids out by it.
        if not bool(out.logits.amax().isfinite()):
            raise RunError(name, "the model's logits are not finite", "give another checkpoint")

    hook = model.register_forward_hook(look)
    try:
        yield
    finally:
        hook.remove()
