"""Print the README's Python example: readme_lines.py [STEPS]   (so many steps in place of its own)"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def readme_lines(steps: int | None = None) -> str:
    """The block that begins with `import sftflow as sf`."""
    (block,) = re.findall(r"```python\n(import sftflow as sf\n.+?)```", README.read_text(encoding="utf-8"), re.S)
    return str(block) if steps is None else re.sub(r"steps=\d+", f"steps={steps}", block)


if __name__ == "__main__":
    print(readme_lines(int(sys.argv[1]) if len(sys.argv) > 1 else None))
