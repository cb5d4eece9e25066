"""Schedules: those of the learning rate against transformers' own, and those of Muon's momentum and of the decay."""

import pytest
import torch
from support.tiny_models import tiny_model
from transformers import get_scheduler

from pretraining.optimization.optimizer import build_optimizer
from pretraining.optimization.options import OptimOptions, SchedulerOptions
from pretraining.optimization.schedule import Schedule

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "options", "theirs"),
    [
        ("cosine", {}, {}),
        ("cosine_with_min_lr", {}, {"min_lr_rate": 0.1}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.25}, {"min_lr_rate": 0.25}),
        ("linear", {}, {}),
        ("constant", {}, {}),
        ("constant_with_warmup", {}, {}),
        ("warmup_stable_decay", {}, {"num_decay_steps": 18, "decay_type": "linear"}),
        ("warmup_stable_decay", {"decay_fraction": 0.5}, {"num_decay_steps": 45, "decay_type": "linear"}),
        *(
            ("warmup_stable_decay", settings, settings)
            for form in ("linear", "cosine", "1-sqrt")
            for settings in ({"num_decay_steps": 30, "decay_type": form, "min_lr_ratio": 0.2},)
        ),
    ],
)
def test_schedules_are_those_of_transformers_after_the_warm_up(name, options, theirs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if name == "warmup_stable_decay":
        theirs = {**theirs, "warmup_type": "linear", "num_stable_steps": 90 - theirs["num_decay_steps"]}
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=10, num_training_steps=100, scheduler_specific_kwargs=theirs
    )
    schedule = Schedule(name, 10, 100, SchedulerOptions(**options))
    for step in range(100):
        expected = scheduler.get_last_lr()[0]
        if step >= 10:
            assert schedule.learning_rate_factor(step) == pytest.approx(expected, abs=1e-9), step
        optimizer.step()
        scheduler.step()


def test_the_warm_up_is_linear_and_no_step_is_wasted_at_zero():
    factors = [Schedule("cosine", 4, 100).learning_rate_factor(step) for step in range(5)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_muons_momentum_rises_to_its_final_value_and_stays_there():
    schedule = Schedule("constant", 0, 20_000)
    found = [schedule.muon_momentum(step) for step in (0, 150, 300, 10_000)]
    assert found == pytest.approx([0.85, 0.9, 0.95, 0.95])
    options = OptimOptions(muon_momentum=0.9, muon_momentum_start=0.5, muon_momentum_warmup_steps=4)
    schedule = Schedule("constant", 0, 20_000, optim_options=options)
    assert [schedule.muon_momentum(step) for step in (0, 1, 2, 4, 5)] == pytest.approx([0.5, 0.6, 0.7, 0.9, 0.9])
    at_once = Schedule("constant", 0, 9, optim_options=OptimOptions(muon_momentum_warmup_steps=0))
    assert at_once.muon_momentum(0) == 0.95


@pytest.mark.parametrize(("optim", "momentum"), [("muon", [0.85, 0.95, 0.95]), ("adamw", [None, None])])
def test_a_step_is_set_up_from_its_number_alone(optim, momentum):
    optimizer = build_optimizer(tiny_model(), optim, 1e-3, 0.1, CPU)
    schedule = Schedule("linear", 0, 4)
    assert [schedule.set(optimizer, step) for step in (3, 0)] == [0.25e-3, 1e-3]
    assert [group.get("momentum") for group in optimizer.param_groups] == momentum
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_factors_of_the_learning_rate_and_a_scheduled_decay(optim):
    options = OptimOptions(embedding_lr=3.0, head_lr=0.5, vector_lr=2.0, scheduled_weight_decay=True)
    model = tiny_model(tie_word_embeddings=False)
    optimizer = build_optimizer(model, optim, 1e-3, 0.2, CPU, options=options)
    for step, factor in ((2, 0.5), (1, 0.75)):
        assert Schedule("linear", 0, 4, optim_options=options).set(optimizer, step) == 1e-3 * factor
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in model.named_parameters():
            group, is_vector = groups[id(parameter)], parameter.ndim == 1
            own = 3.0 if "embed" in name else 0.5 if "lm_head" in name else 2.0 if is_vector else 1.0
            assert group["lr"] == pytest.approx(1e-3 * factor * own), name
            assert group["weight_decay"] == pytest.approx(0.0 if is_vector else 0.2 * factor), name
