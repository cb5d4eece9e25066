"""Small real inputs, and the real commands to run on them."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may need the network
# Many tests look at the last digits. Left to itself, training takes bf16 where the machine has it.
os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the other core is another worker's
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # and a pool of processes would only cost its start

from support import processes
from support.processes import REPOSITORY

from pretraining.cli import run_script

WORDS = """apple bridge candle desert engine forest garden harbor island jacket kettle ladder meadow needle orchard
    pencil quarry ribbon saddle timber umbrella valley window yellow zebra anchor basket copper dragon ember""".split()
# The files that take longest are handed out first: none of them is left alone at the end, beside an idle core.
LONGEST = """test_faults test_scale test_checkpoints test_training test_callers test_docs test_packing test_data
    test_stream test_ecosystem test_publish test_generate test_loss_without_logits test_gaps test_benchmarks
    test_precision test_hub_data test_fuzz""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)

    items.sort(key=place)


def run(*command: object, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess:
    """Run a command to its end, on the CPU with one thread, and keep its output."""
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300
    )


def script(name: str | Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run one of the repository's scripts, or the one at a path, to its end in a process of its own."""
    return processes.start(name, *arguments, **environment).wait()


@pytest.fixture
def refuse(monkeypatch, capfd) -> Callable[..., list[str]]:
    """
    `refuse(module, *arguments)`: what a script says on stderr to a command line that it has to refuse with status 2.
    It runs in this process: dozens of command lines need not import everything once more.
    """

    def call(module: ModuleType, *arguments: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            run_script(module.main)
        assert end.value.code == 2
        return capfd.readouterr().err.splitlines()

    return call


def succeed(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def warnings_in(output: str) -> list[str]:
    """Lines with a warning, but for that of a precision which is not the best one of the machine at hand."""
    return [line for line in output.splitlines() if "warning" in line and "leave --mixed_precision out" not in line]


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def make_documents(number: int, seed: int = 0) -> list[str]:
    """Python-like documents of 20 to 200 words, with some structure that a model can learn."""
    generator = random.Random(seed)
    documents = []
    for _ in range(number):
        lines = [
            f"def {generator.choice(WORDS)}({generator.choice(WORDS)}):\n    return {generator.choice(WORDS)}\n"
            for _ in range(generator.randrange(5, 50))
        ]
        documents.append("\n".join(lines))
    return documents


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory) -> Path:
    """120 documents as JSON lines."""
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in make_documents(120)))
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, corpus_file) -> Path:
    """The corpus, packed into rows of 32 tokens of a 320-token vocabulary."""
    folder = tmp_path_factory.mktemp("data") / "packed"
    arguments = ("--train_file", corpus_file, "--tokenizer_vocab_size", 320, "--block_size", 32)
    succeed(script("prepare_data.py", "--output_dir", folder, *arguments))
    return folder


TINY = "n_layer=2,n_embd=32,n_head=2,n_positions=32"


def train(data_dir: Path, output_dir: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Train a tiny model; `arguments` win over the ones here."""
    defaults = ("--config_overrides", TINY, "--per_device_train_batch_size", 4, "--logging_steps", 1)
    return script("train_accelerate.py", "--data_dir", data_dir, "--output_dir", output_dir, *defaults, *arguments)
