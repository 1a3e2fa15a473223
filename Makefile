# Everything runs in .venv, which the first target that needs it creates. `make PYTHON=python3.12 …` picks the interpreter.
PYTHON ?= python3
export PYTHON

DEMO_SHARDS := shards/demo
DEMO_RUN := runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo test check docs env clean-env

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: env ## set up, make the demo data set, train BCE3S on it and evaluate
	@test -f $(DEMO_SHARDS)/manifest.json || .venv/bin/python tools/make_shards.py --dataset demo --out $(DEMO_SHARDS) --overwrite
	@.venv/bin/bce3s fast-train --dataset demo --shards $(DEMO_SHARDS) --loader dali --out $(DEMO_RUN) --overwrite

test: env ## set up and run every check: ruff, mypy, layers, fast tests
	@.ci/check

check: ## the same checks in the .venv there is, without setting anything up
	@.ci/check

docs: env ## build the documentation into site/, warnings as errors
	@NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet && echo "the documentation is in site/index.html"

env: ## create or bring up to date .venv; instant when there is nothing to do
	@tools/setup_env.sh

clean-env: ## remove .venv
	rm -rf .venv
