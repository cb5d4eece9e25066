"""The loop and what it leaves behind: real processes, from the command line to a model that loads elsewhere."""

import json
import math
import os
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from conftest import REPOSITORY, TINY, make_documents, metrics, run, script, succeed, train, warnings_in
from safetensors.torch import load_file
from support.processes import start, wait_until
from support.tiny_models import random_ids, tiny_model, tiny_stock_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

import modeling_gpt2scratch  # noqa: F401  registers the model type
import train_accelerate
from pretraining.data.data_folder import open_data_folder
from pretraining.data.row_order import RowOrder
from pretraining.optimization.optimizer import build_optimizer
from pretraining.optimization.schedule import Schedule
from pretraining.records import run_log
from pretraining.records.metrics import read_metrics
from pretraining.tokenization.tokenizer import train_tokenizer

STEPS = 300
SMALL_BATCH = ("--per_device_train_batch_size", 4)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, data_dir):
    """A short run with everything on: bf16, Muon, accumulation, evaluations, samples, checkpoints."""
    output_dir = tmp_path_factory.mktemp("runs") / "small"
    arguments = ("--max_steps", STEPS, "--optim", "muon", "--learning_rate", "0.01", "--warmup_steps", 5)
    arguments += ("--gradient_accumulation_steps", 2, "--eval_steps", 100, "--save_steps", 100, "--sample_steps", 150)
    arguments += ("--sample_prompts", "def ", "--report_to", "tensorboard")
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    defaults = ("--config_overrides", TINY, "--per_device_train_batch_size", 4, "--logging_steps", 1)
    flags = ("--data_dir", data_dir, "--output_dir", output_dir, *defaults, *arguments)
    result = succeed(script("train_accelerate.py", *flags, **environment))
    return output_dir, result


def test_metrics_have_the_promised_keys_and_the_loss_falls(finished_run, data_dir):
    lines = metrics(finished_run[0])
    training = [line for line in lines if "loss" in line]
    evaluation = [line for line in lines if "eval_loss" in line]
    clock = {"step", "tokens", "elapsed_seconds"}
    speed = {"tokens_per_second", "step_seconds"}
    assert all(set(line) == clock | speed | {"loss", "learning_rate", "grad_norm"} for line in training)
    assert all(set(line) == clock | {"eval_loss", "eval_perplexity", "eval_bits_per_byte"} for line in evaluation)
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    assert [line["step"] for line in evaluation] == [100, 200, 300]
    assert training[-1]["tokens"] == STEPS * 2 * 4 * 32
    assert training[0]["loss"] == pytest.approx(math.log(320), rel=0.03)  # a fresh model knows nothing
    assert evaluation[0]["eval_loss"] > evaluation[1]["eval_loss"] > evaluation[2]["eval_loss"]
    assert evaluation[-1]["eval_loss"] < 0.5 * math.log(320)
    validation = json.loads((data_dir / "dataset.json").read_text())["splits"]["validation"]
    for line in evaluation:
        bits = line["eval_loss"] / math.log(2) * validation["tokens"] / validation["bytes"]
        assert line["eval_bits_per_byte"] == pytest.approx(bits)
        assert line["eval_perplexity"] == pytest.approx(math.exp(line["eval_loss"]))


