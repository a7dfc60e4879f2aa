#!/usr/bin/env bash
# Build the wheel, install it into an empty environment, and run the README's ten lines and one chat from there.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
cp -r "$root/pyproject.toml" "$root/README.md" "$root/LICENSE" "$root/src" "$work/"   # nothing is left in the checkout
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work/dist" "$work"
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" "$work"/dist/*.whl
cd "$work"
for n in 1 2 3 4 5 6 7 8; do
  echo "{\"prompt\": \"What is $n + $n?\", \"completion\": \"It is $((n + n)).\"}"
done > mine.jsonl
"$python" "$root/scripts/readme_lines.py" 3 > ten_lines.py
venv/bin/python ten_lines.py
test -s report.html
reply=$(venv/bin/sftflow chat runs/mine --prompt "Who are you?")
echo "chat: $reply"
test -n "$reply"
test -f "$(venv/bin/python -c 'import sftflow, os; print(os.path.dirname(sftflow.__file__))')/py.typed"
