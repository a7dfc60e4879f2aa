"""Where the public sets of the built-in tasks are to be had: said where a file is not there."""

_HUB = "https://huggingface.co/datasets"
_ARC = f"ARC-Easy or ARC-Challenge, a .parquet file of {_HUB}/allenai/ai2_arc"
PUBLISHED = {
    "gsm8k": "train.jsonl and test.jsonl of https://github.com/openai/grade-school-math (grade_school_math/data)",
    "mmlu": f"https://people.eecs.berkeley.edu/~hendrycks/data.tar, or a .parquet file of {_HUB}/cais/mmlu",
    "mmlu_pro": "hub:TIGER-Lab/MMLU-Pro:test, which may be named in place of the file",
    "arc": _ARC,
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "openbookqa": f"main, a .parquet file of {_HUB}/allenai/openbookqa",
    "boolq": "hub:google/boolq:train and hub:google/boolq:validation, which may be named in place of the file",
    "ifeval": "hub:google/IFEval:train, which may be named in place of the file",
    "humaneval": "HumanEval.jsonl.gz of https://github.com/openai/human-eval, or hub:openai/openai_humaneval:test",
    "smoltalk": f"a .parquet file of {_HUB}/HuggingFaceTB/smoltalk (data/all)",
}


def to_get(task: str) -> str:
    """The end of a remedy.   task: its name.

    >>> to_get("ifeval")
    '; it is published as hub:google/IFEval:train, which may be named in place of the file'
    >>> to_get("jsonl")
    ''
    """
    return f"; it is published as {PUBLISHED[task]}" if task in PUBLISHED else ""


_GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
_CAIS = f"{_HUB}/cais/mmlu/resolve/main/all"
ADDRESSES = {
    ("gsm8k", "train"): f"{_GSM8K}/train.jsonl",
    ("gsm8k", "test"): f"{_GSM8K}/test.jsonl",
    ("mmlu", "train"): f"{_CAIS}/auxiliary_train-00000-of-00001.parquet",
    ("mmlu", "test"): f"{_CAIS}/test-00000-of-00001.parquet",
    ("arc_easy", "train"): f"{_HUB}/allenai/ai2_arc/resolve/main/ARC-Easy/train-00000-of-00001.parquet",
    ("arc_easy", "test"): f"{_HUB}/allenai/ai2_arc/resolve/main/ARC-Easy/test-00000-of-00001.parquet",
    ("arc_challenge", "train"): f"{_HUB}/allenai/ai2_arc/resolve/main/ARC-Challenge/train-00000-of-00001.parquet",
    ("arc_challenge", "test"): f"{_HUB}/allenai/ai2_arc/resolve/main/ARC-Challenge/test-00000-of-00001.parquet",
    ("openbookqa", "train"): f"{_HUB}/allenai/openbookqa/resolve/main/main/train-00000-of-00001.parquet",
    ("openbookqa", "test"): f"{_HUB}/allenai/openbookqa/resolve/main/main/test-00000-of-00001.parquet",
    ("ifeval", "test"): f"{_HUB}/google/IFEval/resolve/main/ifeval_input_data.jsonl",
    ("humaneval", "test"): "https://github.com/openai/human-eval/raw/master/data/HumanEval.jsonl.gz",
}
"""of the file of a split (of MMLU's train: its auxiliary questions)"""
LICENCES = {
    "gsm8k": "MIT", "mmlu": "MIT", "arc": "CC-BY-SA-4.0", "arc_easy": "CC-BY-SA-4.0", "arc_challenge": "CC-BY-SA-4.0",
    "openbookqa": "Apache-2.0", "boolq": "CC-BY-SA-3.0", "ifeval": "Apache-2.0", "humaneval": "MIT",
    "smoltalk": "Apache-2.0", "HuggingFaceTB/smol-smoltalk": "Apache-2.0", "HuggingFaceTB/smoltalk": "Apache-2.0",
    "openai/gsm8k": "MIT", "cais/mmlu": "MIT", "google/IFEval": "Apache-2.0", "Montekkundan/llm": "MIT",
}  # fmt: skip
"""as their publishers state them, of tasks' sets, data sets of the hub, and repositories"""
