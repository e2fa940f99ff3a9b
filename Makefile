# `make train` and `make test` need Python >= 3.10 with pip, and install the rest into .venv.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN = .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)

help:
	@echo "make train      set up .venv, then train on drawn clips: minutes on two CPU cores"
	@echo "make test       set up .venv, then run the tests; CONSTRAINTS=constraints-oldest.txt sets up the oldest versions"
	@echo "make lint       set up .venv, then run ruff"
	@echo "make notebooks  set up .venv, then run the notebooks with few steps and save them in runs/notebooks/"
	@echo "make gpu        measure this machine's GPU into docs/gpu.md; FOLDER=... adds real videos"
	@echo "make hub        download published weights (1 GB), check them, and run their notebook"
	@echo "make clean      remove .venv (runs/ stays)"

train: .venv/ready
	@echo "Two runs, one core each: one pretrains for minutes, one starts from tiny/drawn, which did for longer."
	@$(MAKE) --no-print-directory -j2 minutes longer
	$(BIN)/python -m tiny.report runs/minutes runs/longer

minutes:
	OMP_NUM_THREADS=1 $(BIN)/python train_tiny.py --scratch-steps 0 --name minutes

longer: # through cat, so that its progress bar is off
	OMP_NUM_THREADS=1 $(BIN)/python train_tiny.py --init tiny/drawn --name longer 2>&1 | cat

test: .venv/ready
	$(BIN)/python -m pytest -q

lint: .venv/ready
	$(BIN)/ruff check .

notebooks: .venv/ready
	FAST=1 $(BIN)/jupyter nbconvert --to notebook --execute --output-dir runs/notebooks notebooks/*.ipynb

gpu: .venv/ready
	$(BIN)/python benchmarks/gpu.py $(if $(FOLDER),--data $(FOLDER))

hub: .venv/ready
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable ".[hub]"
	$(BIN)/python -m pytest -q -m hub
	$(BIN)/jupyter nbconvert --to html --execute --output-dir runs/notebooks notebooks/03*.ipynb

.venv/ready: pyproject.toml $(CONSTRAINTS)
	@echo "Setting up .venv with torch and a few packages; the first time this takes minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable ".[train,test]"
	touch $@

clean:
	rm -rf .venv

.PHONY: help train minutes longer test lint notebooks gpu hub clean
