# make train   from nothing to a GPT-2 of your own: data, training, evaluation, samples (no GPU needed, no downloads
#              but Python packages)
# make test    the whole test suite
# make check   formatting, lint and types
# make format  what of these a program can mend
# make bench   what docs/benchmarks.md says of speed and memory, measured on this machine (about two hours)
# make         these lines

PYTHON := .venv/bin/python
ACCELERATE := .venv/bin/accelerate launch
READY := .venv/.requirements-installed

# With an NVIDIA GPU: bf16 on all of them. Without: the CPU, in bf16 where it has instructions for it. --cpu starts the
# one process directly, without torch's elastic launcher, which has a page to say when it is stopped.
LAUNCH = $(shell if nvidia-smi -L >/dev/null 2>&1; then echo --config_file accelerate_config.yaml; \
	else echo --config_file configs/cpu.yaml --cpu --quiet \
		--num_cpu_threads_per_process $$($(PYTHON) -c 'import psutil; print(psutil.cpu_count(logical=False) or 1)'); \
		grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo || echo --mixed_precision no; fi)

.PHONY: help train test check format bench

help:
	@sed -n 's/^# \(make .*\|  .*\)$$/\1/p' Makefile

train: data/demo/dataset.json
	@if [ -f runs/demo/model.safetensors ]; then \
		kept=runs/demo-$$(date +%Y%m%d-%H%M%S); mv runs/demo $$kept; echo "the finished run was moved to $$kept"; fi
	$(ACCELERATE) $(LAUNCH) train_accelerate.py --config configs/demo.yaml
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

data/demo/dataset.json: | $(READY)
	$(PYTHON) prepare_data.py --output_dir data/demo --block_size 256

# A file of tests on each of two cores: most of their time is that of processes which they start, one after the other.
test: $(READY)
	$(PYTHON) -m pytest --numprocesses 2 --dist loadfile

check: $(READY)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

format: $(READY)
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

# Two of them train on the demo's data.
bench: data/demo/dataset.json
	$(PYTHON) benchmarks/report.py

$(READY): requirements.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	python3 -m venv .venv
	$(PYTHON) -m pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@
