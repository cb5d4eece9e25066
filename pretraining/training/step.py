"""One optimizer step, over all micro-batches of all processes, and what they know of it together."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pretraining.data.model_inputs import num_targets
from pretraining.distributed.processes import is_sharded


@dataclass(frozen=True)
class StepResult:
    """
    The same on all processes.

    Attributes:
        losses: by process and micro-batch, its share of the step's loss, in nats per token.
        grad_norm: before clipping.
        notes: what each process had to tell the others, 0 for nothing.
    """

    losses: list[list[float]]
    grad_norm: float
    notes: list[int]

    @property
    def loss(self) -> float:
        """Mean over all labels, in nats per token."""
        shares = [share for losses in self.losses for share in losses]
        return math.fsum(shares) if all(map(math.isfinite, shares)) else math.nan

    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    micro_batches: list[dict],
    accelerator: Accelerator,
    max_grad_norm: float,
    judge: Callable[[StepResult], bool] = StepResult.is_finite,
    note: Callable[[], int] = int,
) -> StepResult:
    """
    One optimizer step, over `accelerator.gradient_accumulation_steps` micro-batches.

    The loss of a step is the mean over all its labels, of all micro-batches of all processes, so that it does not
    matter how a global batch is split, nor where in it labels of -100 are. Accelerate divides by the accumulation and
    DDP and FSDP by the processes, so both are multiplied back.

    Args:
        micro_batches: the model's arguments `input_ids`, `labels` and whatever else.
        max_grad_norm: 0 does not clip.
        judge: whether the update is to be applied; it has to say the same on all processes.
        note: asked at the end of the step; see `StepResult.notes`.
    """
    targets = accelerator.reduce(sum(num_targets(inputs["labels"]) for inputs in micro_batches), "sum")
    losses = []
    for inputs in micro_batches:
        with accelerator.accumulate(model):
            losses.append(_backward(model, inputs, targets, accelerator))
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    result = _exchange(accelerator, losses, grad_norm, note())
    if judge(result):
        optimizer.step()
    elif accelerator.scaler is not None:
        accelerator.scaler.update()  # which forgets what it knew of these gradients
    optimizer.zero_grad()
    return result


def suspects(
    result: StepResult,
    model: nn.Module,
    optimizer: Optimizer,
    micro_batches: list[dict],
    accelerator: Accelerator,
) -> list[int]:
    """
    Which micro-batches of this process are to blame for a result that is not finite: those whose own loss is not, or,
    if there is none on any process, whose own gradients are not, for which each is computed once more. All of them
    where that cannot be told, as no process has whole gradients.
    """
    if not math.isfinite(result.loss):
        losses = result.losses[accelerator.process_index]
        return [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
    if is_sharded(accelerator):
        return list(range(len(micro_batches)))
    targets = torch.stack([num_targets(inputs["labels"]) for inputs in micro_batches]).sum()
    found = []
    for index, inputs in enumerate(micro_batches):
        with accelerator.no_sync(model):
            _backward(model, inputs, targets, accelerator)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not all(gradient.isfinite().all() for gradient in gradients):
            found.append(index)
        optimizer.zero_grad()
    return found


def _backward(model: nn.Module, inputs: dict, targets: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    loss = model(**inputs, num_items_in_batch=targets, use_cache=False).loss
    accelerator.backward(loss * (accelerator.gradient_accumulation_steps * accelerator.num_processes))
    return loss.detach()


def _exchange(accelerator: Accelerator, losses: list[torch.Tensor], grad_norm: torch.Tensor, note: int) -> StepResult:
    """To read it is to wait for the device, once a step: what has come out decides whether the weights change."""
    mine = torch.stack([*losses, grad_norm.to(losses[0]), torch.tensor(note).to(losses[0])])
    everyone = accelerator.gather(mine).view(accelerator.num_processes, -1).tolist()
    return StepResult(
        losses=[row[:-2] for row in everyone], grad_norm=everyone[0][-2], notes=[int(row[-1]) for row in everyone]
    )
