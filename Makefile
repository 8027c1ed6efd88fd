# PYTHON is an environment with `pip install -e '.[dev]'`: .venv, if it exists.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python)

TABLE ?= memorization_135m

.PHONY: help install check lint format types spelling test heavy mutations evidence docs site

help: ## list these commands
	@grep -E '^[a-z]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 12

install: ## make .venv with everything that the other commands need
	python3 -m venv .venv && .venv/bin/pip install -e '.[dev]'

check: lint types spelling ## before each commit: lint, types, spelling

lint: ## ruff: rules and format, changing nothing
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .

format: ## ruff: fix what can be fixed
	$(PYTHON) -m ruff check --fix . && $(PYTHON) -m ruff format .

types: ## mypy
	$(PYTHON) -m mypy

spelling: ## codespell, everything but the tests
	$(PYTHON) -m codespell_lib

test: ## the default tests; TESTS=tests/remora/test_merge.py for some of them
	$(PYTHON) -m pytest $(TESTS)

heavy: ## the heavy tests, half an hour or more; TESTS=tests/parallel for some of them
	$(PYTHON) -m pytest -m heavy $(TESTS)

mutations: ## small faults in the code: do the tests find them?
	$(PYTHON) -m tests.mutations

evidence: ## repeat a table of docs/results/data for hours, from pip's packages: TABLE=learning_135m_long
	$(PYTHON) -m pip install -e '.[evidence]'
	$(PYTHON) tools/bench/pretrained.py out/fetched
	$(PYTHON) tools/bench/repeat.py $(TABLE)

docs: ## write the generated pages and figures
	$(PYTHON) tools/docs.py && $(PYTHON) tools/figures.py

site: docs ## build the site, in site/
	REPOSITORY_URL=$${REPOSITORY_URL:-$$(git remote get-url origin 2>/dev/null)} $(PYTHON) -m mkdocs build --strict
