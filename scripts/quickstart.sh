#!/usr/bin/env bash
# From nothing to a trained network and its pictures: installs, trains the default config on scenes
# that are drawn on the fly, evaluates, draws. Settings are passed on to the training:
#   bash scripts/quickstart.sh model/head=fcn
# CPU=1 before the command installs PyTorch without CUDA, 1.3 GB instead of 5.9.
set -euo pipefail
from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
run=runs/quickstart/$(date +%Y-%m-%d_%H-%M-%S)
echo "Training on scenes that are drawn on the fly, then test and pictures: three minutes on two CPU"
echo "cores. All results: $PWD/$run"
.venv/bin/python tools/train.py run.dir="$run" "$@" || {
  code=$?
  [ ! -e "$run/last.pt" ] ||
    echo "To go on: cd $(printf %q "$PWD") && .venv/bin/python tools/train.py resume=$run" >&2
  exit $code
}
.venv/bin/python tools/eval.py checkpoint="$run/best.pt" split=test output="$run/test"
.venv/bin/python tools/visualize.py checkpoint="$run/best.pt" split=test output="$run/pictures" \
  'classes=[bus,tram,kiosk,booth]' > /dev/null
.venv/bin/python scripts/quickstart_end.py "$run" "$from" "$@"
