"""The command line from outside: one clear line and the right exit code for wrong input, nothing half-written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.runs import error_line, run
from sftflow.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]


def recipe(folder: Path, checkpoint: Path, **changes: Any) -> Path:
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    data: dict[str, Any] = {
        "base": str(checkpoint),
        "mixture": [{"source": "rows.jsonl"}],
        "train": {"out": str(folder / "run"), "max_length": 64, "tokens_per_step": 64, "steps": 1},
    }
    data.update(changes)
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(data))
    return path


def test_missing_file(tmp_path: Path, tiny_base: Path) -> None:
    line = error_line(run("render", "nowhere.jsonl", "--model", str(tiny_base), cwd=tmp_path))
    assert line.startswith("error: nowhere.jsonl: no such file; ")
    assert "no such recipe" in error_line(run("train", "nowhere.yaml", cwd=tmp_path))


def test_bad_json_line(tmp_path: Path, tiny_base: Path) -> None:
    path = recipe(tmp_path, tiny_base)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{bad\n')
    assert "rows.jsonl:2: not JSON" in error_line(run("train", str(path)))
    assert not (tmp_path / "run").exists()


def test_two_user_turns(tmp_path: Path, tiny_base: Path) -> None:
    path = recipe(tmp_path, tiny_base)
    row = {"messages": [{"role": "user", "content": "a"}] * 2 + [{"role": "assistant", "content": "b"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    line = error_line(run("train", str(path)))
    assert "rows.jsonl:1" in line and "two user turns in a row" in line
    assert not (tmp_path / "run").exists()
    shown = run("render", str(tmp_path / "rows.jsonl"), "--model", str(tiny_base))
    assert shown.returncode == 2 and "two user turns in a row" in shown.stderr


GOOD = json.dumps({"prompt": "é", "completion": "b"}, ensure_ascii=False)
UNASKED = json.dumps([{"role": "assistant", "content": "a"}])


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{oops", "rows.jsonl:2: not JSON"),
        (r'{"prompt": "\ud83d", "completion": "b"}', "rows.jsonl:2.prompt: a lone surrogate"),
        ('{"prompt": "a", "completion": ' + "[" * 200 + "]" * 200 + "}", "nested more than 100 deep"),
        (json.dumps([{"role": "user", "content": "a"}] * 2), "two user turns in a row"),
        (UNASKED, "an assistant turn that does not follow a user turn"),
    ],
)
def test_a_row_that_cannot_be_shown_does_not_hide_the_others(
    tmp_path: Path, tiny_base: Path, bad: str, said: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{GOOD}\n{bad}\n{GOOD}\n", encoding="utf-8")
    done = run("render", "rows.jsonl", "--model", str(tiny_base), "--json", "--html", "rows.html", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert [row["source"] for row in found["rows"]] == ["rows.jsonl:1", "rows.jsonl:3"]
    (refused,) = found["refused"]
    assert said in refused["reason"] and said in done.stderr and done.returncode == 2
    assert said.split(": ")[-1] in (tmp_path / "rows.html").read_text(encoding="utf-8")


def test_a_file_without_rows_is_said(tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "rows.json").write_text("[]")
    done = run("render", "rows.json", "--model", str(tiny_base), cwd=tmp_path)
    assert error_line(done) == "error: rows.json: no rows in it; give a file with conversations"


@pytest.mark.slow
@pytest.mark.parametrize("locale", [{"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}])
def test_letters_that_a_locale_has_not_are_escaped(tmp_path: Path, tiny_base: Path, locale: dict[str, str]) -> None:
    """In names of files, in rows and in errors; what is JSON stays so."""
    (tmp_path / "zoë.jsonl").write_text(f"{GOOD}\n{UNASKED}\n", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("base: builtin:tiny\nmixture: [{source: zoë.jsonl}]\n", encoding="utf-8")
    command = [sys.executable, "-m", "sftflow"]
    environment = {**os.environ, "LC_ALL": "C", **locale}

    def started(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, check=False)

    done = started("render", "zoë.jsonl", "--model", str(tiny_base), "--json")
    found = json.loads(done.stdout.decode("ascii"))
    assert found["rows"][0]["source"].endswith(".jsonl:1") and len(found["refused"]) == 1 and done.returncode in (1, 2)
    mixed = started("mix", "recipe.yaml")
    (line,) = mixed.stderr.decode("ascii").splitlines()[-1:]
    assert line.startswith("error: ") and b"Traceback" not in mixed.stderr


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mixure": []}, "mixure: unknown key; did you mean 'mixture'?"),
        ({"train": {"lrr": 1}}, "train.lrr: unknown key; did you mean 'lr'?"),
        ({"mixture": [{"source": "rows.jsonl", "repeats": 2}]}, "repeats: unknown key; did you mean 'repeat'?"),
        ({"mixture": [{"source": "speling"}]}, "unknown task 'speling'; did you mean 'spelling'?"),
        ({"mixture": [{"source": "gsm8k"}]}, "the task gsm8k needs a path"),
        ({"mixture": []}, "mixture: "),
        *(
            ({"train": {"lr": lr}}, ": train.lr: it should be 'auto', a number above 0, or {of_base: 0.8} (")
            for lr in (-1, 0, "fast", 9e999)
        ),
        ({"train": {"compile": "maybe"}}, ": train.compile: it should be 'auto', true or false (given: "),
        ({"train": {"epochs": 9e999}}, ": train.epochs: it should be a finite number (given: "),
        ({"validation": 9e999}, ": validation: it should be a finite number (given: "),
        ({"literal[": 1}, ": literal[: unknown key; "),
        ({"train": {"lora": {"rank": -8}}}, ": train.lora.rank: it should be greater than 0 (given: -8)"),
        ({"base": "./nowhere"}, "no such checkpoint directory"),
        ({"format": "sftflw"}, "'sftflw' is not a format"),
        ({"train": {"max_length": 4096, "tokens_per_step": 4096}}, "more than the base's context of 256"),
    ],
)
def test_wrong_recipes(changes: dict[str, Any], expected: str, tmp_path: Path, tiny_base: Path) -> None:
    changes = dict(changes)
    if "train" in changes:
        changes["train"] = {"out": str(tmp_path / "run"), **changes["train"]}
    assert expected in error_line(run("train", str(recipe(tmp_path, tiny_base, **changes))))
    assert not (tmp_path / "run").exists()


def test_override_and_unknown_eval_task(tmp_path: Path, tiny_base: Path) -> None:
    path = recipe(tmp_path, tiny_base)
    assert "train.stepz: unknown key" in error_line(run("train", str(path), "--set", "train.stepz=3"))
    result = run("eval", str(tiny_base), "--tasks", "spellin", "--out", str(tmp_path / "e"))
    assert "unknown task 'spellin'" in error_line(result)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("mixture.2.limit=5", "mixture has 2 entries, and 2 is none of them; the first is mixture.0"),
        (
            "mixture.2={source: spelling}",
            "mixture has 2 entries, and 2 is none of them; the first is mixture.0; another",
        ),
        ("mixture[0].limit=5", "an entry's number stands behind a dot; write mixture.0.limit=..."),
        ("mixture.[1]=5", "an entry's number stands behind a dot; write mixture.1=..."),
        ("mixture.-1.limit=5", "mixture has 2 entries, and -1 is none of them; the first is mixture.0"),
        ("mixture.+.source=spelling", "mixture has 2 entries, and + is none of them; the first is mixture.0"),
        ("mixture.first.limit=5", "mixture has 2 entries, and first is none of them; the first is mixture.0"),
        ("mixture.00.limit=5", "mixture has 2 entries, and 00 is none of them; the first is mixture.0"),
        ("mixture.²=5", "mixture has 2 entries, and ² is none of them; the first is mixture.0"),
        ("eval.tasks.0=spelling", "eval.tasks has 0 entries, and 0 is none of them; write the whole list: eval.tasks="),
        ("mixture.0.source.x=5", "'mixture.0.source' holds no keys; check the key"),
        ("train..steps=5", "it is not key=value; write for example --set train.steps=30"),
        ("train.steps", "it is not key=value; write for example --set train.steps=30"),
        ("train.steps=-1", "train.steps: it should be greater than 0 (given: -1); write null"),
        ("mixture.1.limit=none", 'mixture.1.limit: it should be a whole number (given: "none"); write null'),
        ("trian.steps=5", "trian: unknown key; did you mean 'train'?"),
        ("eval={taks: []}", "eval.taks: unknown key; did you mean 'tasks'?"),
        ("train.tokens_per_step=8", "train: tokens_per_step 8 is less than max_length 64"),
    ],
)
def test_wrong_overrides_are_named(override: str, said: str, tmp_path: Path) -> None:
    """The same for every command that has --set; the recipe's own mistakes stay its own."""
    path = recipe(tmp_path, tmp_path, mixture=[{"source": "rows.jsonl"}, {"source": "arithmetic"}])
    for command in ("train", "mix", "doctor"):
        line = error_line(run(command, str(path), "--set", "train.seed=3", "--set", override))
        assert line.startswith(f"error: --set {override}: {said}"), line
    assert not (tmp_path / "run").exists()
    path.write_text(path.read_text().replace('"steps": 1', '"steps": -2'))
    line = error_line(run("train", str(path), "--set", "train.seed=3"))
    assert line.startswith(f"error: {path}:1: train.steps: "), line


