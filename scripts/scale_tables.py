"""The arithmetic of docs/scale.md: memory, traffic and time of models and machines that were not at hand.

    python scripts/scale_tables.py        # prints the tables as they stand there (a test compares)

Nothing here is measured but `ACTIVATION`. Formulas stand beside what they give; 1 GiB is 2**30 bytes, 1 GB is 1e9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

GIB = 2**30
DEVICE_GIB, PEAK, MFU = 80, 989e12, 0.4  # an H100's memory and bf16 products a second, and the share that is reached
ROOM = 0.9  # the share of a device's memory that may be filled
NVLINK, NETWORK = 450e9, 50e9  # bytes a second that a GPU sends: to those of its node, to others (400 Gbit/s a GPU)
TOKENS, SUPERVISED = 131_072, 0.25  # tokens_per_step, and the share of them that is supervised
MICRO = 4096  # micro_tokens
RANK = 16  # of LoRA, on every matrix of the layers
ACTIVATION = 40  # bytes a token, layer and unit of width that the backward pass keeps: 0.7 MB a token in a 135M model
LOGITS = 3 * 4 * 2**24  # a chunk of them, their exponentials and their gradient, in fp32


class Shape(NamedTuple):
    """Sizes of a Llama: layers, width, width of keys and values, of the feed-forward, vocabulary."""

    layers: int
    width: int
    kv: int
    feed: int
    vocab: int
    tied: bool

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of a layer's: query, key, value, output, gate, up, down."""
        d, k, f = self.width, self.kv, self.feed
        return [(d, d), (k, d), (k, d), (d, d), (f, d), (f, d), (d, f)]

    @property
    def body(self) -> int:
        """Parameters in the layers' matrices."""
        return self.layers * sum(a * b for a, b in self.matrices)

    @property
    def head(self) -> int:
        return self.vocab * self.width

    @property
    def parameters(self) -> int:
        norms = (2 * self.layers + 1) * self.width
        return self.body + (1 if self.tied else 2) * self.head + norms

    @property
    def adapter(self) -> int:
        """Parameters of LoRA: (out, r) and (r, in) beside each matrix."""
        return self.layers * sum(RANK * (a + b) for a, b in self.matrices)


MODELS = {
    "1B": Shape(16, 2048, 512, 8192, 128_256, True),  # Llama 3.2 1B
    "8B": Shape(32, 4096, 1024, 14_336, 128_256, False),  # Llama 3.1 8B
    "70B": Shape(80, 8192, 1024, 28_672, 128_256, False),  # Llama 3.1 70B
}


@dataclass(frozen=True)
class Setup:
    """How a model is trained: on so many ranks, in bf16, each with the whole or a shard of it."""

    model: str
    ranks: int
    sharded: bool
    lora: bool
    optimizer_bytes: float = 8.0

    @property
    def shape(self) -> Shape:
        return MODELS[self.model]

    @property
    def checkpointing(self) -> bool:
        return self.model != "1B"

    def states(self) -> float:
        """Bytes a rank: of what is trained fp32 weights (4), gradients (4) and moments (8, or 2.04 in 8 bits). Of
        LoRA: the frozen matrices of the layers in bf16 (2), embedding and head in fp32 (4); these two and the adapter
        are whole on each rank."""
        s, trained = self.shape, 8 + self.optimizer_bytes
        shards = self.ranks if self.sharded else 1
        if self.lora:
            return 2 * s.body / shards + 4 * (s.parameters - s.body) + trained * s.adapter
        return trained * s.parameters / shards

    def working(self) -> float:
        """Bytes a rank: bf16 copies of what products run on (2); of a sharded model what is whole at a time: one layer
        (bf16 weights 2, their gradient 2, fp32 to be summed 4), and the embedding or the head (fp32 weights 4, gradient
        4, what is summed 4)."""
        s = self.shape
        if self.lora:
            return 2 * s.head + (2 * s.body / s.layers if self.sharded else 0)
        return 8 * s.body / s.layers + 12 * s.head if self.sharded else 2 * (s.body + s.head)

    def activations(self) -> float:
        """Bytes a rank: `ACTIVATION` in each layer; with gradient checkpointing in one, and each layer's input (4)."""
        s = self.shape
        if self.checkpointing:
            return MICRO * s.width * (4 * s.layers + ACTIVATION)
        return MICRO * s.width * ACTIVATION * s.layers

    def memory(self) -> float:
        return self.states() + self.working() + self.activations() + LOGITS

    def traffic(self) -> float:
        """Bytes that a rank sends in a step, and receives."""
        s, share = self.shape, (self.ranks - 1) / self.ranks
        trained = s.adapter if self.lora else s.parameters
        if not self.sharded:
            return 2 * share * 4 * trained  # one all-reduce of the fp32 gradients
        passes = max(1, round(TOKENS / self.ranks / MICRO))
        if self.lora:
            return passes * share * 2 * 2 * s.body + 2 * share * 4 * trained
        gathered = 2 * 2 * s.body + 2 * 4 * s.head + 2 * s.head  # layers twice in bf16, embedding twice, head once
        return passes * share * (gathered + 4 * s.body + 2 * 4 * s.head)  # and gradients in fp32

    def flops(self) -> float:
        """Of a step: 6 a parameter and token, 4 where its gradient is not asked for, 2 more for checkpointing."""
        s, a = self.shape, 4 if self.lora else 6
        return TOKENS * ((a + 2 * self.checkpointing) * s.body + a * SUPERVISED * s.head)

    def computing(self) -> float:
        """Seconds of a step's products."""
        return self.flops() / (self.ranks * PEAK * MFU)

    def sending(self) -> float:
        """Seconds that a step's traffic takes by itself: nodes have eight GPUs."""
        return self.traffic() / (NVLINK if self.ranks <= 8 else NETWORK)

    def seconds(self) -> float:
        """Of a step, when nothing is sent while something is computed."""
        return self.computing() + self.sending()


SETUPS = [
    Setup("1B", 1, False, False),
    Setup("1B", 1, False, False, 2.04),
    Setup("1B", 8, False, False),
    Setup("1B", 1, False, True),
    Setup("8B", 1, False, True),
    Setup("8B", 8, False, True),
    Setup("8B", 1, False, False),
    Setup("8B", 8, True, False),
    Setup("8B", 16, True, False),
    Setup("70B", 8, True, True),
    Setup("70B", 16, True, True),
    Setup("70B", 8, True, False),
    Setup("70B", 16, True, False),
]


def table() -> str:
    """The table of docs/scale.md. hours: of 100 million tokens."""
    heads = ["model", "trained", "GPUs", "each has", "states", "working", "activations", "GiB in all", "sent, GB"]
    heads += ["computing, s", "sending, s", "steps a day", "hours"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|--:|---|" + "--:|" * 9]
    for s in SETUPS:
        trained = "LoRA" if s.lora else "all" if s.optimizer_bytes == 8 else "all, 8 bits"
        parts, whole = [s.states(), s.working(), s.activations() + LOGITS], s.memory() / GIB
        cells = [s.model, trained, str(s.ranks), "a shard" if s.sharded else "all"]
        told = "" if whole < ROOM * DEVICE_GIB else ", does not fit"
        cells += [f"{x / GIB:,.1f}" for x in parts] + [f"{whole:,.1f}{told}"]
        times = [s.traffic() / 1e9, s.computing(), s.sending()]
        cells += [f"{x:,.1f}" for x in times] + [f"{86_400 / s.seconds():,.0f}"]
        cells.append(f"{1e8 / TOKENS * s.seconds() / 3600:,.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
