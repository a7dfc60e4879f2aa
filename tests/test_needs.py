"""`sftflow data`: what a recipe needs, what of it is there, and how to get the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.runs import error_line, run

ROWS = "".join(json.dumps({"prompt": f"ask {i}", "completion": "tell"}) + "\n" for i in range(7))


@pytest.fixture(autouse=True)
def own_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "hf"


def told(folder: Path, recipe: dict[str, Any], *more: str) -> tuple[int, dict[str, dict[str, Any]]]:
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    done = run("data", "recipe.yaml", "--json", *more, cwd=folder)
    found = json.loads(done.stdout)
    assert found["missing"] == sum(not need["there"] for need in found["needs"])
    return done.returncode, {f"{need['what']} {need['name']}": need for need in found["needs"]}


def test_everything_that_a_recipe_names_is_looked_for(tmp_path: Path, own_hub: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(ROWS)
    pq.write_table(pa.table({"prompt": ["a"] * 5, "completion": ["b"] * 5}), tmp_path / "table.parquet")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    recipe: dict[str, Any] = {
        "base": "./base",
        "mixture": [
            {"source": "mine.jsonl"},
            {"source": "table.parquet"},
            {"source": "gsm8k", "path": "data/train.jsonl", "repeat": 4},
            {"source": "hub:HuggingFaceTB/smol-smoltalk:train", "name": "smoltalk"},
            {"source": "other.jsonl", "published": "https://example.org/a/other.jsonl"},
            {"source": "more.jsonl", "published": "page 7 of the handbook"},
            {"source": "spelling"},
        ],
        "validation": {"files": ["held.csv"], "share": 0.1},
        "eval": {"tasks": ["gsm8k=data/test.jsonl", "arithmetic"]},
        "compare": {"prompts": "prompts.jsonl"},
    }
    code, needs = told(tmp_path, recipe)
    assert code == 1
    there = {key for key, need in needs.items() if need["there"]}
    assert there == {"base base", "mixture mine", "mixture table", "mixture spelling", "evaluation arithmetic"}
    assert (needs["mixture mine"]["rows"], needs["mixture mine"]["bytes"]) == (7, len(ROWS))
    assert needs["mixture table"]["rows"] == 5 and needs["base base"]["bytes"] == 2
    assert needs["mixture gsm8k"]["get"] == (
        "curl -fL --create-dirs -o data/train.jsonl "
        "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/train.jsonl"
    )
    assert needs["evaluation gsm8k"]["get"].endswith("/test.jsonl") and needs["mixture gsm8k"]["licence"] == "MIT"
    assert needs["mixture smoltalk"]["get"] == "hf download --repo-type dataset HuggingFaceTB/smol-smoltalk"
    assert needs["mixture other"]["get"] == ("curl -fL --create-dirs -o other.jsonl https://example.org/a/other.jsonl")
    assert needs["mixture more"]["get"] == "page 7 of the handbook"
    assert needs["validation held"]["get"] == "give a file of rows"
    assert needs["prompts prompts"]["get"] == "give a file of prompts"

    for name in ("data/train.jsonl", "data/test.jsonl", "other.jsonl", "more.jsonl", "prompts.jsonl", "held.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(ROWS)
    (own_hub / "hub" / "datasets--HuggingFaceTB--smol-smoltalk" / "snapshots" / "abc").mkdir(parents=True)
    code, needs = told(tmp_path, recipe)
    assert code == 0 and all(need["there"] and need["get"] is None for need in needs.values())


def test_a_base_of_the_hub(tmp_path: Path, own_hub: Path) -> None:
    recipe = {"base": "Qwen/Qwen3-0.6B@main", "mixture": [{"source": "spelling"}]}
    code, needs = told(tmp_path, recipe)
    assert code == 1 and needs["base Qwen/Qwen3-0.6B@main"]["get"] == "hf download Qwen/Qwen3-0.6B --revision main"
    snapshot = own_hub / "hub" / "models--Qwen--Qwen3-0.6B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert told(tmp_path, recipe)[0] == 0
    assert told(tmp_path, recipe, "--set", "base=builtin:tiny")[0] == 0
    assert told(tmp_path, recipe, "--set", "base=./nowhere")[1]["base nowhere"]["there"] is False


def test_the_table_fits_and_a_wrong_name_is_one_line(tmp_path: Path) -> None:
    done = run("data", "builtin:picollm_mixture", cwd=tmp_path)
    table, _, rest = done.stdout.partition("\n\n")
    assert done.returncode == 1 and max(map(len, table.splitlines())) <= 80
    assert rest.count("is not there") == 13 and "curl -fL --create-dirs -o data/gsm8k/train.jsonl https://" in rest
    assert run("data", "builtin:demo", cwd=tmp_path).returncode == 0
    assert "known: builtin:demo, builtin:picollm_mixture" in error_line(run("data", "builtin:nope"))
    (tmp_path / "r.yaml").write_text('{"mixture": [{"source": "spelling"}], "eval": {"tasks": ["gsm9k=x.jsonl"]}}')
    assert "unknown task 'gsm9k'; did you mean 'gsm8k'?" in error_line(run("data", "r.yaml", cwd=tmp_path))
    (tmp_path / "r.yaml").write_text('{"mixture": [{"source": "speling"}]}')
    assert "r.yaml:1: mixture.0.source: unknown task 'speling'" in error_line(run("data", "r.yaml", cwd=tmp_path))


def test_no_library_of_models_is_imported() -> None:
    code = "import sys; from sftflow.cli import main; sys.argv = ['sftflow', 'data', 'builtin:demo']\n"
    code += "try: main()\nexcept SystemExit: print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
