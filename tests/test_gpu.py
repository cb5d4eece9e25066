"""Tests that need a GPU, and are skipped without one. They do without the packages that prepare data."""

import os
import sys
from importlib.util import find_spec

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import REPOSITORY, TINY, metrics, run, succeed
from safetensors.torch import load_file
from support.tiny_models import random_ids, randomise, tiny_model

from benchmarks import synthetic
from pretraining.distributed.processes import open_accelerator, open_state
from pretraining.optimization.optimizer import build_optimizer
from pretraining.precision import choose_precision, muon_dtype
from train_accelerate import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def gpu_model(**changes):
    model = tiny_model(n_embd=64, **changes)
    randomise(model)
    return model.to("cuda")


def loss_and_gradients(model, **kwargs):
    ids = random_ids(4, 24).to("cuda")
    model.zero_grad()
    loss = model.train()(ids, labels=ids, use_cache=False, **kwargs).loss
    loss.backward()
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_without_logits_in_bf16(compiled):
    model = gpu_model()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected, expected_gradients = loss_and_gradients(model, skip_logits=False)
        model.forward = torch.compile(model.forward, fullgraph=True) if compiled else model.forward
        loss, gradients = loss_and_gradients(model)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    for name, gradient in gradients.items():
        if "k_proj.bias" not in name:
            assert (gradient - expected_gradients[name]).norm() < 0.03 * expected_gradients[name].norm(), name


def test_a_training_step_never_waits_for_the_gpu():
    model = gpu_model()
    loss_and_gradients(model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradients(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(find_spec("flash_attn") is None, reason="needs flash-attn")
def test_flash_attention_keeps_documents_apart_in_every_row():
    model = gpu_model().to(torch.bfloat16)
    ids = random_ids(2, 16).to("cuda")
    positions = torch.tensor([[*range(5), *range(11)], [*range(16)]], device="cuda")
    with torch.no_grad():
        expected = model(ids, position_ids=positions).logits
        model.set_attn_implementation("flash_attention_2")
        logits = model(ids, position_ids=positions).logits
    assert (logits - expected).norm() < 0.03 * expected.norm()


# Precision


@pytest.fixture
def fresh_state():
    """Accelerate's view of this process, which other tests may have told to use the CPU, or another precision."""

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield reset
    reset()


def prepared(mixed_precision, optim="muon"):
    """A tiny model, and what else `train_step` takes, as train_accelerate.py makes them."""
    accelerator = open_accelerator(open_state(), 1, False, mixed_precision)
    model = tiny_model(n_embd=64).train()
    dtype = muon_dtype(accelerator.device, mixed_precision)
    optimizer = build_optimizer(model, optim, 3e-3, 0.1, accelerator.device, dtype)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = random_ids(8, 24).to(accelerator.device)
    return model, optimizer, [{"input_ids": ids, "labels": ids}], accelerator


def test_the_precision_is_the_one_that_the_gpu_multiplies():
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    chosen = choose_precision(torch.device("cuda"), told=None)
    assert chosen.mixed_precision == ("bf16" if has_bf16 else "fp16") and chosen.warning is None
    assert muon_dtype(torch.device("cuda"), "bf16") == (torch.bfloat16 if has_bf16 else torch.float32)
    assert choose_precision(torch.device("cuda"), told="no").warning is not None


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("mixed_precision", ["fp16", "bf16"])
def test_half_precision_learns_as_fp32_does(mixed_precision, optim, fresh_state):
    losses = {}
    for precision in ("no", mixed_precision):
        fresh_state()
        *arguments, accelerator = prepared(precision, optim)
        assert accelerator.device.type == "cuda" and (accelerator.scaler is not None) == (precision == "fp16")
        results = [train_step(*arguments, accelerator, max_grad_norm=1.0) for _ in range(12)]
        assert all(result.is_finite() for result in results)
        losses[precision] = [result.loss for result in results]
    assert losses["no"][-1] < losses["no"][0] - 0.5
    assert losses[mixed_precision] == pytest.approx(losses["no"], rel=0.01)


def test_a_step_that_overflows_in_fp16_changes_no_weight_and_halves_the_scale(fresh_state):
    model, optimizer, micro_batches, accelerator = prepared("fp16")
    assert train_step(model, optimizer, micro_batches, accelerator, max_grad_norm=1.0).is_finite()
    scaler = accelerator.scaler
    usual = scaler.get_scale()
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**60})
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    result = train_step(model, optimizer, micro_batches, accelerator, max_grad_norm=1.0)
    assert not result.is_finite() and scaler.get_scale() == 2.0**59
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name
    scaler.load_state_dict({**scaler.state_dict(), "scale": usual})
    assert train_step(model, optimizer, micro_batches, accelerator, max_grad_norm=1.0).is_finite()
    assert not torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])


def test_muon_in_bf16_updates_as_in_fp32():
    updates = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = gpu_model()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = build_optimizer(model, "muon", 1e-2, 0.0, torch.device("cuda"), dtype)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to("cuda")
        optimizer.step()
        updates[dtype] = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    for name, update in updates[torch.bfloat16].items():
        expected = updates[torch.float32][name]
        assert (update - expected).norm() < 0.05 * expected.norm(), name


# The whole loop


@pytest.fixture(scope="module")
def token_files(tmp_path_factory):
    """Token files in nanoGPT's format, with the folder of their tokenizer beside them."""
    folder = tmp_path_factory.mktemp("tokens")
    synthetic.write_token_files(folder, tokens=32 * 1000, validation_tokens=32 * 100, vocab_size=320)
    return folder


@pytest.mark.parametrize("config", ["accelerate_config.yaml", "configs/fsdp2.yaml"])
def test_the_loop_on_all_gpus_compiled_and_resumed(config, token_files, tmp_path):
    gpus = torch.cuda.device_count()
    if "fsdp" in config and gpus < 2:
        pytest.skip("needs two NVIDIA GPUs")
    command = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", REPOSITORY / config)
    flags = ("--data_dir", token_files, "--tokenizer_name", token_files / "tokenizer", "--block_size", 32)
    flags += ("--config_overrides", TINY + ",resid_pdrop=0.1", "--torch_compile", "--report_to", "none")
    flags += ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--max_steps", 12)
    flags += ("--optim", "muon", "--eval_steps", 6, "--save_steps", 6, "--output_dir", tmp_path / "run")
    environment = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))}
    result = succeed(run(*command, REPOSITORY / "train_accelerate.py", *flags, **environment))
    precision = choose_precision(torch.device("cuda"), told=None)
    assert str(precision) in result.stdout and torch.cuda.get_device_name() in result.stdout
    first = load_file(tmp_path / "run/model.safetensors"), metrics(tmp_path / "run")[-1]["eval_loss"]
    (tmp_path / "run/model.safetensors").unlink()  # as if it had ended after step 6
    again = succeed(run(*command, REPOSITORY / "train_accelerate.py", *flags, **environment))
    assert "continuing from" in again.stdout
    assert metrics(tmp_path / "run")[-1]["eval_loss"] == pytest.approx(first[1], rel=1e-3)
    second = load_file(tmp_path / "run/model.safetensors")
    for name, weight in first[0].items():
        if "k_proj.bias" not in name:
            assert (weight - second[name]).norm() < 0.01 * weight.norm() + 1e-3, name
