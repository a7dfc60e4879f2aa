"""From a base language-model checkpoint to a measured, served assistant.

    import sftflow as sf

    base = sf.load("builtin:tiny")
    rows = sf.read("mine.jsonl")
    mix = sf.mix([rows, sf.task("spelling", limit=2000)], base)
    run = sf.train(base, mix, out="runs/mine", steps=60)
    print(sf.compare(base, run.assistant, tasks=["spelling"]))

Nothing is imported until one of these is used. transformers' auto classes know our model of picollm and nanochat then.
"""

from typing import TYPE_CHECKING, Any

from sftflow.nanochat import registration

__version__ = "0.1.0"
__all__ = [
    "SftflowError",
    "ask",
    "compare",
    "diff",
    "evaluate",
    "export",
    "load",
    "mix",
    "read",
    "render",
    "serve",
    "task",
    "train",
]

if TYPE_CHECKING:
    from sftflow.api import ask, compare, diff, evaluate, export, load, mix, read, render, serve, task, train
    from sftflow.foundation import errors as errors
    from sftflow.foundation.errors import SftflowError


def __getattr__(name: str) -> Any:
    """The door's names, and `errors` with the kinds of SftflowError, imported when they are first used."""
    import warnings
    from importlib import import_module as importing

    def import_module(module: str) -> Any:
        with warnings.catch_warnings():  # tqdm's, in a notebook without ipywidgets: its bars are switched off anyway
            warnings.filterwarnings("ignore", "IProgress not found")
            return importing(module)

    if name == "errors":
        value: Any = import_module("sftflow.foundation.errors")
    elif name in __all__:
        value = getattr(import_module("sftflow.foundation.errors" if name == "SftflowError" else "sftflow.api"), name)
        value = value if isinstance(value, type) else _verb(value)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _verb(function: Any) -> Any:
    """A function of the door, whose errors speak of its arguments, not of the command line's options."""
    import functools
    import inspect

    from sftflow.foundation.errors import RecipeError, SftflowError, in_python

    signature = inspect.signature(function)

    @functools.wraps(function)
    def verb(*arguments: Any, **keys: Any) -> Any:
        try:
            signature.bind(*arguments, **keys)
        except TypeError as error:
            known = ", ".join(str(p).partition(":")[0] for p in signature.parameters.values())
            raise RecipeError(f"sf.{function.__name__}", str(error), f"its arguments: {known}") from None
        try:
            return function(*arguments, **keys)
        except SftflowError as error:
            error.reword(in_python)
            raise

    return verb


def __dir__() -> list[str]:
    return __all__


registration.arrange()
