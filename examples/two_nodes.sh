#!/usr/bin/env bash
# Two machines. Run it on both within ten minutes, with the same HEAD, which is the address of one of them:
#
#     HEAD=10.0.0.1 RECIPE=/shared/recipe.yaml bash examples/two_nodes.sh
#
# The recipe, its files, its train.out and the cache lie on a disk that both see.
set -euo pipefail
export SFTFLOW_CACHE=${SFTFLOW_CACHE:-/shared/cache}
exec torchrun --nnodes 2 --nproc-per-node "${GPUS:-8}" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:?name the first machine}:${PORT:-29500}" --rdzv-id "${JOB:-sft}" \
  -m sftflow train "${RECIPE:?name a recipe}" --resume
