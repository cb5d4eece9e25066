"""What only a GPU can show. Skipped where there is none."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TINY, metrics, run, succeed
from safetensors.torch import load_file
from tiny_models import random_ids, randomise, tiny_model

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


@pytest.mark.parametrize("config", ["accelerate_config.yaml", "configs/fsdp2.yaml"])
def test_the_loop_on_all_gpus_compiled_in_bf16_and_resumed(config, data_dir, tmp_path):
    gpus = torch.cuda.device_count()
    if "fsdp" in config and gpus < 2:
        pytest.skip("needs two NVIDIA GPUs")
    command = (Path(sys.executable).with_name("accelerate"), "launch", "--config_file", REPOSITORY / config)
    flags = ("--data_dir", data_dir, "--config_overrides", TINY + ",resid_pdrop=0.1", "--torch_compile")
    flags += ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--max_steps", 12)
    flags += ("--eval_steps", 6, "--save_steps", 6, "--output_dir", tmp_path / "run")
    environment = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))}
    result = succeed(run(*command, REPOSITORY / "train_accelerate.py", *flags, **environment))
    assert "bf16" in result.stdout and torch.cuda.get_device_name() in result.stdout
    first = load_file(tmp_path / "run/model.safetensors"), metrics(tmp_path / "run")[-1]["eval_loss"]
    (tmp_path / "run/model.safetensors").unlink()  # as if it had ended after step 6
    assert (
        "continuing from" in succeed(run(*command, REPOSITORY / "train_accelerate.py", *flags, **environment)).stdout
    )
    assert metrics(tmp_path / "run")[-1]["eval_loss"] == pytest.approx(first[1], rel=1e-3)
    second = load_file(tmp_path / "run/model.safetensors")
    for name, weight in first[0].items():
        if "k_proj.bias" not in name:
            assert (weight - second[name]).norm() < 0.01 * weight.norm() + 1e-3, name
