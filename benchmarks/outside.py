"""Where the benchmarks find public data sets, tokenizers and templates: in the folder that SFTFLOW_TEST_DATA names."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def data_path(text: str) -> Path:
    """An argument's path, environment variables filled in: `$SFTFLOW_TEST_DATA/gsm8k/test.jsonl`."""
    path = os.path.expandvars(text)
    if "$" in path:
        raise argparse.ArgumentTypeError(f"{text}: the variable is not set; give a path, or see CONTRIBUTING.md")
    return Path(path)
