#!/usr/bin/env bash
# A training on all GPUs of one machine, or of several:
#   bash scripts/launch/torchrun.sh RUN_FOLDER [SETTING=VALUE ...]
#   NODES=2 HOST=first.machine bash scripts/launch/torchrun.sh ...      the same line on every machine
# PROCESSES is the number per machine (the number of GPUs by default, 1 without any). The same line
# again resumes the run.
set -euo pipefail
folder=${1:?usage: bash scripts/launch/torchrun.sh RUN_FOLDER [SETTING=VALUE ...]}
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}
processes=${PROCESSES:-$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}
where=(--standalone)
if [ "${NODES:-1}" -gt 1 ]; then
  where=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-id "${JOB:-$folder}"
    --rdzv-endpoint "${HOST:?name the first machine in HOST}:${PORT:-29500}")
fi
exec "$python" -m torch.distributed.run "${where[@]}" --nproc-per-node "$processes" --max-restarts "${RESTARTS:-3}" \
  tools/train.py run.dir="$folder" resume=auto "$@"
