"""One training, however it is launched: the reference is one process with one batch for each step."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import REPOSITORY, TINY, metrics, run, script, succeed
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from support.generated_items import generated_records, write_items
from support.local_tasks import write_tasks
from support.processes import free_port, run_ranks, start
from support.tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import train_accelerate
from pretraining.distributed.processes import WORLD_SIZES, check_launch
from pretraining.errors import UserError
from pretraining.evaluation.hellaswag_items import encode_items, load_items
from pretraining.evaluation.hellaswag_scoring import score_items, summarise
from pretraining.training.model import load_model_and_tokenizer

ACCELERATE = Path(sys.executable).with_name("accelerate")
SAME = {"step", "tokens", "loss", "learning_rate", "eval_loss", "eval_bits_per_byte", "hellaswag_acc", "hellaswag_n"}
# Without biases of the keys: their gradients are zero but for rounding, which AdamW scales up to full steps.
SHAPE = TINY + ",qkv_bias=false"


@pytest.fixture(scope="module")
def flags(data_dir, tmp_path_factory) -> tuple:
    """20 steps of 16 rows, with all that happens on the way."""
    items = write_items(tmp_path_factory.mktemp("items") / "items.jsonl", generated_records(19))
    return (
        *("--data_dir", data_dir, "--config_overrides", SHAPE, "--tokens_per_step", 512, "--max_steps", 20),
        *("--eval_steps", 10, "--eval_iters", 1, "--save_steps", 10, "--sample_prompts", "def ", "--logging_steps", 1),
        *("--hellaswag_steps", 10, "--hellaswag_file", items, "--report_to", "none"),
    )


@pytest.fixture(scope="module")
def reference(flags, tmp_path_factory) -> Path:
    return train_alone(flags, tmp_path_factory.mktemp("reference") / "run")


def train_alone(flags: tuple, output_dir: Path) -> Path:
    batch = ("--per_device_train_batch_size", 16)
    result = succeed(script("train_accelerate.py", *flags, *batch, "--output_dir", output_dir))
    (output_dir / "samples.txt").write_text(samples(result))
    return output_dir


def samples(result: subprocess.CompletedProcess) -> str:
    return re.search(r"--- sample at step 20\n(.*?)\n---", result.stdout, re.DOTALL)[1]


def sharding(tmp_path: Path, num_processes: int, mixed_precision: str = "no") -> Path:
    """configs/fsdp2.yaml as it is but for what makes it run on a CPU."""
    config = yaml.safe_load((REPOSITORY / "configs/fsdp2.yaml").read_text())
    config |= {"num_processes": num_processes, "mixed_precision": mixed_precision, "use_cpu": True}
    path = tmp_path / "fsdp.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def launch_sharded(config: Path, *arguments: object) -> subprocess.CompletedProcess:
    programs = (REPOSITORY / "tests/support/fsdp_on_cpu.py", REPOSITORY / "train_accelerate.py")
    return run(ACCELERATE, "launch", "--config_file", config, *programs, *arguments)


def fork_sharded(config: Path, *arguments: object) -> subprocess.CompletedProcess:
    """As `accelerate launch` would start it, by accelerate's own reading of the config. Returns the first process."""
    args = launch_command_parser().parse_args(["--config_file", str(config), "train_accelerate.py"])
    args, *_ = _validate_launch_command(args)
    given = {name: value for name, value in prepare_multi_gpu_env(args).items() if os.environ.get(name) != value}
    given = {name: value for name, value in given.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    programs = ("tests/support/fsdp_on_cpu.py", REPOSITORY / "train_accelerate.py")
    results = run_ranks(args.num_processes, *programs, *arguments, **given)
    for result in results:
        succeed(result)
    return results[0]


def relative_distance(weights: dict, others: dict) -> float:
    """Of all weights as one vector."""
    assert weights.keys() == others.keys()
    squares = [
        ((weights[name] - others[name]).double().square().sum(), weights[name].square().sum()) for name in weights
    ]
    return float((sum(part for part, _ in squares) / sum(whole for _, whole in squares)).sqrt())


def assert_same_training(output_dir: Path, reference: Path, result: subprocess.CompletedProcess) -> None:
    lines, expected = metrics(output_dir), metrics(reference)
    assert len(lines) == len(expected) == 20 + 2 + 2
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys()
        for key in line.keys() & SAME:
            assert line[key] == pytest.approx(other[key], rel=1e-6), (key, line, other)
        if "grad_norm" in line:
            assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-5)
    weights = load_file(output_dir / "model.safetensors")
    assert relative_distance(weights, load_file(reference / "model.safetensors")) < 1e-6
    assert samples(result) == (reference / "samples.txt").read_text()
    assert os.readlink(output_dir / "best-checkpoint") == "checkpoint-000010"
    from_checkpoint = AutoModelForCausalLM.from_pretrained(output_dir / "best-checkpoint").state_dict()
    from_reference = AutoModelForCausalLM.from_pretrained(reference / "best-checkpoint").state_dict()
    assert relative_distance(from_checkpoint, from_reference) < 1e-6


