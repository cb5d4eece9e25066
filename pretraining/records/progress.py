"""How far a run is: its step and its clock."""

import time
from dataclasses import dataclass

from accelerate import Accelerator
from transformers import PreTrainedConfig

from pretraining import hardware


@dataclass
class Progress:
    """
    How far a run is.

    Attributes:
        tokens_per_step: of all processes together.
        step: optimizer steps done.
        elapsed_before: seconds that earlier starts of the program took.
        flops_per_token: see `hardware.flops_per_token`.
        peak_flops: of all devices together, or None if it is not known.
    """

    tokens_per_step: int
    flops_per_token: int
    peak_flops: float | None
    step: int = 0
    elapsed_before: float = 0.0

    @classmethod
    def of(
        cls,
        config: PreTrainedConfig,
        tokens_per_step: int,
        num_parameters: int,
        block_size: int,
        accelerator: Accelerator,
    ) -> "Progress":
        """Return the progress of a run at its beginning."""
        peak_flops = hardware.peak_flops(accelerator.device)
        return cls(
            tokens_per_step=tokens_per_step,
            flops_per_token=hardware.flops_per_token(num_parameters, config.n_layer, config.n_embd, block_size),
            peak_flops=peak_flops and peak_flops * accelerator.num_processes,
        )

    def __post_init__(self):
        self._started = time.perf_counter()
        self.restart_interval()

    @property
    def tokens(self) -> int:
        return self.step * self.tokens_per_step

    @property
    def elapsed_seconds(self) -> float:
        return self.elapsed_before + time.perf_counter() - self._started

    def restart_interval(self) -> None:
        """Time steps from here on: evaluations, samples and checkpoints are not training speed."""
        self._interval_started, self._interval_step = time.perf_counter(), self.step

    def speed(self) -> dict[str, float]:
        """
        Since the last call or `restart_interval`: tokens per second, seconds per step, and the model FLOPs
        utilisation, `tokens_per_second * flops_per_token / peak_flops`, where the device's peak is known.
        """
        step_seconds = (time.perf_counter() - self._interval_started) / (self.step - self._interval_step)
        tokens_per_second = self.tokens_per_step / step_seconds
        self.restart_interval()
        speed = {"tokens_per_second": round(tokens_per_second, 1), "step_seconds": round(step_seconds, 5)}
        if self.peak_flops:
            speed["mfu"] = round(tokens_per_second * self.flops_per_token / self.peak_flops, 4)
        return speed


def duration(hours: float) -> str:
    """`42 seconds`, `3.4 minutes` or `17.2 hours`."""
    if hours < 2:
        return f"{hours * 60:.1f} minutes" if hours * 60 >= 2 else f"{hours * 3600:.0f} seconds"
    return f"{hours:.1f} hours"
