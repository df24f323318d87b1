# `make run` and `make test` are all a newcomer needs; both set up what they miss. `make` alone lists the rest.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup check-lab run pack unpack purify plan sweep inspect test test-fast base model execute results docs course site slides colab lab harness lint lock clean

VENV ?= .venv
PYTHON ?= python3
UV ?= $(shell command -v uv 2>/dev/null)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NOTEBOOKS = $(sort $(wildcard notebooks/[0-9][0-9]_*.ipynb))

# --- parameters of `make run` -----------------------------------------------------------------------------------
PARAMETERS := PROFILE ATTACK TASK ACCESS SEED NAME DATA ROWS TAU DEFENSE SET METHOD GRID SCHEDULER
PURIFY := SUSPECT BASE ROWS TRIGGERED MARKERS
KNOWN := $(PARAMETERS) $(PURIFY) MODEL PACK ADDRESS VENV PYTHON UV TORCH_INDEX

# WSL exports NAME, the name of the computer: only `make run NAME=…` counts
ifneq ($(origin NAME),command line)
override NAME :=
endif

# make ignores a misspelled variable; a run with the wrong seed is worse than none
blank := $(subst ,, )
MISSPELLED := $(filter-out $(addsuffix =%,$(KNOWN)),$(subst \$(blank),_,$(MAKEOVERRIDES)))
ifneq ($(strip $(MISSPELLED)),)
$(error unknown $(MISSPELLED); valid: $(KNOWN))
endif

# nor is one read that its target does not take: `make sweep SEED=3` would run the seeds of the grid
OF_A_RUN := $(filter-out METHOD GRID SCHEDULER,$(PARAMETERS))
TAKES_run := $(OF_A_RUN) METHOD
TAKES_pack := $(OF_A_RUN)
TAKES_plan := $(OF_A_RUN)
TAKES_sweep := GRID NAME SCHEDULER
TAKES_purify := $(PURIFY) METHOD NAME PROFILE SEED TAU SET
not_taken = $(if $(TAKES_$1),$(filter-out $(addsuffix =%,$(TAKES_$1) VENV PYTHON UV TORCH_INDEX),$(subst \$(blank),_,$(MAKEOVERRIDES))))
$(foreach goal,$(MAKECMDGOALS),$(if $(strip $(call not_taken,$(goal))),\
$(error make $(goal) does not take $(strip $(call not_taken,$(goal))); it takes $(TAKES_$(goal)))))

# a value reaches the shell as it was typed: neither make nor the shell reads $ or ' in it
quoted = '$(subst ','\'',$(value $1))'
option = $(if $(value $1),--$2 $(call quoted,$1))
OPTIONS = $(call option,PROFILE,profile) $(call option,ATTACK,attack) $(call option,TASK,task) \
          $(call option,ACCESS,access) $(call option,SEED,seed) $(call option,NAME,name) \
          $(call option,DATA,data) $(call option,ROWS,rows) $(call option,TAU,tau) $(call option,DEFENSE,defense) \
          $(call option,SET,set)

# --- environment ------------------------------------------------------------------------------------------------
ifneq ($(UV),)
CREATE = test -x $(BIN)/python || $(UV) venv --quiet --python '>=3.11' $(VENV)
INSTALL = $(UV) pip install --quiet --python $(BIN)/python \
          $(if $(TORCH_INDEX),--index-strategy unsafe-best-match --extra-index-url '$(TORCH_INDEX)')
else
CREATE = test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
INSTALL = $(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)')
CHECK = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; \
        $(PYTHON) is $$($(PYTHON) -V 2>&1 | tail -n 1). Try: make setup PYTHON=python3.12"; exit 1; }
endif

# stages of a run belong to that run: stored outputs start from an empty folder, and so do tests
FRESH_RUNS = folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; export LAB_RUNS="$$folder/runs"

test execute: export TQDM_DISABLE := 1
test execute: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS := 1

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo; echo '  make run PROFILE=tiny ATTACK=badnets TASK=refusal ACCESS=full SEED=3 NAME=mine DATA=rows.json SET="lora.r=4"'

setup: $(READY)  ## install everything into .venv (TORCH_INDEX=https://download.pytorch.org/whl/cpu: the small CPU build)

$(READY): requirements-lock.txt pyproject.toml
	@$(CHECK)
	@echo 'setting up $(VENV), a few minutes the first time'
	@$(CREATE)
	@$(INSTALL) -r requirements-lock.txt
	@$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

# without `setup`, which it looks for; and in whatever Python there is before that
check-lab: export HF_HUB_OFFLINE := 1
check-lab: export TQDM_DISABLE := 1
check-lab:  ## what this machine lacks for a class: a line for each need, and what helps
	@python=$(BIN)/python; test -x "$$python" || python='$(PYTHON)'; "$$python" -m helpers.run.check_lab

run: setup  ## notebooks 00 to 09 with one set of parameters, into runs/<name>/ (METHOD=bdvax or conflict: one paper's; all: every defense)
	@$(BIN)/python -m helpers.run.pipeline run $(OPTIONS) $(call option,METHOD,method)

pack: setup  ## a finished run as one file, runs/<name>.tar.gz, for a class that starts at any notebook
	@$(BIN)/python -m helpers.run.packing pack $(OPTIONS)

unpack: setup  ## put such a file into runs/ (PACK=file.tar.gz)
	@test -n $(call quoted,PACK) || { echo 'make unpack needs PACK=file.tar.gz, as `make pack` writes it'; exit 1; }
	@$(BIN)/python -m helpers.run.packing unpack $(call quoted,PACK)

