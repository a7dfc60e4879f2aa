"""Where files go and come from: links to another disk, a cache that cannot be written, files that cannot be mapped."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.runs import run, write_recipe
from sftflow.foundation.atomic_io import recover_directory, remove_directory, sweep, write_directory
from sftflow.foundation.errors import CheckpointError
from sftflow.training.resume import require_own_links


def fill(text: str, directory: Path) -> None:
    (directory / "a").write_text(text)


def test_a_directory_is_written_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "run" / "checkpoint"
    link.parent.mkdir()
    link.symlink_to("../disk/ours")  # nothing there yet
    for text in ("one", "two"):
        write_directory(link, lambda directory, text=text: fill(text, directory))  # type: ignore[misc]
        assert link.is_symlink() and (tmp_path / "disk" / "ours" / "a").read_text() == text
    assert os.listdir(tmp_path / "disk") == ["ours"]
    # A crash between the two renames, and a killed writer's leavings, are put right on that disk.
    (tmp_path / "disk" / "ours").rename(tmp_path / "disk" / ".ours.old")
    recover_directory(link)
    assert (link / "a").read_text() == "two"
    (tmp_path / "disk" / ".ours.123.tmp").mkdir()
    sweep(link.parent, "checkpoint")
    assert os.listdir(tmp_path / "disk") == ["ours"]
    remove_directory(link)
    assert link.is_symlink() and not link.exists() and os.listdir(tmp_path / "disk") == []


@pytest.mark.parametrize("linked", ["checkpoint", "resume", "both"])
def test_a_run_saves_through_links(tiny_base: Path, tmp_path: Path, linked: str) -> None:
    names = ["checkpoint", "resume"] if linked == "both" else [linked]
    recipe = write_recipe(tmp_path, tiny_base, steps=6, save_every=2)
    (tmp_path / "run").mkdir()
    for name in names:
        (tmp_path / "disk" / name).mkdir(parents=True)
        (tmp_path / "run" / name).symlink_to(tmp_path / "disk" / name)
    done = run("train", str(recipe))
    if "resume" in names:  # what an empty one means: an earlier run that has saved nothing yet
        done = run("train", str(recipe), "--resume")
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / "run" / name).is_symlink() for name in names)
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").is_file()
    if "checkpoint" in names:
        assert (tmp_path / "disk" / "checkpoint" / "model.safetensors").is_file()
        assert run("chat", str(tmp_path / "run"), "--prompt", "hi").returncode == 0
    else:
        assert list((tmp_path / "disk" / "resume").glob("step-*"))


def test_where_no_checkpoint_can_be_written_is_said_before_the_first_step(tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, steps=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "run" / "checkpoint").symlink_to(tmp_path / "file" / "inside")
    done = run("train", str(recipe))
    assert done.returncode == 3
    assert done.stderr.startswith(f"error: {tmp_path / 'run' / 'checkpoint'}: cannot write (")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("linked", ["checkpoint", "resume"])
def test_a_link_to_what_is_not_ours_is_refused(linked: str, tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, steps=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "kept.txt").write_text("mine")
    (tmp_path / "run" / linked).symlink_to(tmp_path / "photos")
    with pytest.raises(
        CheckpointError, match=r"something else in it \(kept.txt\), which would be removed; let it lead"
    ):
        require_own_links(tmp_path / "run")
    done = run("train", str(recipe))
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path / 'run' / linked}: a link to a folder")
    assert os.listdir(tmp_path / "photos") == ["kept.txt"]
    (tmp_path / "photos" / "kept.txt").unlink()
    assert run("train", str(recipe)).returncode == 0
    require_own_links(tmp_path / "run")  # what we have written is ours


@pytest.mark.parametrize("replace, left", [(True, "outer"), (False, "inner")])
def test_two_writers_with_one_number_do_not_disturb_each_other(replace: bool, left: str, tmp_path: Path) -> None:
    """On a shared disk: in containers every process may be number 1. Here the other comes in the middle."""
    target = tmp_path / "target"

    def inner(directory: Path) -> None:
        (directory / "who").write_text("inner")

    def outer(directory: Path) -> None:
        (directory / "who").write_text("outer")
        write_directory(target, inner, replace=replace)

    write_directory(target, outer, replace=replace)
    assert (target / "who").read_text() == left and os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("why", ["a file in its place", "no home"])
def test_an_unwritable_default_cache_is_said_and_done_without(
    why: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SFTFLOW_CACHE")
    (tmp_path / "file").touch()
    if why == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    recipe = write_recipe(tmp_path, tiny_base, steps=2)
    done = run("mix", str(recipe), "--out", str(tmp_path / "audit"))
    assert done.returncode == 0, done.stderr
    said = [r.getMessage() for r in caplog.records if r.name == "sftflow.data"]
    assert len(said) <= 1 and all("the cache cannot be written (Not a directory); nothing is kept" in s for s in said)
    monkeypatch.setenv("SFTFLOW_CACHE", str(tmp_path / "file" / "cache"))  # one that was asked for is an error
    assert run("mix", str(recipe), "--out", str(tmp_path / "audit2")).returncode == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of address space as Linux has them")
@pytest.mark.parametrize("kind", [pytest.param("safetensors", marks=pytest.mark.slow), "gguf"])
def test_files_that_cannot_be_mapped_are_not_called_damaged(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    size = 1 << 36  # sparse: it takes no room on the disk
    if kind == "gguf":
        pytest.importorskip("gguf")
        model = tmp_path / "model.gguf"
        model.write_bytes(b"GGUF")
    else:
        config = json.loads((tiny_base / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config))
        entry = {"model.embed_tokens.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
        header = json.dumps(entry).encode()
        model = tmp_path
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        size += 8 + len(header)
    os.truncate(model if kind == "gguf" else tmp_path / "model.safetensors", size)
    limit = (1 << 35, 1 << 35)
    done = subprocess.run(
        [sys.executable, "-m", "sftflow", "chat", str(model), "--prompt", "hi"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert "memory" in line and "whole" not in line and "damaged" not in line
