# make demo: the paper's tables on a laptop. `make help` lists the rest.
PYTHON ?= python3
# The sheet that `make report` shows.
SHEET ?= config/demo/experiments.tsv
PORT ?= 5000
# What `make resume` starts again, and with which further options.
PROFILE ?= profiles/slurm
ARGS ?=
BIN := .venv/bin

# snakefmt looks for shfmt there.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Spinning OpenMP threads make a step ten times slower where cores are busy.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help install demo demo-full resume show report ui test test-all fuzz gpu wheels pictures lint clean

help:  ## list these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: .venv/.installed  ## create .venv with the pinned versions

# torch first, on its own: it is the largest by far, and what follows accepts the build that is there.
.venv/.installed: pyproject.toml constraints.txt
	@echo 'Installing the pinned packages into .venv: minutes, once.'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[workflow,slurm,lora,postgresql,dev]'
	touch $@

demo: install  ## train and evaluate the demo's main rows, then show Table 1
	$(BIN)/snakemake --quiet host reason
	@$(MAKE) --no-print-directory show TABLES=results/tables/demo PAGE=results/report.html

demo-full: install  ## the demo with all pruners, seeds and ratios, and short runs for the ablation
	$(BIN)/snakemake --quiet host reason --config experiments=config/demo/experiments-full.tsv
	$(BIN)/snakemake --quiet host reason --config experiments=config/demo/experiments-short.tsv
	@$(MAKE) --no-print-directory show TABLES=results/tables/demo-full PAGE=results/report-full.html
	@echo; cat results/tables/demo-short/table3.md

resume:  ## go on after a killed snakemake: end its Slurm jobs, unlock, start again (PROFILE=..., ARGS=...)
	$(BIN)/dualspeed end-jobs
	$(BIN)/snakemake --profile $(PROFILE) $(ARGS) --unlock
	$(BIN)/snakemake --profile $(PROFILE) $(ARGS)

show:
	@echo; cat $(TABLES)/table1.md
	@echo; echo "More tables: $(TABLES)/, figures: $(subst tables,figures,$(TABLES))/"
	@echo "One page with everything: $(PAGE). Every run: make ui (MLflow)."

report: install  ## Snakemake's own page, with every job's run time: results/snakemake-report.html
	$(BIN)/snakemake --config experiments=$(SHEET) --report results/snakemake-report.html

ui: install  ## browse the runs with MLflow at http://localhost:$(PORT)
	@echo "Which run is best, and what did it cost? http://localhost:$(PORT)/#/experiments/1/runs?viewStateShareKey=best"
	$(BIN)/mlflow ui --backend-store-uri sqlite:///results/mlflow.db --port $(PORT)

# A file of tests to a process, and a thread to a process.
test: install  ## the tests, a few minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m 'not slow and not slurm and not browser'

test-all: install  ## the longer ones too
	$(BIN)/pytest

fuzz: install  ## mutated inputs for every reader of files, 20000 each, or N=1000
	$(BIN)/pytest tests/fuzz --fuzz-inputs $(or $(N),20000)

# No `install`: a machine with a GPU may have no network, and another Python and torch (PYTHON=...).
gpu:  ## the figures that need a GPU, 8 minutes, with PYTHON=<interpreter that has torch and transformers>
	$(PYTHON) -m measurements.gpu
	$(PYTHON) -m measurements.gpu_tables

# What a machine without internet installs: pip install --no-index --find-links wheels 'dualspeed[workflow,slurm]'.
WHEELS ?= wheels
PACKAGES ?= '.[workflow,slurm,lora]'
wheels:  ## a folder of wheels of everything, to be taken to machines without internet
	$(PYTHON) -m pip wheel --quiet -c constraints.txt --wheel-dir $(WHEELS) $(PACKAGES)

pictures: install  ## screenshots for docs/img of what `make demo` left; needs Chromium
	$(BIN)/pytest tests/reporting/test_pictures.py --pictures docs/img

lint: install  ## what CI checks of style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --line-length 120 --check Snakefile workflow
	SNAKEMAKE=$(BIN)/snakemake .ci/lint_workflow
	$(BIN)/mypy

clean:  ## delete every result
	find results -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
	rm -rf .snakemake