purify: setup  ## purify a model that you were given (SUSPECT=folder, BASE, ROWS, TRIGGERED, METHOD), into runs/<name>/
	@test -n $(call quoted,SUSPECT) || { echo 'make purify needs SUSPECT=folder, with a PEFT adapter or a model'; exit 1; }
	@$(BIN)/python -m helpers.purify $(call option,SUSPECT,suspect) $(call option,BASE,base) $(call option,ROWS,rows) \
	$(call option,TRIGGERED,triggered) $(call option,MARKERS,markers) \
	$(call option,METHOD,method) $(call option,NAME,name) $(call option,PROFILE,profile) $(call option,SEED,seed) \
	$(call option,TAU,tau) $(call option,SET,set)

plan: setup  ## what such a run will cost: memory, disk and time of each stage, and whether it fits this machine
	@$(BIN)/python -m helpers.run.pipeline plan $(OPTIONS)

inspect: setup  ## what lies in a folder or file of real rows (DATA=path), and what does not fit its name
	@test -n $(call quoted,DATA) || { echo 'make inspect needs DATA=path/to/rows.json or a folder'; exit 1; }
	@$(BIN)/python -m helpers.run.pipeline inspect $(call quoted,DATA)

GRID ?= notebooks/parameters/grids/tau.yaml
sweep: setup  ## all cells of a grid (GRID=file.yaml), on all cores or on a cluster (SCHEDULER=tcp://…)
	@$(BIN)/python -m helpers.run.pipeline sweep $(call quoted,GRID) $(call option,NAME,name) $(call option,SCHEDULER,scheduler)

# The notebooks take the longer: one core is theirs, the unit tests have what they leave.
test: setup  ## lint, unit tests, and every notebook from its first cell to its last, on two cores
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@echo 'the notebooks run beside the unit tests; what they say comes last'
	folder=$$(mktemp -d); trap 'exit 130' INT; trap 'kill $${notebooks:-} 2>/dev/null || true; rm -rf "$$folder"' EXIT; \
	LAB_RUNS="$$folder/runs" OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=1800 \
	$(NOTEBOOKS) > "$$folder/log" 2>&1 & notebooks=$$!; status=0; \
	nice -n 5 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests || status=$$?; \
	wait $$notebooks || status=$$?; cat "$$folder/log"; exit $$status

test-fast: setup  ## what to run while editing: lint and the unit tests that train nothing, in under three minutes
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" tests

base: setup  ## train a small model of data/models/ anew (MODEL=tiny, tiny-mistral or tiny-gpt2)
	$(BIN)/python -m helpers.run.pretrain $(call option,MODEL,model)

model: setup  ## fetch a real model into data/models/, for PROFILE=smollm2 (MODEL=smollm2, 100 MB, a minute)
	@$(BIN)/python -m helpers.run.fetch $(call option,MODEL,model) --install "$(INSTALL)"

execute: setup  ## refresh the outputs stored in the notebooks
	$(FRESH_RUNS); $(BIN)/python -m helpers.run.pipeline execute

results: setup  ## write docs/results.md from what is recorded in data/results/ and benchmarks/results/
	@$(BIN)/python -m helpers.run.results_page

docs: setup  ## write all that is generated in docs/: the results page, the graph of the stages, what defenses assume
	@$(BIN)/python -m helpers.run.docs

course: setup  ## write the sheets and solutions of course/ anew from course/exercises/
	@$(BIN)/python -m course.build

site: $(VENV)/.site  ## the course as a website, in site/_build/html/ (notebooks with their stored outputs; nothing is run)
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --jobs auto --conf-dir site --doctree-dir \
	  site/_build/doctrees . site/_build/html
	@echo 'open site/_build/html/index.html'

slides: setup  ## slides for three sessions, with the figures stored in the notebooks, in site/_build/slides/
	@$(BIN)/python -m course.decks
	@echo 'open one of them: arrow keys turn the pages, n shows the notes'

colab: setup  ## enter the address from which notebooks fetch the lab on Google Colab (ADDRESS=https://…)
	@$(BIN)/python -m course.colab $(call option,ADDRESS,address)

$(VENV)/.site: site/requirements.txt $(READY)
	@$(INSTALL) -r site/requirements.txt -c requirements-lock.txt
	@touch $@

harness: $(VENV)/.harness  ## add lm-evaluation-harness for BD-VAX's ten benchmarks (200 MB; the lab itself needs none of it)

$(VENV)/.harness: requirements-harness.txt $(READY)
	@$(INSTALL) -r requirements-harness.txt -c requirements-lock.txt
	@touch $@

lab: setup  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

lint: setup  ## check the style of code and notebooks
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# torch fixes the versions of its GPU libraries itself; leaving them out lets its CPU build do without them
lock:  ## rewrite requirements-lock.txt from requirements.txt (needs uv)
	@test -n "$(UV)" || { echo 'make lock needs uv: pip install uv'; exit 1; }
	{ echo '# Made from requirements.txt by `make lock`; do not edit.'; \
	  $(UV) pip compile requirements.txt --universal --python-version 3.11 --no-header --no-annotate --quiet \
	  | grep -Ev '^(nvidia|cuda|triton)\b'; } > requirements-lock.new
	mv requirements-lock.new requirements-lock.txt

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) site/_build site/api .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
