"""The optimizers: AdamW for all parameters, or Muon for the blocks' matrices and AdamW for the others."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.adamw import adamw

from pretraining.optimization.options import Optim, OptimOptions
from pretraining.optimization.orthogonalization import orthogonalize_together

ADAM_BETAS = (0.9, 0.95)  # GPT-3 paper, appendix B
ADAM_EPSILON = 1e-8
DEFAULT_OPTIONS = OptimOptions()
NORMUON_EPSILON = 1e-10  # keeps a matrix of zeros from becoming NaN


def build_optimizer(
    model: nn.Module,
    optim: Optim,
    learning_rate: float,
    weight_decay: float,
    device: torch.device,
    muon_dtype: torch.dtype = torch.float32,
    betas: tuple[float, float] = ADAM_BETAS,
    eps: float = ADAM_EPSILON,
    options: OptimOptions = DEFAULT_OPTIONS,
) -> Optimizer:
    """
    Build the optimizer of a run.

    `adamw`: AdamW for everything. Betas 0.9 and 0.95, epsilon 1e-8, decay 0.1 (GPT-3 paper, appendix B); the training
    script's default learning rate, 6e-4, is that of GPT-3 Small (table 2.1), larger models take less.
    `muon`: `Muon` for the blocks' weight matrices, AdamW as above for embeddings, head, norms and biases.

    Only matrices decay; norms and biases do not. Matrices of the same factor are one group, as in checkpoints of
    versions without factors. A group keeps its peak learning rate, its factor and its peak decay for the schedule.

    Args:
        device: where the parameters will be.
        muon_dtype: see `Muon`.
        betas, eps: AdamW's.
        options: see `OptimOptions`.
    """
    matrices, embeddings, head, vectors = parameter_groups(model)
    parts = [
        (matrices, options.matrix_lr, weight_decay, optim),
        (embeddings, options.embedding_lr, weight_decay, "adamw"),
        (head, options.head_lr, weight_decay, "adamw"),
        (vectors, options.vector_lr, 0.0, "adamw"),
    ]
    groups: dict[tuple, dict[str, Any]] = {}
    for parameters, factor, decay, kind in parts:
        settings = {"weight_decay": decay, "peak_weight_decay": decay, "lr_factor": factor, "kind": kind}
        if parameters:
            key = (parameters is vectors, factor, kind)
            groups.setdefault(key, {"params": [], **settings})["params"] += parameters
    adam: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": eps, "fused": has_fused_adamw(device)}
    optimizer: Optimizer
    if optim == "muon":
        optimizer = Muon(groups.values(), **adam, options=options, dtype=muon_dtype)
    else:
        optimizer = AdamW(groups.values(), **adam)
    for group in optimizer.param_groups:
        group["peak_lr"] = learning_rate
        group["lr"] = learning_rate * group["lr_factor"]
    return optimizer


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], ...]:
    """
    Return the trained parameters in four parts: the blocks' matrices, the token and position embeddings, an output
    head that is not tied to them, and all vectors.
    """
    matrices, embeddings, head, vectors = [], [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif "embed" in name:
            embeddings.append(parameter)
        elif "lm_head" in name:
            head.append(parameter)
        else:
            matrices.append(parameter)
    return matrices, embeddings, head, vectors


def has_fused_adamw(device: torch.device) -> bool:
    """Return True if torch has its fused AdamW kernel for this device."""
    parameter = nn.Parameter(torch.zeros(1, device=device))
    parameter.grad = torch.zeros_like(parameter)
    try:
        AdamW([parameter], fused=True).step()
    except RuntimeError:
        return False
    return True


class Muon(Optimizer):
    """
    Muon and AdamW in one optimizer, with a kind for each parameter group.

    Groups of kind `muon` hold matrices. Their momentum is replaced by a matrix of the same singular vectors whose
    singular values are all near 1 (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), times
    0.2 sqrt(max(rows, columns)), which gives an update the root mean square of AdamW's (Liu et al. 2025, "Muon is
    Scalable for LLM Training", section 2.2), so that one learning rate and one weight decay serve both kinds. Groups
    of kind `adamw` are updated by torch's own AdamW.

    Where there are several processes, all of them step together, and each orthogonalises a share of the matrices
    (`orthogonalization.orthogonalize_together`). Parameters are the same on all processes or sharded by FSDP2.

    Args:
        groups: each with `params`, `kind` and `weight_decay`.
        betas, eps, fused: AdamW's.
        options: see `OptimOptions`.
        dtype: in which matrices are orthogonalised: bf16 where the device multiplies it in hardware, else fp32.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = ADAM_BETAS,
        eps: float = ADAM_EPSILON,
        fused: bool = False,
        options: OptimOptions = DEFAULT_OPTIONS,
        dtype: torch.dtype = torch.float32,
    ):
        self.options = options
        self.dtype = dtype
        # By this name torch's load_state_dict knows that AdamW's steps belong on the device of the parameters.
        defaults = {"lr": lr, "betas": betas, "eps": eps, "momentum": options.muon_momentum, "fused": fused}
        super().__init__(groups, defaults)
        for group in self.param_groups:
            if group["kind"] == "muon" and any(parameter.ndim != 2 for parameter in group["params"]):
                raise ValueError("a group of kind 'muon' takes matrices alone")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients = [parameter.grad for parameter in parameters]
            if parameters and group["kind"] == "muon":
                self._step_muon(parameters, gradients, group)
            elif parameters:
                self._step_adamw(parameters, gradients, group)
        return loss

    def _step_muon(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        momentums = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            buffer = self._state(parameter, "momentum_buffer")
            buffer.lerp_(gradient, 1 - group["momentum"])
            momentums.append(gradient.lerp(buffer, group["momentum"]).to(self.dtype))  # Nesterov's
        updates = orthogonalize_together(momentums)
        sizes = [self._size(parameter) for parameter in parameters]
        if self.options.normuon_beta2:
            updates = self._normalise_rows(parameters, updates)
        for parameter, update, size in zip(parameters, updates, sizes, strict=True):
            weights, decay = _local(parameter), group["lr"] * group["weight_decay"]
            if self.options.cautious_weight_decay:
                weights.mul_(1 - decay * (weights * update > 0))
            else:
                weights.mul_(1 - decay)
            weights.add_(update, alpha=-group["lr"] * size)

    def _size(self, parameter: Tensor) -> float:
        """Return the factor of a matrix whose singular values are 1 or, after NorMuon, whose mean square is 1."""
        rows, columns = parameter.shape
        size = 0.2 * max(rows, columns) ** 0.5
        if self.options.muon_scale == "spectral" and rows < columns:
            size *= rows / columns
        return size / max(rows, columns) ** 0.5 if self.options.normuon_beta2 else size

    def _normalise_rows(self, parameters: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
        """Divide each row by its root mean square over the steps, and bring each matrix to a root mean square of 1."""
        normalised, squares = [], []
        for parameter, update in zip(parameters, updates, strict=True):
            state, update = self.state[parameter], update.float()
            if "row_second_moment" not in state:
                state["row_second_moment"] = torch.zeros_like(parameter[:, :1])
            moment = _local(state["row_second_moment"])  # (R, 1)
            moment.lerp_(update.square().mean(dim=1, keepdim=True), 1 - self.options.normuon_beta2)
            normalised.append(update / (moment.sqrt() + NORMUON_EPSILON))
            squares.append(normalised[-1].square().sum())
        sums = torch.stack(squares)
        if isinstance(parameters[0], DTensor):  # of which the other processes have other rows
            dist.all_reduce(sums, group=parameters[0].device_mesh.get_group())
        sizes = torch.tensor([parameter.numel() for parameter in parameters], device=sums.device)
        factors = (sizes / sums.clamp(min=NORMUON_EPSILON)).sqrt()
        return [update * factor for update, factor in zip(normalised, factors, strict=True)]

    def _step_adamw(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if "step" not in self.state[parameter]:
                self.state[parameter]["step"] = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            gradients,
            [self._state(parameter, "exp_avg") for parameter in parameters],
            [self._state(parameter, "exp_avg_sq") for parameter in parameters],
            [],
            [self.state[parameter]["step"] for parameter in parameters],
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state(self, parameter: Tensor, name: str) -> Tensor:
        """Return a tensor of the optimizer's state with the parameter's shape and sharding, zeros at first."""
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state[name]


def _local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
