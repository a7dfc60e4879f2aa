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
