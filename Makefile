PYTHON ?= .venv/bin/python

.PHONY: install check test test-quick format site

install:
	bash scripts/install.sh test

check:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy -p danet
	$(PYTHON) -m pytest -n 2 --dist worksteal -m "not slow"

test:
	bash scripts/test.sh

test-quick:
	$(PYTHON) -m pytest -n 2 --dist worksteal -m "not slow"

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

site:
	$(PYTHON) -m mkdocs build --strict
