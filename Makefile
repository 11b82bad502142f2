# make demo: the main job on data that it makes itself.   make flickr8k SOURCE=...: the same on real pictures.
# make test: lint and the tests.   make clean: remove .venv.
# The first three install into .venv where that is missing or old. Another Python: make demo PYTHON=python3.12
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: demo flickr8k source test slurm-test fault-test exact lint install clean

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# The launcher `deepspeed`, and the ninja with which DeepSpeed compiles, are those of .venv.
export PATH := $(BIN):$(PATH)

demo: install
	@$(BIN)/python tools/demo.py

# Real pictures: shards of the downloaded SOURCE, two pre-trained towers, training of their projections, evaluation.
flickr8k: source install
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[pretrained]'
	$(BIN)/python tools/shard_flickr8k.py $(SOURCE) --out data/flickr8k
	$(BIN)/python tools/prepare_pretrained.py --out data/pretrained
	$(BIN)/python clipdist/train.py --config configs/flickr8k_pretrained.yaml
	$(BIN)/python tools/eval_retrieval.py runs/flickr8k_pretrained data/flickr8k/val
	$(BIN)/python tools/search_images.py runs/flickr8k_pretrained data/flickr8k/val "This is a dog"
	$(BIN)/python tools/report.py runs/flickr8k_pretrained

source:
	@[ -n "$(SOURCE)" ] || { echo "error: name what was downloaded (docs/data.md says from where):" \
	  "make flickr8k SOURCE='Flickr8k_Dataset.zip Flickr8k_text.zip'" >&2; exit 2; }

# Two at a time, one thread each: most of a test's time is a start of Python or a process of its own.
test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Jobs on a Slurm cluster of two nodes that the tests start on this machine; skipped, with the reason, where that fails.
slurm-test: install
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm tests/slurm

# The whole table of gradients, over ranks, ZeRO stages, micro-batches, objectives and precisions.
exact: install
	@EXACT_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/dist/test_gradients.py tests/dist/test_optimizers.py

# Runs that are killed at random moments and at named points, beside undisturbed ones; a long run's memory and files.
KILLS ?= 40
SOAK ?= 2000
fault-test: install
	@$(BIN)/python tests/fault_test.py --kills $(KILLS) --steps $(SOAK)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy clipdist launch tools slurm/cluster

install: $(VENV)/.installed

# pip's own words go to install.log; shown are the large packages, so that something is seen to happen, and errors.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) on PATH; name one: make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $$($(PYTHON) -V 2>&1) is too old, 3.10 or newer is needed: make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV): some minutes, several GB (PyTorch brings its CUDA libraries)"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev]' 2>&1 | \
	  tee $(VENV)/install.log | \
	  awk '/^ *(Downloading|Using cached) .*[0-9][0-9][0-9]\.[0-9] MB\)/ \
	         { sub(/.*\//, "", $$2); split($$2, name, "-"); print "  " name[1] " " $$(NF-1) " " $$NF; fflush() } \
	       /^Installing collected/ { print "  unpacking " NF - 3 " packages"; fflush() } \
	       /^ *(ERROR|error)/ { print; fflush() }' || \
	  { echo "error: the installation failed; $(VENV)/install.log says more" >&2; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
