#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh test
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy -p danet
if [ $# -gt 0 ]; then
  exec .venv/bin/python -m pytest "$@"
fi
# Two at a time; then, one by one, those that kill processes and wait for them.
failed=0
.venv/bin/python -m pytest -n 2 --dist worksteal -m "not serial" || failed=1
.venv/bin/python -m pytest -m serial || failed=1
exit $failed
