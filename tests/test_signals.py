"""A signal that comes where nothing may be left half done takes effect right after it."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from sftflow import api
from sftflow.foundation import atomic_io
from sftflow.foundation.atomic_io import Lock
from sftflow.training.signals import Signals, Stopped


def test_a_signal_while_a_lock_is_taken_leaves_no_lock(tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(Stopped) as stopped, ExitStack() as stack:
        signals = stack.enter_context(Signals(lambda: told.append("waits")))
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            stack.enter_context(Lock(tmp_path / "run"))
        pytest.fail("it took no effect")
    assert stopped.value.exit_code == 143 and not told
    assert not (tmp_path / "run").exists()


def test_without_a_signal_nothing_happens_and_the_notice_is_as_before() -> None:
    told: list[str] = []
    with Signals(lambda: told.append("waits")) as signals:
        with signals.deferred():
            pass
        with signals.between_steps():
            os.kill(os.getpid(), signal.SIGTERM)
        assert told == ["waits"] and signals.asked == signal.SIGTERM


def test_a_signal_while_an_earlier_demo_is_cleared_leaves_a_demo_s_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".demo").touch()
    (tmp_path / "report.html").write_text("of an earlier demo")

    def clear_and_signal(folder: Path) -> None:
        (folder / ".demo").unlink()
        os.kill(os.getpid(), signal.SIGTERM)
        atomic_io.clear_directory(folder)

    monkeypatch.setattr("sftflow.api.run.clear_directory", clear_and_signal)
    with pytest.raises(Stopped), Signals():
        api.demo(tmp_path)
    assert (tmp_path / ".demo").is_file() and not (tmp_path / "report.html").exists()
