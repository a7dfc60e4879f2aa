"""SIGTERM and Ctrl-C while a run is on.

before the first step, after the last    stop at once: whatever is being written is whole or absent
between them                             finish the step, save, stop; Ctrl-C once more stops at once
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


class Stopped(BaseException):
    """A signal came, and the run has stopped. saved: whether its state was saved just now.

    Like KeyboardInterrupt no Exception, so that no code on its way out takes it for an error of its own.
    """

    def __init__(self, number: int, *, saved: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.saved = saved
        self.exit_code = 128 + number  # as shells have it


class Signals:
    """While inside, the two signals become `Stopped`. asked: the number of the one that came, 0 where none has.

    notice: told when a signal has to wait for the step's end; it runs inside the signal handler.
    """

    def __init__(self, notice: Callable[[], None] | None = None) -> None:
        self.asked = 0
        self._notice = notice
        self._waits = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        with contextlib.suppress(ValueError):  # not in the main thread: nobody sends us signals there
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and & ask to be left alone
                    self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """While inside, a signal is only noted, in `asked`: the loop looks at it after each step."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """While inside, a signal is only noted; it takes effect at the end. For what must not be left half done."""
        notice, self._notice = self._notice, None
        with self.between_steps():
            yield
        self._notice = notice
        self.check()

    def check(self) -> None:
        """Raises Stopped where a signal has come."""
        if self.asked:
            raise Stopped(self.asked)

    def _on_signal(self, number: int, _: Any) -> None:
        impatient = bool(self.asked) and number == signal.SIGINT
        self.asked = self.asked or number
        if not self._waits or impatient:
            raise Stopped(self.asked)
        if self._notice is not None:
            self._notice()
