"""docs/scale.md and examples/: what stands there is what the script computes, what a model holds, and what runs."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.runs import write_recipe
from helpers.several import launch
from helpers.training import BF16, shared_rows, spec
from sftflow.foundation.ranks import joined as joined
from sftflow.pretraining.pretrain import BaseSpec, build_model
from sftflow.training.batch_plan import RowPlan
from sftflow.training.trainer import Trainer, flops_a_token

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").iterdir())
SCRIPTS = [path for path in EXAMPLES if path.suffix in (".sh", ".sbatch")]
MANIFESTS = [path for path in EXAMPLES if path.suffix == ".yaml"]
SBATCH = {
    "array", "cpus-per-task", "gpus-per-node", "job-name", "nodes", "ntasks-per-node", "open-mode", "output", "requeue",
    "signal", "time",
}  # fmt: skip
"""options of sbatch that we know the meaning of"""

sys.path.insert(0, str(ROOT / "scripts"))
import scale_tables  # noqa: E402

# ---- the arithmetic


def test_the_page_s_table_is_the_script_s() -> None:
    """After a change: python scripts/scale_tables.py, and its output into the page."""
    assert scale_tables.table() in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["1B", "8B", pytest.param("70B", marks=pytest.mark.slow)])
def test_sizes_are_those_of_the_model(name: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = scale_tables.MODELS[name]
    config = LlamaConfig(
        hidden_size=shape.width, num_hidden_layers=shape.layers, intermediate_size=shape.feed, vocab_size=shape.vocab,
        num_attention_heads=shape.width // 64, num_key_value_heads=shape.kv // 64, head_dim=64,
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        assert model.num_parameters() == shape.parameters
        assert flops_a_token(model) == (6 * shape.body, 6 * shape.head)
        wrapped = get_peft_model(model, LoraConfig(r=scale_tables.RANK, target_modules="all-linear"))
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == shape.adapter


def small() -> tuple[Any, Any]:
    """A tiny model, and its shape as the script has it."""
    model = build_model(BaseSpec(params="0.1M", context=64), 320, 0)
    c = model.config
    return model, scale_tables.Shape(c.num_hidden_layers, 32, 32, c.intermediate_size, 320, True)


def held_bytes(settings: dict[str, Any]) -> tuple[int, int]:
    """(bytes of weights, gradients and moments, bytes of bf16 copies) that this rank holds after a step."""
    model, _ = small()
    train = spec(steps=1, **settings)
    trainer = Trainer(model, RowPlan(shared_rows(), train), train, BF16)
    trainer.train_step()
    moments = [v for o in trainer.optimizers for state in o.state.values() for v in state.values() if v.ndim]
    every = [*trainer.trained, *(p.grad for p in trainer.trained), *moments]
    local = [x.to_local() if hasattr(x, "to_local") else x for x in every]
    bf16 = trainer.bf16
    copies = [] if bf16 is None or trainer.sharded else [*(m.bf16 for m in bf16.modules), bf16.head]
    return sum(x.nbytes for x in local), sum(x.nbytes for x in copies)


def test_states_and_copies_are_what_a_rank_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scale_tables.MODELS, "tiny", small()[1])
    setup = scale_tables.Setup("tiny", 1, False, False)
    assert held_bytes({}) == (setup.states(), setup.working())


@pytest.mark.slow
def test_sharded_states_are_what_a_rank_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But vectors, which every rank keeps whole."""
    code = "import test_scale\nwith test_scale.joined(): print(test_scale.held_bytes({'shard': 'full'}), flush=True)"
    done = launch(2, "--no-python", sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    held = {int(x) for x in re.findall(r"\((\d+), \d+\)", done.stdout)}
    shape = small()[1]
    monkeypatch.setitem(scale_tables.MODELS, "tiny", shape)
    vectors = shape.parameters - shape.body - shape.head
    assert held == {scale_tables.Setup("tiny", 2, True, False).states() + 16 * vectors / 2}


# ---- the examples


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -" in text
    directives = re.findall(r"^#SBATCH --([\w-]+)", text, re.M)
    assert set(directives) <= SBATCH and bool(directives) is (path.suffix == ".sbatch")
    last = max((m.start() for m in re.finditer("^#SBATCH", text, re.M)), default=0)
    assert last < text.index("\nset -"), "Slurm reads no directive behind the first command"


def objects(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_manifests_are_what_kubernetes_takes(path: Path) -> None:
    """Its own rules, as the API reference has them; a server is not at hand."""
    for made in objects(path):
        assert set(made) == {"apiVersion", "kind", "metadata", "spec"}
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", made["metadata"]["name"])
        if made["kind"] == "PersistentVolumeClaim":
            assert made["apiVersion"] == "v1" and made["spec"]["resources"]["requests"]["storage"]
        elif made["kind"] == "Service":
            assert made["apiVersion"] == "v1" and made["spec"]["clusterIP"] == "None"
        else:
            require_job(made)


def require_job(made: dict[str, Any]) -> None:
    assert (made["apiVersion"], made["kind"]) == ("batch/v1", "Job")
    spec, pod = made["spec"], made["spec"]["template"]["spec"]
    known = {"backoffLimit", "completionMode", "completions", "parallelism", "podFailurePolicy", "template"}
    assert set(spec) <= known
    assert pod["restartPolicy"] == "Never"  # Always is not for jobs, and a podFailurePolicy asks for Never
    for rule in spec.get("podFailurePolicy", {"rules": []})["rules"]:
        codes = rule.get("onExitCodes", {"operator": "In", "values": [1]})
        assert (
            rule["action"] in ("FailJob", "Ignore", "Count") and codes["operator"] == "In" and 0 not in codes["values"]
        )
    if "completions" in spec:
        assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    (container,) = pod["containers"]
    assert all(isinstance(word, str) for word in container["command"]), "numbers are written as text there"
    assert all(isinstance(pair["value"], str) for pair in container.get("env", []))
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    (claim,) = objects(ROOT / "examples" / "kubernetes_storage.yaml")
    assert claims == [claim["metadata"]["name"]]


def test_two_nodes_find_each_other_by_the_service() -> None:
    service, job = objects(ROOT / "examples" / "kubernetes_two_nodes.yaml")
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    (port,) = (p["port"] for p in service["spec"]["ports"])
    (endpoint,) = (w for w in pod["containers"][0]["command"] if w.startswith("--rdzv-endpoint="))
    assert endpoint == f"--rdzv-endpoint={job['metadata']['name']}-0.{pod['subdomain']}:{port}"


def stub(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def outside(tmp_path: Path) -> dict[str, str]:
    """An environment with the programs of this one first in PATH, and before them those of tmp_path / "bin"."""
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    keys = {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "GPUS": "2"}
    return {**os.environ, **keys, "SFTFLOW_CACHE": str(tmp_path / "cache")}


SAME = [
    ("kubernetes_one_node.yaml", "eight_gpus.sh"),
    ("kubernetes_two_nodes.yaml", "two_nodes.sh"),
    ("kubernetes_parts.yaml", "slurm_parts.sbatch"),
]


@pytest.mark.parametrize(("manifest", "script"), SAME, ids=lambda name: name)
def test_a_pod_s_command_is_the_script_s(manifest: str, script: str, tmp_path: Path, outside: dict[str, str]) -> None:
    """So that what the scripts are shown to do (below) holds for both."""
    for name in ("sftflow", "torchrun"):
        stub(tmp_path / "bin", name, f"printf '%s\\n' {name} \"$@\"")
    slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}
    keys = {"GPUS": "8", "HEAD": "sft-0.sft", "RECIPE": "/shared/recipe.yaml", **slurm}
    words = [str(ROOT / "examples" / script)]
    done = subprocess.run(["bash", *words], env={**outside, **keys}, capture_output=True, text=True, check=True)
    command = objects(ROOT / "examples" / manifest)[-1]["spec"]["template"]["spec"]["containers"][0]["command"]
    written = " ".join(command).replace("$(JOB_COMPLETION_INDEX)", "3")
    assert re.split("[ =]", written) == done.stdout.split()


def started(script: str, env: dict[str, str]) -> subprocess.Popen[str]:
    path = ROOT / "examples" / script
    return subprocess.Popen(["bash", str(path)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    told = process.communicate(timeout=200)[0]
    assert process.returncode == 0, told[-3000:]
    return told


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def steps_logged(run: Path) -> int:
    return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").is_file() else 0


@pytest.mark.slow
@pytest.mark.parametrize("script", ["one_gpu.sh", "eight_gpus.sh", "two_nodes.sh"])
def test_scripts_train(script: str, tmp_path: Path, outside: dict[str, str]) -> None:
    """With a tiny model, two processes, and where it is two machines, both of them this one."""
    recipe = write_recipe(tmp_path, Path("builtin:tiny"), steps=2, optimizer="adamw")
    machines = 2 if script == "two_nodes.sh" else 1
    keys = {"RECIPE": str(recipe), "HEAD": "localhost", "PORT": str(free_port())}
    keys |= {"GPUS": "1"} if machines == 2 else {}
    for told in [ended(p) for p in [started(script, {**outside, **keys}) for _ in range(machines)]]:
        # torch warns of a lost meeting place, whose error has "Error" in its name, where the other machine ends first.
        assert "Traceback" not in told and not re.search(r"^(?!\[?W\d{4} ).*error", told, re.M)
    assert (tmp_path / "run" / "DONE").is_file() and steps_logged(tmp_path / "run") == 2


@pytest.mark.slow
def test_an_array_job_renders_the_mixture(tmp_path: Path, outside: dict[str, str]) -> None:
    """Two jobs at once; whoever comes after them finds all rows."""
    recipe = write_recipe(tmp_path, Path("builtin:tiny"))
    keys = {"RECIPE": str(recipe), "SLURM_ARRAY_TASK_COUNT": "2"}
    jobs = [started("slurm_parts.sbatch", {**outside, **keys, "SLURM_ARRAY_TASK_ID": n}) for n in "12"]
    told = [ended(job) for job in jobs]
    assert [re.findall(r"part \d of 2", text)[-1] for text in told] == ["part 1 of 2", "part 2 of 2"]
    command = ["sftflow", "mix", str(recipe)]
    after = subprocess.run(command, env={**outside, **keys}, capture_output=True, text=True, check=True)
    assert "2 of 2 parts are joined" in after.stderr


SRUN = """shift
for ((n = 0; n < SLURM_NTASKS; n++)); do
  SLURM_PROCID=$n SLURM_LOCALID=$n "$@" &
  echo $! >> "$PIDS"
done
code=0
while read -r pid; do wait "$pid" || code=$?; done < "$PIDS"
exit $code"""


@pytest.mark.slow
def test_a_slurm_job_that_is_preempted_saves_and_asks_to_go_on(tmp_path: Path, outside: dict[str, str]) -> None:
    """srun and scontrol are stand-ins: so many processes that are told their numbers; what was to be requeued."""
    stub(tmp_path / "bin", "srun", SRUN)
    stub(tmp_path / "bin", "scontrol", '[ "$1" = show ] && echo localhost || echo "$@" > "$REQUEUED"')
    recipe = write_recipe(tmp_path, Path("builtin:tiny"), steps=500, save_every=500, optimizer="adamw")
    pids, requeued = tmp_path / "pids", tmp_path / "requeued"
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    keys = {"RECIPE": str(recipe), "PIDS": str(pids), "REQUEUED": str(requeued), **slurm}
    process = started("slurm_train.sbatch", {**outside, **keys})
    until = time.monotonic() + 120
    while steps_logged(tmp_path / "run") < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    for pid in pids.read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 143, told[-3000:]
    assert len(re.findall(r"^stopped; the state is saved", told, re.M)) == 1 and "Traceback" not in told
    assert requeued.read_text().split() == ["requeue", slurm["SLURM_JOB_ID"]]
    (state,) = (tmp_path / "run" / "resume").iterdir()
    assert state.name == f"step-{steps_logged(tmp_path / 'run'):08d}"
