#!/usr/bin/env bash
# Create .venv and install this checkout into it, unless that was done for the same requirements.
#   bash scripts/install.sh [test]      with the extras of the tests
# PYTHON=python3.12 chooses an interpreter; 3.10 to 3.13 work.
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
if ! is_done -test && { [ -n "$extra" ] || ! is_done ""; }; then
  echo "Installing into .venv (some minutes the first time) ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip setuptools wheel
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable "$target"
  echo "$stamp" > ".venv/installed${extra:+-$extra}"
fi
