"""The loss on the validation rows. (Which documents those are: data/validation_split.py.)"""

import math

import torch
from accelerate import Accelerator
from torch import nn

from pretraining.data.packed_rows import ModelInputs, PackedDataset, num_targets


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: PackedDataset,
    accelerator: Accelerator,
    batch_size: int,
    num_rows: int | None,
    model_inputs: ModelInputs,
) -> dict[str, float]:
    """
    Loss over a fixed set of rows, the first `num_rows` of `dataset` or all of them, shared out over the processes;
    every row counts once, whatever the number of processes and the size of a batch.

    Args:
        model: as `accelerator.prepare` returned it.
        model_inputs: makes the model's arguments of rows.

    Returns:
        eval_loss: mean cross-entropy in nats per token.
        eval_perplexity: exp(eval_loss).
        eval_bits_per_byte: the loss per byte of text instead, which can be compared between tokenizers:
            eval_loss / ln 2 * tokens / bytes of the validation text. The tokens between documents count, with no
            bytes of their own.
    """
    num_rows = min(len(dataset), num_rows or len(dataset))
    rows_per_round = batch_size * accelerator.num_processes
    sums = []  # loss and tokens of each round, read at the end only: to read is to wait for the device
    model.eval()
    for start in range(0, num_rows, rows_per_round):
        # All processes take part in every round, with rows that count for nothing once there are no more: a sharded
        # model needs all of them for a forward pass.
        first = start + accelerator.process_index * batch_size
        rows = [min(row, num_rows - 1) for row in range(first, first + batch_size)]
        inputs = model_inputs(dataset.__getitems__(rows))
        inputs["labels"] = inputs["labels"].clone()
        inputs["labels"][max(0, num_rows - first) :] = -100
        loss_sum = model(**inputs, num_items_in_batch=1, use_cache=False, skip_logits=True).loss
        sums.append(torch.stack([loss_sum, num_targets(inputs["labels"])]))
    model.train()
    everyone = accelerator.gather(torch.stack(sums).flatten()).view(-1, 2).tolist()
    loss_sum, tokens = (math.fsum(values) for values in zip(*everyone, strict=True))
    loss = loss_sum / tokens
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(min(loss, 700.0)),  # exp(710) overflows a float
        "eval_bits_per_byte": loss / math.log(2) / dataset.bytes_per_token,
    }
