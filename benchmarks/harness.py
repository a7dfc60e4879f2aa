"""The same items under EleutherAI's lm-evaluation-harness, answer by answer beside ours.

    python benchmarks/harness.py --model DIR --peer-python PY [--gsm8k 50] [--arc 100] [--tokens 256] [--served]

DIR is what `sftflow train` wrote (or any chat checkpoint); the harness loads it as its `hf` model with the chat
template applied, fp32, greedy. It is wanted nowhere else, so it gets an environment of its own that borrows this one's
packages:

    python3 -m venv /tmp/harness-venv
    .venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \\
        > $(/tmp/harness-venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
    /tmp/harness-venv/bin/pip install --no-deps lm-eval==0.4.13 sacrebleu portalocker tabulate colorama lxml

With `--served` the harness asks `sftflow serve` instead, as any other server: `local-chat-completions` for GSM8K,
`local-completions` with the prompt's own ids, `echo` and `logprobs` for ARC-Easy; and its `hf` model scores ARC-Easy
besides, every letter's log-likelihood to be within 1e-3. That wants three packages more:

    /tmp/harness-venv/bin/pip install aiohttp tenacity requests

GSM8K: the replies' texts must be equal. ARC-Easy: the letter with the highest probability must be the same. Where one
differs, both are printed, and whether our engine had reported a near-tie (two logits, or two letters, within 1e-4).
Exits 1 where a difference is not explained by one. (It takes no times: the form of measured figures is in figures.py.)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from load import serve_command, served
from outside import data_path

PEER = """
import json, sys
import lm_eval
kind, arguments, tasks, out = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3])), sys.argv[4]
device = {"device": "cpu", "batch_size": 8} if kind == "hf" else {}
done = lm_eval.simple_evaluate(
    model=kind, model_args=arguments, tasks=tasks, apply_chat_template=True, log_samples=True, bootstrap_iters=0,
    **device,
)
kept = {name: [[s["doc"]["id"], s["resps"], s["arguments"]] for s in rows] for name, rows in done["samples"].items()}
json.dump({"results": done["results"], "samples": kept}, open(out, "w"), default=str)
"""


def tasks_of(folder: Path, tokens: int) -> list[dict[str, Any]]:
    """The harness's configurations for our items, written into a folder as JSONL."""
    common = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}", "num_fewshot": 0}

    def files(name: str) -> dict[str, Any]:
        return {"dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}

    generated = {
        "task": "gsm8k_ours",
        **common,
        **files("gsm8k"),
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "max_gen_toks": tokens, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    chosen = {
        "task": "arc_ours",
        **common,
        **files("arc_easy"),
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{target}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    return [generated, chosen]


def ask_harness(python: str, kind: str, options: dict[str, Any], tasks: list[dict[str, Any]], folder: Path) -> Any:
    """What the harness's model class `kind` answers: {"results", "samples": {task: [[id, responses, arguments]]}}."""
    (folder / "tasks.json").write_text(json.dumps(tasks))
    arguments = ",".join(f"{k}={v}" for k, v in options.items())
    command = [python, "-c", PEER, kind, arguments, str(folder / "tasks.json"), str(folder / "out.json")]
    subprocess.run(command, check=True)
    return json.loads((folder / "out.json").read_text())


def ask_served(python: str, model: str, path: Path, context: int, tasks: list[dict[str, Any]], folder: Path) -> Any:
    """The same from `sftflow serve`, through the harness's two classes for servers."""
    generated, chosen = tasks
    with served(serve_command(model)) as server:
        common = {"model": server.model, "num_concurrent": 8, "max_retries": 1}
        chat = {**common, "base_url": f"{server.url}/v1/chat/completions"}
        theirs = ask_harness(python, "local-chat-completions", chat, [generated], folder)
        plain = {**common, "base_url": f"{server.url}/v1/completions", "tokenizer": path, "max_length": context}
        other = ask_harness(
            python, "local-completions", {**plain, "tokenizer_backend": "huggingface"}, [chosen], folder
        )
    return {name: theirs[name] | other[name] for name in ("results", "samples")}


def logprobs_of(samples: list[Any]) -> dict[str, list[float]]:
    """By item: the log-likelihood of each of its choices."""
    return {i: [float(r[0][0]) for r in responses] for i, responses, _ in samples}


def furthest(mine: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    return max(abs(a - b) for i in mine for a, b in zip(mine[i], other[i], strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--gsm8k", type=int, default=50)
    parser.add_argument("--arc", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--data", type=data_path, default="$SFTFLOW_TEST_DATA", help="folder of the outside data")
    parser.add_argument("--served", action="store_true", help="ask a server of ours through the harness's API classes")
    args = parser.parse_args()

    from sftflow.checkpoint import load_assistant, resolve
    from sftflow.evaluation.evaluate import evaluate
    from sftflow.evaluation.options import open_tasks
    from sftflow.evaluation.prompts_for import letter_scores, prompts_for

    assistant = load_assistant(args.model)
    path = resolve(args.model).path
    (gsm8k,) = open_tasks([f"gsm8k={args.data / 'gsm8k' / 'test.jsonl'}"], args.gsm8k)
    (arc,) = open_tasks([f"arc_easy={args.data / 'multiple_choice' / 'ARC-Easy' / 'test.jsonl'}"], args.arc)
    gsm8k.task.max_new_tokens = args.tokens
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for run in (gsm8k, arc):
            rows = [
                {
                    "id": i.id,
                    "question": i.messages[0].text,
                    "answer": str(i.answer),
                    "choices": list(i.choices),
                    "target": i.choices.index(i.answer) if i.choices else 0,
                }
                for i in run.items
            ]
            (folder / f"{run.name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        tasks = tasks_of(folder, args.tokens)
        ours = {run.name: evaluate(assistant, run, "chat", folder) for run in (gsm8k, arc)}
        loaded = {"pretrained": path, "dtype": "float32"}
        if args.served:
            context = assistant.engine.context
            theirs = ask_served(args.peer_python, args.model, path, context, tasks, folder)
            known = letter_scores(assistant.engine, prompts_for(assistant, arc, "chat"))
            scores = {arc.items[k].id: [of[c] for c in arc.items[k].choices] for k, of in known}
            hf = logprobs_of(ask_harness(args.peer_python, "hf", loaded, tasks[1:], folder)["samples"]["arc_ours"])
            told = logprobs_of(theirs["samples"]["arc_ours"])
            for what, other in (("the harness's hf model", hf), ("our evaluation", scores)):
                off = furthest(told, other)
                bad += off > 1e-3
                print(f"log-likelihoods over the server beside {what}: at most {off:.1e} apart, {len(told)} items")
        else:
            theirs = ask_harness(args.peer_python, "hf", loaded, tasks, folder)
    texts = {i: resps[0][0] for i, resps, _ in theirs["samples"]["gsm8k_ours"]}
    letters = {
        i: "ABCDE"[max(range(len(r)), key=lambda k: r[k])]
        for i, r in logprobs_of(theirs["samples"]["arc_ours"]).items()
    }
    for name, said in (("gsm8k", texts), ("arc_easy", letters)):
        rows = ours[name].rows
        differ = [r for r in rows if r.reply.strip() != said[r.id].strip()]
        print(f"{name}: {len(rows) - len(differ)} of {len(rows)} answers equal; our score {ours[name].score:.3f}")
        for row in differ:
            bad += not row.near_ties
            print(f"  {row.id} ({row.near_ties} near-ties)\n    ours    {row.reply!r}\n    theirs  {said[row.id]!r}")
    print("the harness's own scores:", json.dumps(theirs["results"], default=str))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
