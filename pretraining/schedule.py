"""Learning-rate schedules."""

import math
from typing import Literal, assert_never

from torch.optim import Optimizer

LRSchedulerType = Literal[
    "cosine_with_min_lr", "cosine", "linear", "constant", "constant_with_warmup", "warmup_stable_decay"
]


def learning_rate_factor(step: int, schedule: LRSchedulerType, warmup_steps: int, max_steps: int) -> float:
    """
    What to multiply the peak learning rate by at `step` (from 0): a pure function, so there is no state to save.

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
    """Scale every group from its peak. Returns the first group's new learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return optimizer.param_groups[0]["lr"]
