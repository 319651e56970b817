# Every target sets `.venv` up first if it is missing or older than pyproject.toml or constraints.txt.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup run test test-all lint format bench docs hooks clean clean-venv

BIN := .venv/bin
WORKERS ?= 2
# The first interpreter that is new enough; `make setup PYTHON=python3.12` chooses another.
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/.stamp ## create or refresh .venv

.venv/.stamp: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or say make setup PYTHON=..."; exit 2; }
	@$(BIN)/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@echo "Installing into .venv (PyTorch alone is 200 MB to 2 GB, so the first time takes minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@touch $@

run: setup ## the main job: one small model, rearranged and compared (report/index.html)
	@start=$$SECONDS; $(BIN)/dovetail compare recipes/first.yaml; \
	echo "make run: $$((SECONDS - start)) s"

test: setup ## the tests but the slow ones (under 8 minutes on 2 cores)
	@start=$$SECONDS; $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal; \
	echo "make test: $$((SECONDS - start)) s of 480"

test-all: setup ## every test, the slow ones too
	@start=$$SECONDS; $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal; \
	echo "make test-all: $$((SECONDS - start)) s"

lint: setup ## ruff, basedpyright, the floors of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error
	$(BIN)/lint-imports

format: setup ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## speed against peers; all that can run here, or make bench NAMES="decode_cpu ngram"
	$(BIN)/dovetail bench $(or $(NAMES),all)

docs: setup ## a page for every registered part, then the site (site/index.html)
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict --quiet

hooks: setup ## run ruff before every commit
	$(BIN)/pre-commit install

clean: ## what the other targets wrote, save .venv
	rm -rf site docs/generated report runs build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

clean-venv: ## .venv
	rm -rf .venv