def test_overrides_reach_every_command_and_the_door(tmp_path: Path, tiny_base: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"base: {tiny_base}\nmixture: [&a {{source: arithmetic, limit: 20}}, {{source: spelling}}]\nvalidation: 0\n"
        "train: {max_length: 256, tokens_per_step: 256}\neval: {tasks: [arithmetic, spelling]}\n"
    )
    changes = ["--set", "mixture.0.limit=7", "--set", "mixture.1={source: concepts, limit: 5}"]
    ledger = json.loads(run("mix", str(path), *changes, "--json").stdout)
    assert [(s["name"], s["rows"]) for s in ledger["sources"]] == [("arithmetic", 7), ("concepts", 5)]
    checked = run("doctor", str(path), *changes)
    assert checked.returncode == 0 and f"{path}: sound; 12 training rows" in checked.stdout, checked.stderr
    assert "unknown task 'nothing'" in error_line(run("doctor", str(path), *changes, "--set", "eval.tasks.1=nothing"))
    assert error_line(run("doctor", "--set", "a=1")).startswith("error: --set a=1: there is no recipe to change")
    import sftflow as sf

    given = {"base": str(tiny_base), "mixture": [{"source": "arithmetic", "limit": 20}], "validation": 0}
    assert sf.mix((), recipe=given, max_length=64, tokens_per_step=64, **{"mixture.0.limit": 7}).ledger["rows"] == 7
    assert given["mixture"] == [{"source": "arithmetic", "limit": 20}]
    with pytest.raises(sf.SftflowError, match="mixture has 1 entry, and 1 is none of them"):
        sf.mix((), recipe=given, **{"mixture.1.limit": 7})


