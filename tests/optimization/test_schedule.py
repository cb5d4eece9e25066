"""Schedules: those of the learning rate against transformers' own, and that of Muon's momentum."""

import pytest
import torch
from support.tiny_models import tiny_model
from transformers import get_scheduler

from pretraining.optimization.optimizer import build_optimizer
from pretraining.optimization.schedule import learning_rate_factor, muon_momentum, set_muon_momentum


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


def test_muons_momentum_rises_to_its_final_value_and_stays_there():
    found = [muon_momentum(step) for step in (0, 150, 300, 10_000)]
    assert found == pytest.approx([0.85, 0.9, 0.95, 0.95])


def test_the_momentum_is_set_where_muon_updates_and_nowhere_else():
    for optim, expected in (("muon", [0.9, 0.95, 0.95]), ("adamw", [None, None])):
        optimizer = build_optimizer(tiny_model(), optim, 1e-3, 0.1, torch.device("cpu"))
        set_muon_momentum(optimizer, 0.9)
        assert [group.get("momentum") for group in optimizer.param_groups] == expected
