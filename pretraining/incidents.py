"""What is known of a step that went wrong, for people to look at: where it happened, and on which rows."""

from textwrap import shorten

import torch
from accelerate.utils import gather_object

from pretraining.anomalies import NOT_FINITE, WINDOW, Anomalies
from pretraining.metrics import finite
from pretraining.sources import TrainingData
from pretraining.step_split import StepSplit
from pretraining.steps import StepResult

SHOWN_TOKENS, SHOWN_ROWS = 32, 8


def describe(
    step: int,
    result: StepResult,
    anomalies: Anomalies,
    to_blame: list[int],
    rows: list[torch.Tensor],
    data: TrainingData,
    split: StepSplit,
    seed: int,
) -> dict:
    """
    A line of events.jsonl. All processes have to ask.

    Args:
        step: counted from 1.
        to_blame: numbers of micro-batches of this process.
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
        for index in to_blame
    ]
    is_left_out = anomalies.verdict == NOT_FINITE or anomalies.skip_loss_spikes
    return {
        "step": step,
        "event": anomalies.verdict,
        "loss": finite(result.loss),
        "grad_norm": finite(result.grad_norm),
        "deviations": round(anomalies.deviations, 2),
        "update": "left out" if is_left_out else "applied",
        "micro_batches": [each for described in gather_object([mine]) for each in described],
    }


def sentence(event: dict) -> str:
    """An event in a sentence."""
    if event["event"] != NOT_FINITE:
        what = (
            f"loss {event['loss']:.4f}, {event['deviations']} standard deviations above that of {WINDOW} steps before"
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
