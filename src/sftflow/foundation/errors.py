"""The one error tree.

    SftflowError            exit 2   the user's input was wrong
      SchemaError                    a conversation breaks the schema
      FormatError                    a chat format cannot express a conversation
      RecipeError                    a recipe key or value is wrong
      CheckpointError                a checkpoint is missing, damaged, or does not fit
      ContextError                   something is longer than the model's context
      GrammarError                   a reply cannot be held to a grammar
      TaskError                      an unknown task, or a task's data file is wrong
      DataError                      a data file is missing or unreadable
      ServeError                     a port in use, a wrong host
      ProofError            exit 1   a check failed: an audit invariant, a parity certificate
        MaskError                    a loss mask cannot be proven
      RunError              exit 3   the run failed: disk full, out of memory, loss not finite

Every message is one line: `place: fact; remedy`.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable

_OPTIONS = re.compile(
    r"--(allow-code|allow-host|allow-origin|api-key|base|format|host|index|insecure|judge|judge-model|limit|max-tokens"
    r"|out|overwrite|params|port|prompts|require|resume|samples|shots|supervise|tasks|temperature"
    r"|thinking|to|tokens|type)\b(?!-)( (?=[A-Z]{2,}))?"
)
_FLAGS = ("allow-code", "insecure", "overwrite", "resume")


_REMEDIES = {
    errno.EACCES: "give this user the right to it, or name another place",
    errno.EPERM: "give this user the right to it, or name another place",
    errno.EROFS: "name a place on a disk that can be written",
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space: a quota is reached",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a folder of this path is a file; check the path",
    errno.EISDIR: "name a file, or move the folder away",
    errno.EEXIST: "it is there already; name another place",
    errno.ENAMETOOLONG: "give the path of a file",
    errno.ELOOP: "its links lead in a circle; check the path",
    errno.EMFILE: "close other programs, or raise the limit (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network disk",
}


def said_of(error: OSError) -> tuple[str, str]:
    """(fact, remedy) of what the system says of a file."""
    return error.strerror or first_line(error), _REMEDIES.get(error.errno or 0, "check the disk and its permissions")


def undecoded() -> tuple[str, str]:
    """(fact, remedy) of bytes of the command line that are no text here."""
    encoding = sys.getfilesystemencoding()
    if encoding == "utf-8":
        return "not text in UTF-8", "write it in UTF-8"
    return f"it has letters that {encoding}, the encoding of this locale, has not", "set LC_ALL=C.UTF-8"


def first_line(error: BaseException) -> str:
    """The first line of what an error says; "" where it says nothing.

    >>> first_line(ValueError("no such key\\n  at line 3"))
    'no such key'
    """
    return (str(error).strip().splitlines() or [""])[0]


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 105]} ... {text[-100:]}"


class SftflowError(Exception):
    """An error a user can act on: where it is, what is the case, what to do.

    >>> str(SchemaError("data.jsonl:17", "two user turns in a row", "merge them"))
    'data.jsonl:17: two user turns in a row; merge them'
    """

    exit_code = 2

    def __init__(self, place: str, fact: str, remedy: str = "") -> None:
        self.place, self.fact, self.remedy = place, fact, remedy
        fact, remedy = _shortened(fact, 1_400), _shortened(remedy, 500)  # they may quote a row's value
        line = f"{place}: {fact}" if place else fact
        line = " ".join((f"{line}; {remedy}" if remedy else line).split())
        super().__init__(line.encode("utf-8", "backslashreplace").decode())  # half a surrogate pair cannot be printed

    def reword(self, say: Callable[[str], str]) -> None:
        """Say it in the words of whoever asked: errors are raised in the command line's."""
        SftflowError.__init__(self, say(self.place), say(self.fact), say(self.remedy))

    def __reduce__(self) -> tuple[type[SftflowError], tuple[str, str, str]]:
        """Errors travel from the processes that render rows."""
        return type(self), (self.place, self.fact, self.remedy)


def in_python(text: str) -> str:
    """Options of the command line as arguments of a function. A command that is to be run stays as it is.

    >>> in_python("start with --base BASE, or give --allow-code"), in_python("sftflow train RECIPE --resume")
    ('start with base=BASE, or give allow_code=True', 'sftflow train RECIPE --resume')
    """

    def argument(found: re.Match[str]) -> str:
        end = "=True" if found[1] in _FLAGS else "=" if found[2] else ""
        return found[1].replace("-", "_") + end

    return text if "sftflow " in text else _OPTIONS.sub(argument, text)


class SchemaError(SftflowError): ...


class FormatError(SftflowError): ...


class RecipeError(SftflowError): ...


class CheckpointError(SftflowError): ...


class ContextError(SftflowError): ...


class GrammarError(SftflowError): ...


class TaskError(SftflowError): ...


class DataError(SftflowError): ...


class ServeError(SftflowError): ...


class ProofError(SftflowError):
    exit_code = 1


class MaskError(ProofError): ...


class RunError(SftflowError):
    exit_code = 3
