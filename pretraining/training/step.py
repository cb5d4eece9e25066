"""The result of one optimizer step, which all processes know. The step itself is in train_accelerate.py."""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class StepResult:
    """
    The same on all processes.

    Attributes:
        losses: by process and micro-batch, its share of the step's loss, in nats per token.
        grad_norm: before clipping.
        stop_signals: by process, the number of a signal that asks the run to end, 0 for none.
        save_failed: True if a checkpoint could not be written.
    """

    losses: list[list[float]]
    grad_norm: float
    stop_signals: list[int]
    save_failed: bool

    @property
    def loss(self) -> float:
        """Mean over all labels, in nats per token."""
        shares = [share for losses in self.losses for share in losses]
        return math.fsum(shares) if all(map(math.isfinite, shares)) else math.nan

    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def gather_result(
    accelerator: Accelerator,
    losses: list[torch.Tensor],
    grad_norm: torch.Tensor,
    stop_signal: int = 0,
    save_failed: bool = False,
) -> StepResult:
    """
    Gather losses, gradient norm, signals and failures to save from all processes. This is the only host-device
    synchronisation of a step, but for fp16's loss scaling: the result decides whether the weights change.

    Args:
        losses: of this process, a scalar for each micro-batch.
        grad_norm: the same on all processes.
        stop_signal, save_failed: what this process knows, see `StepResult`.
    """
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    first = losses[0]
    mine = torch.stack([*losses, grad_norm.to(first), *torch.tensor([stop_signal, save_failed]).to(first)])
    everyone = accelerator.gather(mine).view(accelerator.num_processes, -1).tolist()
    return StepResult(
        losses=[row[:-3] for row in everyone],
        grad_norm=everyone[0][-3],
        stop_signals=[int(row[-2]) for row in everyone],
        save_failed=any(row[-1] for row in everyone),
    )