def test_paths_of_overrides_are_seen_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftflow.recipe import load_recipe

    (tmp_path / "recipes").mkdir()
    (tmp_path / "mine").mkdir()
    path = tmp_path / "recipes" / "recipe.yaml"
    path.write_text(
        "base: ./base\nmixture: [{source: a.jsonl}, {source: gsm8k, path: b.jsonl}, {source: c.jsonl}]\n"
        "eval: {tasks: [gsm8k=d.jsonl, jsonl=e.jsonl]}\ncompare: {prompts: f.txt}\nformat: g.jinja\n"
    )
    monkeypatch.chdir(tmp_path)
    changes = ("base=mine", "mixture.1.path=x.jsonl", "mixture.2={source: y.jsonl}", "eval.tasks.1=jsonl=z.jsonl")
    own, changed = load_recipe(path), load_recipe(path, changes)
    there, here = str(tmp_path / "recipes"), str(tmp_path)
    assert (own.base, changed.base) == (f"{there}/base", f"{here}/mine")
    assert [e.path or e.source for e in changed.mixture] == [f"{there}/a.jsonl", f"{here}/x.jsonl", f"{here}/y.jsonl"]
    assert changed.eval and changed.eval.tasks == (f"gsm8k={there}/d.jsonl", f"jsonl={here}/z.jsonl")
    changed = load_recipe(path, ["compare={prompts: p.txt}", "format=q.jinja"])
    assert changed.compare and (changed.compare.prompts, changed.format) == (f"{here}/p.txt", f"{here}/q.jinja")
    assert [e.path or e.source for e in changed.mixture] == [f"{there}/{x}.jsonl" for x in "abc"]


