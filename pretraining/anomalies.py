"""Steps that go wrong: a loss or gradient that is not finite, and a loss far above those before it."""

import math
from dataclasses import dataclass, field

import numpy as np

from pretraining.steps import StepResult

# OLMo-core's SkipStepOptimizer (Allen Institute for AI, 2024): six standard deviations above the mean of the last 128
# losses, once there are half as many.
WINDOW = 128
DEVIATIONS = 6.0

FINE, NOT_FINITE, SPIKE = "fine", "not_finite", "loss_spike"


@dataclass
class Anomalies:
    """
    Judges steps, on each process alike, from what all of them know.

    Args:
        skip_loss_spikes: a spike's update is not applied.
        has_scaler: of fp16. An overflowing gradient is normal then: the scaler skips the update, and scales less.

    Attributes:
        recent: the losses of the last steps, spikes included, so that a higher level becomes the usual one.
        in_a_row: how many steps up to the last one were not finite.
        verdict: on the last step.
        deviations: how many standard deviations its loss was above the mean of those before it.
    """

    skip_loss_spikes: bool
    has_scaler: bool = False
    recent: list[float] = field(default_factory=list)
    in_a_row: int = 0
    verdict: str = FINE
    deviations: float = 0.0

    def judge(self, result: StepResult) -> bool:
        """Judge a step. Whether its update is to be applied."""
        self.verdict, self.deviations = FINE, 0.0
        if not math.isfinite(result.loss) or not (self.has_scaler or math.isfinite(result.grad_norm)):
            self.verdict = NOT_FINITE
            self.in_a_row += 1
            return False
        self.in_a_row = 0
        if len(self.recent) >= WINDOW // 2:
            spread = np.std(self.recent, ddof=1)
            self.deviations = float((result.loss - np.mean(self.recent)) / spread) if spread else 0.0
        self.recent = [*self.recent, result.loss][-WINDOW:]
        if self.deviations > DEVIATIONS:
            self.verdict = SPIKE
        return self.verdict == FINE or not self.skip_loss_spikes

    def state(self) -> dict:
        """As JSON, for a checkpoint."""
        return {"recent": list(self.recent)}

    def load(self, state: dict) -> None:
        self.recent = state["recent"]
