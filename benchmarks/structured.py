"""What holding replies to a schema costs: the same greedy decoding with and without it, and the time to compile one.

    python benchmarks/structured.py [--model builtin:tiny] [--shape TOKENIZER] [--rows 1 8] [--tokens 128] [--rounds 3]

    free    no constraint
    held    a list of records without end: texts, numbers, a choice of words

Each reply has exactly `--tokens` tokens: none may end the turn in either way. Rounds alternate; printed are the medians
of generated tokens a second and a second of CPU time, prompts included. `--shape` makes a random model of the shape of
SmolLM2-135M with the tokenizer of a directory, in place of `--model`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from outside import data_path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "n": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["red", "green", "blue"]},
    },
    "required": ["name", "n", "kind"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": RECORD, "minItems": 10_000}


def of_shape(tokenizer: Path, directory: Path) -> str:
    """A random model of SmolLM2-135M's shape; the path of its checkpoint."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}assistant: "
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=-(-len(loaded) // 128) * 128, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    loaded.save_pretrained(directory)
    return str(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--shape", type=data_path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    from sftflow.chat.schema import parse_row
    from sftflow.checkpoint import load_assistant
    from sftflow.serving.structured import json_rule

    with tempfile.TemporaryDirectory() as folder:
        assistant = load_assistant(of_shape(asked.shape, Path(folder)) if asked.shape else asked.model)
    engine = assistant.engine
    seconds = []
    for n in range(9):  # the first one also reads the vocabulary
        schema = {**ENDLESS, "description": str(n)}
        began = time.perf_counter()
        grammar = engine.grammars.compile(f"start: {json_rule(schema)}")
        seconds.append(time.perf_counter() - began)
    size = assistant.model.get_input_embeddings().weight.shape[0]
    print(
        f"{size} ids; a schema compiles in {1e3 * statistics.median(seconds[1:]):.1f} ms, the first {seconds[0]:.2f} s"
    )
    chat = parse_row({"messages": [{"role": "user", "content": "Write a list of records as JSON."}]}, "benchmark")
    options: dict[str, Any] = {"max_tokens": asked.tokens, "stop_ids": frozenset(), "use_python": False}
    for rows in asked.rows:
        rates: dict[str, list[float]] = {"free": [], "held": []}
        rates_cpu: dict[str, list[float]] = {"free": [], "held": []}
        for n_round in range(asked.rounds + 1):
            for way in sorted(rates, reverse=bool(n_round % 2)):
                request = assistant.request(chat, grammar=grammar if way == "held" else None, **options)
                began, began_cpu = time.perf_counter(), time.process_time()
                replies = engine.generate([request] * rows)
                took, took_cpu = time.perf_counter() - began, time.process_time() - began_cpu
                if n_round:  # the first one warms up
                    rates[way].append(sum(len(r.ids) for r in replies) / took)
                    rates_cpu[way].append(sum(len(r.ids) for r in replies) / took_cpu)
        for what, measured in (("tokens/s", rates), ("tokens/s of CPU", rates_cpu)):
            print(rows, "rows,", what, {way: round(statistics.median(r), 1) for way, r in measured.items()})


if __name__ == "__main__":
    main()
