"""What each rank of a run with two machines of two ranks does in tests: it is given the mixture in several ways, and
says how many rows it has rendered itself."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from helpers.tiny import make_renderer
from sftflow.data.rendered_once import rendered_once
from sftflow.foundation.ranks import joined
from sftflow.recipe import load_recipe

SHARED, APART, OFF, LATE = "shared", "apart", "off", "late"


def main(folder: Path, tokenizer: Path) -> None:
    machine, os.environ["LOCAL_RANK"] = (str(i) for i in divmod(int(os.environ["RANK"]), 2))
    renderer, told = make_renderer(tokenizer, "sftflow"), {}
    with joined() as ranks:
        import torch.distributed as dist

        for way in (SHARED, APART, OFF, LATE):
            cache = {APART: f"{APART}-{machine}"}.get(way, way)
            os.environ["SFTFLOW_CACHE"] = OFF if way == OFF else str(folder / cache)
            rendered = 0

            def progress(_: str, rows: int, way: str = way) -> None:
                nonlocal rendered
                rendered = rows
                if way == LATE:
                    time.sleep(5)

            ranks.barrier()
            if way == LATE:  # much later than this group has patience for
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))
            found = rendered_once(load_recipe(folder / "recipe.yaml"), renderer, progress)
            told[way] = {"rendered": rendered, "ledger": found.ledger}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(told))


def told_by(folder: Path, world: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
