"""Why there is no file at a path, and what to write instead."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path


def not_there(name: str | Path, kind: str = "file", otherwise: str = "check the path") -> tuple[str, str]:
    """(fact, remedy) of a path at which there is no file, or none of this kind.

    >>> not_there("~/data.jsonl"), not_there("nowhere/a.jsonl")[0]
    (('no such file', '~ is for the shell to read; write the folder out'), 'no such file: there is no folder nowhere')
    """
    fact, path, text = f"no such {kind}", Path(name), str(name)
    if path.is_dir():
        return f"a folder, not a {kind}", otherwise
    if "~" in path.parts or re.search(r"\$\{?[A-Za-z_]", text):
        sign = "~" if "~" in path.parts else "$"
        return fact, f"{sign} is for the shell to read; write the folder out"
    if re.search(r"(https?|s3|gs|hdfs|file):/", text):
        return fact, "an address is not read; download it, and name the file"
    if any(sign in path.name for sign in "*?[") and path.parent.is_dir():
        found = sorted(found.name for found in path.parent.glob(path.name))[:3] if path.name else []
        return f"{fact}: patterns are not read here", f"name the files: {', '.join(found) or 'none fits it'}"
    if path.is_symlink():
        return f"{fact}: a link to {os.readlink(path)}, which is not there", "mend the link"
    above = next(parent for parent in (*path.parents, Path()) if parent.exists())
    if above.is_file():
        return f"{fact}: {above} is a file, not a folder", otherwise
    if above != path.parent:
        lost = above / path.parent.relative_to(above).parts[0]
        return f"{fact}: there is no folder {lost}", otherwise
    try:
        there = os.listdir(path.parent)
    except OSError:
        return fact, otherwise
    near = difflib.get_close_matches(path.name, there, 1, 0.75)
    return fact, f"did you mean {near[0]!r}?" if near else otherwise
