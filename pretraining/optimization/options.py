"""The settings of `--optim_args` and `--lr_scheduler_kwargs`, and what does not fit together in them."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Optim = Literal["adamw", "muon"]
LRSchedulerType = Literal[
    "cosine_with_min_lr", "cosine", "linear", "constant", "constant_with_warmup", "warmup_stable_decay"
]
DecayType = Literal["linear", "cosine", "1-sqrt"]
MuonScale = Literal["rms", "spectral"]
# Settings by the only schedules that have them.
SCHEDULES = {
    "min_lr_rate": "cosine_with_min_lr",
    "num_decay_steps": "warmup_stable_decay",
    "decay_fraction": "warmup_stable_decay",
    "decay_type": "warmup_stable_decay",
    "min_lr_ratio": "warmup_stable_decay",
}


@dataclass(frozen=True)
class OptimOptions:
    """
    Settings of the optimizer: `--optim_args`.

    Attributes:
        embedding_lr, head_lr, matrix_lr, vector_lr: factors of the learning rate: of the token and position
            embeddings, an output head that is not tied to them, the blocks' matrices, and norms and biases.
        muon_momentum: Nesterov's, which rises linearly from `muon_momentum_start` over `muon_momentum_warmup_steps`
            (Jordan et al. 2024, https://github.com/KellerJordan/modded-nanogpt, train_gpt.py). While gradients still
            change their direction fast, a long average holds on to directions that are out of date.
        muon_scale: the size of Muon's updates: `rms`, that of AdamW's for every matrix (Liu et al. 2025, "Muon is
            Scalable for LLM Training", section 2.2), or `spectral`, by sqrt(outputs / inputs), so that activations
            change as much in every layer (Bernstein 2025, https://jeremybernste.in/writing/deriving-muon).
        normuon_beta2: decay of the second moment of Muon's updates, one number per row, by which NorMuon divides them
            (Li et al. 2025, https://arxiv.org/abs/2510.05491); 0 is Muon.
        cautious_weight_decay: Muon's weights decay only where that agrees with the sign of their update (Chen et al.
            2025, https://arxiv.org/abs/2510.12402).
        scheduled_weight_decay: the weight decay follows the learning rate's course once more, so that it is gone when
            the learning rate is.
    """

    embedding_lr: float = 1.0
    head_lr: float = 1.0
    matrix_lr: float = 1.0
    vector_lr: float = 1.0
    muon_momentum: float = 0.95
    muon_momentum_start: float = 0.85
    muon_momentum_warmup_steps: int = 300
    muon_scale: MuonScale = "rms"
    normuon_beta2: float = 0.0
    cautious_weight_decay: bool = False
    scheduled_weight_decay: bool = False

    def problems(self, optim: Optim) -> list[str]:
        """Return a message for each value out of range, or that the optimizer has no use for."""
        found, default = [], OptimOptions()
        for name in ("embedding_lr", "head_lr", "matrix_lr", "vector_lr", "muon_momentum_warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                found.append(f"--optim_args: {name} must be a finite number of at least 0, got {getattr(self, name)}")
        for name in ("muon_momentum", "muon_momentum_start", "normuon_beta2"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"--optim_args: {name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.muon_scale not in get_args(MuonScale):
            found.append(f"--optim_args: muon_scale must be {' or '.join(get_args(MuonScale))}, got {self.muon_scale}")
        for name in (*(key for key in vars(self) if "muon" in key), "cautious_weight_decay"):
            if optim != "muon" and getattr(self, name) != getattr(default, name):
                found.append(f"--optim_args: {name} is for --optim muon")
        return found


@dataclass(frozen=True)
class SchedulerOptions:
    """
    Settings of the learning rate's schedule, by transformers' names where it has them: `--lr_scheduler_kwargs`.

    Attributes:
        min_lr_rate: where `cosine_with_min_lr` ends, as a part of the peak.
        num_decay_steps: steps over which `warmup_stable_decay` falls at the end.
        decay_fraction: the same as a part of the steps after the warm-up.
        decay_type: the form of that fall: `linear`, half a `cosine`, or `1-sqrt` (Hägele et al. 2024).
        min_lr_ratio: where `warmup_stable_decay` ends, as a part of the peak.
    """

    min_lr_rate: float = 0.1  # GPT-3 paper, appendix B
    num_decay_steps: int | None = None
    decay_fraction: float = 0.2  # Hägele et al. 2024
    decay_type: DecayType = "linear"
    min_lr_ratio: float = 0.0

    def problems(self, lr_scheduler_type: LRSchedulerType, warmup_steps: int, max_steps: int) -> list[str]:
        """Return a message for each value out of range, or that the schedule has no use for."""
        found, default, flag = [], SchedulerOptions(), "--lr_scheduler_kwargs"
        for name, schedule in SCHEDULES.items():
            value = getattr(self, name)
            if value != getattr(default, name) and schedule != lr_scheduler_type:
                found.append(f"{flag}: {name} is for --lr_scheduler_type {schedule}")
        for name in ("min_lr_rate", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{flag}: {name} must be 0 to 1, got {getattr(self, name)}")
        if not 0 < self.decay_fraction <= 1:
            found.append(f"{flag}: decay_fraction must be above 0 and at most 1, got {self.decay_fraction}")
        steps = self.num_decay_steps
        if steps is not None and not 0 < steps <= max_steps - warmup_steps:
            found.append(
                f"{flag}: num_decay_steps must be 1 to {max_steps - warmup_steps}, the steps after the warm-up, "
                f"got {steps}"
            )
        if steps is not None and self.decay_fraction != default.decay_fraction:
            found.append(f"{flag}: num_decay_steps and decay_fraction say the same: give one of them")
        if self.decay_type not in get_args(DecayType):
            found.append(f"{flag}: decay_type must be {', '.join(get_args(DecayType))}, got {self.decay_type}")
        return found