def test_the_run_folder_holds_what_was_promised(finished_run):
    output_dir, result = finished_run
    files = {path.name for path in output_dir.iterdir()}
    assert files >= {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("modeling_gpt2scratch.py", "configuration_gpt2scratch.py", "README.md"),
        *("training_args.yaml", "metrics.jsonl", "plots", "checkpoint-000100", "checkpoint-000200"),
    }
    assert not any("incomplete" in name for name in files)
    assert (output_dir / "plots/loss.png").read_bytes().startswith(b"\x89PNG")
    card = (output_dir / "README.md").read_text()
    last = [line for line in metrics(output_dir) if "eval_loss" in line][-1]
    for expected in (f"{last['eval_bits_per_byte']:.3f}", "`gzip -9`", "`xz -9`", "pipeline_tag: text-generation"):
        assert expected in card
    assert f"{last['eval_bits_per_byte']:.3f} bits per byte" in result.stdout
    assert "gzip -9" in result.stdout
    assert result.stdout.count("--- sample at step") == 2
    assert warnings_in(result.stdout + result.stderr) == []
    assert list(output_dir.rglob("events.out.tfevents*"))
    auto_map = json.loads((output_dir / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


def test_tensorboard_gets_what_metrics_jsonl_has(finished_run):
    sent = EventAccumulator(str(finished_run[0] / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for key in ("loss", "grad_norm", "eval_loss"):
        expected = {line["step"]: line[key] for line in metrics(finished_run[0]) if key in line}
        found = {event.step: event.value for event in sent.Scalars(key)}
        assert found.keys() == expected.keys()
        assert all(abs(found[step] - value) < 1e-6 * value for step, value in expected.items())


def test_a_pipeline_outside_the_repository_writes_text_and_the_cache_changes_nothing(finished_run, tmp_path):
    program = f"""
import importlib.util
from transformers import AutoModelForCausalLM, pipeline
assert importlib.util.find_spec("modeling_gpt2scratch") is None
generator = pipeline("text-generation", model={str(finished_run[0])!r}, trust_remote_code=True)
assert generator("def ")[0]["generated_text"].startswith("def ")  # all defaults: ends at the model's last position
greedy = dict(do_sample=False, max_new_tokens=25)
with_cache = generator("def ", **greedy)[0]["generated_text"]
assert with_cache == generator("def ", use_cache=False, **greedy)[0]["generated_text"]
print(with_cache)
"""
    environment = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    text = succeed(run(sys.executable, "-c", program, cwd=tmp_path, **environment)).stdout
    assert "return" in text  # it has learnt what the documents look like


def test_training_args_are_a_recipe_for_the_same_run(finished_run, tmp_path):
    output_dir = finished_run[0]
    arguments = yaml.safe_load((output_dir / "training_args.yaml").read_text())
    assert arguments["max_steps"] == STEPS and arguments["optim"] == "muon"
    again = ("--config", output_dir / "training_args.yaml", "--output_dir", tmp_path / "again")
    succeed(script("train_accelerate.py", *again, ACCELERATE_MIXED_PRECISION="bf16"))
    first, second = load_file(output_dir / "model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_goes_on_from_a_stock_checkpoint_and_publishes_what_stock_gpt2_computes(data_dir, tmp_path):
    stock = tiny_stock_model(vocab_size=320, n_positions=32)
    stock.save_pretrained(tmp_path / "stock")
    arguments = ("--model_name_or_path", tmp_path / "stock", "--config_overrides", "", "--max_steps", 2)
    succeed(train(data_dir, tmp_path / "run", *arguments, "--warmup_steps", 0, "--learning_rate", 0))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    ids = random_ids(2, 32, vocab_size=320)
    torch.testing.assert_close(trained(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)
    assert metrics(tmp_path / "run")[0]["loss"] > 5.5  # it was not trained, and says so


def test_a_preset_with_changes_and_a_vocabulary_of_no_round_size(corpus_file, tmp_path):
    """301 tokens are padded to 320 where products are computed, and nowhere else."""
    prepare = ("--train_file", corpus_file, "--tokenizer_vocab_size", 301, "--block_size", 32)
    succeed(script("prepare_data.py", "--output_dir", tmp_path / "data", *prepare))
    changes = "n_layer=1,n_embd=32,n_positions=32"
    arguments = ("--config_name", "350M", "--config_overrides", changes, "--max_steps", 2)
    succeed(train(tmp_path / "data", tmp_path / "run", *arguments))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.n_head == 16
    assert model.config.vocab_size == len(model.lm_head.weight) == 301


def test_a_finished_run_is_not_overwritten(finished_run, refuse):
    output_dir = finished_run[0]
    before = (output_dir / "model.safetensors").stat().st_mtime_ns
    flags = ("--config", output_dir / "training_args.yaml")
    assert "finished run" in succeed(script("train_accelerate.py", *flags)).stdout
    (error,) = refuse(train_accelerate, *flags, "--seed", 1)
    assert "holds a finished run, of --seed 42, not 1" in error
    assert (output_dir / "model.safetensors").stat().st_mtime_ns == before


def key_biases(weights: dict[str, torch.Tensor]) -> set[str]:
    """
    Adding a constant to all keys changes no attention weight, so their biases' gradients are zero but for rounding,
    which AdamW scales up to full steps: two exact programs differ in them, to no effect.
    """
    return {name for name in weights if name.endswith("k_proj.bias")}


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_the_loop_is_a_plain_loop_over_the_same_rows(optim, finished_run, data_dir, tmp_path):
    """Against torch alone, but for Muon itself: no accelerate, and an accumulation that is one big batch."""
    start = finished_run[0]
    flags = ("--model_name_or_path", start, "--max_steps", 8, "--learning_rate", 1e-3, "--warmup_steps", 2)
    flags += ("--optim", optim)
    arguments = (*flags, "--gradient_accumulation_steps", 3, "--per_device_train_batch_size", 4, "--logging_steps", 1)
    succeed(script("train_accelerate.py", "--data_dir", data_dir, "--output_dir", tmp_path / "run", *arguments))

    model = AutoModelForCausalLM.from_pretrained(start)
    rows = open_data_folder(data_dir).train
    order = iter(RowOrder([len(rows)], batch_size=12, seed=42))
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=False)
    if optim == "muon":
        optimizer = build_optimizer(model, "muon", 1e-3, 0.1, torch.device("cpu"))
    for step, line in zip(range(8), metrics(tmp_path / "run"), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * Schedule("cosine_with_min_lr", 2, 8).learning_rate_factor(step)
            group["momentum"] = 0.85 + step / 300 * 0.1  # Muon's
        input_ids = rows.__getitems__(next(order)).long()
        logits = model(input_ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), input_ids[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    trained = load_file(tmp_path / "run/model.safetensors")
    for name in trained.keys() - key_biases(trained):
        # In norm: AdamW scales a gradient that is nearly zero, and so mostly rounding, up to a full step as well.
        difference = (trained[name] - model.state_dict()[name]).norm()
        assert difference <= 2e-5 * model.state_dict()[name].norm(), name


def test_the_loss_curve_is_that_of_stock_gpt2_in_a_plain_loop(data_dir, tmp_path):
    stock = tiny_stock_model(vocab_size=320, n_positions=32).train()
    stock.save_pretrained(tmp_path / "stock")
    flags = ("--model_name_or_path", tmp_path / "stock", "--max_steps", 50, "--learning_rate", 1e-3)
    arguments = (
        *flags,
        "--lr_scheduler_type",
        "constant",
        "--config_overrides",
        "",
        "--per_device_train_batch_size",
        8,
    )
    succeed(train(data_dir, tmp_path / "run", *arguments))

    rows = open_data_folder(data_dir).train
    order = iter(RowOrder([len(rows)], batch_size=8, seed=42))
    matrices = [parameter for parameter in stock.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in stock.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    losses = []
    for _ in range(50):
        input_ids = rows.__getitems__(next(order)).long()
        loss = stock(input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stock.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    logged = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert logged == pytest.approx(losses, abs=1e-4)


def test_one_batch_is_learnt_by_heart_and_the_best_checkpoint_outlives_later_ones(corpus_file, tmp_path):
    (tmp_path / "one.txt").write_text(make_documents(1, seed=9)[0])
    prepare = ("--train_file", tmp_path / "one.txt", "--validation_file", corpus_file, "--block_size", 32)
    succeed(script("prepare_data.py", "--output_dir", tmp_path / "data", *prepare, "--tokenizer_vocab_size", 320))
    batch_size = len(open_data_folder(tmp_path / "data").train)
    arguments = ("--max_steps", 200, "--per_device_train_batch_size", batch_size, "--learning_rate", 1e-2)
    arguments += ("--config_overrides", "n_layer=2,n_embd=64,n_head=2,n_positions=32", "--weight_decay", 0)
    arguments += ("--eval_steps", 40, "--save_steps", 40, "--save_total_limit", 1)
    result = succeed(train(tmp_path / "data", tmp_path / "run", *arguments))
    lines = metrics(tmp_path / "run")
    assert [line["loss"] for line in lines if "loss" in line][-1] < 0.05

    # What it learns by heart does not help with other text: the evaluation loss rises again.
    eval_losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min(eval_losses, key=eval_losses.get)
    assert best < 160
    assert os.readlink(tmp_path / "run/best-checkpoint") == f"checkpoint-{best:06d}"
    kept = {path.name for path in (tmp_path / "run").glob("checkpoint-0*")}
    assert kept == {f"checkpoint-{best:06d}", "checkpoint-000160"}
    assert f"checkpoint-{best:06d} (best-checkpoint) has a lower eval_loss than the final model" in result.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/best-checkpoint").eval()
    rows = open_data_folder(tmp_path / "data").validation
    ids = rows.__getitems__(range(len(rows))).long()
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() == pytest.approx(eval_losses[best], rel=1e-5)


def test_the_start_is_summarised_a_strange_one_is_warned_of_and_what_fails_beside_it_stops_nothing(data_dir, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/training_args.yaml").write_text("{}\n")  # a run that came to nothing
    for name in ("tensorboard", "plots"):
        (tmp_path / "run" / name).write_text("where a folder should be")
    arguments = ("--config_overrides", TINY + ",initializer_range=1.0", "--max_steps", 7, "--report_to", "tensorboard")
    result = succeed(train(data_dir, tmp_path / "run", *arguments))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    assert f"{matrices + vectors:,} parameters: {matrices:,} with weight decay, {vectors:,} without" in result.stdout
    assert "7 steps of 128 tokens, 896 in all" in result.stdout
    assert re.search(r"[\d,]+ tokens/s: about \d+ seconds to go", result.stdout)
    assert re.search(r"warning: the first loss is [\d.]+, but should be about ln\(vocabulary\) = 5.77", result.stdout)
    for name in ("tensorboard", "plots/loss.png"):
        assert f"warning: {name} failed, the run goes on without it: " in result.stderr
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == list(range(1, 8))


def test_the_evaluation_is_the_mean_over_every_row_counted_once(finished_run, data_dir, tmp_path):
    flags = ("--model_name_or_path", finished_run[0], "--max_steps", 1, "--per_device_train_batch_size", 4)
    succeed(script("train_accelerate.py", "--data_dir", data_dir, "--output_dir", tmp_path / "run", *flags))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    rows = open_data_folder(data_dir).validation
    assert len(rows) % 4 != 0  # a last batch that is not full
    losses = []
    with torch.no_grad():
        for index in range(len(rows)):
            row = rows[index].long()
            log_probabilities = model(row[None]).logits[0, :-1].log_softmax(-1)
            losses += (-log_probabilities.gather(-1, row[1:, None])).flatten().tolist()
    assert metrics(tmp_path / "run")[-1]["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert f"trained further from `{finished_run[0].name}`" in (tmp_path / "run/README.md").read_text()


class FailingTracker(GeneralTracker):
    """Works until the third line, as one whose network goes away."""

    name, requires_logging_directory, tracker = "failing", False, None

    def __init__(self):
        super().__init__()
        self.steps = []

    def store_init_configuration(self, values: dict) -> None:
        self.settings = values

    def log(self, values: dict, step: int | None, **kwargs) -> None:
        if len(self.steps) == 2:
            raise ConnectionError("the network is gone")
        self.steps.append(step)

    def finish(self) -> None:
        raise AssertionError("it was done without")


def test_a_tracker_that_fails_on_the_way_is_done_without(tmp_path, monkeypatch, capsys):
    tracker = FailingTracker()
    monkeypatch.setitem(run_log.TRACKERS, "failing", lambda folder, step: tracker)
    with run_log.RunLog(Accelerator(cpu=True), tmp_path, 0, 5, ["failing"], {"seed": 1, "prompts": [""]}) as log:
        for step in range(1, 6):
            log.metrics(SimpleNamespace(step=step, tokens=10 * step, elapsed_seconds=1.0), {"loss": 5.0 - step})
    assert tracker.settings == {"seed": 1, "prompts": "['']"}
    assert tracker.steps == [1, 2]
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]
    errors = capsys.readouterr().err
    assert "warning: failing failed, the run goes on without it: the network is gone" in errors
    assert f"failing has nothing after step 2; {tmp_path / 'metrics.jsonl'} has everything" in errors


def test_what_is_not_finite_is_null_in_the_log_which_is_json(tmp_path):
    """Gradients that overflow in fp16 are nothing that went wrong: their norm is logged like any other."""
    run = SimpleNamespace(step=1, tokens=10, elapsed_seconds=1.0)
    with run_log.RunLog(Accelerator(cpu=True), tmp_path, 0, 5, [], {}) as log:
        log.metrics(run, {"loss": 5.0, "grad_norm": float("inf")})
    assert '"loss": 5.0, "grad_norm": null' in (tmp_path / "metrics.jsonl").read_text()


def test_memory_does_not_grow_with_evaluations(data_dir, tmp_path):
    """Each draws a plot, whose figure is 1.6 MB."""
    flags = ("--config_overrides", TINY, *SMALL_BATCH, "--eval_iters", 1, "--eval_steps", 1, "--report_to", "none")
    places = ("--data_dir", data_dir, "--output_dir", tmp_path)
    running = start("train_accelerate.py", *places, *flags, "--max_steps", 40)
    megabytes = []
    for evaluations in (10, 35):
        wait_until(lambda count=evaluations: sum("eval_loss" in line for line in read_metrics(tmp_path)) >= count)
        megabytes.append(psutil.Process(running.pid).memory_info().rss / 1e6)
    succeed(running.wait())
    assert megabytes[1] - megabytes[0] < 5


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_fp16_trains_as_fp32_does_and_resumes_with_its_loss_scale(optim, data_dir, tmp_path):
    flags = ("--data_dir", data_dir, "--config_overrides", TINY, *SMALL_BATCH, "--gradient_accumulation_steps", 2)
    flags += ("--optim", optim, "--learning_rate", 3e-3, "--max_steps", 12, "--save_steps", 6, "--logging_steps", 1)
    flags += ("--report_to", "none", "--eval_iters", 1, "--output_dir")
    succeed(script("train_accelerate.py", *flags, tmp_path / "fp32"))
    result = succeed(script("train_accelerate.py", *flags, tmp_path / "fp16", ACCELERATE_MIXED_PRECISION="fp16"))
    assert "fp16 (as asked for)" in result.stdout
    losses, expected = (
        [line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("fp16", "fp32")
    )
    assert losses == pytest.approx(expected, rel=2e-3) and losses != expected
    state = torch.load(tmp_path / "fp16/checkpoint-000006/optimizer.pt")
    assert state["scaler"]["scale"] > 1 and state["scaler"]["_growth_tracker"] == 6  # six steps without an overflow
    whole = load_file(tmp_path / "fp16/model.safetensors")
    (tmp_path / "fp16/model.safetensors").unlink()
    succeed(script("train_accelerate.py", *flags, tmp_path / "fp16", ACCELERATE_MIXED_PRECISION="fp16"))
    resumed = load_file(tmp_path / "fp16/model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


OVERFLOW = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from accelerate import PartialState
from support.tiny_models import random_ids, tiny_model
from pretraining.distributed.processes import open_accelerator
from pretraining.training.bad_steps import BadSteps
from pretraining.optimization.optimizer import build_optimizer
from train_accelerate import train_step

accelerator = open_accelerator(PartialState(cpu=True), 1, torch_compile=False, mixed_precision="fp16")
model = tiny_model().train()
model, optimizer = accelerator.prepare(model, build_optimizer(model, "muon", 1e-2, 0.1, accelerator.device))
accelerator.scaler.scale(torch.ones(1))  # which makes it
accelerator.scaler.update(2.0**40)  # a loss times so much is infinite in fp16
before = [parameter.clone() for parameter in model.parameters()]
ids = random_ids(2, 16)
bad_steps = BadSteps(has_scaler=True)
result = train_step(model, optimizer, [{"input_ids": ids, "labels": ids}], accelerator, 1.0, bad_steps)
assert not result.is_finite(), result
assert all(map(torch.equal, before, model.parameters())) and not optimizer.state
assert accelerator.scaler.get_scale() == 2.0**39
accelerator.scaler.update(2.0**10)
assert train_step(model, optimizer, [{"input_ids": ids, "labels": ids}], accelerator, 1.0).is_finite()
assert not any(map(torch.equal, before, model.parameters()))
"""


def test_gradients_that_overflow_in_fp16_change_no_weight_of_muons(tmp_path):
    program = tmp_path / "overflow.py"
    program.write_text(OVERFLOW)
    succeed(script(program, REPOSITORY / "tests"))


def test_an_earlier_checkpoint_begins_a_branch_of_its_own(finished_run, tmp_path):
    """What came after it before is set aside: it is not rotated against, not gone on from, and not the best."""
    output_dir = tmp_path / "run"
    shutil.copytree(finished_run[0], output_dir)  # follows the link to the best: that is a folder then
    (output_dir / "model.safetensors").unlink()
    flags = ("--config", output_dir / "training_args.yaml", "--output_dir", output_dir, "--eval_steps", 50)
    flags += ("--resume_from_checkpoint", output_dir / "checkpoint-000100")
    flags += ("--save_steps", 50, "--save_total_limit", 1)
    result = succeed(script("train_accelerate.py", *flags, ACCELERATE_MIXED_PRECISION="bf16"))
    assert "set aside, as this run goes on from an earlier step: " in result.stdout
    names = {path.name for path in output_dir.glob("*checkpoint-*")}
    assert names == {"abandoned-checkpoint-000200", "checkpoint-000250"}
    assert os.readlink(output_dir / "best-checkpoint") == "checkpoint-000250"
    first, second = (load_file(folder / "model.safetensors") for folder in (finished_run[0], output_dir))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--max_step", "5"], ["unknown flag --max_step, did you mean --max_steps?"]),
        (["--config", "{tmp}/recipe.yaml"], ["recipe.yaml: unknown key 'learning_rat', did you mean learning_rate?"]),
        (["--data_dir", "{tmp}/nowhere"], ["nowhere is not a data folder, it has no dataset.json"]),
        (
            ["--block_size", "64"],
            ["the rows of {data} have 32 tokens"],
        ),
        (["--config_overrides", "n_positions=16"], ["--block_size 32 is beyond the model's 16 positions"]),
        (
            ["--config_overrides", "n_positions=32,vocab_size=300"],
            ["the tokenizer of the data has ids up to 319, beyond the model's vocabulary of 300"],
        ),
        (["--config_overrides", "n_layers=2"], ["the config has no 'n_layers', did you mean n_layer?"]),
        (["--config_overrides", "n_embd=33,n_head=2"], ["n_embd (33) must be a multiple of n_head (2)"]),
        (
            ["--tokens_per_step", "300"],
            ["300 is not a multiple of 128 (block 32 x batch 4 x 1 processes); nearest: 256 or 384"],
        ),
        (["--config_overrides", "n_positions=32,attn_pdrop=2"], ["attn_pdrop must be at least 0 and below 1, got 2"]),
        (["--config_overrides", "activation_function=foo"], ["activation_function 'foo' is not one of"]),
        (["--learning_rate", "inf"], ["--learning_rate must be a finite number of at least 0, got inf"]),
        (["--output_dir", "{tmp}/recipe.yaml/run"], ["cannot be written: Not a directory"]),
        (["--optim", "sgd", "--max_steps", "0"], ["--optim: invalid choice: 'sgd'", "--max_steps must be at least 1"]),
        (["--model_name_or_path", "{tmp}", "--config_overrides", ""], ["{tmp} cannot be loaded"]),
        (["--model_name_or_path", "./nowhere", "--config_overrides", ""], ["./nowhere cannot be loaded: there is no"]),
        (["--config_name", "{tmp}/125M"], ["use a preset: 124M, 350M, 774M, 1558M"]),
        (["--resume_from_checkpoint", "{tmp}/checkpoint-000001"], ["checkpoint-000001: no such folder"]),
        (["--output_dir", "{tmp}"], ["exists and is not a run folder"]),
        (["--sample_prompts", "def " * 20], ["def def [...]' is 41 tokens with the one that begins a document"]),
        (["--report_to", "none", "tensorboard"], ["--report_to none leaves no place for tensorboard"]),
        (["--hellaswag_steps", "1", "--hellaswag_file", "{tmp}"], ["--hellaswag_file {tmp} is not a file"]),
        (["--hellaswag_file", "{tmp}/recipe.yaml"], ["--hellaswag_file is for --hellaswag_steps: give both"]),
        (["--hellaswag_steps", "1", "--hellaswag_file", "{tmp}/recipe.yaml"], ["line 1: not valid JSON"]),
        (["--lr_scheduler_type", "constant", "--warmup_steps", "1"], ["constant has no warm-up"]),
        (["--optim_args", "head_lr=2"], ["head_lr is for an output head of its own, as --config_overrides tie_word_"]),
    ],
)
def test_bad_input_is_named_in_one_line_each_and_writes_nothing(arguments, messages, data_dir, tmp_path, refuse):
    (tmp_path / "recipe.yaml").write_text("learning_rat: 0.1\n")
    before = sorted(tmp_path.iterdir())
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    places = ("--data_dir", data_dir, "--output_dir", tmp_path / "run")
    errors = refuse(train_accelerate, *places, "--config_overrides", TINY, *SMALL_BATCH, *arguments)
    assert len(errors) == len(messages), errors
    for message in messages:
        message = message.replace("{tmp}", str(tmp_path)).replace("{data}", str(data_dir))
        assert any(message in error for error in errors), errors
    assert all(error.startswith("train_accelerate.py: error: ") for error in errors)
    assert sorted(tmp_path.iterdir()) == before


def test_data_of_another_tokenizer_than_the_models_is_refused(data_dir, tmp_path, refuse):
    """Its ids are all in the vocabulary, and mean other tokens."""
    model = tmp_path / "model"
    tiny_model(vocab_size=320, n_positions=32).save_pretrained(model)
    train_tokenizer([f"line {number} of another text" for number in range(300)], 320).save_pretrained(model)
    places = ("--data_dir", data_dir, "--output_dir", tmp_path / "run", "--model_name_or_path", model)
    (error,) = refuse(train_accelerate, *places, "--max_steps", 1)
    assert f"another tokenizer than that of {model}: prepare it with --tokenizer_name {model}" in error
    assert not (tmp_path / "run").exists()


def test_processes_that_were_not_started_are_an_error(data_dir, tmp_path):
    """`--num_processes 2` with distributed_type NO makes accelerate start one process, without a word."""
    accelerate = os.path.join(os.path.dirname(sys.executable), "accelerate")
    config = tmp_path / "no.yaml"
    config.write_text("distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 2\nmixed_precision: 'no'\n")
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "run")
    result = run(accelerate, "launch", "--quiet", "--config_file", config, REPOSITORY / "train_accelerate.py", *flags)
    assert result.returncode != 0
    assert "only one was started" in result.stderr
    assert not (tmp_path / "run").exists()
