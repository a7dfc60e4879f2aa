"""Running Python that a model wrote: the parent's side is `run`, what runs inside is `inside` and `guard`."""

from sftflow.sandbox.bubblewrap import why_no_bubblewrap
from sftflow.sandbox.execute import Isolation, Outcome, isolation_available, run_python

__all__ = ["Isolation", "Outcome", "isolation_available", "run_python", "why_no_bubblewrap"]