def test_a_path_may_begin_with_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "recipe.yaml"
    path.write_text("mixture: [{source: ~/a.jsonl}, {source: gsm8k, path: ~/b.jsonl}]\ntrain: {out: ~/run}\n")
    found = load_recipe(path, ["eval.tasks=[gsm8k=~/c.jsonl]"])
    assert [found.mixture[0].source, found.mixture[1].path] == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    assert found.train.out == f"{tmp_path}/run" and found.eval and found.eval.tasks == (f"gsm8k={tmp_path}/c.jsonl",)


def test_a_file_or_folder_of_a_bare_name_is_no_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").write_text("{}")
    (tmp_path / "sets").mkdir()
    for name, remedy in {
        "rows": "for the file of that name write ./rows",
        "sets": "for the folder of that name write ./sets",
        "zebra": "; a file is written ./zebra",
    }.items():
        (tmp_path / "r.yaml").write_text(f"mixture: [{{source: {name}}}]")
        line = error_line(run("mix", "r.yaml"))
        assert f"r.yaml:1: mixture.0.source: unknown task '{name}'; " in line and line.endswith(remedy)


@pytest.mark.parametrize(("package", "data"), [("datasets", "hub:a/b"), ("pyarrow", "a.parquet")])
def test_a_missing_package_is_named(package: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, package, None)
    line = error_line(run("render", data, "--model", "builtin:tiny"))
    assert line == f"error: {package}: this Python package is not installed; pip install {package}"


def test_an_override_leaves_other_uses_of_an_alias_alone(tmp_path: Path) -> None:
    from sftflow.recipe import load_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text("mixture: [&a {source: arithmetic, limit: 20}, *a]")
    assert [e.limit for e in load_recipe(path, ["mixture.0.limit=5"]).mixture] == [5, 20]


def test_the_version_is_one_line_and_quick() -> None:
    heavy = "import sys; sys.argv[1:] = ['--version']; from sftflow.cli import main\ntry: main()\nfinally: print("
    code = heavy + "sorted({'torch', 'transformers', 'pydantic', 'numpy', 'rich.console'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    version = importlib.metadata.version("sftflow")
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"sftflow {version}", "[]"]), done.stderr