def test_hellaswag_in_the_loop_is_what_its_script_says_of_the_model(flags, reference):
    model, tokenizer = load_model_and_tokenizer(AutoModelForCausalLM, str(reference))
    items = load_items(flags[flags.index("--hellaswag_file") + 1])
    encoded = encode_items(model.config, tokenizer, items, "completion")
    scores = score_items(model, encoded, batch_size=3, as_trees=False)
    summary = summarise(encoded, scores, "completion")
    last = [line for line in metrics(reference) if "hellaswag_n" in line][-1]
    assert {key: last[f"hellaswag_{key}"] for key in ("n", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr")} == {
        key: summary[key] for key in ("n", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    }
    assert (reference / "plots/hellaswag.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("is_sharded", [False, True])
def test_tasks_in_the_loop_are_what_their_script_says_of_the_model(is_sharded, flags, tmp_path):
    files = write_tasks(tmp_path)
    output_dir, tasks = tmp_path / "run", (files["four"], files["last_word"])
    arguments = (*flags, "--per_device_train_batch_size", 8, "--output_dir", output_dir)
    arguments += ("--eval_tasks", *tasks, "--eval_tasks_steps", 10, "--eval_tasks_limit", 3)
    if is_sharded:
        fork_sharded(sharding(tmp_path, 2), *arguments)
    else:
        for result in run_ranks(2, "train_accelerate.py", *arguments):
            succeed(result)
    arguments = ("--tasks", *tasks, "--limit", 3, "--output_file", tmp_path / "results.json")
    succeed(script("eval_harness.py", "--model_name_or_path", output_dir, *arguments))
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    lines = [line for line in metrics(output_dir) if "eval_tasks_n" in line]
    assert [(line["step"], line["eval_tasks_n"]) for line in lines] == [(10, 6), (20, 6)]
    for task, metric in (("four", "acc"), ("four", "acc_norm"), ("last_word", "perplexity"), ("last_word", "acc")):
        for name in (metric, f"{metric}_stderr"):
            assert lines[-1][f"{task}_{name}"] == pytest.approx(results[task][f"{name},none"], rel=1e-4), (task, name)
    assert lines[0]["last_word_perplexity"] != lines[1]["last_word_perplexity"]
    assert (output_dir / "plots/tasks.png").read_bytes().startswith(b"\x89PNG")
    card = ModelCard.load(output_dir / "README.md")
    entries = {(each.dataset_name, each.metric_type): each for each in card.data.eval_results}
    assert entries["four", "acc_norm"].metric_value == pytest.approx(lines[-1]["four_acc_norm"], abs=1e-4)
    assert (entries["four", "acc_norm"].metric_args["n"], entries["four", "acc_norm"].metric_args["task"]) == (
        3,
        "four",
    )
    assert "| four, 0-shot | `acc_norm` |" in card.text


def test_tasks_that_generate_are_refused_where_the_model_is_sharded(flags, tmp_path):
    files = write_tasks(tmp_path)
    arguments = (*flags, "--per_device_train_batch_size", 8, "--eval_tasks", files["writes"])
    with pytest.raises(AssertionError, match="--eval_tasks: writes generates text, which a sharded model cannot do"):
        fork_sharded(sharding(tmp_path, 2), *arguments, "--output_dir", tmp_path / "run")


def log_output_code() -> None:
    """As by TORCH_LOGS, which is read when torch is imported."""
    torch._logging.set_logs(output_code=True)


def test_two_processes_with_a_compiled_model_and_checkpointed_activations(flags, tmp_path):
    flags = (*flags, "--config_overrides", SHAPE.replace("n_layer=2", "n_layer=1"))  # each layer is compiled
    reference = train_alone(flags, tmp_path / "reference")
    arguments = (*flags, "--per_device_train_batch_size", 4, "--torch_compile", "--gradient_checkpointing")
    arguments += ("--output_dir", tmp_path / "run")
    results = run_ranks(2, "train_accelerate.py", *arguments, faults={0: log_output_code, 1: log_output_code})
    assert all("Output code" in succeed(result).stderr for result in results)  # it was compiled
    assert_same_training(tmp_path / "run", reference, results[0])


def test_shards_on_two_processes_and_then_on_four(flags, reference, tmp_path):
    two, four = tmp_path / "two", tmp_path / "four"
    arguments = (*flags, "--per_device_train_batch_size", 4, "--output_dir", two)
    result = succeed(launch_sharded(sharding(tmp_path, 2), *arguments))
    assert_same_training(two, reference, result)

    shutil.copytree(two, four, symlinks=True)
    (four / "model.safetensors").unlink()  # as if it had ended in the middle
    arguments = (*flags, "--per_device_train_batch_size", 2, "--output_dir", four)
    result = fork_sharded(sharding(tmp_path, 4), *arguments)
    assert "continuing from" in result.stdout
    assert_same_training(four, reference, result)


@pytest.fixture(scope="module")
def muon(data_dir, tmp_path_factory) -> tuple[tuple, dict]:
    """Flags of 20 steps of Muon, and the weights with which one process ends."""
    folder = tmp_path_factory.mktemp("muon")
    flags = ("--data_dir", data_dir, "--config_overrides", SHAPE, "--tokens_per_step", 512, "--max_steps", 20)
    flags += ("--optim", "muon", "--learning_rate", 3e-3, "--eval_iters", 1, "--report_to", "none")
    succeed(script("train_accelerate.py", *flags, "--per_device_train_batch_size", 16, "--output_dir", folder / "run"))
    return flags, load_file(folder / "run/model.safetensors")


@pytest.mark.parametrize("num_processes", [2, 4])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_muon_trains_the_same_model_on_any_number_of_processes(num_processes, is_sharded, muon, tmp_path):
    flags, expected = muon
    arguments = (*flags, "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "run")
    if is_sharded:
        fork_sharded(sharding(tmp_path, num_processes), *arguments)
    else:
        for result in run_ranks(num_processes, "train_accelerate.py", *arguments):
            succeed(result)
    assert relative_distance(load_file(tmp_path / "run/model.safetensors"), expected) < 1e-5


def test_muon_on_shards_in_bf16_is_muon(flags, tmp_path):
    """Only roughly: in bf16 a gradient's last bit can change the third digit of the update."""
    flags = (*flags, "--optim", "muon", "--learning_rate", 3e-3, "--max_steps", 11)
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    arguments = (*flags, "--per_device_train_batch_size", 16, "--output_dir", whole)
    succeed(script("train_accelerate.py", *arguments, ACCELERATE_MIXED_PRECISION="bf16"))
    arguments = (*flags, "--per_device_train_batch_size", 4, "--output_dir", sharded)
    fork_sharded(sharding(tmp_path, 2, "bf16"), *arguments)
    first = load_file(sharded / "model.safetensors")
    assert relative_distance(first, load_file(whole / "model.safetensors")) < 0.02
    losses, expected = (
        torch.tensor([line["loss"] for line in metrics(folder) if "loss" in line]) for folder in (sharded, whole)
    )
    torch.testing.assert_close(losses, expected, rtol=2e-3, atol=0)
    # Products are in bf16, the loss is not: sums of four numbers from 1 to 2 with bf16's 8 bits would be whole here.
    assert ((losses * 1024) % 1 != 0).sum() > 5
    assert all(weight.dtype == torch.float32 and (weight != weight.bfloat16()).any() for weight in first.values())


@pytest.fixture(scope="module")
def launch_node(flags, tmp_path_factory):
    """With configs/multi-node.yaml as it is but for what makes it two machines with one CPU each."""
    config = yaml.safe_load((REPOSITORY / "configs/multi-node.yaml").read_text())
    config |= {"num_processes": 2, "use_cpu": True, "mixed_precision": "no"}
    path = tmp_path_factory.mktemp("nodes") / "nodes.yaml"
    path.write_text(yaml.safe_dump(config))

    def call(rank: int, port: int, cwd: Path, *more: object) -> subprocess.CompletedProcess:
        place = ("--machine_rank", rank, "--main_process_ip", "127.0.0.1", "--main_process_port", port)
        program = (ACCELERATE, "launch", "--config_file", path, *place, *more, REPOSITORY / "train_accelerate.py")
        return run(*program, *flags, "--per_device_train_batch_size", 4, "--output_dir", "run", cwd=cwd)

    return call


def test_two_machines_of_which_one_writes(launch_node, flags, reference, tmp_path):
    """Each has a folder of its own, as without a shared file system. The second try continues the first."""
    folders = tmp_path / "node-0", tmp_path / "node-1"
    for folder in folders:
        folder.mkdir()
    port = free_port()
    with ThreadPoolExecutor(2) as nodes:
        results = list(nodes.map(launch_node, (0, 1), (port, port), folders))
    assert all("training:" in succeed(result).stderr for result in results)  # a bar for each machine
    assert "2 processes" in results[0].stdout
    assert_same_training(folders[0] / "run", reference, results[0])
    assert list(folders[1].iterdir()) == []

    (folders[0] / "run/model.safetensors").unlink()
    arguments = ("train_accelerate.py", *flags, "--per_device_train_batch_size", 4, "--output_dir", "run")
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **sizes}
    nodes = [start(*arguments, cwd=folder, RANK=str(rank), **place) for rank, folder in enumerate(folders)]
    results = [node.wait() for node in nodes]
    assert all("training:" in succeed(result).stderr for result in results)
    assert "continuing from" in results[0].stdout
    assert_same_training(folders[0] / "run", reference, results[0])
    assert list(folders[1].iterdir()) == []


def test_a_machine_that_stays_alone_does_not_train(launch_node, tmp_path):
    result = launch_node(0, free_port(), tmp_path, "--rdzv_conf", "timeout=1")
    assert result.returncode != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_processes_that_do_not_find_each_other_are_an_error(name, monkeypatch):
    for other in WORLD_SIZES:
        monkeypatch.delenv(other, raising=False)
    check_launch(1)
    monkeypatch.setenv(name, "4")
    check_launch(4)
    with pytest.raises(UserError, match=f"one of 4 processes \\({name}\\), but found 1"):
        check_launch(1)


def test_sharding_that_cannot_be_is_an_error(flags, tmp_path, refuse, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    errors = refuse(train_accelerate, *flags, "--per_device_train_batch_size", 16, "--output_dir", tmp_path / "run")
    assert errors == [
        "train_accelerate.py: error: the launch config asks for FSDP, which needs several processes with a GPU each"
    ]
    assert not (tmp_path / "run").exists()


def uneven_batches(num_steps: int) -> list[dict]:
    """Rows with labels missing from the front of some, and one without any: no two parts have as many."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(num_steps):
        input_ids = torch.randint(1, 101, (12, 24), generator=generator)
        labels = input_ids.clone()
        for row, length in zip(labels, torch.randint(0, 25, (12,), generator=generator), strict=True):
            row[:length] = -100
        labels[5] = -100
        batches.append({"input_ids": input_ids, "labels": labels})
    return batches


UNEVEN = """
import json, sys
sys.path[:0] = sys.argv[1:]
from accelerate import PartialState
from safetensors.torch import save_file
from test_scale import uneven_batches
from support.tiny_models import tiny_model
from pretraining.distributed.processes import open_accelerator
from pretraining.optimization.optimizer import build_optimizer
from train_accelerate import train_step

accelerator = open_accelerator(PartialState(cpu=True), 3, torch_compile=False, mixed_precision="no")
model = tiny_model(qkv_bias=False).train()
model, optimizer = accelerator.prepare(model, build_optimizer(model, "adamw", 6e-4, 0.1, accelerator.device))
losses = []
for batch in uneven_batches(20):
    parts = [{name: batch[name][start : start + 2] for name in batch} for start in range(0, 12, 2)]
    result = train_step(model, optimizer, parts[accelerator.process_index :: 2], accelerator, max_grad_norm=1.0)
    losses.append(result.loss)
if accelerator.is_main_process:
    save_file(dict(accelerator.unwrap_model(model).named_parameters()), "weights.safetensors")
    json.dump(losses, open("losses.json", "w"))
accelerator.free_memory()
accelerator.end_training()
"""


def test_labels_that_are_missing_here_and_there_weigh_the_same_everywhere(tmp_path):
    """Two processes with three micro-batches each, against torch alone with one mean over all labels of a batch."""
    (tmp_path / "program.py").write_text(UNEVEN)
    for result in run_ranks(2, tmp_path / "program.py", REPOSITORY / "tests", Path(__file__).parent, cwd=tmp_path):
        succeed(result)

    model = tiny_model(qkv_bias=False).train()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))
    losses = []
    for batch in uneven_batches(20):
        logits = model(batch["input_ids"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(losses, rel=1e-6)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert relative_distance(load_file(tmp_path / "weights.safetensors"), weights) < 1e-6
