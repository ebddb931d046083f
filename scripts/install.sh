#!/usr/bin/env bash
# Create .venv and install this checkout into it, unless that was done for the same requirements.
#   bash scripts/install.sh [test]      with the extras of the tests
# PYTHON=python3.12 chooses an interpreter; 3.10 to 3.13 work. CPU=1 takes PyTorch without CUDA from
# its own index: 1.3 GB instead of 5.9 on Linux.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:-}
target=.${extra:+[$extra]}
python=${PYTHON:-python3}

"$python" - <<'PY' || { echo "error: Python 3.10 to 3.13 is needed; choose one with PYTHON=python3.12 bash $0" >&2; exit 2; }
import sys
sys.exit(not (3, 10) <= sys.version_info < (3, 14))
PY

if [ ! -x .venv/bin/python ]; then
  "$python" -m venv .venv || { echo "error: no venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
fi
# The stamp identifies the requirements: the same ones are not installed twice.
stamp=$(cat requirements.txt setup.py pyproject.toml | sha256sum | cut -c1-16)
is_done() { [ "$(cat ".venv/installed$1" 2>/dev/null)" = "$stamp" ]; }
# An environment with the extras of the tests suffices for everything else.
pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$@"; }
index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
if ! is_done -test && { [ -n "$extra" ] || ! is_done ""; }; then
  size="5.9 GB with CUDA, or 1.3 with CPU=1 before the command"
  if [ "${CPU:-}" = 1 ]; then
    packages=$(grep -E '^torch(vision)?[<>=]' requirements.txt)
    echo "Installing PyTorch for CPUs from $index ..."
    # An index that hangs must not hold up the rest for pip's five tries.
    if pip install --timeout 15 --retries 1 --index-url "$index" $packages 2> .venv/torch.log; then
      size="1.3 GB"
    else
      size="5.9 GB with CUDA"
      echo "$index cannot be used, the reason is in .venv/torch.log: taking the default PyTorch"
    fi
  fi
  echo "Installing into .venv: $size; some minutes the first time ..."
  pip install --upgrade pip setuptools wheel
  # setuptools warns of the folders in a checkout in ten lines that do not apply here.
  PYTHONWARNINGS=ignore pip install --editable "$target"
  echo "$stamp" > ".venv/installed${extra:+-$extra}"
fi
# Not only after a failure: it may be of an earlier installation, or of a second index in pip's settings.
if [ "${CPU:-}" = 1 ] && .venv/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
  echo "CPU=1: PyTorch in .venv has CUDA. To replace it: rm -r .venv, and repeat where $index can be reached"
fi