def test_missing_shard(tmp_path: Path, tiny_base: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_base, broken)
    (broken / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    line = error_line(run("train", str(recipe(tmp_path, broken))))
    assert "model-00001-of-00002.safetensors: this shard is missing" in line
    assert not (tmp_path / "run").exists()


def test_flipped_byte_in_a_checkpoint(tmp_path: Path, tiny_base: Path) -> None:
    path = recipe(tmp_path, tiny_base)
    assert run("train", str(path)).returncode == 0
    file = tmp_path / "run" / "checkpoint" / "model.safetensors"
    blob = bytearray(file.read_bytes())
    blob[-2] ^= 4
    file.write_bytes(blob)
    line = error_line(run("chat", str(tmp_path / "run"), "--prompt", "hi"))
    assert "model.safetensors: changed since it was saved: its sha256 is not the one" in line


def test_port_in_use(tiny_base: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = error_line(run("serve", str(tiny_base), "--port", str(port)))
        assert f"127.0.0.1:{port}: the port is in use" in line
    assert "error: 0.0.0.0" in error_line(run("serve", str(tiny_base), "--host", "0.0.0.0"))


def test_usage_errors_are_one_line() -> None:
    assert "No such command" in error_line(run("tarin"))
    assert "--steps" in error_line(run("train", "x.yaml", "--steps", "3"))


def test_render_json_html_and_refusals(tmp_path: Path, tiny_base: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "hi", "completion": "yo"}\n{"prompt": "a", "completion": "b"}\n')
    result = run("render", str(data), "--model", str(tiny_base), "--json")
    document = json.loads(result.stdout)
    assert result.returncode == 0 and [r["source"] for r in document["rows"]] == [f"{data}:1", f"{data}:2"]
    first = document["rows"][0]
    assert len(first["ids"]) == len(first["mask"]) == len(first["tokens"]) and first["tokens"][0] == "<|bos|>"
    page = tmp_path / "p.html"
    assert run("render", str(data), "--model", str(tiny_base), "--html", str(page), "--index", "1").returncode == 0
    assert "assistant_start" in page.read_text()
    plain = run("render", str(data), "--model", str(tiny_base), "--index", "0")
    assert "\x1b[" not in plain.stdout and "yo" in plain.stdout and "supervised" in plain.stdout
    endless = tmp_path / "endless.jinja"
    endless.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    refused = run("render", str(data), "--model", str(tiny_base), "--format", str(endless), "--json")
    assert refused.returncode == 1
    assert [r["source"] for r in json.loads(refused.stdout)["refused"]] == [f"{data}:1", f"{data}:2"]


def test_mix_prints_the_ledger(tmp_path: Path, tiny_base: Path) -> None:
    path = recipe(tmp_path, tiny_base, mixture=[{"source": "arithmetic", "limit": 20, "repeat": 3}], validation=2)
    result = run("mix", str(path), "--out", str(tmp_path / "audit"))
    assert result.returncode == 0, result.stderr
    assert max(len(x) for x in result.stdout.splitlines()) <= 80
    ledger = json.loads((tmp_path / "audit" / "ledger.json").read_text())
    (source,) = ledger["sources"]
    assert (source["name"], source["rows"], source["repeat"], ledger["rows"]) == ("arithmetic", 18, 3, 54)
    assert {"tokens", "supervised_tokens", "cut", "dropped"} <= set(source)
    assert {"packed_rows", "padding_share", "tokens", "supervised_tokens"} <= set(ledger)


def test_over_long_rows_are_cut_to_whole_turns_and_counted(tmp_path: Path, tiny_base: Path) -> None:
    path = recipe(tmp_path, tiny_base)
    turns = [("user", "a"), ("assistant", "b"), ("user", "word " * 60), ("assistant", "c")]
    rows = [
        {"messages": [{"role": r, "content": c} for r, c in turns]},
        {"prompt": "word " * 80, "completion": "x"},
        {"prompt": "a", "completion": "b"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    result = run("mix", str(path), "--json")
    (source,) = json.loads(result.stdout)["sources"]
    assert (source["rows"] + source["validation_rows"], source["cut"], source["dropped"]) == (2, 1, 1)


def test_mix_audits(tmp_path: Path, tiny_base: Path) -> None:
    path = recipe(
        tmp_path, tiny_base, mixture=[{"source": "arithmetic", "limit": 40}], eval={"tasks": ["arithmetic"], "limit": 9}
    )
    out = tmp_path / "audit"
    result = run("mix", str(path), "--out", str(out), "--html", str(tmp_path / "a.html"))
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80 and "prompt + supervised = training ids" in result.stdout
    ledger = json.loads((out / "ledger.json").read_text())
    (source,) = ledger["sources"]
    assert {"name", "rows", "tokens", "supervised_tokens", "cut", "dropped", "repeat", "lengths"} <= set(source)
    assert {"rows", "tokens", "supervised_tokens", "packed_rows", "padding_share", "overlap"} <= set(ledger)
    assert {(i["checked"], i["failed"]) for i in ledger["invariants"].values()} == {
        (source["rows"] + source["validation_rows"], 0)
    }
    assert "<svg" in (tmp_path / "a.html").read_text()


def test_mix_names_the_row_whose_mask_cannot_be_proven(tmp_path: Path, tiny_base: Path) -> None:
    template = tmp_path / "endless.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    path = recipe(tmp_path, tiny_base, format=str(template))
    result = run("mix", str(path), "--out", str(tmp_path / "audit"))
    assert result.returncode == 1 and "rows.jsonl:1.messages[1]: " in result.stderr, result.stderr
    assert not (tmp_path / "audit").exists()


def test_the_flow_end_to_end(tmp_path: Path, tiny_base: Path) -> None:
    """Train, evaluate, compare, report and chat on a random base: the files and keys that others read."""
    path = recipe(
        tmp_path,
        tiny_base,
        mixture=[{"source": "arithmetic", "limit": 40}],
        eval={"tasks": ["arithmetic"], "limit": 4},
        compare={"prompts": "default"},
    )
    result = run("train", str(path))
    assert result.returncode == 0, result.stderr
    assert "sftflow chat" in result.stderr and "report.html" in result.stderr
    out = tmp_path / "run"
    document = json.loads((out / "compare.json").read_text())
    entry = document["tasks"]["arithmetic"]
    assert {"n", "chance", "base", "base_chat", "base_plain", "sft", "delta", "ci95"} <= set(entry)
    assert entry["base"] == max(entry["base_chat"], entry["base_plain"])
    assert set(document["centred_mean"]) == {"base", "sft"} and len(document["prompts"]) >= 40
    assert {"id", "messages", "base", "base_plain", "sft"} <= set(document["prompts"][0])
    models = json.loads((out / "eval.json").read_text())["models"]
    assert all({"n", "score", "stderr", "chance"} <= set(m["tasks"]["arithmetic"]) for m in models.values())
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "seconds"} <= set(row)
    for name in ("recipe.yaml", "ledger.json", "report.html", "eval/sft-arithmetic.jsonl"):
        assert (out / name).is_file(), name
    logged = (out / "log.txt").read_text()
    for line in [*result.stdout.splitlines(), *result.stderr.partition("\n\n")[2].splitlines()]:
        assert line.strip() in logged, line
    chat = run("chat", str(out), "--prompt", "What is 1 + 1?")
    assert chat.returncode == 0, chat.stderr


def test_demo_never_replaces_another_run(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    assert "it holds something other than a demo run" in error_line(run("demo", "--out", str(tmp_path)))
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_doctor_proves_the_maths() -> None:
    result = run("doctor", "--math")
    assert result.returncode == 0 and "ok  " in result.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_a_recipe_of_ours_reads_is_there_or_is_said_to_be_had_somewhere(path: Path, tmp_path: Path) -> None:
    from sftflow.data.sources import rows_of_entry
    from sftflow.foundation.errors import SftflowError
    from sftflow.tasks import TaskSource, make_task

    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("data"))  # as it is cloned
    loaded = load_recipe(tmp_path / "recipes" / path.name)
    assert ".." not in re.sub(r"(?m)^#.*", "", path.read_text(encoding="utf-8"))
    reads = [lambda entry=entry: next(rows_of_entry(entry, loaded)) for entry in loaded.mixture]
    for name, _, file in (task.partition("=") for task in (loaded.eval.tasks if loaded.eval else ())):
        source = TaskSource(path=file or None, limit=1)
        if not file.startswith("hub:"):
            reads.append(lambda name=name, source=source: make_task(name, source).items())
    for read in reads:
        try:
            assert read()
        except SftflowError as error:
            assert re.search(r"(no such file|no CSV file).*; .*(https://|hub:)", str(error)), str(error)


def test_shipped_recipes_are_sound() -> None:
    from sftflow.recipe import load_recipe

    for path in [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "src" / "sftflow" / "recipes").glob("*.yaml")]:
        assert load_recipe(path).mixture
