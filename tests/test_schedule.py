"""Learning-rate schedules against transformers' own."""

import pytest
import torch
from transformers import get_scheduler

from pretraining.schedule import learning_rate_factor


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
