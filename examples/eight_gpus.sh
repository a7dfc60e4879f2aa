#!/usr/bin/env bash
# One machine, all its GPUs:   RECIPE=recipe.yaml GPUS=8 bash examples/eight_gpus.sh
set -euo pipefail
exec sftflow train "${RECIPE:?name a recipe}" --nproc "${GPUS:-8}" --resume
