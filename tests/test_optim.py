"""Schedules against transformers' own, parameter groups, and one Muon step against its formula."""

import pytest
import torch
from transformers import get_scheduler

from modeling_gpt2scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from pretraining.optim import build_optimizers, learning_rate_factor, parameter_groups, set_learning_rate


def tiny_model(**changes) -> GPT2ScratchForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2ScratchForCausalLM(GPT2ScratchConfig(**{**shape, "bos_token_id": 0, "eos_token_id": 0, **changes}))


@pytest.mark.parametrize(
    ("name", "specific"),
    [
        ("cosine", {}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("linear", {}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("warmup_stable_decay", {"num_decay_steps": 18, "decay_type": "linear", "num_stable_steps": 72}),
    ],
)
def test_schedules_are_those_of_transformers_after_the_warm_up(name, specific):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if name == "warmup_stable_decay":
        specific = {**specific, "warmup_type": "linear"}
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=10, num_training_steps=100, scheduler_specific_kwargs=specific
    )
    for step in range(100):
        expected = scheduler.get_last_lr()[0]
        if step >= 10:
            assert learning_rate_factor(step, name, 10, 100) == pytest.approx(expected, abs=1e-9), step
        optimizer.step()
        scheduler.step()


def test_the_warm_up_is_linear_and_no_step_is_wasted_at_zero():
    factors = [learning_rate_factor(step, "cosine", 4, 100) for step in range(5)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_only_matrices_decay_and_every_parameter_is_trained_once(optim):
    model = tiny_model()
    optimizers = build_optimizers(model, optim, 1e-3, 0.1, torch.device("cpu"))
    decay = {id(p): group["weight_decay"] for o in optimizers for group in o.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for o in optimizers for group in o.param_groups)
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.1 if parameter.ndim == 2 else 0.0), name
    assert set_learning_rate(optimizers, 0.5) == 5e-4
    assert {group["lr"] for o in optimizers for group in o.param_groups} == {5e-4}


def test_muon_gets_the_blocks_matrices_and_nothing_else():
    model = tiny_model(tie_word_embeddings=False)
    hidden, other_matrices, vectors = parameter_groups(model)
    assert len(hidden) == 2 * 6
    assert len(other_matrices) == 3  # token embedding, positions, untied head
    assert all(parameter.ndim == 1 for parameter in vectors)


def test_a_muon_step_is_orthogonal_and_as_large_as_adamws():
    model = tiny_model(n_embd=64)
    muon, _ = build_optimizers(model, "muon", 1e-2, 0.0, torch.device("cpu"))
    matrix = model.model.layers[0].mlp.up_proj.weight  # 256 x 64
    before = matrix.detach().clone()
    matrix.grad = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1))
    muon.step()
    update = (matrix.detach() - before) / -1e-2
    # Liu et al. 2025: 0.2 sqrt(max(rows, columns)) times a matrix whose singular values are about 1.
    singular_values = torch.linalg.svdvals(update) / (0.2 * 256**0.5)
    assert singular_values.min() > 0.6 and singular_values.max() < 1.3
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)
