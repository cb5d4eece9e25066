"""The schedule of a run: pure functions of the step, so that there is no state to save."""

import math
from dataclasses import dataclass
from typing import Any, assert_never

from torch.optim import Optimizer

from pretraining.optimization.options import LRSchedulerType, OptimOptions, SchedulerOptions

# Flags that say what the learning rate is at a step.
SCHEDULE_SETTINGS = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps")


@dataclass(frozen=True)
class Schedule:
    """
    The learning rate of all parameters, and the momentum and weight decay of those that have a schedule of these.

    Attributes:
        warmup_steps: steps of linear warm-up to the peak.
        max_steps: steps of the run.
    """

    lr_scheduler_type: LRSchedulerType
    warmup_steps: int
    max_steps: int
    options: SchedulerOptions = SchedulerOptions()
    optim_options: OptimOptions = OptimOptions()

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Schedule":
        """Return the schedule of the settings that an identity holds (`checkpoints/identity.py`)."""
        return cls(
            settings["lr_scheduler_type"],
            settings["warmup_steps"],
            settings["max_steps"],
            SchedulerOptions(**settings["lr_scheduler_kwargs"]),
            OptimOptions(**settings["optim_args"]),
        )

    def set(self, optimizer: Optimizer, step: int) -> float:
        """
        Set up the optimizer for `step` (from 0).

        Returns:
            The learning rate, of groups that have no factor of their own.
        """
        factor, learning_rate = self.learning_rate_factor(step), 0.0
        for group in optimizer.param_groups:
            learning_rate = group["peak_lr"] * factor
            group["lr"] = learning_rate * group["lr_factor"]
            if self.optim_options.scheduled_weight_decay:
                group["weight_decay"] = group["peak_weight_decay"] * factor
            if group.get("kind") == "muon":
                group["momentum"] = self.muon_momentum(step)
        return learning_rate

    def learning_rate_factor(self, step: int) -> float:
        """
        Return what to multiply the peak learning rate by at `step` (from 0).

        After a linear warm-up over `warmup_steps`:
            cosine_with_min_lr: half a cosine down to `min_lr_rate`
            cosine, linear: down to 0 at `max_steps`
            constant, constant_with_warmup: 1
            warmup_stable_decay: 1, then down to `min_lr_ratio` over the last steps (Hägele et al. 2024)
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        schedule, num_steps = self.lr_scheduler_type, max(1, self.max_steps - self.warmup_steps)
        progress = (step - self.warmup_steps) / num_steps
        if schedule == "cosine_with_min_lr":
            return _between(self.options.min_lr_rate, 0.5 * (1 + math.cos(math.pi * progress)))
        if schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if schedule == "linear":
            return 1 - progress
        if schedule == "constant" or schedule == "constant_with_warmup":
            return 1.0
        if schedule == "warmup_stable_decay":
            fraction = self.options.decay_fraction
            if self.options.num_decay_steps:
                fraction = self.options.num_decay_steps / num_steps
            is_stable = 1 - progress >= fraction
            return 1.0 if is_stable else _between(self.options.min_lr_ratio, self._decay((1 - progress) / fraction))
        assert_never(schedule)

    def _decay(self, remaining: float) -> float:
        """Return a factor that falls from 1 to 0 as the remaining part of the decay does."""
        if self.options.decay_type == "linear":
            return remaining
        if self.options.decay_type == "cosine":
            return 0.5 * (1 - math.cos(math.pi * remaining))
        if self.options.decay_type == "1-sqrt":
            return 1 - math.sqrt(1 - remaining)
        assert_never(self.options.decay_type)

    def muon_momentum(self, step: int) -> float:
        """Return Muon's momentum at `step` (from 0), which rises linearly over its first steps."""
        options = self.optim_options
        if step >= options.muon_momentum_warmup_steps:
            return options.muon_momentum
        part = step / options.muon_momentum_warmup_steps
        return options.muon_momentum_start + part * (options.muon_momentum - options.muon_momentum_start)


def is_same_schedule(before: dict[str, Any], now: dict[str, Any], num_steps: int) -> bool:
    """
    Return True if the learning rate is the same in each of the first `num_steps` steps.

    Args:
        before, now: settings as an identity has them, `before` read from a file that may hold anything.
    """
    try:
        schedules = [Schedule.of(settings) for settings in (before, now)]
        factors = ([each.learning_rate_factor(step) for step in range(num_steps)] for each in schedules)
        return next(factors) == next(factors)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, AssertionError):
        return False


def _between(floor: float, factor: float) -> float:
    return floor + (1 - floor) * factor
