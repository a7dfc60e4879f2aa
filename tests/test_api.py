"""The Python door: ten lines of the README, sources from memory, and the same errors as the command line's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import sftflow as sf
from sftflow.chat.schema import Part

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"{n} + 1?"},
            {"role": "assistant", "content": f"It is {n + 1}."},
        ]
    }
    for n in range(40)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of these tests, with the rows as a file."""
    path = tmp_path_factory.mktemp("door")
    (path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


@pytest.fixture(scope="module")
def base(folder: Path, tiny_base: Path) -> Any:
    return sf.load(tiny_base)


@pytest.fixture(scope="module")
def run(folder: Path, base: Any) -> Any:
    mix = sf.mix([sf.read(ROWS, name="mine"), sf.task("spelling", limit=40)], base, max_length=128, validation=4)
    return sf.train(base, mix, out=folder / "run", steps=3, tokens_per_step=256)


def test_the_door_has_these_names() -> None:
    verbs = {"load", "read", "task", "render", "mix", "train", "evaluate", "compare", "serve", "export"}
    verbs |= {"ask", "diff"}
    assert set(sf.__all__) == verbs | {"SftflowError"} and set(dir(sf)) == set(sf.__all__)
    assert all(callable(getattr(sf, name)) for name in sf.__all__)
    assert issubclass(sf.errors.RecipeError, sf.SftflowError)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        sf.trian  # noqa: B018


def test_importing_it_costs_nothing() -> None:
    code = "import sys; before = set(sys.modules); import sftflow; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {m.split(".")[0] for m in done.stdout.split()} - set(sys.stdlib_module_names) == {"sftflow"}
    few = {"sftflow.nanochat", "sftflow.nanochat.registration"}  # which waits for transformers
    assert {m for m in done.stdout.split() if m.startswith("sftflow.")} == few


def test_types_are_shipped() -> None:
    assert (Path(sf.__file__).parent / "py.typed").is_file()


def test_the_readme_s_ten_lines(folder: Path) -> None:
    """The README's example as it stands there, in a notebook user's namespace, but with less of everything."""
    (block,) = re.findall(r"```python\n(import sftflow as sf\n.+?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert not [line for line in block.splitlines() if "import" in line and line != "import sftflow as sf"]
    fewer, n = re.subn(r"steps=\d+", "steps=2", block)
    assert n == 1
    fewer = fewer.replace("limit=2000", "limit=60").replace('["spelling"]', '["spelling"], limit=4')
    fewer = fewer.replace("tasks=[", 'prompts="few.jsonl", tasks=[')
    (folder / "few.jsonl").write_text('{"prompt": "Who are you?"}\n{"prompt": "Hi"}\n')
    names: dict[str, Any] = {}
    exec(compile(fewer, "README.md", "exec"), names)
    assert len(names["run"].losses) == 2 and (folder / "report.html").is_file()
    assert isinstance(names["run"].assistant.chat("Who are you?").text, str)


# ---- sources


def sources(folder: Path) -> dict[str, Any]:
    import datasets
    import pandas

    return {
        "list": list(ROWS),
        "iterator": iter(ROWS),
        "dataset": datasets.Dataset.from_list(ROWS),
        "pandas": pandas.DataFrame(ROWS),
    }


@pytest.mark.parametrize("kind", ["list", "iterator", "dataset", "pandas"])
def test_rows_in_memory_train_what_a_file_would(kind: str, folder: Path, base: Any) -> None:
    from_file = sf.mix(["mine.jsonl"], base, max_length=128)
    rows = sf.read(sources(folder)[kind], name="mine")
    from_memory = sf.mix([rows], base, max_length=128)
    assert from_memory.digest() == from_file.digest()
    pairs = zip(from_memory.examples, from_file.examples, strict=True)
    assert all((a.ids == b.ids).all() and (a.mask == b.mask).all() for a, b in pairs)
    ledgers = [{k: v for k, v in m.ledger.items()} for m in (from_memory, from_file)]
    assert ledgers[0] == ledgers[1] and len(rows) == len(ROWS) and rows[3] == ROWS[3] and rows[-1] == ROWS[-1]


def test_a_list_of_rows_is_one_source(base: Any) -> None:
    rows = [{**row, "source": "web"} for row in ROWS]
    ledger = sf.mix(rows, base, max_length=128).ledger
    assert [source["name"] for source in ledger["sources"]] == ["rows"] and ledger == sf.mix(
        [rows], base, max_length=128
    ).ledger


def test_a_file_s_rows_are_read_where_they_are_asked_for(folder: Path) -> None:
    rows = sf.read("mine.jsonl")
    assert len(rows) == 40 and rows[0] == ROWS[0] and rows[1:3] == ROWS[1:3] and list(rows) == ROWS
    with pytest.raises(IndexError):
        rows[40]
    assert repr(rows) == "Rows('mine.jsonl')" and repr(sf.read(ROWS)) == "Rows(40 in memory, name='rows')"


def test_bad_rows_in_memory_are_named(folder: Path, base: Any) -> None:
    with pytest.raises(sf.SftflowError, match=r"mine:2\.messages\[0\]: a message without a role"):
        sf.mix([sf.read([ROWS[0], {"messages": [{"content": "x"}]}], name="mine")], base, max_length=128)
    with pytest.raises(sf.SftflowError, match="rows:1: not JSON"):
        sf.mix([[{"prompt": "a", "completion": object()}]], base)


# ---- what the verbs give


def test_rendering(base: Any) -> None:
    found = base.render(ROWS[0])
    (row,), (again,) = found.to_json()["rows"], sf.render(ROWS[0], base).to_json()["rows"]
    assert row == {**again, "source": "row"}
    taught = "".join(t for t, m in zip(row["tokens"], row["mask"], strict=True) if m)
    assert taught == "It is 1.<|assistant_end|>"
    html = found._repr_html_()
    assert "assistant_end" in html and "<script" not in html and "sup" in str(found) and "assistant_end" in str(found)
    hostile = base.render({"prompt": "<img src=x onerror=alert(1)>", "completion": "</div><script>alert(2)</script>"})
    assert "<img" not in hostile._repr_html_() and "<script" not in hostile._repr_html_()


def test_a_mixture_prints_and_is_audited(base: Any) -> None:
    mix = sf.mix([sf.task("spelling", limit=30)], base, max_length=128)
    assert mix.ledger["rows"] + mix.ledger["validation_rows"] == 30 and "spelling" in str(mix)
    assert str(mix).splitlines()[2].split()[::7] == ["all", str(mix.ledger["validation_rows"])], "the sums"
    audit = mix.audit()
    assert "prompt + supervised = training ids" in str(audit) and max(map(len, str(audit).splitlines())) <= 80
    picture = mix.plot()._repr_html_()
    (source,) = mix.ledger["sources"]
    assert f"{source['tokens']:,} tokens, {source['supervised_tokens']:,} supervised" in picture and "100%" in picture
    assert "<iframe" in mix._repr_html_() and "<iframe" in audit._repr_html_()


def test_a_run(run: Any, folder: Path) -> None:
    assert len(run.losses) == 3 and all(loss > 0 for loss in run.losses)
    assert run.recipe.train.steps == 3 and run.recipe.train.max_length == 128
    assert "<svg" in run.plot()._repr_html_() and "3 steps" in repr(run)
    assert str(run).startswith("kept        step ") and str(run) in re.sub(
        "(?m)^.{21}", "", (run.directory / "log.txt").read_text()
    )
    # What was done by hand, as a recipe: it trains the same weights.
    file = folder / "again.yaml"
    run.save_recipe(file)
    again = sf.train(recipe=file, out=folder / "again")
    assert again.losses == run.losses
    weights = [(r.directory / "checkpoint" / "model.safetensors").read_bytes() for r in (run, again)]
    assert weights[0] == weights[1]


def test_the_command_line_trains_the_same(run: Any, folder: Path) -> None:
    from sftflow.cli import main

    file = folder / "by-command.yaml"
    run.save_recipe(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sftflow", "train", str(file), "--set", f"train.out={folder / 'by-command'}"])
        with pytest.raises(SystemExit) as left:
            main()
    assert not left.value.code
    name = Path("checkpoint") / "model.safetensors"
    assert (folder / "by-command" / name).read_bytes() == (run.directory / name).read_bytes()


def test_talking(run: Any) -> None:
    assistant = run.assistant
    assert assistant is run.assistant
    reply = assistant.chat("What is 2 + 1?", max_tokens=12)
    pieces = list(assistant.stream([{"role": "user", "content": "What is 2 + 1?"}], max_tokens=12))
    assert "".join(p.text for p in pieces) == reply.text and pieces[-1].reply.ids == reply.ids
    drawn = [assistant.chat("Hi", max_tokens=8, temperature=1.0, seed=s).ids for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert assistant.chat("Hi", system="Be brief.", max_tokens=4).n_prompt > assistant.chat("Hi", max_tokens=4).n_prompt


def test_models_are_asked_the_same_side_by_side(base: Any, run: Any) -> None:
    turns = [*ROWS[0]["messages"], {"role": "user", "content": "<b>And 2 + 1?"}]
    replies = sf.ask({"base": base, "SFT": run.assistant}, ["What is 2 + 1?", turns], max_tokens=6)
    for name, model in (("base", base), ("SFT", run.assistant)):
        alone = [model.chat(q, max_tokens=6) for q in ("What is 2 + 1?", turns)]
        assert [r.ids for r in replies.replies[name]] == [r.ids for r in alone]
    html = replies._repr_html_()
    assert "<b>And" not in html and "&lt;b&gt;And" in html and "did not stop" in html
    assert "assistant: It is 1." in str(replies) and max(map(len, str(replies).splitlines())) <= 80
    parts = (Part("python", "2+1"), Part("python_output", "3"), Part("text", "It is 3."))
    reckoned = replace(replies.replies["base"][0], text="It is 3.", parts=parts)
    told = str(replace(replies, questions=replies.questions[:1], replies={"base": [reckoned]}))
    assert "⟨2+1⟩ ⟨= 3⟩ It is 3." in told and "calculator" in told and "calculator" not in str(replies)
    assert len(sf.ask(base, turns, max_tokens=2).questions) == len(sf.ask(base, "Hi", max_tokens=2).questions) == 1
    assert len(sf.ask(base, (q for q in ("Hi", "Ho")), max_tokens=2).questions) == 2
    for nothing in (5, [5], [{"role": "user"}]):
        with pytest.raises(sf.SftflowError, match="row"):
            sf.ask(base, nothing)
    with pytest.raises(sf.SftflowError, match="models: two have one name; give a mapping of names to models"):
        sf.ask([base, base], "Hi")


def test_a_server_answers_beside_the_program_until_it_is_stopped(run: Any) -> None:
    body = {"messages": [{"role": "user", "content": "What is 2 + 1?"}], "max_tokens": 6}
    with sf.serve(run.assistant, name="mine", port=0, background=True) as server:
        assert server.url.startswith("http://127.0.0.1:") and "mine" in repr(server) and server.models == ("mine",)
        answer = httpx.post(f"{server.url}/v1/chat/completions", json={"model": "mine", **body}, trust_env=False)
        said = answer.json()["choices"][0]["message"]["content"]
        assert said == run.assistant.chat("What is 2 + 1?", max_tokens=6).text
        long = {**body, "model": "mine", "max_tokens": 400, "stream": True, "temperature": 2}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=long, trust_env=False) as stream:
            next(stream.iter_lines())
            changed = [m for m in run.assistant.model.modules() if "forward" in vars(m)]
            assert not changed  # the program's own model is not the one that the server's thread computes with
        with pytest.raises(sf.SftflowError, match="the port is in use"):
            sf.serve(run.assistant, port=int(server.url.rpartition(":")[2]), background=True)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health", trust_env=False)


def test_training_moves_numbers_and_nothing_else(base: Any, run: Any) -> None:
    change = sf.diff(base, run.assistant)
    assert change.same_shapes and change.classes[0] == change.classes[1]
    assert sum(m.n for m in change.moved) == len(list(base.model.parameters()))
    (moved,) = (m for m in change.moved if m.name.endswith("q_proj.weight"))
    both = [m.model.state_dict() for m in (base, run.assistant)]
    old, new = ([v.flatten() for k, v in weights.items() if k.endswith("q_proj.weight")] for weights in both)
    far = sum(float((b - a).square().sum()) for a, b in zip(old, new, strict=True))
    assert moved.share == pytest.approx((far / sum(float(a.square().sum()) for a in old)) ** 0.5, rel=1e-4) and far > 0
    assert all(m.share == 0 for m in sf.diff(base, base).moved)
    other = sf.diff("builtin:tiny", base)
    assert not other.same_shapes and "model.embed_tokens.weight" in other.reshaped
    assert f"{len(other.reshaped)} tensors of another shape" in " ".join(str(other).split())
    assert "the same names and shapes" in " ".join(str(change).split()) and "<caption>" in change._repr_html_()


def test_logprobs_are_the_model_s(base: Any) -> None:
    import torch

    ids = base.render(ROWS[0]).to_json()["rows"][0]["ids"]
    with torch.no_grad():
        wanted = base.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    found = base.logprobs(ROWS[0], top=2)
    assert found[0] is None and [f.id for f in found[1:]] == ids[1:]
    for at, f in enumerate(found[1:]):
        assert f.logprob == pytest.approx(float(wanted[at, f.id]), abs=1e-4) and len(f.top) == 2


def test_a_task_s_rows_and_the_loss_on_them(base: Any) -> None:
    rows = sf.read(sf.task("arithmetic", limit=6))  # with calls, whose results are not supervised
    mix = sf.mix(sf.task("arithmetic", limit=6), base, validation=0)
    rendered = [base.render(row).to_json()["rows"][0] for row in rows]
    assert [r["ids"] for r in rendered] == [e.ids.tolist() for e in mix.examples] and rows.name == "arithmetic"
    (end,) = {r["ids"][-1] for r in rendered}
    by_hand = [
        (-told.logprob, id == end)
        for row, r in zip(rows, rendered, strict=True)
        for told, id, taught in zip(base.logprobs(row), r["ids"], r["mask"], strict=True)
        if taught
    ]
    found = base.loss(rows)
    assert found.tokens == len(by_hand) and found.all == pytest.approx(sum(x for x, _ in by_hand) / len(by_hand), 1e-5)
    ends = [x for x, is_end in by_hand if is_end]
    assert found.end_of_turn == pytest.approx(sum(ends) / len(ends), 1e-5) and found.roles["user"] > 0
    with pytest.raises(sf.SftflowError, match="mine:2: a row is a string"):
        base.loss(sf.read([ROWS[0], "no row"], name="mine"))


def test_evaluating_and_comparing(base: Any, run: Any, tmp_path: Path) -> None:
    evaluation = sf.evaluate(run.assistant, ["spelling"], limit=4)
    (model,) = evaluation.models.values()
    result = model.tasks["spelling"]
    low, high = result.interval
    assert result.n == 4 and 0 <= low <= result.score <= high <= 1 and len(result.rows) == 4
    assert "spelling" in str(evaluation) and "<table" in evaluation._repr_html_()
    (tmp_path / "few.jsonl").write_text('{"prompt": "Hi"}\n')
    few = {"limit": 4, "prompts": str(tmp_path / "few.jsonl")}
    comparison = sf.compare(base, run.assistant, tasks=["spelling"], out=tmp_path / "compare", **few)
    task = comparison.tasks["spelling"]
    assert task.n == 4 and task.ci95[0] <= task.delta <= task.ci95[1]
    assert "spelling" in str(comparison) and "<iframe" in comparison._repr_html_()
    for name in ("scores", "forgetting"):
        drawn = comparison.section(name)._repr_html_()
        assert 'class="sftflow"' in drawn and "<script" not in drawn
        assert ("spelling" in drawn) == (name == "scores") and ("bits per byte" in drawn) == (name == "forgetting")
    with pytest.raises(sf.SftflowError, match="section: there is no 'score'; one of scores, "):
        comparison.section("score")
    comparison.save_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == (tmp_path / "compare" / "report.html").read_text()
    written = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert written == json.loads(json.dumps(comparison.to_json()))


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: sf.load("./nowhere"), "./nowhere: no such checkpoint directory"),
        (lambda: sf.task("speling"), "unknown task 'speling'; did you mean 'spelling'?"),
        (lambda: sf.task("spelling", limits=3), "limits: unknown key; did you mean 'limit'?"),
        (lambda: sf.train(recipe={"mixture": [{"source": "spelling"}]}, stepz=3), "stepz: unknown key; did you mean"),
        (lambda: sf.read("mine.jsonl", config="a"), "mine.jsonl: a file, which has no config beside it; leave"),
        (lambda: sf.mix(["nowhere.jsonl"], "builtin:tiny"), "nowhere.jsonl: no such file"),
        (lambda: sf.evaluate("builtin:tiny", ["spelin"]), "unknown task 'spelin'; did you mean 'spelling'?"),
        (lambda: sf.export("builtin:tiny", "merged", "x", type="q8_0"), "type: a checkpoint directory holds no q8_0"),
        (lambda: sf.train("x", base="y"), "sf.train: multiple values for argument 'base'; its arguments: base, mix, "),
        (lambda: sf.train("x", recipe=5), "recipe: it should be a recipe (given: int); give its"),
        (lambda: sf.train(recipe={"mixture": [{"source": "a"}]}, train=5, out="x"), "train: it should be a map"),
        (lambda: sf.load("x", dtype="y"), "sf.load: got an unexpected keyword argument 'dtype'; its arguments: "),
        (lambda: sf.load(" "), "' ': a model without a name; give a directory, "),
        (lambda: sf.render(ROWS, 5), "model: it should be a model (given: int)"),
        (lambda: sf.evaluate(5), "model: it should be a model (given: int)"),
        (lambda: sf.evaluate("builtin:tiny", limit=0), "limit: it should be a whole number above 0 (given: 0); "),
    ],
)  # fmt: skip
def test_errors_are_the_command_line_s(call: Any, line: str, folder: Path) -> None:
    with pytest.raises(sf.SftflowError) as error:
        call()
    assert line in str(error.value) and error.value.exit_code == 2 and "\n" not in str(error.value)


