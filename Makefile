# make train   from nothing to a GPT-2 of your own: data, training, evaluation, samples (no GPU needed, no downloads
#              but Python packages)
# make test    the whole test suite
# make check   formatting, lint and types
# make format  fix what can be fixed automatically
# make bench   what docs/benchmarks.md says of speed and memory, measured on this machine (about two hours)
# make         these lines

PYTHON := .venv/bin/python
# One process on the best device that accelerate finds.
LAUNCH := .venv/bin/accelerate launch --config_file configs/one_device.yaml --quiet
TRAINING := .venv/.training-installed
ALL := .venv/.all-installed

.PHONY: help train test check format bench

help:
	@sed -n 's/^# \(make .*\|  .*\)$$/\1/p' Makefile

train: data/demo/dataset.json
	@if [ -f runs/demo/model.safetensors ]; then \
		kept=runs/demo-$$(date +%Y%m%d-%H%M%S); mv runs/demo $$kept; echo "the finished run was moved to $$kept"; fi
	$(LAUNCH) train_accelerate.py --config configs/demo.yaml --max_steps $$($(PYTHON) benchmarks/demo_steps.py)
	@echo; echo 'What pipeline("text-generation", model="runs/demo", trust_remote_code=True) writes:'
	@cd runs && ../$(PYTHON) -c "$$SHOW"

define SHOW
from transformers import pipeline, set_seed
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
generator = pipeline("text-generation", model="demo", trust_remote_code=True)
set_seed(42)
for prompt in ("def __init__(self", "class Test", "import os"):
    print("---")
    print(generator(prompt, max_new_tokens=80)[0]["generated_text"])
endef
export SHOW

data/demo/dataset.json: | $(TRAINING)
	$(PYTHON) prepare_data.py --output_dir data/demo --block_size 256

# A file of tests on each of two cores: most of their time is that of processes which they start, one after the other.
# They come in the order of tests/conftest.py.
test: $(ALL)
	$(PYTHON) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: $(ALL)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	PYTHONPATH=. .venv/bin/lint-imports --no-cache

format: $(ALL)
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

# Two of them train on the demo's data.
bench: data/demo/dataset.json $(ALL)
	$(PYTHON) benchmarks/report.py

# Python compiles what it imports by itself; pip would compile all there is, which takes longer than a demo's start.
INSTALL := $(PYTHON) -m pip install --disable-pip-version-check --no-compile -q -r

$(TRAINING): requirements.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	python3 -m venv .venv
	$(INSTALL) requirements.txt
	@touch $@

$(ALL): requirements-dev.txt $(TRAINING)
	$(INSTALL) requirements-dev.txt
	@touch $@
