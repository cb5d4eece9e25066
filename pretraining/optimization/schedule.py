"""Schedules: pure functions of the step, so that there is no state to save."""

import math
from typing import Literal, assert_never

from torch.optim import Optimizer

from pretraining.optimization.optimizer import MUON_MOMENTUM

# Jordan et al. 2024, https://github.com/KellerJordan/modded-nanogpt (train_gpt.py). While gradients still change their
# direction fast, a long average holds on to directions that are out of date.
FIRST_MUON_MOMENTUM = 0.85
MUON_MOMENTUM_STEPS = 300
LRSchedulerType = Literal[
    "cosine_with_min_lr", "cosine", "linear", "constant", "constant_with_warmup", "warmup_stable_decay"
]


def learning_rate_factor(step: int, schedule: LRSchedulerType, warmup_steps: int, max_steps: int) -> float:
    """
    Return what to multiply the peak learning rate by at `step` (from 0).

    After a linear warm-up over `warmup_steps`:
        cosine_with_min_lr: half a cosine down to 0.1 (GPT-3 paper, appendix B)
        cosine, linear: down to 0 at `max_steps`
        constant, constant_with_warmup: 1
        warmup_stable_decay: 1, then linearly to 0 over the last fifth (Hägele et al. 2024)
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    if schedule == "cosine_with_min_lr":
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1 - progress
    if schedule == "constant" or schedule == "constant_with_warmup":
        return 1.0
    if schedule == "warmup_stable_decay":
        return min(1.0, (1 - progress) / 0.2)
    assert_never(schedule)


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Scale every group's learning rate from its peak. Returns the first group's new one."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def muon_momentum(step: int) -> float:
    """Return Muon's momentum at `step` (from 0): it rises linearly over the first `MUON_MOMENTUM_STEPS` steps."""
    part = min(1.0, step / MUON_MOMENTUM_STEPS)
    return FIRST_MUON_MOMENTUM + part * (MUON_MOMENTUM - FIRST_MUON_MOMENTUM)


def set_muon_momentum(optimizer: Optimizer, momentum: float) -> None:
    """Set the momentum of all groups that Muon updates. An optimizer without any stays as it is."""
    for group in optimizer.param_groups:
        if group.get("kind") == "muon":
            group["momentum"] = momentum
