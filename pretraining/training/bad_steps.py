"""Steps that go wrong: a loss or gradient that is not finite, and a loss far above those before it."""

import math
from dataclasses import dataclass, field
from textwrap import shorten

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer

from pretraining.data.packed_rows import num_targets
from pretraining.data.row_order import StepSplit
from pretraining.data.training_data import TrainingData
from pretraining.distributed.processes import is_sharded
from pretraining.records.metrics import finite
from pretraining.training.step import StepResult

# OLMo-core's SkipStepOptimizer (Allen Institute for AI, 2024): six standard deviations above the mean of the last 128
# losses, once there are half as many.
WINDOW = 128
DEVIATIONS = 6.0
SHOWN_TOKENS, SHOWN_ROWS = 32, 8

FINE, NOT_FINITE, SPIKE = "fine", "not_finite", "loss_spike"


@dataclass
class BadSteps:
    """
    Find steps that go wrong, on each process alike, from what all of them know.

    Args:
        skip_loss_spikes: a spike's update is not applied.
        has_scaler: of fp16. An overflowing gradient is normal then: the scaler skips the update, and scales less.

    Attributes:
        recent: the losses of the last steps, spikes included, so that a higher level becomes the usual one.
        not_finite_in_a_row: how many steps up to the last one had a loss or gradient that is not finite.
        verdict: on the last step.
        deviations: how many standard deviations its loss was above the mean of those before it.
    """

    skip_loss_spikes: bool = False
    has_scaler: bool = False
    recent: list[float] = field(default_factory=list)
    not_finite_in_a_row: int = 0
    verdict: str = FINE
    deviations: float = 0.0

    def judge(self, result: StepResult) -> bool:
        """Judge a step. Return True if its update may be applied; fp16's scaler may still leave it out."""
        self.verdict, self.deviations = FINE, 0.0
        if not math.isfinite(result.loss) or not (self.has_scaler or math.isfinite(result.grad_norm)):
            self.verdict = NOT_FINITE
            self.not_finite_in_a_row += 1
            return False
        self.not_finite_in_a_row = 0
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


def suspect_micro_batches(
    result: StepResult,
    model: nn.Module,
    optimizer: Optimizer,
    micro_batches: list[dict],
    accelerator: Accelerator,
) -> list[int]:
    """
    Return the micro-batches of this process that may have made a result that is not finite: those whose own loss is
    not, or, if there is none on any process, those whose own gradients are not, which are computed once more. Return
    all of them where no process has whole gradients.
    """
    if not math.isfinite(result.loss):
        losses = result.losses[accelerator.process_index]
        return [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
    if is_sharded(accelerator):
        return list(range(len(micro_batches)))
    num_labels = sum(num_targets(inputs["labels"]) for inputs in micro_batches)
    found = []
    for index, inputs in enumerate(micro_batches):
        with accelerator.no_sync(model):
            accelerator.backward(model(**inputs, num_items_in_batch=num_labels, use_cache=False).loss)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not all(gradient.isfinite().all() for gradient in gradients):
            found.append(index)
        optimizer.zero_grad()
    return found


def describe_bad_step(
    step: int,
    result: StepResult,
    bad_steps: BadSteps,
    suspects: list[int],
    rows: list[torch.Tensor],
    data: TrainingData,
    split: StepSplit,
    seed: int,
) -> dict:
    """
    A line of events.jsonl. All processes have to ask.

    Args:
        step: counted from 1.
        suspects: numbers of micro-batches of this process.
        rows: its micro-batches.
    """
    losses = result.losses[split.process_index]
    mine = [
        {
            "process": split.process_index,
            "micro_batch": index,
            "loss": finite(losses[index] * split.num_processes * split.gradient_accumulation_steps),
            "rows": data.row_numbers(split, seed, step - 1, index),
            "texts": [shorten(text, 80) for text in data.tokenizer.batch_decode(rows[index][:, :SHOWN_TOKENS])],
        }
        for index in suspects
    ]
    is_left_out = bad_steps.verdict == NOT_FINITE or bad_steps.skip_loss_spikes
    return {
        "step": step,
        "event": bad_steps.verdict,
        "loss": finite(result.loss),
        "grad_norm": finite(result.grad_norm),
        "deviations": round(bad_steps.deviations, 2),
        "update": "left out" if is_left_out else "applied",
        "micro_batches": [each for described in gather_object([mine]) for each in described],
    }


def format_event(event: dict) -> str:
    """Return an event as a sentence."""
    if event["event"] != NOT_FINITE:
        what = (
            f"loss {event['loss']:.4f}, {event['deviations']} standard deviations above the mean of the last {WINDOW} "
            "at most"
        )
    else:
        what = f"{'loss' if event['loss'] is None else 'gradient'} not finite"
    places: dict[int, list] = {}
    for each in event["micro_batches"]:
        places.setdefault(each["process"], []).extend(each["rows"] or map(repr, each["texts"]))
    where = "; ".join(f"process {process}, rows {_first(rows)}" for process, rows in places.items())
    return (
        f"step {event['step']}: {what} ({where or 'on no process when computed again'}), its update {event['update']}"
    )


def _first(values: list) -> str:
    shown = ", ".join(map(str, values[:SHOWN_ROWS]))
    return f"{shown} and {len(values) - SHOWN_ROWS:,} more" if len(values) > SHOWN_ROWS else shown
