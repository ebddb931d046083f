#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh test
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy -p danet
if [ $# -eq 0 ]; then
  set -- -n 3 --dist worksteal
fi
exec .venv/bin/python -m pytest "$@"
