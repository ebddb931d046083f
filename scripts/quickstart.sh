#!/usr/bin/env bash
# From nothing to a trained network and its pictures: installs, trains the default config on scenes
# that are drawn on the fly, evaluates, draws. Settings are passed on to the training:
#   bash scripts/quickstart.sh model/head=fcn
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
run=runs/quickstart/$(date +%Y-%m-%d_%H-%M-%S)
.venv/bin/python tools/train.py run.dir="$run" "$@"
.venv/bin/python tools/eval.py checkpoint="$run/last.pt" split=test output="$run/test"
.venv/bin/python tools/visualize.py checkpoint="$run/last.pt" split=test output="$run/pictures" \
  'classes=[bus,tram,kiosk,booth]'
.venv/bin/python - "$run" <<'PY'
import json, sys
run = sys.argv[1]
miou = json.load(open(f"{run}/test/metrics.json"))["miou"]
print(f"\nmIoU on scenes the network has not seen: {100 * miou:.1f}")
print(f"pictures: {run}/pictures   (NAME.png: prediction; NAME_attention.png: what it attends to)")
print(f"checkpoint: {run}/last.pt   curves: .venv/bin/tensorboard --logdir {run}")
PY
