"""The notebook: it runs from top to bottom on any run, and what it prints is true."""

import json
import math
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import metrics, succeed, train
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from support.processes import REPOSITORY
from transformers import AutoTokenizer

from modeling_gpt2scratch import GPT2ScratchForCausalLM

NOTEBOOK = REPOSITORY / "notebooks" / "play.ipynb"
PROBE = "import json, sys; print(json.dumps([sys.executable, str(RUN), TEXT, PROMPT]))"


@pytest.fixture(scope="module")
def run_dir(data_dir, tmp_path_factory) -> Path:
    """A run of two layers and 32 positions, which saw more steps than it evaluated."""
    folder = tmp_path_factory.mktemp("notebook") / "run"
    schedule = ("--max_steps", 60, "--eval_steps", 25, "--optim", "muon", "--learning_rate", 1e-2)
    succeed(train(data_dir, folder, *schedule, "--report_to", "none"))
    assert sum("loss" in line for line in metrics(folder)) == 60
    assert [line["step"] for line in metrics(folder) if "eval_loss" in line] == [25, 50, 60]
    return folder


@pytest.fixture(scope="module")
def executed(run_dir, tmp_path_factory) -> NotebookNode:
    """The notebook after a run from top to bottom, with a last cell that tells what it worked with."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE, id="probe"))
    # A kernel of this interpreter, whatever other kernels of the name python3 there are on the machine.
    kernels = tmp_path_factory.mktemp("kernels")
    write_kernel_spec(kernels / "python3")
    specs = KernelSpecManager(kernel_dirs=[str(kernels)], ensure_native_kernel=False)
    manager = AsyncKernelManager(kernel_name=notebook.metadata.kernelspec.name, kernel_spec_manager=specs)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    variables = {"GPT2SCRATCH_RUN": str(run_dir), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    client = NotebookClient(notebook, km=manager, timeout=120, resources=resources)
    return client.execute(env={**os.environ, **variables})


@pytest.fixture(scope="module")
def probe(executed, run_dir) -> tuple[str, str]:
    """TEXT and PROMPT, as the notebook has them."""
    executable, run, text, prompt = json.loads(printed(executed, "probe"))
    assert (executable, run) == (sys.executable, str(run_dir.resolve()))
    return text, prompt


@pytest.fixture(scope="module")
def tokenizer(run_dir):
    return AutoTokenizer.from_pretrained(run_dir)


@pytest.fixture(scope="module")
def model(run_dir) -> GPT2ScratchForCausalLM:
    return GPT2ScratchForCausalLM.from_pretrained(run_dir, attn_implementation="eager").eval()


def printed(notebook: NotebookNode, cell_id: str) -> str:
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def test_the_saved_notebook_is_valid_and_has_no_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    for cell in code:
        assert (cell.outputs, cell.execution_count, cell.metadata) == ([], None, {}), cell.id


def test_every_plot_cell_makes_a_picture_and_no_cell_a_warning(executed):
    plots = [cell for cell in executed.cells if cell.cell_type == "code" and "plt.subplots" in cell.source]
    assert len(plots) >= 10
    for cell in plots:
        assert [output for output in cell.outputs if "image/png" in output.get("data", {})], cell.id
    for cell in executed.cells:
        assert not [output for output in cell.get("outputs", []) if output.get("name") == "stderr"], cell


@torch.no_grad()
def test_bits_per_byte_are_those_of_the_logits(executed, probe, tokenizer, model):
    text, _ = probe
    tokens = tokenizer(text)["input_ids"]
    kept = tokens[: model.config.n_positions - 1]
    assert 0 < len(kept) < len(tokens)  # a text longer than the model's positions is cut
    logits = model(torch.tensor([[tokenizer.eos_token_id, *kept]])).logits[0]
    nats = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(kept), reduction="sum").item()
    read = tokenizer.decode(kept)
    assert text.startswith(read)
    output = printed(executed, "surprise")
    assert output.startswith(f"{len(kept)} of {len(tokens)} tokens, {len(read.encode())} bytes")
    (bits_per_byte,) = re.findall(r"([\d.]+) bits per byte", output)
    assert float(bits_per_byte) == pytest.approx(nats / math.log(2) / len(read.encode()), abs=1e-4)


@torch.no_grad()
def test_the_greedy_completion_is_that_of_generate(executed, probe, tokenizer, model):
    _, prompt = probe
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(prompt)["input_ids"]]])
    output = model.generate(ids, do_sample=False, max_new_tokens=model.config.n_positions - ids.shape[1])
    written = tokenizer.decode(output[0], skip_special_tokens=True)
    assert written.startswith(prompt)
    assert len(set(written.removeprefix(prompt))) > 3  # not one token again and again, which says little
    assert printed(executed, "greedy") == written + "\n"
