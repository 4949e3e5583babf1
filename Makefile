# make reproduce [SCALE=toy|tiny]   the headline, from nothing: data, training, extension, evaluation, one table
# make reproduce SCALE=small        real text on one GPU: TEXT=DIR for your own files, or FineWeb-Edu; SCALE=paper: eight GPUs
# make table                        three seeds with the ablations; skips what results/tiny.csv already has
# make encodings                    three seeds of every encoding and extension: results/tiny-encodings.csv (about eight hours on 2 cores)
# make test                         the test suite
# make figure                       results/tiny*.png from results/tiny.csv and tiny-encodings.csv (installs matplotlib)
#
# Each makes .venv by itself. PYTHON=python3 uses an interpreter that has the packages already;
# TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" installs the small CPU build on Linux.

SCALE ?= tiny
TORCH ?= torch==2.13.0
PYTHON ?= .venv/bin/python
.PHONY: reproduce table encodings test figure

ifeq ($(PYTHON),.venv/bin/python)
VENV = .venv/installed
.venv/installed: Makefile
	python3 -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	.venv/bin/python -m pip install -q --disable-pip-version-check numpy tiktoken tqdm pytest
	touch $@
endif

reproduce: $(VENV)
	$(if $(filter small paper,$(SCALE)),$(if $(TEXT),,$(PYTHON) -m pip install -q datasets transformers))
	$(PYTHON) -m results.reproduce --scale $(SCALE) $(if $(TEXT),--text "$(TEXT)")

table: $(VENV)
	$(PYTHON) -m results.reproduce --scale tiny --seeds 1,2,3 --table ablations --dtype fp32 --out out/fp32

encodings: $(VENV)
	$(PYTHON) -m results.reproduce --scale tiny --seeds 1,2,3 --table encodings --dtype fp32 --out out/fp32

figure: $(VENV)
	$(PYTHON) -c "import matplotlib" 2>/dev/null || $(PYTHON) -m pip install -q matplotlib
	$(PYTHON) -m results.reproduce --scale tiny --seeds 1,2,3 --table ablations --dtype fp32 --out out/fp32 --plot results/tiny.png --no_run
	$(PYTHON) -m results.reproduce --scale tiny --seeds 1,2,3 --table encodings --dtype fp32 --out out/fp32 --plot results/tiny-encodings.png --no_run

test: $(VENV)
	$(PYTHON) -m pytest -q tests