def test_values_in_each_other_s_place_are_named(base: Any) -> None:
    mix = sf.mix([ROWS], base, max_length=64)
    for call, line in [
        (lambda: sf.train(mix, base), "mix: it should be a mixture (given: Assistant); "),
        (lambda: sf.mix(base, [ROWS]), "rows: no rows, but a value of type Assistant; give a file"),
        (lambda: sf.evaluate(mix), "model: it should be a model (given: Mixture); "),
        (lambda: base.chat("x", max_new_tokens=9), "max_new_tokens: no argument of a reply; write max_tokens=..."),
        (lambda: base.stream("x", zebra=9), "zebra: no argument of a reply; known: max_tokens, temperature, "),
    ]:
        with pytest.raises(sf.SftflowError) as error:
            call()
        assert str(error.value).startswith(line)


@pytest.mark.parametrize("content", ["\ud83d", json.loads("[" * 300 + "]" * 300)])
def test_rows_from_memory_that_no_file_can_hold_are_named(base: Any, content: Any) -> None:
    rows = [ROWS[0], {"prompt": "a", "completion": content}]
    (refused,) = sf.render(rows, base).refused
    assert refused["reason"].startswith("rows:2")
    with pytest.raises(sf.SftflowError, match="rows:2"):
        sf.mix(sf.read(rows), base)
