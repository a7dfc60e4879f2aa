"""What the installed transformers makes of checkpoints, run as a program: `python older_reader.py OUT DIR...`

OUT: {"version": "4.57.6", DIR: {"ids": [ids of each text], "decoded": [...], "ends": ..., "logits": [[...], ...]}}.
logits: of the first model's forward pass over IDS, eager attention, fp32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

IDS = [(7 * i) % 250 + 3 for i in range(48)]
TEXTS = [
    "\n\n1. one\n\n20 two it's  345\n    6",
    "<|user_start|>Hi there.<|user_end|><|assistant_start|>4 x 12 = 48<|assistant_end|>",
    " naïve 東京 <think>x</think>\n",
    "",
]


def read(directory: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, info = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], (directory, info)
    with torch.no_grad():
        logits = model.float().eval()(torch.tensor([IDS])).logits[0]
    ids = [tokenizer(text).input_ids for text in TEXTS]
    messages = [{"role": "user", "content": "2 + 2"}]
    return {
        "ids": ids,
        "decoded": [tokenizer.decode(row) for row in ids],
        "template": tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
        "special": sorted(tokenizer.all_special_tokens),
        "inputs": sorted(tokenizer("a")),
        "ends": GenerationConfig.from_pretrained(directory).eos_token_id,
        "logits": logits.tolist(),
    }


if __name__ == "__main__":
    import transformers

    found = {directory: read(directory) for directory in sys.argv[2:]}
    Path(sys.argv[1]).write_text(json.dumps({"version": transformers.__version__, **found}), encoding="utf-8")
