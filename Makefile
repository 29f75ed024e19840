PYTHON ?= python3
QUICK ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check

help: ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "make %-10s %s\n", $$1, $$2 }'

demo: .venv/.installed ## the whole journey in miniature, on a CPU, offline, into demo/ (QUICK=1: the short form)
	.venv/bin/echo4o demo $(if $(QUICK),--quick)

test: .venv/.installed ## the fast tests
	OMP_NUM_THREADS=1 .venv/bin/pytest -n auto --dist worksteal

test-slow: .venv/.installed ## the slow tests
	OMP_NUM_THREADS=1 .venv/bin/pytest -n auto --dist worksteal -m "slow and not gpu"

check: .venv/.installed ## ruff and mypy
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

.venv/.installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, $(PYTHON) is " + v + "; name another one: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@
