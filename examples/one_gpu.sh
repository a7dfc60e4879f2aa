#!/usr/bin/env bash
# One GPU:   RECIPE=recipe.yaml bash examples/one_gpu.sh
set -euo pipefail
exec sftflow train "${RECIPE:?name a recipe}" --resume # goes on with what was saved; where nothing was, begins
