"""Run the notebooks as they stand; print the seconds of each, and of one that fails its cell and the error (exit 1).

Each runs in an empty temporary folder: nothing is written into the checkout. `--out DIR` keeps what they showed.
SFTFLOW_NOTEBOOK=small takes the smaller settings.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert.filters import strip_ansi

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
AT_ONCE = 2
CELL_SECONDS = 600
QUIET = ["--log-level=ERROR"]  # the kernel's own remarks


async def run(file: Path, out: Path) -> bool:
    """Whether all of it ran. The executed notebook is `out`/NAME, also one that stopped half-way."""
    notebook, started, error = nbformat.read(file, as_version=4), time.perf_counter(), ""
    with tempfile.TemporaryDirectory() as folder:
        place = {"metadata": {"path": folder}}
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            resources=place,
            extra_arguments=QUIET,
            coalesce_streams=True,
        )
        try:
            await client.async_execute()
        except CellExecutionError as failure:
            error = str(failure)
        except Exception as failure:  # a kernel that died, or a cell that takes too long
            error = f"{type(failure).__name__}: {failure}"
    nbformat.write(notebook, out / file.name)
    print(f"{'FAIL' if error else 'ok  '} {file.name}: {time.perf_counter() - started:.0f} s", flush=True)
    if error:
        failed = [n for n, c in enumerate(notebook.cells, 1) for o in c.get("outputs", ()) if o.output_type == "error"]
        print(f"{file.name}, cell {failed[0] if failed else '?'}: {strip_ansi(error)}", file=sys.stderr)
    return not error


async def run_all(files: list[Path], out: Path) -> bool:
    places = asyncio.Semaphore(AT_ONCE)

    async def in_turn(file: Path) -> bool:
        async with places:
            return await run(file, out)

    return all(await asyncio.gather(*map(in_turn, files)))


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("files", nargs="*", type=Path, default=sorted(NOTEBOOKS.glob("*.ipynb"), reverse=True))
    arguments.add_argument("--out", type=Path, help="where the executed notebooks stay; else a temporary folder")
    asked = arguments.parse_args()
    if not asked.files:
        print(f"{NOTEBOOKS}: no notebook", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("IPYTHONDIR", str(Path(scratch) / "ipython"))  # no history of the reader's
        os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this environment's kernel
        out = asked.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        return 0 if asyncio.run(run_all(asked.files, out)) else 1


if __name__ == "__main__":
    sys.exit(main())
