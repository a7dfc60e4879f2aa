"""What holding replies to a schema costs: the same greedy decoding with and without it, and the time to compile one.

    python benchmarks/structured.py [--model builtin:tiny] [--shape TOKENIZER] [--rows 1 8] [--tokens 128] [--rounds 3]

    sftflow          no constraint
    sftflow, held    a list of records without end: texts, numbers, a choice of words

Each reply has exactly `--tokens` tokens: none may end the turn in either way. Generated tokens a second, and CPU time a
token, prompts included; rounds alternate. `--shape` makes a random model of the shape of
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
from record import begin

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
    asked, record = begin(parser, "structured", small={"tokens": 64})
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
    compiled = f"in {1e3 * statistics.median(seconds[1:]):.1f} ms, the first in {seconds[0]:.2f} s"
    record.facts["a schema compiles"] = f"{compiled} ({size:,} ids)"
    chat = parse_row({"messages": [{"role": "user", "content": "Write a list of records as JSON."}]}, "benchmark")
    options: dict[str, Any] = {"max_tokens": asked.tokens, "stop_ids": frozenset(), "use_python": False}
    for rows in asked.rows:
        engine.generate([assistant.request(chat, grammar=grammar, **options)] * rows)  # warms up
        for _ in record.turns():
            for way in record.turned(["sftflow", "sftflow, held"]):
                request = assistant.request(chat, grammar=grammar if way.endswith("held") else None, **options)
                began, began_cpu = time.perf_counter(), time.process_time()
                tokens = sum(len(r.ids) for r in engine.generate([request] * rows))
                took, took_cpu = time.perf_counter() - began, time.process_time() - began_cpu
                values = {"tokens_per_second": tokens / took, "cpu_ms_per_token": 1000 * took_cpu / tokens}
                record.add(way, values, replies=rows)
    record.finish()


if __name__ == "__main__":
    main()
