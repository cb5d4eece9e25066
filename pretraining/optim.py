"""Parameter groups, the optimizers AdamW and Muon, and learning-rate schedules."""

import math
from typing import Literal, assert_never

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

ADAM_BETAS = (0.9, 0.95)  # GPT-3 paper, appendix B
Optim = Literal["adamw", "muon"]
LRSchedulerType = Literal[
    "cosine_with_min_lr", "cosine", "linear", "constant", "constant_with_warmup", "warmup_stable_decay"
]


def build_optimizers(
    model: nn.Module, optim: Optim, learning_rate: float, weight_decay: float, device: torch.device
) -> list[Optimizer]:
    """
    The optimizers of a run, to be stepped together.

    `adamw`: AdamW for everything, fused. Betas 0.9 and 0.95, epsilon 1e-8, decay 0.1 (GPT-3 paper, appendix B); the
    training script's default learning rate, 6e-4, is that of GPT-3 Small (table 2.1), larger models take less.
    `muon`: Muon for the blocks' weight matrices, with Nesterov momentum 0.95 and five Newton-Schulz steps (Jordan et
    al. 2024, torch's defaults), AdamW as above for embeddings, head, norms and biases. Muon's updates are scaled to
    the root mean square of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2), so that one
    learning rate and one weight decay serve both.

    Only matrices decay; norms and biases do not. Each group keeps its peak learning rate as `initial_lr`.
    """
    hidden, other_matrices, vectors = parameter_groups(model)
    fused = device.type in ("cuda", "cpu")
    optimizers: list[Optimizer] = []
    if optim == "muon":
        optimizers.append(Muon(hidden, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
        decayed = other_matrices
    elif optim == "adamw":
        decayed = hidden + other_matrices
    else:
        assert_never(optim)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizers.append(AdamW(groups, lr=learning_rate, betas=ADAM_BETAS, fused=fused))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = learning_rate
    return optimizers


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters in three parts: the blocks' matrices, embeddings and head, and all vectors."""
    hidden, other_matrices, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif "embed" in name or "lm_head" in name:
            other_matrices.append(parameter)
        else:
            hidden.append(parameter)
    return hidden, other_matrices, vectors


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


def set_learning_rate(optimizers: list[Optimizer], factor: float) -> float:
    """Scale every group from its peak. Returns the first group's new learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
    return optimizers[0].param_groups[0]["lr"]
